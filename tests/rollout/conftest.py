"""Scripted engines as a fixture; short pauses."""

import asyncio

import pytest
from scripted_engine import ScriptedEngine

from miles.rollout import blame, engines


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    for module in (blame, engines):
        monkeypatch.setattr(module, "FIRST_PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(engines, "READ_SECONDS", 0.0)


@pytest.fixture
async def start_engines():
    """`await start_engines(engine, ...)` serves each on a port of its own."""
    started: list[ScriptedEngine] = []

    async def start(*engines: ScriptedEngine) -> None:
        for engine in engines:
            await engine.start()
            started.append(engine)

    yield start
    await asyncio.gather(*(engine.close() for engine in started))
