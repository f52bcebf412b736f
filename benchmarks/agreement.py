"""How far a trainer backend is from plain Hugging Face on every layout: one table, and one JSON file.

`PYTHONPATH=. python benchmarks/agreement.py --backend megatron` runs tiny models on gloo ranks of this machine in
float32 and writes benchmarks/results/agreement-megatron.json. The same measurement is a test in tests/training.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "training"))

from layouts import Agreement, Case, run_cases  # noqa: E402
from provenance import machine  # noqa: E402

from miles.config.schema import Backend  # noqa: E402

MEGATRON = [
    Case("qwen3", micro_batches=1),
    Case("qwen3", micro_batches=4),
    Case("qwen3", ranks=2, micro_batches=4),
    Case("qwen3", ranks=2, tensor=2),
    Case("qwen3", ranks=2, pipeline=2),
    Case("qwen3", ranks=4, tensor=2, pipeline=2),
    Case("qwen3", ranks=4, tensor=2),
    Case("qwen3-tied", ranks=2, tensor=2),
    Case("qwen3-tied", ranks=2, pipeline=2),
    Case("qwen2", ranks=2, tensor=2),
    Case("llama", ranks=2, tensor=2),
    Case("qwen3-moe", micro_batches=1),
    Case("qwen3-moe", micro_batches=4),
    Case("qwen3-moe", ranks=2),
    Case("qwen3-moe", ranks=2, tensor=2),
    Case("qwen3-moe", ranks=2, pipeline=2),
    Case("qwen3-moe", ranks=2, expert=2),
    Case("qwen3-moe", ranks=2, tensor=2, expert=2),
    Case("qwen3-moe", ranks=4, tensor=2, pipeline=2, expert=2),
    Case("qwen3-moe", ranks=4, expert=2),
]
FSDP = [
    Case(model, ranks=ranks, micro_batches=micro_batches, backend=Backend.FSDP)
    for model in ("qwen3", "qwen3-tied", "qwen2", "llama", "qwen3-moe")
    for ranks in (1, 2)
    for micro_batches in (1, 4)
]
CASES = {Backend.MEGATRON: MEGATRON, Backend.FSDP: FSDP}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", type=Backend, choices=list(Backend), default=Backend.MEGATRON)
    backend = parser.parse_args().backend
    with tempfile.TemporaryDirectory() as directory:
        results = run_cases(CASES[backend], Path(directory))
    print_table(results)
    output = ROOT / "benchmarks" / "results" / f"agreement-{backend}.json"
    output.parent.mkdir(exist_ok=True)
    cases = [{"case": str(case), **vars(agreement)} for case, agreement in results.items()]
    output.write_text(
        json.dumps({"machine": machine(), "against": "transformers, float32", "cases": cases}, indent=2) + "\n"
    )
    print(f"written to {output.relative_to(ROOT)}")


def print_table(results: dict[Case, Agreement]) -> None:
    columns = [name for name in Agreement.__annotations__ if name != "metrics"]
    width = max(len(str(case)) for case in results)
    print(" " * width, *(f"{name:>16}" for name in columns))
    for case, agreement in results.items():
        print(f"{case!s:{width}}", *(f"{getattr(agreement, name):16.1e}" for name in columns))


if __name__ == "__main__":
    main()
