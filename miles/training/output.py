"""The model directory that a training step leaves behind."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch.distributed as dist

from miles.errors import RunError
from miles.runs.files import disk_errors, flush_tree, sync_directory
from miles.training.backend import TrainerBackend
from miles.training.distributed import together


def write_model(trainer: TrainerBackend, output: Path) -> None:
    """Write `output/model` in Hugging Face format, whole or not at all. Collective."""
    partial, final = output / "model.partial", output / "model"
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
    dist.barrier()
    with disk_errors(partial):
        trainer.save_hf(partial)
    dist.barrier()
    with together(RunError):
        if dist.get_rank() == 0:
            # A model that is said to be done must be whole after a power cut as well.
            with disk_errors(final):
                flush_tree(partial)
                shutil.rmtree(final, ignore_errors=True)
                partial.rename(final)
                sync_directory(output)
