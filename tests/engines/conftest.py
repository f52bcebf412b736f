"""Servers for the engine tests: the embedded engine, and real SGLang where MILES_SGLANG_PYTHON points to one.

Both are started as a run starts them, by `python -m miles.engines.serve` on a run directory.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from miles.config.load import dump_resolved, load_run
from miles.config.schema import TinyTaskStep
from miles.runs.paths import RunPaths

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TOKEN = "contract-token"
CONTEXT = 2048
RUN = """
name = "contract"
[steps.train]
kind = "rl"
model.path = "{model}"
data.path = "{data}"
train.dtype = "float32"
rollout.max_response_tokens = 64
[steps.train.engine]
kind = "{kind}"
return_routed_experts = true
max_running_requests = 16
extra_args = ["--mem-fraction-static", "0.3", "--max-total-tokens", "16000", "--skip-server-warmup"]
"""


@dataclass
class Engine:
    """A running server."""

    kind: str
    url: str
    model: Path

    def send(self, path: str, body: Any = None, *, token: str | None = TOKEN, method: str = "POST") -> httpx.Response:
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        return httpx.request(method, self.url + path, json=body, headers=headers, timeout=120)

    def get(self, path: str, *, token: str | None = TOKEN) -> httpx.Response:
        return self.send(path, token=token, method="GET")

    def generate(self, prompt: Any, **sampling: Any) -> Any:
        """`/generate` with log-probabilities; keys starting with `body_` go beside the sampling parameters."""
        body = {key.removeprefix("body_"): sampling.pop(key) for key in list(sampling) if key.startswith("body_")}
        answer = self.send(
            "/generate", {"input_ids": prompt, "sampling_params": sampling, "return_logprob": True, **body}
        )
        assert answer.status_code == 200, answer.text
        return answer.json()

    def start(self, prompt: list[int], **sampling: Any) -> Started:
        """A streaming request on a thread of its own; returns after its first token."""
        started = Started(self, prompt, sampling)
        started.first.wait(60)
        return started


class Started:
    """A request that is being answered."""

    def __init__(self, engine: Engine, prompt: list[int], sampling: dict[str, Any]) -> None:
        self.first = threading.Event()
        self.events: list[dict[str, Any]] = []
        rid = sampling.pop("rid", None)
        self._body = {
            "input_ids": prompt, "sampling_params": sampling, "stream": True, "rid": rid,
            "return_logprob": True, "return_routed_experts": True,
        }  # fmt: skip
        self._engine = engine
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        headers = {"Authorization": f"Bearer {TOKEN}"}
        with httpx.stream(
            "POST", self._engine.url + "/generate", json=self._body, headers=headers, timeout=120
        ) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    self.events.append(json.loads(line.removeprefix("data: ")))
                    self.first.set()

    def finish(self, timeout: float = 60) -> dict[str, Any]:
        """The final answer."""
        self._thread.join(timeout)
        assert not self._thread.is_alive(), "the request did not end"
        return self.events[-1]

    @property
    def running(self) -> bool:
        return self._thread.is_alive()


@pytest.fixture(scope="session")
def tiny_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3-MoE with tokenizer, beside the tiny task's data."""
    from miles.models.tiny import build_tiny_task

    directory = tmp_path_factory.mktemp("tiny-moe")
    build_tiny_task(TinyTaskStep(kind="tiny-task", train_prompts=4, heldout_prompts=4), directory, seed=0)
    config = json.loads((directory / "model" / "config.json").read_text())
    config["max_position_embeddings"] = CONTEXT
    (directory / "model" / "config.json").write_text(json.dumps(config))
    return directory


KINDS = [
    "embedded",
    *([pytest.param("sglang", marks=pytest.mark.sglang)] if "MILES_SGLANG_PYTHON" in os.environ else []),
]


@pytest.fixture(scope="session", params=KINDS)
def engine(
    request: pytest.FixtureRequest, tiny_moe: Path, tmp_path_factory: pytest.TempPathFactory, unused_port: int
) -> Iterator[Engine]:
    """Each kind of server once per session; the tests leave it as they found it."""
    run_dir = write_run(tmp_path_factory.mktemp("run"), request.param, tiny_moe)
    process = serve(run_dir, request.param, unused_port)
    server = Engine(request.param, f"http://127.0.0.1:{unused_port}", tiny_moe / "model")
    try:
        wait_until_healthy(server, process, run_dir)
        yield server
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(30)


@pytest.fixture(scope="session")
def unused_port() -> int:
    from miles.cluster.ports import choose_ports

    return choose_ports(1, seed=os.getpid())[0]


def write_run(run_dir: Path, kind: str, tiny: Path) -> Path:
    """A run directory with one RL step."""
    (run_dir / "user.toml").write_text(RUN.format(model=tiny / "model", data=tiny / "train.jsonl", kind=kind))
    paths = RunPaths(run_dir)
    paths.config.write_text(dump_resolved(load_run(run_dir / "user.toml")))
    paths.secrets.mkdir(mode=0o700)
    paths.engine_token.write_text(TOKEN + "\n")
    return run_dir


def serve(run_dir: Path, kind: str, port: int) -> subprocess.Popen[bytes]:
    """The engine's process; its output goes to `engine.log` in the run directory."""
    python = os.environ["MILES_SGLANG_PYTHON"] if kind == "sglang" else sys.executable
    path = [str(ROOT)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "0"}
    if kind == "sglang":
        absent = (HERE / "sglang_cpu" / "stand-ins.txt").read_text().split()
        environment |= {"MILES_STAND_INS": ",".join(absent), "SGLANG_USE_CPU_ENGINE": "1"}
        path.insert(0, str(HERE / "sglang_cpu"))
    environment["PYTHONPATH"] = os.pathsep.join(path)
    command = [python, "-m", "miles.engines.serve", "--run-dir", str(run_dir), "--step", "train", "--index", "0"]
    with (run_dir / "engine.log").open("wb") as log:
        return subprocess.Popen([*command, "--port", str(port)], env=environment, stdout=log, stderr=log)


def wait_until_healthy(server: Engine, process: subprocess.Popen[bytes], run_dir: Path) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        assert process.poll() is None, (run_dir / "engine.log").read_text()[-4000:]
        try:
            if server.get("/health_generate", token=None).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.3)
    pytest.fail((run_dir / "engine.log").read_text()[-4000:])
