"""A run directory as a finished, or unfinished, run leaves it: written with the run's own writers, numbers invented."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

from miles.config.load import load_run
from miles.runs.attempts import EndReason, begin_attempt, end_attempt
from miles.runs.directory import create_run
from miles.runs.metrics import MetricsWriter
from miles.runs.paths import RunPaths
from miles.runs.samples import SampleRecord, write_samples

RUN_FILE = """
name = "example"
seed = 7
runs_dir = "{runs_dir}"

[rollout]
prompts_per_step = 8
group_size = 4
max_response_tokens = 8

[eval]
data = "step:prepare/heldout.jsonl"
samples = 4
pass_at = [1, 4]

[steps.prepare]
kind = "tiny-task"

[steps.warmup]
kind = "sft"
model = "step:prepare/model"
data = "step:prepare/demonstrations.jsonl"
train = {{ steps = 40, batch_size = 64, lr = 2e-3 }}

[steps.grpo]
kind = "rl"
model = "step:warmup/model"
data = "step:prepare/train.jsonl"
train = {{ steps = 60, lr = 3e-4, lr_warmup_steps = 5 }}

[steps.final]
kind = "eval"
model = "step:grpo/model"

[steps.report]
kind = "report"
"""


def create_example(directory: Path) -> RunPaths:
    """A run that has just been created."""
    file = directory / "example.toml"
    file.write_text(RUN_FILE.format(runs_dir=directory / "runs"))
    return create_run(load_run(file), min_free_bytes=0)


def write_warmup(paths: RunPaths, steps: int = 40) -> None:
    """Metrics of the supervised stage."""
    chance, writer = random.Random(1), MetricsWriter(paths)
    for step in range(1, steps + 1):
        loss = 2.5 * math.exp(-step / 14) + 0.45 + chance.gauss(0, 0.03)
        values = {"loss": loss, "grad_norm": 0.4 + loss, "lr": 2e-3 * min(1, step / 20)}
        writer.write("warmup", step, values | {"perplexity": math.exp(loss), "time/step": 0.21, "tokens/total": 1e3})


def write_training(paths: RunPaths, steps: int = 60) -> None:
    """Metrics and transcripts of the reinforcement-learning stage, evaluated before and after."""
    chance, writer = random.Random(2), MetricsWriter(paths)
    writer.write("grpo", 0, {"eval/reward": 0.31, "eval/pass@1": 0.31, "eval/pass@4": 0.62, "time/eval": 4.0})
    for step in range(1, steps + 1):
        reward = 0.3 + 0.65 * (1 - math.exp(-step / 18)) + chance.gauss(0, 0.02)
        seconds = {"generate": 1.6, "reward": 0.02, "log_probs": 0.4, "update": 1.1, "sync": 0.15}
        seconds = {phase: value * chance.uniform(0.9, 1.2) for phase, value in seconds.items()}
        values = {
            "reward/mean": reward,
            "reward/std": math.sqrt(max(0.01, reward * (1 - reward))),
            "reward/exact": reward,
            "response/length_mean": 6.1 + chance.gauss(0, 0.1),
            "response/length_max": 8.0,
            "response/truncated_fraction": 0.2 * math.exp(-step / 10),
            "groups/zero_variance_fraction": min(1.0, 0.1 + step / 80),
            "loss": chance.gauss(0, 0.01),
            "grad_norm": chance.uniform(0.2, 0.6) if step != 30 else math.nan,
            "lr": 3e-4 * min(1, step / 5),
            "entropy": 0.9 * math.exp(-step / 25) + 0.05,
            "ratio/mean": 1.0,
            "ratio/clip_fraction": 0.01,
            "importance/capped_fraction": 0.0,
            "mismatch/log_prob_abs_diff_mean": 3e-7 * chance.uniform(0.8, 1.2),
            "mismatch/log_prob_abs_diff_max": 4e-6 * chance.uniform(0.8, 1.4),
            "mismatch/kl_k3": 2e-13 * chance.uniform(0.5, 1.5),
            "time/step": sum(seconds.values()) + 0.1,
            **{f"time/{phase}": value for phase, value in seconds.items()},
        }
        if step in (20, 40, 60):
            values |= {
                "eval/reward": reward - 0.03,
                "eval/pass@1": reward - 0.03,
                "eval/pass@4": min(1, reward + 0.05),
            }
        writer.write("grpo", step, values)
        write_samples(paths, "grpo", step, [_sample(chance, right=chance.random() < reward) for _ in range(4)])


def write_results(paths: RunPaths) -> None:
    """results.json of the evaluation step."""
    paths.step("final").mkdir()
    (paths.step("final") / "results.json").write_text(
        json.dumps({"reward": 0.93, "pass@4": 0.98, "results": [{"prompt": "a"}]})
    )


def write_attempts(paths: RunPaths, *steps: str) -> None:
    """One finished attempt of each step."""
    for step in steps:
        end_attempt(paths, begin_attempt(paths, step), EndReason.FINISHED)


def finished_example(directory: Path) -> RunPaths:
    """A run that did everything."""
    paths = create_example(directory)
    write_attempts(paths, "prepare", "warmup", "grpo", "grpo", "final")
    write_warmup(paths)
    write_training(paths)
    write_results(paths)
    return paths


def _sample(chance: random.Random, *, right: bool) -> SampleRecord:
    digits = [chance.randrange(10) for _ in range(6)]
    label = " ".join(map(str, sorted(digits)))
    response = label if right else " ".join(map(str, digits))
    return SampleRecord(
        prompt=f"<|user|>sort: {' '.join(map(str, digits))}<|assistant|>",
        response=response,
        label=label,
        reward=float(right),
        reward_parts={"exact": float(right)},
        finish_reason="stop" if right else "length",
        length=7 if right else 8,
    )
