"""Bytes and seconds of the rollout journal: PYTHONPATH=. python benchmarks/journal.py

Two questions. How many bytes does a response token take, by what is recorded and by compression? And how long do
flush, commit and reading take in a large step? Answers go to benchmarks/results/journal.json.

Contents:

- `tiny-moe`: sampled by the embedded engine, in this process, from a small Qwen3-MoE with random weights (4 layers,
  top 4 of 32 experts, 512 tokens in the vocabulary): real log-probabilities and routes, but of no trained model;
- `synthetic-dense`: no model. Token ids follow Zipf's law over 151,936; two of three log-probabilities are close to 0,
  as a trained model's are; four letters of text per token;
- `synthetic-moe`: the same with routes of 48 layers, top 8 of 128 experts, some experts more popular than others.

Every response has one weight version and a mask of ones. Prompt tokens, ids and rewards are in the bytes, too. Arrays
of more than a chunk are packed with gzip by threads on all cores, with lzf by one.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from provenance import commit, machine  # noqa: E402

from miles.data.sample import FinishReason, Group, Prompt, Sample  # noqa: E402
from miles.engines.embedded.model import load_runner  # noqa: E402
from miles.engines.embedded.request import Request  # noqa: E402
from miles.engines.embedded.sampling import ALL_TOKENS, SamplingParams  # noqa: E402
from miles.engines.embedded.scheduler import Limits, Scheduler  # noqa: E402
from miles.rollout.answers import ExpertShape, read_generation  # noqa: E402
from miles.runs.claim import Fence  # noqa: E402
from miles.runs.journal import Batch, Journal  # noqa: E402
from miles.runs.journal.codec import batch_content, decode, encode  # noqa: E402
from miles.runs.paths import RunPaths  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "journal.json"
COMPRESSION: dict[str, dict[str, Any]] = {
    "none": {},
    "lzf, shuffle": {"compression": "lzf", "shuffle": True},
    "gzip 1": {"compression": "gzip", "compression_opts": 1},
    "gzip 1, shuffle": {"compression": "gzip", "compression_opts": 1, "shuffle": True},
    "gzip 4, shuffle": {"compression": "gzip", "compression_opts": 4, "shuffle": True},
    "gzip 9, shuffle": {"compression": "gzip", "compression_opts": 9, "shuffle": True},
}
PROMPT = Prompt("prompt-000001", list(range(100, 200)), "")


def tiny_moe(groups: int, size: int, tokens: int) -> list[Group]:
    """A rollout of the embedded engine."""
    torch.manual_seed(0)
    shape = ExpertShape(layers=4, top_k=4, experts=32)
    config = Qwen3MoeConfig(
        vocab_size=512,
        hidden_size=128,
        moe_intermediate_size=64,
        num_hidden_layers=shape.layers,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        norm_topk_prob=True,
    )
    with tempfile.TemporaryDirectory() as directory:
        Qwen3MoeForCausalLM(config).save_pretrained(directory)
        runner = load_runner(Path(directory), torch.float32)
    scheduler = Scheduler(runner, None, Limits(), [])
    answers: dict[str, dict[str, Any]] = {}
    for number in range(groups * size):
        params = SamplingParams(tokens, temperature=1.0, top_p=1.0, top_k=ALL_TOKENS, seed=number, ignore_eos=True)
        keep = partial(answers.__setitem__, str(number))
        request = Request(str(number), PROMPT.tokens, params, keep, return_log_probs=True)
        request.return_routes = True
        scheduler.add(request)
    while not scheduler.idle:
        scheduler.step()
    in_order = [{"text": "", **answers[str(number)]} for number in range(groups * size)]
    generations = [read_generation(answer, len(PROMPT.tokens), shape) for answer in in_order]
    return [
        Group(
            PROMPT,
            [
                graded(i, position, each.tokens, each.log_probs, each.routed_experts)
                for i, each in enumerate(generations[position * size : (position + 1) * size])
            ],
            position=position,
        )
        for position in range(groups)
    ]


def synthetic(groups: int, size: int, tokens: int, *, routes: bool) -> list[Group]:
    """Content with the statistics that the top of this file names."""
    noise = np.random.default_rng(0)
    popularity = noise.gumbel(size=(48, 128)) * 0.7
    return [
        Group(
            PROMPT,
            [
                graded(
                    i,
                    position,
                    (noise.zipf(1.3, tokens) % 151_936).tolist(),
                    _log_probs(noise, tokens).tolist(),
                    _routes(noise, popularity, len(PROMPT.tokens) + tokens - 1) if routes else None,
                )
                for i in range(size)
            ],
            position=position,
        )
        for position in range(groups)
    ]


def _log_probs(noise: np.random.Generator, tokens: int) -> np.ndarray:
    sure = noise.random(tokens) < 2 / 3
    return -np.where(sure, noise.exponential(1e-3, tokens), noise.exponential(1.2, tokens)).astype(np.float32)


def _routes(noise: np.random.Generator, popularity: np.ndarray, rows: int) -> np.ndarray:
    scores = popularity + noise.gumbel(size=(rows, *popularity.shape)).astype(np.float32)
    return np.argpartition(-scores, 8, axis=-1)[..., :8].astype(np.uint8)


def graded(index: int, position: int, tokens: list[int], log_probs: list[float], routes: np.ndarray | None) -> Sample:
    """A finished sample with four letters of text per token."""
    return Sample(
        PROMPT,
        index,
        seed=position * 1000 + index,
        response_tokens=tokens,
        log_probs=log_probs,
        loss_mask=[1] * len(tokens),
        weight_versions=[3] * len(tokens),
        routed_experts=routes,
        text=" ".join(f"w{token % 1000:03d}"[-3:] for token in tokens),
        finish_reason=FinishReason.STOP,
        reward=float(index % 2),
        reward_parts={"math": float(index % 2)},
    )


def timed(action: Callable[[], Any]) -> tuple[Any, float]:
    """What it returns, and its wall-clock seconds."""
    start = time.perf_counter()
    result = action()
    return result, time.perf_counter() - start


def measure_content(groups: list[Group]) -> dict[str, Any]:
    """Bytes per response token and seconds per million of them, by compression."""
    tokens = sum(len(sample.response_tokens) for group in groups for sample in group.samples)
    content = batch_content(Batch(4, groups, [], [], cursor=len(groups)))
    ways = {}
    for name, filters in COMPRESSION.items():
        data, write = timed(lambda filters=filters: bytes(encode(content, filters)))
        _, read = timed(lambda data=data: decode(data, "benchmark"))
        per_million = 1e6 / tokens
        ways[name] = {
            "bytes_per_token": round(len(data) / tokens, 3),
            "write_seconds_per_million_tokens": round(write * per_million, 2),
            "read_seconds_per_million_tokens": round(read * per_million, 2),
        }
        print(f"  {name:18} {ways[name]}", flush=True)
    return {"tokens": tokens, "compression": ways}


def measure_step(groups: list[Group], directory: Path) -> dict[str, float]:
    """Seconds of two flushes (half the tokens each), the commit and the reading of one step."""
    paths = RunPaths(directory)
    journal = Journal(paths, "grpo", Fence(paths, None), {PROMPT.id: PROMPT})
    halves = [half_done(group) for group in groups]
    first, first_seconds = timed(lambda: journal.flush(1, halves))
    second, second_seconds = timed(lambda: journal.flush(1, groups))
    batch, commit_seconds = timed(lambda: journal.commit(Batch(1, groups, [], [], cursor=len(groups))))
    _, read_seconds = timed(lambda: journal.read_batch(1))
    tokens = sum(len(sample.response_tokens) for group in groups for sample in group.samples)
    return {
        "groups": len(groups),
        "samples_per_group": len(groups[0].samples),
        "tokens": tokens,
        "first_flush_bytes": first,
        "first_flush_seconds": round(first_seconds, 2),
        "second_flush_bytes": second,
        "second_flush_seconds": round(second_seconds, 2),
        "commit_bytes": batch,
        "commit_seconds": round(commit_seconds, 2),
        "read_seconds": round(read_seconds, 2),
        "peak_resident_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }


def half_done(group: Group) -> Group:
    """The group when its samples had half of their tokens."""
    return replace(group, samples=[_half(sample) for sample in group.samples])


def _half(sample: Sample) -> Sample:
    count = len(sample.response_tokens) // 2
    return Sample(
        sample.prompt,
        sample.index,
        sample.seed,
        sample.response_tokens[:count],
        sample.log_probs[:count],
        sample.loss_mask[:count],
        sample.weight_versions[:count],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=512, help="of the large step, 8 samples each")
    parser.add_argument("--response-tokens", type=int, default=1024, help="of each of its samples")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    contents = {
        "tiny-moe": lambda: tiny_moe(8, 8, 256),
        "synthetic-dense": lambda: synthetic(16, 8, 2048, routes=False),
        "synthetic-moe": lambda: synthetic(4, 8, 512, routes=True),
    }
    measured = {}
    for name, build in contents.items():
        print(name, flush=True)
        measured[name] = measure_content(build())
    large = synthetic(arguments.groups, 8, arguments.response_tokens, routes=False)
    with tempfile.TemporaryDirectory() as directory:
        step = measure_step(large, Path(directory))
    print(step, flush=True)
    record = {
        "machine": machine(),
        "load_average": round(os.getloadavg()[0], 1),
        "commit": commit(),
        "contents": measured,
        "large dense step": step,
    }
    arguments.output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
