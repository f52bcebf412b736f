"""A checkpoint's trainer state becomes the model directory that its trainer would have written."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import reference
import torch
from layouts import Case, enter_process_group, leave_process_group, weights
from safetensors.torch import load_file
from state_pairs import save
from transformers import AutoModelForCausalLM

from miles.config.load import load_run
from miles.errors import ConfigError, RunError
from miles.runs.checkpoints import CheckpointStore
from miles.runs.claim import Fence
from miles.runs.directory import create_run
from miles.runs.manifest import CheckpointInfo, DamagedError
from miles.runs.paths import RunPaths
from miles.training.context import open_model
from miles.training.export import alone, export

RUN = """
name = "demo"
runs_dir = "{runs}"
[steps.prepare]
kind = "tiny-task"
[steps.warmup]
kind = "sft"
model = "step:prepare/model"
data = "step:prepare/demonstrations.jsonl"
train.backend = "{backend}"
train.dtype = "float32"
train.device = "cpu"
"""
MEGATRON_LAYOUT = """
train.tensor_parallel_size = 2
local.ranks = 2
"""


@pytest.fixture
def run(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[RunPaths, dict[str, torch.Tensor]]:
    """A run whose stage `warmup` has a checkpoint after two updates, and the weights at that moment."""
    backend = getattr(request, "param", "fsdp")
    text = RUN.format(runs=tmp_path / "runs", backend=backend) + (MEGATRON_LAYOUT if backend == "megatron" else "")
    (tmp_path / "run.toml").write_text(text)
    config = load_run(tmp_path / "run.toml")
    paths = create_run(config)
    reference.build_model("qwen3-tied", paths.step("prepare") / "model")
    section = config.steps["warmup"]
    store = CheckpointStore(paths, "warmup", Fence(paths, None))
    draft = store.draft(2)
    enter_process_group(Case("qwen3-tied"), 0, 0, f"file://{tmp_path}/rendezvous")
    try:
        trainer = open_model(section.model, alone(section.train, "cpu"), paths, config.seed)
        for _ in range(2):
            batches = reference.micro_batches(reference.sequences(), 2)
            trainer.update(batches, reference.loss, lr=reference.LR, temperature=reference.TEMPERATURE)
        save(trainer, draft / "trainer")
        expected = weights(trainer)
    finally:
        leave_process_group()
    store.commit(draft, CheckpointInfo("warmup", 2, 1, time.time(), "f00", backend, 1, 1.0, 0.1, {}, {}), {})
    return paths, expected


def export_process(paths: RunPaths, output: Path) -> subprocess.CompletedProcess[str]:
    arguments = ["--run-dir", str(paths.root), "--stage", "warmup", "--step", "2", "--output", str(output)]
    command = [sys.executable, "-m", "miles.training.export", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("run", ["fsdp", "megatron"], indirect=True)
def test_the_model_is_the_checkpoints(run: tuple[RunPaths, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    paths, expected = run
    output = tmp_path / "exports" / "model"
    done = export_process(paths, output)
    assert done.returncode == 0, done.stderr
    assert reference.largest_difference(load_file(output / "model.safetensors"), expected)[0] == 0.0
    initial = load_file(paths.step("prepare") / "model" / "model.safetensors")
    assert reference.largest_difference(initial, expected)[0] > 1e-3
    assert [path.name for path in output.parent.iterdir()] == ["model"]
    _, report = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]

    again = export_process(paths, output)
    assert again.returncode == RunError.exit_code
    assert f"error: {output} exists" in again.stderr


def test_a_damaged_trainer_state_is_refused(run: tuple[RunPaths, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    paths, _ = run
    file = paths.checkpoints("warmup") / "step-000002" / "trainer" / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(DamagedError, match=r"step 2 is damaged: trainer/__0_0.distcp: checksum"):
        export(paths, "warmup", 2, tmp_path / "model", "cpu")


def test_unknown_stages_and_steps_are_refused(run: tuple[RunPaths, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    paths, _ = run
    with pytest.raises(ConfigError, match=r"no step 'warmpu' that trains. Did you mean 'warmup'\?"):
        export(paths, "warmpu", 2, tmp_path / "model", "cpu")
    with pytest.raises(ConfigError, match="no step 'prepare' that trains"):
        export(paths, "prepare", 2, tmp_path / "model", "cpu")
    with pytest.raises(RunError, match="step 3"):
        export(paths, "warmup", 3, tmp_path / "model", "cpu")
