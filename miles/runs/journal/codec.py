"""The journal's file format: HDF5 with one table per kind of record and one array per kind of token data.

Owns the layout and its version (docs/journal.md describes it for readers). A batch is the same as a segment in which
every sample begins at its start. Names, checksums and durability belong to `miles.runs.journal.files`.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, get_args

import h5py
import numpy as np

from miles.data.sample import FinishReason, Prompt
from miles.errors import DataError, RunError, did_you_mean
from miles.runs.files import disk_errors
from miles.runs.journal.columns import (
    FILTERS,
    floats,
    integers,
    pack_text,
    runs,
    spans,
    table,
    unpack_text,
    unrun,
    write_array,
)
from miles.runs.journal.deltas import FindPrompt, Opening, Replay, SampleDelta, whole_group
from miles.runs.journal.records import Batch, Dropped, DropReason
from miles.runs.manifest import DamagedError

FORMAT = "miles rollout journal"
VERSION = 1

_FINISH: tuple[FinishReason | None, ...] = (None, FinishReason.STOP, FinishReason.LENGTH, FinishReason.ABORT)
_DROP: tuple[DropReason, ...] = get_args(DropReason)


@dataclass(frozen=True, slots=True)
class Content:
    """What one file holds."""

    step: int
    openings: list[Opening]
    deltas: list[SampleDelta]
    dropped: list[Dropped]
    cursor: int | None = None
    """Of a batch; None: a segment."""
    quarantined_total: int = 0


def batch_content(batch: Batch) -> Content:
    """The content of a batch's file."""
    parts = [whole_group(group) for group in batch.groups]
    parts += [whole_group(group, carried=True) for group in batch.carried]
    positions = [opening.position for opening, _ in parts]
    assert len(set(positions)) == len(positions), "a position is trained on or carried, once"
    return Content(
        step=batch.step,
        openings=[opening for opening, _ in parts],
        deltas=list(chain.from_iterable(deltas for _, deltas in parts)),
        dropped=batch.dropped,
        cursor=batch.cursor,
        quarantined_total=batch.quarantined_total,
    )


def content_batch(content: Content, find: FindPrompt) -> Batch:
    """The batch of a batch's file. Raises DataError as `find` does."""
    assert content.cursor is not None
    replay = Replay(find)
    for opening in content.openings:
        replay.open(opening)
    for delta in content.deltas:
        replay.apply(delta)
    groups = replay.finish()
    return Batch(
        step=content.step,
        groups=[group for opening, group in groups if not opening.carried],
        carried=[group for opening, group in groups if opening.carried],
        dropped=content.dropped,
        cursor=content.cursor,
        quarantined_total=content.quarantined_total,
    )


def write_batch(path: Path, batch: Batch) -> None:
    """Write a batch to a file of its own, flushed to the disk. Raises RunError when the disk refuses."""
    with disk_errors(path), path.open("wb") as file:
        file.write(encode(batch_content(batch)))
        file.flush()
        os.fsync(file.fileno())


def read_batch(path: Path, prompts: Mapping[str, Prompt] | None) -> Batch:
    """The batch that `write_batch` wrote. `prompts` None: prompts have their tokens and no text.

    The caller has verified the file's checksum. Raises DamagedError when it cannot be read, DataError when a prompt
    is not among `prompts` or has other tokens.
    """
    with disk_errors(path, "read"):
        data = path.read_bytes()
    content = decode(data, str(path))
    if content.cursor is None:
        raise DamagedError(f"{path} is a segment of the journal, not a batch")
    return content_batch(content, prompt_finder(prompts))


def prompt_finder(prompts: Mapping[str, Prompt] | None) -> FindPrompt:
    """Look prompts up by id and compare their tokens; without `prompts` they are made from what the journal has."""

    def find(id: str, tokens: list[int]) -> Prompt:
        if prompts is None:
            return Prompt(id, tokens, text="")
        fix = "put the data and the tokenizer back as they were, or start over with --fresh"
        if (prompt := prompts.get(id)) is None:
            raise DataError(
                f"the journal holds prompt '{id}', which is not in the data.{did_you_mean(id, prompts)}", fix=fix
            )
        if prompt.tokens != tokens:
            was, now = len(tokens), len(prompt.tokens)
            raise DataError(f"prompt '{id}' had other tokens when it was journaled ({was}, now {now})", fix=fix)
        return prompt

    return find


def encode(content: Content, filters: Mapping[str, Any] = FILTERS) -> memoryview:
    """The bytes of the file; the same content gives the same bytes."""
    buffer = io.BytesIO()
    with h5py.File(buffer, "w", libver=("v110", "v110")) as file:
        file.attrs["format"] = FORMAT
        file.attrs["version"] = VERSION
        file.attrs["step"] = content.step
        if content.cursor is not None:
            file.attrs["cursor"] = content.cursor
            file.attrs["quarantined_total"] = content.quarantined_total
        arrays = _group_arrays(content.openings) | _dropped_arrays(content.dropped)
        arrays |= _sample_arrays(content.deltas) | _token_arrays(content.deltas)
        for name, values in arrays.items():
            write_array(file, name, values, filters)
        names = list(dict.fromkeys(chain.from_iterable(delta.reward_parts for delta in content.deltas)))
        file.attrs["reward_parts"] = json.dumps(names)
        write_array(file, "reward_parts", _reward_parts(content.deltas, names), filters)
        _write_routes(file, content.deltas, filters)
    return buffer.getbuffer()


def _group_arrays(openings: list[Opening]) -> dict[str, np.ndarray]:
    ids, id_bytes = pack_text(opening.prompt_id for opening in openings)
    prompt_tokens = [opening.prompt_tokens for opening in openings]
    columns = {
        "position": integers(opening.position for opening in openings),
        "epoch": integers(opening.epoch for opening in openings),
        "born": integers(opening.born for opening in openings),
        "carried": integers(opening.carried for opening in openings),
        "prompt_id_bytes": id_bytes,
        "prompt_tokens": integers(map(len, prompt_tokens)),
    }
    tokens = table({"token": integers(chain.from_iterable(prompt_tokens))})["token"]
    return {"groups": table(columns), "prompt_ids": ids, "prompt_tokens": tokens}


def _dropped_arrays(dropped: list[Dropped]) -> dict[str, np.ndarray]:
    ids, id_bytes = pack_text(each.prompt_id for each in dropped)
    details, detail_bytes = pack_text(each.detail for each in dropped)
    columns = {
        "position": integers(each.position for each in dropped),
        "reason": integers(_DROP.index(each.reason) for each in dropped),
        "prompt_id_bytes": id_bytes,
        "detail_bytes": detail_bytes,
    }
    return {"dropped": table(columns), "dropped_ids": ids, "dropped_details": details}


def _sample_arrays(deltas: list[SampleDelta]) -> dict[str, np.ndarray]:
    text, text_bytes = pack_text(delta.text for delta in deltas)
    routes = [delta.routed_experts for delta in deltas]
    columns = {
        "position": integers(delta.position for delta in deltas),
        "index": integers(delta.index for delta in deltas),
        "seed": integers(delta.seed for delta in deltas),
        "start": integers(delta.start for delta in deltas),
        "tokens": integers(len(delta.tokens) for delta in deltas),
        "rows_start": integers(delta.rows_start for delta in deltas),
        "rows": integers(-1 if rows is None else len(rows) for rows in routes),
        "text_start": integers(delta.text_start for delta in deltas),
        "text_bytes": text_bytes,
        "finish_reason": integers(_FINISH.index(delta.finish_reason) for delta in deltas),
        "reward_parts": integers(len(delta.reward_parts) for delta in deltas),
        "graded": integers(delta.reward is not None for delta in deltas),
        "reward": np.array([0.0 if delta.reward is None else delta.reward for delta in deltas], np.float64),
    }
    return {"samples": table(columns), "text": text}


def _token_arrays(deltas: list[SampleDelta]) -> dict[str, np.ndarray]:
    count = sum(len(delta.tokens) for delta in deltas)
    for delta in deltas:
        lengths = {len(delta.tokens), len(delta.log_probs), len(delta.loss_mask), len(delta.weight_versions)}
        assert len(lengths) == 1, f"per-token lists of {lengths} elements at position {delta.position}"
    mask = integers(chain.from_iterable(delta.loss_mask for delta in deltas), count)
    versions = integers(chain.from_iterable(delta.weight_versions for delta in deltas), count)
    tokens = integers(chain.from_iterable(delta.tokens for delta in deltas), count)
    return {
        "tokens": table({"token": tokens})["token"],
        "log_probs": floats([delta.log_probs for delta in deltas], count),
        "loss_mask": runs(mask),
        "weight_versions": runs(versions),
    }


def _reward_parts(deltas: list[SampleDelta], names: list[str]) -> np.ndarray:
    number = {name: i for i, name in enumerate(names)}
    pairs = [pair for delta in deltas for pair in delta.reward_parts.items()]
    values = np.array([value for _, value in pairs], np.float64)
    return table({"name": integers(number[name] for name, _ in pairs), "value": values})


def _write_routes(file: h5py.File, deltas: list[SampleDelta], filters: Mapping[str, Any]) -> None:
    parts = [delta.routed_experts for delta in deltas if delta.routed_experts is not None]
    if parts:
        kinds = {(rows.dtype, rows.shape[1:]) for rows in parts}
        assert len(kinds) == 1, f"routes of more than one model: {kinds}"
        write_array(file, "routed_experts", np.concatenate(parts), filters)


def decode(data: bytes, name: str) -> Content:
    """The content of a file. `name` is for errors.

    Raises DamagedError when it is not what `encode` makes, RunError when a newer Miles wrote it.
    """
    try:
        with h5py.File(io.BytesIO(data), "r") as file:
            if file.attrs["format"] != FORMAT:
                raise DamagedError(f"{name} is no file of the rollout journal")
            if (version := int(file.attrs["version"])) > VERSION:
                raise RunError(
                    f"{name} has version {version} of the journal's format; this Miles reads up to {VERSION}",
                    fix="continue the run with the newer Miles that wrote it",
                )
            return _content(file)
    except (OSError, KeyError, ValueError, IndexError, RuntimeError, TypeError) as error:
        raise DamagedError(f"{name} cannot be read: {error}") from error


def _content(file: h5py.File) -> Content:
    cursor = file.attrs.get("cursor")
    return Content(
        step=int(file.attrs["step"]),
        openings=_openings(file),
        deltas=_deltas(file),
        dropped=_dropped(file),
        cursor=None if cursor is None else int(cursor),
        quarantined_total=int(file.attrs.get("quarantined_total", 0)),
    )


def _openings(file: h5py.File) -> list[Opening]:
    rows, tokens = file["groups"][:], file["prompt_tokens"][:]
    ids = unpack_text(file["prompt_ids"][:], rows["prompt_id_bytes"])
    return [
        Opening(position, epoch, born, id, tokens[start:end].tolist(), bool(carried))
        for position, epoch, born, carried, id, (start, end) in zip(
            *(rows[name].tolist() for name in ("position", "epoch", "born", "carried")),
            ids,
            spans(rows["prompt_tokens"]),
            strict=True,
        )
    ]


def _dropped(file: h5py.File) -> list[Dropped]:
    rows = file["dropped"][:]
    ids = unpack_text(file["dropped_ids"][:], rows["prompt_id_bytes"])
    details = unpack_text(file["dropped_details"][:], rows["detail_bytes"])
    reasons = [_DROP[reason] for reason in rows["reason"].tolist()]
    return list(map(Dropped, rows["position"].tolist(), ids, reasons, details))


def _deltas(file: h5py.File) -> list[SampleDelta]:
    rows = file["samples"][:]
    tokens, log_probs = file["tokens"][:], file["log_probs"][:]
    mask, versions = unrun(file["loss_mask"][:]), unrun(file["weight_versions"][:])
    routes = file["routed_experts"][:] if "routed_experts" in file else None
    texts = unpack_text(file["text"][:], rows["text_bytes"])
    names, parts = json.loads(file.attrs["reward_parts"]), file["reward_parts"][:]
    token_spans, part_spans = spans(rows["tokens"]), spans(rows["reward_parts"])
    row_spans = spans(np.maximum(rows["rows"].astype(np.int64), 0))
    deltas = []
    for i, row in enumerate(rows):
        a, b = token_spans[i]
        first, last = row_spans[i]
        own = parts[slice(*part_spans[i])]
        deltas.append(
            SampleDelta(
                position=int(row["position"]),
                index=int(row["index"]),
                seed=int(row["seed"]),
                start=int(row["start"]),
                tokens=tokens[a:b].tolist(),
                log_probs=log_probs[a:b].tolist(),
                loss_mask=mask[a:b].tolist(),
                weight_versions=versions[a:b].tolist(),
                rows_start=int(row["rows_start"]),
                routed_experts=None if routes is None or row["rows"] < 0 else routes[first:last],
                text_start=int(row["text_start"]),
                text=texts[i],
                finish_reason=_FINISH[row["finish_reason"]],
                reward=float(row["reward"]) if row["graded"] else None,
                reward_parts={names[n]: v for n, v in zip(own["name"].tolist(), own["value"].tolist(), strict=True)},
            )
        )
    return deltas
