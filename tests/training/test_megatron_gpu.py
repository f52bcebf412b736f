"""The megatron backend on the visible GPUs with NCCL against plain Hugging Face on the CPU.

float32 runs megatron-core's own modules, bfloat16 Transformer Engine's where it is installed.
"""

import math
from dataclasses import fields, replace

import pytest
import torch
from layouts import Agreement, Case, run_cases

from miles.config.schema import Dtype

GPUS = torch.cuda.device_count()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(GPUS == 0, reason="needs a CUDA device")]

LAYOUTS = [
    Case("qwen3"),
    Case("qwen3-moe", recompute=True),
    Case("qwen3-moe", micro_batches=1, balance=0.3),
    Case("qwen3", ranks=2, tensor=2),
    Case("qwen3-tied", ranks=2, pipeline=2),
    Case("qwen3-moe", ranks=2, tensor=2),
    Case("qwen3-moe", ranks=2, expert=2),
]
CASES = [
    replace(case, device="cuda", dtype=dtype)
    for case in LAYOUTS
    for dtype in (Dtype.FLOAT32, Dtype.BFLOAT16)
    if case.ranks <= max(GPUS, 1)
]
EXACT = Agreement(**{field.name: 2e-5 for field in fields(Agreement)})
ROUNDED = Agreement(
    log_probs=1.0,
    entropy=0.2,
    loss=0.05,
    metrics=0.05,
    # Exported weights are rounded to bfloat16: their difference is no gradient, and a step shows in few of them.
    gradients=math.inf,
    grad_norm=0.05,
    updated_weights=0.05,
    exported_weights=0.0,
    saved_weights=0.0,
)
TOLERANCE = {
    Dtype.FLOAT32: replace(EXACT, exported_weights=0.0, saved_weights=0.0),
    Dtype.BFLOAT16: ROUNDED,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> dict[Case, Agreement]:
    return run_cases(CASES, tmp_path_factory.mktemp("gpu"))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_hugging_face(case: Case, run: dict[Case, Agreement]) -> None:
    found, bounds = vars(run[case]), vars(TOLERANCE[case.dtype])
    print(case, {name: f"{value:.1e}" for name, value in found.items()})
    assert {name: value for name, value in found.items() if not value <= bounds[name]} == {}
