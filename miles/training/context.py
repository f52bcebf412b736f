"""What every step that runs on ranks is given: where it is, who it is, how it is told to stop."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from miles.config.schema import Backend, ModelSection, RlStep, TrainSection
from miles.runs.claim import Fence
from miles.runs.paths import RunPaths
from miles.training.backend import TrainerBackend
from miles.training.distributed import StopRequest


@dataclass(frozen=True, slots=True)
class Context:
    """One step in one rank."""

    name: str
    seed: int
    run_name: str
    paths: RunPaths
    device: torch.device
    stop: StopRequest
    attempt: int
    fence: Fence
    engines_file: Path
    """Where the engines are (`miles.runs.endpoints`)."""

    @property
    def is_rank_zero(self) -> bool:
        return dist.get_rank() == 0

    @property
    def output(self) -> Path:
        """The directory of this step's outputs."""
        return self.paths.step(self.name)


def build_trainer(model: ModelSection, train: TrainSection, context: Context) -> TrainerBackend:
    """The configured backend with the weights of a step's model. Collective."""
    return open_model(model, train, context.paths, context.seed)


def open_model(model: ModelSection, train: TrainSection, paths: RunPaths, seed: int) -> TrainerBackend:
    """As `build_trainer`, where no step is being run. Collective."""
    model_dir = paths.resolve(model.path)
    if train.backend is Backend.MEGATRON:
        from miles.training.megatron.backend import MegatronBackend

        return MegatronBackend(model_dir, train, seed)
    from miles.training.fsdp.backend import FsdpBackend

    return FsdpBackend(model_dir, train, seed, trust_remote_code=model.trust_remote_code)


def engine_dtype(step: RlStep) -> torch.dtype:
    """Type of the engines' weights: engine.dtype, else the trainer's."""
    return getattr(torch, step.engine.dtype or step.train.dtype)
