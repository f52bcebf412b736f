"""Metrics in other people's tools: TensorBoard event files and Weights & Biases runs.

Both repeat what `metrics.jsonl` already holds; nothing in Miles reads them back. The packages are extras:
their absence is reported by `check_trackers` before anything starts, and they are imported when first needed.
"""

from __future__ import annotations

import importlib.util
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miles.config.schema import TrackingSection
from miles.errors import ConfigError
from miles.runs.paths import RunPaths

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


def check_trackers(section: TrackingSection) -> None:
    """Raise `ConfigError` naming the pip extra when a tracker is asked for and its package is not installed.

    Imports nothing heavy, so that it can be asked on a login node.
    """
    wanted = {
        "tensorboard": ("tracking.tensorboard = true", section.tensorboard),
        "wandb": (f"tracking.wandb_project = {section.wandb_project!r}", section.wandb_project is not None),
    }
    for package, (setting, asked) in wanted.items():
        if asked and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"{setting} needs the package '{package}', which is not installed",
                fix=f"pip install 'miles-hpc[{package}]', or remove the setting",
            )


class Trackers:
    """The trackers that `section` asks for; without any, every method does nothing.

    One process of a run holds one. The stages of a run (its sft and rl steps) become TensorBoard runs beside
    each other, and name prefixes with a step axis of their own in the one Weights & Biases run.
    """

    def __init__(self, paths: RunPaths, section: TrackingSection, run_name: str) -> None:
        """Raises `ConfigError` when a package is missing or Weights & Biases refuses the run."""
        check_trackers(section)
        self._tensorboard = _TensorBoard(paths) if section.tensorboard else None
        self._wandb = None
        if section.wandb_project is not None:
            self._wandb = _Wandb(paths, section.wandb_project, run_name)

    def log(self, stage: str, step: int, values: dict[str, float]) -> None:
        """Record one step's values; a step that is logged again after a resume replaces the earlier one."""
        if self._tensorboard is not None:
            self._tensorboard.log(stage, step, values)
        if self._wandb is not None:
            self._wandb.log(stage, step, values)

    def close(self) -> None:
        """Flush and end; waits for an upload in progress."""
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.close()


class _TensorBoard:
    def __init__(self, paths: RunPaths) -> None:
        self._directory = paths.root / "tensorboard"
        self._writers: dict[str, SummaryWriter] = {}

    def log(self, stage: str, step: int, values: dict[str, float]) -> None:
        writer = self._writers.get(stage)
        if writer is None:
            from torch.utils.tensorboard import SummaryWriter

            # purge_step hides what an interrupted attempt logged from this step on.
            writer = SummaryWriter(log_dir=str(self._directory / stage), purge_step=step)
            self._writers[stage] = writer
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()


class _Wandb:
    def __init__(self, paths: RunPaths, project: str, run_name: str) -> None:
        import wandb

        try:
            self._run: Any = wandb.init(
                project=project, name=run_name, dir=str(paths.root), id=_wandb_run_id(paths), resume="allow"
            )
        except wandb.errors.Error as error:
            raise ConfigError(
                f"Weights & Biases refused project {project!r}: {error}",
                fix="run `wandb login`, set WANDB_MODE=offline, or remove tracking.wandb_project",
            ) from error
        self._stages: set[str] = set()

    def log(self, stage: str, step: int, values: dict[str, float]) -> None:
        if stage not in self._stages:
            self._run.define_metric(f"{stage}/step")
            self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
            self._stages.add(stage)
        self._run.log({f"{stage}/{name}": value for name, value in values.items()} | {f"{stage}/step": step})

    def close(self) -> None:
        self._run.finish()


def tracker_ids(paths: RunPaths) -> dict[str, str]:
    """Under which id each tracker knows this run, by the tracker's name; only those that were used."""
    file = _wandb_id_file(paths)
    return {"wandb": file.read_text().strip()} if file.exists() else {}


def _wandb_run_id(paths: RunPaths) -> str:
    """The id under which every stage and attempt of this run directory continues one Weights & Biases run."""
    file = _wandb_id_file(paths)
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(secrets.token_hex(8))
    return tracker_ids(paths)["wandb"]


def _wandb_id_file(paths: RunPaths) -> Path:
    return paths.root / "wandb" / "miles-run-id"
