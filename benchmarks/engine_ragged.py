"""Embedded engine against `model.generate` on a ragged batch: python benchmarks/engine_ragged.py

64 prompts of 4 to 60 tokens ask for 8 to 128 tokens each (about 2 M parameters, Qwen3 and Qwen3-MoE, random weights,
float32). `generate` gets the batch padded on the left and runs until the longest response is done, as it must; only
the tokens that were asked for count for either side. The engine also computes log-probabilities and, for the MoE,
routes; `generate` computes neither. The third way is the engine's HTTP server in a process of its own, one request
with all 64 prompts.

The ways take turns; the fastest of several rounds counts. Seconds of wall clock and of CPU are both written to
benchmarks/results/engine_ragged.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch
import transformers
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from miles.engines.embedded.model import Runner, load_runner
from miles.engines.embedded.request import Request
from miles.engines.embedded.sampling import ALL_TOKENS, SamplingParams
from miles.engines.embedded.scheduler import Limits, Scheduler

RESULTS = Path(__file__).parent / "results" / "engine_ragged.json"
VOCABULARY = 512
SERVE = """
import sys, torch
from pathlib import Path
from miles.engines.embedded.launch import EmbeddedOptions, serve_embedded
model, port, threads = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(threads)
serve_embedded(EmbeddedOptions(model=model, tokenizer=model, dtype=torch.float32, host="127.0.0.1", port=port,
                               token=None, context_length=None, max_running_requests=64))
"""


@dataclass(frozen=True)
class Job:
    """One response to generate."""

    prompt: list[int]
    tokens: int


@dataclass(frozen=True)
class Measurement:
    """The fastest round of one way."""

    model: str
    parameters: int
    way: str
    useful_tokens: int
    wall_seconds: float
    cpu_seconds: float
    useful_tokens_per_second: float


def draw_jobs(count: int) -> list[Job]:
    source = random.Random(0)
    return [
        Job([source.randrange(VOCABULARY) for _ in range(source.randint(4, 60))], source.randint(8, 128))
        for _ in range(count)
    ]


def build(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    shared = {"vocab_size": VOCABULARY, "num_hidden_layers": 4, "max_position_embeddings": 1024, "head_dim": 32}
    if name == "qwen3":
        return Qwen3ForCausalLM(
            Qwen3Config(hidden_size=192, intermediate_size=640, num_attention_heads=6, num_key_value_heads=2, **shared)
        )
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            hidden_size=128,
            moe_intermediate_size=128,
            num_experts=8,
            num_experts_per_tok=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            norm_topk_prob=True,
            **shared,
        )
    )


def run_generate(model: PreTrainedModel, jobs: list[Job]) -> None:
    longest = max(len(job.prompt) for job in jobs)
    ids = torch.tensor([[0] * (longest - len(job.prompt)) + job.prompt for job in jobs])
    mask = torch.tensor([[0] * (longest - len(job.prompt)) + [1] * len(job.prompt) for job in jobs])
    tokens = max(job.tokens for job in jobs)
    config = GenerationConfig(
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        pad_token_id=0,
    )
    with torch.inference_mode():
        assert model.generate(ids, attention_mask=mask, generation_config=config).shape[1] == longest + tokens


def run_engine(runner: Runner, jobs: list[Job]) -> None:
    scheduler = Scheduler(runner, None, Limits(), [])
    answers: list[dict] = []
    for index, job in enumerate(jobs):
        params = SamplingParams(job.tokens, temperature=1.0, top_p=1.0, top_k=ALL_TOKENS, seed=index, ignore_eos=True)
        request = Request(str(index), job.prompt, params, answers.append, return_log_probs=True)
        request.return_routes = runner.has_routes
        scheduler.add(request)
    while not scheduler.idle:
        scheduler.step()
    assert len(answers) == len(jobs)


def run_http(port: int, jobs: list[Job], routes: bool) -> None:
    body = {
        "input_ids": [job.prompt for job in jobs],
        "sampling_params": [
            {"max_new_tokens": job.tokens, "temperature": 1.0, "sampling_seed": index, "ignore_eos": True}
            for index, job in enumerate(jobs)
        ],
        "return_logprob": True,
        "return_routed_experts": routes,
    }
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/generate", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=600) as answer:
        assert len(json.load(answer)) == len(jobs)


def start_server(directory: Path, threads: int) -> tuple[subprocess.Popen[bytes], int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen([sys.executable, "-c", SERVE, str(directory), str(port), str(threads)])
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health_generate", timeout=30).close()
            return server, port
        except OSError:
            assert server.poll() is None, "the server did not start"
            time.sleep(0.2)


def cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def measure(run: Callable[[], None], process: psutil.Process) -> tuple[float, float]:
    """Wall and CPU seconds of one round; CPU is that of the process that computes."""
    cpu, wall = cpu_seconds(process), time.perf_counter()
    run()
    return time.perf_counter() - wall, cpu_seconds(process) - cpu


def benchmark(name: str, jobs: list[Job], rounds: int, threads: int) -> list[Measurement]:
    model = build(name)
    parameters = sum(p.numel() for p in model.parameters())
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        model = type(model).from_pretrained(directory, dtype=torch.float32).eval()
        runner = load_runner(Path(directory), torch.float32)
        server, port = start_server(Path(directory), threads)
        here, there = psutil.Process(), psutil.Process(server.pid)
        ways: dict[str, tuple[Callable[[], None], psutil.Process]] = {
            "generate, padded batch": (lambda: run_generate(model, jobs), here),
            "embedded engine": (lambda: run_engine(runner, jobs), here),
            "embedded engine over HTTP": (lambda: run_http(port, jobs, runner.has_routes), there),
        }
        try:
            results = {way: [measure(*ways[way])] for way in ways}
            for _ in range(rounds - 1):
                for way in ways:
                    results[way].append(measure(*ways[way]))
        finally:
            server.terminate()
            server.wait()
    useful = sum(job.tokens for job in jobs)
    measurements = []
    for way, times in results.items():
        wall, cpu = min(t[0] for t in times), min(t[1] for t in times)
        measurements.append(
            Measurement(name, parameters, way, useful, round(wall, 3), round(cpu, 3), round(useful / wall))
        )
        print(f"{name:10} {way:26} {wall:7.2f} s wall {cpu:7.2f} s CPU {useful / wall:7.0f} useful tok/s", flush=True)
    return measurements


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    jobs = draw_jobs(64)
    results = [m for name in ("qwen3", "qwen3-moe") for m in benchmark(name, jobs, arguments.rounds, arguments.threads)]
    record = {
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "threads": arguments.threads,
        "load_average": round(os.getloadavg()[0], 1),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "results": [asdict(result) for result in results],
    }
    arguments.output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
