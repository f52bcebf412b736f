"""A checkpoint as a Hugging Face model directory: `python -m miles.training.export --run-dir D --stage S --step N
--output DIR`.

One rank of its own, however many trained: it builds the stage's trainer with all parallel sizes 1, loads the
checkpoint's trainer state into it and writes the model. Changes nothing of the run, which may be running; so it stays
off the run's GPUs unless told otherwise. Which checkpoint is meant is `miles.workflow.saved`'s to say.
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

from miles.config.load import load_resolved
from miles.config.schema import RlStep, SftStep, TrainSection
from miles.errors import ConfigError, RunError, did_you_mean
from miles.runs.checkpoints import CheckpointStore
from miles.runs.claim import Fence
from miles.runs.failures import exit_with_failures
from miles.runs.files import disk_errors, flush_tree, sync_directory
from miles.runs.manifest import DamagedError
from miles.runs.paths import RunPaths
from miles.training.backend import TrainerBackend
from miles.training.checkpointing import TRAINER_STATE
from miles.training.context import open_model
from miles.training.distributed import choose_device, process_group
from miles.training.worker import quieten_libraries

_ONE_RANK = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
"""torch.distributed's environment; port 0 is a free one, for nobody else needs to know it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--stage", required=True)
    parser.add_argument("--step", type=int, required=True)
    parser.add_argument("--output", type=Path, required=True, help="directory to write; must not exist")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="cpu")
    arguments = parser.parse_args()

    quieten_libraries()
    os.environ.update(_ONE_RANK)
    export(RunPaths(arguments.run_dir), arguments.stage, arguments.step, arguments.output, arguments.device)


def export(paths: RunPaths, stage: str, step: int, output: Path, device: str) -> None:
    """Write the model of a checkpoint to `output`, completely or not at all.

    Raises RunError when `output` exists, when there is no such checkpoint or it is damaged, and where the disk refuses;
    ConfigError when the run has no such stage. Sets up the default process group, of one rank, and ends it.
    """
    _require_absent(output)
    config = load_resolved(paths.root)
    section = config.steps.get(stage)
    if not isinstance(section, SftStep | RlStep):
        stages = [name for name, other in config.steps.items() if isinstance(other, SftStep | RlStep)]
        raise ConfigError(
            f"run '{config.name}' has no step '{stage}' that trains.{did_you_mean(stage, stages)}",
            fix=f"name one of: {', '.join(stages)}",
        )
    state = _intact_state(paths, stage, step)
    train = alone(section.train, device)
    with process_group(choose_device(train.device)):
        trainer = open_model(section.model, train, paths, config.seed)
        trainer.load_state(state)
        _write(trainer, output)


def alone(train: TrainSection, device: str) -> TrainSection:
    """The section of a trainer of the same kind on one rank."""
    return train.model_copy(
        update={
            "device": device,
            "tensor_parallel_size": 1,
            "pipeline_parallel_size": 1,
            "expert_parallel_size": 1,
        }
    )


def _intact_state(paths: RunPaths, stage: str, step: int) -> Path:
    """The directory of the trainer's files, each of which is what was written. Damage elsewhere is no matter here."""
    store = CheckpointStore(paths, stage, Fence(paths, None))
    store.require(step)
    damage = [line for line in store.damage(step) if line.startswith(f"{TRAINER_STATE}/")]
    if damage:
        raise DamagedError(
            f"the checkpoint of step {step} is damaged: {'; '.join(damage)}",
            fix="export another one: `miles checkpoints` lists them",
        )
    return store.path(step) / TRAINER_STATE


def _write(trainer: TrainerBackend, output: Path) -> None:
    """Write beside the output, flush, rename."""
    partial = output.with_name(f".{output.name}.{os.getpid()}.partial")
    try:
        with disk_errors(output):
            output.parent.mkdir(parents=True, exist_ok=True)
            trainer.save_hf(partial)
            flush_tree(partial)
            _require_absent(output)
            partial.rename(output)
            sync_directory(output.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _require_absent(output: Path) -> None:
    if output.exists():
        raise RunError(f"{output} exists", fix="name a directory that does not exist yet")


if __name__ == "__main__":
    exit_with_failures(main)
