"""A real embedded engine in a process of its own, for tests that need engines but no run."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from miles.cluster.ports import choose_ports
from miles.rollout.client import EngineClient

TOKEN = "test-token"
SERVER = """
import sys, torch
from pathlib import Path
from miles.engines.embedded.launch import EmbeddedOptions, serve_embedded
torch.set_num_threads(1)
model = Path(sys.argv[1])
serve_embedded(EmbeddedOptions(model=model, tokenizer=model, dtype=torch.float32, host="127.0.0.1",
    port=int(sys.argv[2]), token=sys.argv[3], context_length=None, max_running_requests=32))
"""


@dataclass
class EngineProcess:
    """One server process."""

    process: subprocess.Popen[bytes]
    url: str


@contextmanager
def engine_processes(model: Path, count: int) -> Iterator[list[EngineProcess]]:
    """Engines that are ready; killed at the end."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "0"}
    engines = []
    try:
        for port in choose_ports(count, seed=os.getpid()):
            command = [sys.executable, "-c", SERVER, str(model), str(port), TOKEN]
            engines.append(EngineProcess(subprocess.Popen(command, env=environment), f"http://127.0.0.1:{port}"))
        asyncio.run(_ready(engines))
        yield engines
    finally:
        for engine in engines:
            engine.process.kill()
            engine.process.wait()


async def _ready(engines: list[EngineProcess]) -> None:
    deadline = time.monotonic() + 120
    async with EngineClient([engine.url for engine in engines], TOKEN) as client:
        while any(problem is not None for problem in (await client.health()).values()):
            assert time.monotonic() < deadline, "the engines did not start"
            assert all(engine.process.poll() is None for engine in engines)
            await asyncio.sleep(0.1)
