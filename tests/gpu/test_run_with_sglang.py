"""A whole run on one GPU with real SGLang: stopped, its trainer killed, continued, finished, and nothing left behind.

SGLANG_OPTIONS: what the installed SGLang needs beyond the defaults, as a TOML array of arguments.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from miles.runs.attempts import EndReason, read_attempts
from miles.runs.metrics import read_metrics
from miles.runs.paths import RunPaths
from tests.chaos.run import STAGE, Submit, finish, kill, processes, python_path, remains, wait_for_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(1200),  # a server takes a minute to start, three times
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="needs SGLang"),
]

ROOT = Path(__file__).resolve().parents[2]
STEPS = 10
RUN_FILE = """
extends = "{root}/workflows/quickstart.toml"
name = "proof"
runs_dir = "{directory}/runs"
checkpoint.every = 3
eval.every = {steps}
steps.grpo.train.steps = {steps}

[train]
backend = "{backend}"
dtype = "bfloat16"

[engine]
kind = "sglang"
extra_args = {options}
"""


@pytest.mark.parametrize("backend", ["megatron", "fsdp"])
def test_stopped_killed_and_continued_it_finishes_and_leaves_nothing(tmp_path: Path, backend: str) -> None:
    options = os.environ.get("SGLANG_OPTIONS", '["--mem-fraction-static", "0.4"]')
    file = tmp_path / "run.toml"
    file.write_text(RUN_FILE.format(root=ROOT, directory=tmp_path, steps=STEPS, backend=backend, options=options))
    free = free_bytes()

    submit = Submit(file)
    paths = submit.paths
    wait_for_step(submit, 2)
    stop = [sys.executable, "-m", "miles", "stop", "proof"]
    subprocess.run(stop, cwd=tmp_path, env=os.environ | {"PYTHONPATH": python_path()}, check=True)
    submit.wait()
    nothing_left(paths, free)

    submit = Submit(file)
    wait_for_step(submit, 5)
    for pid, role in processes(paths).items():
        if role == "trainer":
            kill(pid, signal.SIGKILL)
    submit.wait()
    nothing_left(paths, free)

    finish(file)
    nothing_left(paths, free)
    ends = [attempt.reason for attempt in read_attempts(paths) if attempt.step == STAGE]
    assert ends == [EndReason.STOPPED, EndReason.TRAINER_CRASH, EndReason.FINISHED]
    lines = [line for line in read_metrics(paths) if line.stage == STAGE]
    assert [line.step for line in lines] == list(range(STEPS + 1))
    first, last = (line.values["eval/reward"] for line in (lines[0], lines[-1]))
    assert last > first + 0.03
    assert all(line.values["mismatch/log_prob_abs_diff_mean"] < 0.02 for line in lines[1:])


def free_bytes() -> int:
    """Of the GPU, as its driver says it."""
    return torch.cuda.mem_get_info()[0]


def nothing_left(paths: RunPaths, free: int) -> None:
    """No process of the run, and none of its GPU memory (the driver takes a moment)."""
    deadline = time.monotonic() + 30
    while (left := remains(paths)) or free_bytes() < free - 2**26:
        assert time.monotonic() < deadline, (left, free_bytes(), free)
        time.sleep(0.5)
