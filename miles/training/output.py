"""The model directory that a training step leaves behind."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch.distributed as dist

from miles.runs.files import disk_errors
from miles.training.backend import TrainerBackend


def write_model(trainer: TrainerBackend, output: Path) -> None:
    """Write `output/model` in Hugging Face format, whole or not at all. Collective."""
    partial, final = output / "model.partial", output / "model"
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
    dist.barrier()
    with disk_errors(partial):
        trainer.save_hf(partial)
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
    dist.barrier()
