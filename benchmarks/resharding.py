"""A trainer's state saved on every layout of ranks and loaded on every other: one table, and one JSON file.

`PYTHONPATH=. python benchmarks/resharding.py --backend megatron` trains tiny models on gloo ranks of this machine in
float32, saves, goes on, and has fresh processes resume from the save on each layout. The figures say how far apart the
two are then: exactly 0 where the layout is the same. It writes benchmarks/results/resharding-megatron.json. A few of
the pairs are a test in tests/training.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / "training"), str(ROOT / "benchmarks")]

from layouts import Case  # noqa: E402
from provenance import machine  # noqa: E402
from state_pairs import Distance, Pair, run_pairs  # noqa: E402

from miles.config.schema import Backend  # noqa: E402

MEGATRON = [
    # The vocabulary of 131 needs padding for two tensor ranks; tied embeddings are two parameters on two stages.
    [
        Case("qwen3-tied"),
        Case("qwen3-tied", ranks=2),
        Case("qwen3-tied", ranks=2, tensor=2),
        Case("qwen3-tied", ranks=2, pipeline=2),
        Case("qwen3-tied", ranks=4, tensor=2),
        Case("qwen3-tied", ranks=4, tensor=2, pipeline=2),
    ],
    [
        Case("qwen3-moe"),
        Case("qwen3-moe", ranks=2),
        Case("qwen3-moe", ranks=2, expert=2),
        Case("qwen3-moe", ranks=2, tensor=2),
        Case("qwen3-moe", ranks=2, pipeline=2),
        Case("qwen3-moe", ranks=4, tensor=2, expert=2),
        Case("qwen3-moe", ranks=4, tensor=2, pipeline=2, expert=2),
    ],
]
FSDP = [
    [Case(model, ranks=ranks, backend=Backend.FSDP) for ranks in (1, 2, 4)] for model in ("qwen3-tied", "qwen3-moe")
]
LAYOUTS = {Backend.MEGATRON: MEGATRON, Backend.FSDP: FSDP}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", type=Backend, choices=list(Backend), default=Backend.MEGATRON)
    backend = parser.parse_args().backend
    pairs = [Pair(*both) for layouts in LAYOUTS[backend] for both in product(layouts, layouts)]
    with tempfile.TemporaryDirectory() as directory:
        results = run_pairs(pairs, Path(directory))
    print_table(results)
    output = ROOT / "benchmarks" / "results" / f"resharding-{backend}.json"
    output.parent.mkdir(exist_ok=True)
    rows = [
        {"saved": str(pair.saved), "loaded": str(pair.loaded), **vars(distance)} for pair, distance in results.items()
    ]
    output.write_text(json.dumps({"machine": machine(), "pairs": rows}, indent=2) + "\n")
    print(f"written to {output.relative_to(ROOT)}")


def print_table(results: dict[Pair, Distance]) -> None:
    columns = list(Distance.__annotations__)
    width = max(len(str(pair)) for pair in results)
    print(" " * width, *(f"{name:>13}" for name in columns))
    for pair, distance in results.items():
        print(f"{pair!s:{width}}", *(f"{getattr(distance, name):13.1e}" for name in columns))


if __name__ == "__main__":
    main()
