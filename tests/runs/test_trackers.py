"""The trackers with the real libraries: what was logged is read back from what they wrote."""

from __future__ import annotations

import importlib.util
import json
import struct
import time
from pathlib import Path
from typing import Any

import pytest

from miles.config.schema import TrackingSection
from miles.errors import ConfigError
from miles.runs.paths import RunPaths
from miles.runs.trackers import Trackers, check_trackers


def test_without_trackers_nothing_is_written(tmp_path: Path) -> None:
    trackers = Trackers(RunPaths(tmp_path), TrackingSection(), "quiet")
    trackers.log("train", 1, {"loss": 0.5})
    trackers.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("package", "section"),
    [("tensorboard", TrackingSection(tensorboard=True)), ("wandb", TrackingSection(wandb_project="sorting"))],
)
def test_missing_package_names_the_extra_before_anything_is_written(
    package: str, section: TrackingSection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find_spec(name))
    with pytest.raises(ConfigError, match=f"'{package}', which is not installed") as error:
        check_trackers(section)
    assert f"miles-hpc[{package}]" in str(error.value)
    with pytest.raises(ConfigError):
        Trackers(RunPaths(tmp_path), section, "run")
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_holds_each_stage_as_a_run(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    trackers = Trackers(RunPaths(tmp_path), TrackingSection(tensorboard=True), "sorting")
    trackers.log("warmup", 1, {"loss": 2.5})
    trackers.log("train", 1, {"loss": 0.5, "reward/mean": 0.25})
    trackers.log("train", 2, {"loss": 0.25, "reward/mean": 0.75})
    trackers.close()

    assert _scalars(tmp_path / "tensorboard" / "warmup") == {"loss": [(1, 2.5)]}
    assert _scalars(tmp_path / "tensorboard" / "train") == {
        "loss": [(1, 0.5), (2, 0.25)],
        "reward/mean": [(1, 0.25), (2, 0.75)],
    }


def test_tensorboard_hides_steps_that_a_resumed_attempt_repeats(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    for losses in ({1: 3.0, 2: 2.0, 3: 1.0}, {2: 2.25, 3: 1.25}):
        trackers = Trackers(RunPaths(tmp_path), TrackingSection(tensorboard=True), "resumed")
        for step, loss in losses.items():
            trackers.log("train", step, {"loss": loss})
        trackers.close()

    assert _scalars(tmp_path / "tensorboard" / "train")["loss"] == [(1, 3.0), (2, 2.25), (3, 1.25)]


def test_wandb_offline_holds_stages_with_their_own_steps_in_one_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for stage, loss in (("warmup", 2.5), ("train", 0.5)):
        trackers = Trackers(RunPaths(tmp_path), TrackingSection(wandb_project="sorting"), "sorting")
        trackers.log(stage, 1, {"loss": loss})
        trackers.close()

    first, second = sorted((tmp_path / "wandb").glob("offline-run-*"), key=lambda path: path.stat().st_ctime)
    assert first.name.rpartition("-")[2] == second.name.rpartition("-")[2]
    assert _wandb_history(first) == [{"warmup/loss": 2.5, "warmup/step": 1}]
    assert _wandb_history(second) == [{"train/loss": 0.5, "train/step": 1}]


def _scalars(directory: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def _wandb_history(directory: Path) -> list[dict[str, float]]:
    """The logged rows of an offline run, without wandb's own `_` keys.

    wandb's service process writes the file on its own time, and the record `exit` last.
    """
    (file,) = directory.glob("*.wandb")
    while True:
        records = _wandb_records(file.read_bytes())
        if records and records[-1].WhichOneof("record_type") == "exit":
            break
        time.sleep(0.1)
    histories = [record.history for record in records if record.WhichOneof("record_type") == "history"]
    rows = [{"/".join(item.nested_key): json.loads(item.value_json) for item in row.item} for row in histories]
    return [{name: value for name, value in row.items() if not name.startswith("_")} for row in rows]


def _wandb_records(data: bytes) -> list[Any]:
    """A LevelDB log of one block: 7 bytes of header, then records of crc (4), length (2), type (1), message."""
    from wandb.proto.wandb_internal_pb2 import Record

    records, offset = [], 7
    while offset + 7 <= len(data):
        end = offset + 7 + struct.unpack_from("<H", data, offset + 4)[0]
        if end > len(data):
            break
        records.append(Record.FromString(data[offset + 7 : end]))
        offset = end
    return records
