"""The smallest run with a rank: a model is built, then trained for some supervised steps."""

from __future__ import annotations

from pathlib import Path

STAGE = "warmup"

RUN_FILE = """
name = "proof"
seed = 3
runs_dir = "{directory}/runs"

[train]
backend = "fsdp"
dtype = "float32"

[local]
threads = 1

[checkpoint]
every = 1

[slurm]
setup = {setup}

[steps.prepare]
kind = "tiny-task"
architecture = "qwen3-moe"
hidden_size = 64
train_prompts = 40

[steps.prepare.slurm]
setup = []

[steps.warmup]
kind = "sft"
model = "step:prepare/model"
data = "step:prepare/demonstrations.jsonl"

[steps.warmup.train]
steps = {steps}
batch_size = 16
lr = 1e-3
"""


def write_short_run(directory: Path, *, steps: int, setup: str = "[]") -> Path:
    """Write the run file; `setup`: what the job of the trained step runs first, as TOML."""
    file = directory / "run.toml"
    file.write_text(RUN_FILE.format(directory=directory, steps=steps, setup=setup))
    return file
