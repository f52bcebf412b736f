"""Collecting steps with scripted engines: what a session does, on the test's own event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scripted_engine import END, ScriptedEngine, Storyteller

from miles.config.schema import RewardSection, RolloutSection
from miles.data.sample import Group, Prompt
from miles.rewards.grader import build_grader
from miles.rollout.answers import ExpertShape
from miles.rollout.client import EngineClient, SamplingParams
from miles.rollout.draws import Source
from miles.rollout.engines import EngineList
from miles.rollout.flight import Flight, Generating
from miles.rollout.flusher import Flusher
from miles.rollout.manager import Collected, Frontier, NeedWeights, StepCollection, Stopped
from miles.rollout.text import ResponseText
from miles.runs.claim import Fence
from miles.runs.endpoints import Endpoint, write_endpoints
from miles.runs.journal import Batch, Journal, OpenStep
from miles.runs.paths import RunPaths

PROMPTS = [Prompt(f"p{i}", [200 + i], f"question {i}", label="x") for i in range(10)]
GRADER = """
async def score(prompt, response, label, metadata):
    return len(response) % 3 == 0
"""


def decode(tokens: list[int]) -> str:
    """Characters; the end token is special."""
    return "".join(chr(token) for token in tokens if token != END)


@dataclass
class Supervisor:
    """Keeps the engines file; starts killed engines again."""

    file: Path
    engines: list[ScriptedEngine]
    starts: list[int] = field(default_factory=list)
    again: Callable[[int], ScriptedEngine] = lambda index: Storyteller()

    def __post_init__(self) -> None:
        self.starts = [1] * len(self.engines)
        self.write()

    def write(self, missing: int | None = None) -> None:
        write_endpoints(
            self.file,
            [
                Endpoint(i, engine.url, start, ready=i != missing)
                for i, (engine, start) in enumerate(zip(self.engines, self.starts, strict=True))
            ],
        )

    async def kill(self, index: int) -> None:
        await self.engines[index].kill()
        self.write(missing=index)

    async def restart(self, index: int) -> None:
        self.engines[index] = self.again(index)
        await self.engines[index].start()
        self.starts[index] += 1
        self.write()


@dataclass
class Run:
    """One attempt at a stage."""

    section: RolloutSection
    engines: EngineList
    flight: Flight
    journal: Journal
    supervisor: Supervisor
    source: Source
    flush_seconds: float
    frontier: Frontier = field(default_factory=Frontier)
    stop: Callable[[], bool] = lambda: False
    collection: StepCollection | None = None
    open_step: OpenStep | None = None
    pushes: list[list[int]] = field(default_factory=list)

    def push(self, version: int) -> None:
        indices = self.engines.receivers(version)
        for index in indices:
            self.supervisor.engines[index].version = version
        self.engines.pushed(version, indices)
        self.pushes.append(indices)

    def resume_with(self, open_step: OpenStep) -> None:
        self.open_step = open_step

    async def attempt(self, step: int) -> Collected | NeedWeights | Stopped:
        if self.collection is None or self.collection.step != step:
            self.collection = StepCollection(
                step,
                self.frontier,
                self.section,
                source=self.source,
                flight=self.flight,
                flusher=Flusher(self.journal, self.flush_seconds),
                stop=lambda: self.stop(),
            )
            if self.open_step is not None:
                self.collection.restore(self.open_step)
                self.open_step = None
        return await self.collection.run(lambda done, total: None)

    async def step(self, step: int) -> Collected:
        """Collect a step, with weights of the step before."""
        self.push(step - 1)
        while not isinstance(outcome := await self.attempt(step), Collected):
            assert isinstance(outcome, NeedWeights)
            self.push(step - 1)
        self.frontier = Frontier.after(outcome.batch)
        return outcome


@asynccontextmanager
async def run_of(
    root: Path,
    supervisor: Supervisor,
    *,
    section: RolloutSection,
    chunk_seconds: float = 0.0,
    shortest_chunk: int = 4,
    flush_seconds: float = 60.0,
    experts: bool = False,
    grader: str = GRADER,
) -> AsyncIterator[Run]:
    root.mkdir(exist_ok=True)
    grader_file = root / "grader.py"
    grader_file.write_text(grader)
    graders = build_grader([RewardSection(grader=f"{grader_file}:score")])
    params = SamplingParams.of(section, [END])
    how = Generating(
        params,
        ResponseText(decode, params.stop),
        max_groups=section.max_concurrent_groups,
        max_retries=section.max_retries,
        experts=ExpertShape(layers=1, top_k=1, experts=8) if experts else None,
        chunk_seconds=chunk_seconds,
        shortest_chunk=shortest_chunk,
    )
    engines = EngineList(supervisor.file, receive_weights=True)
    paths = RunPaths(root)
    journal = Journal(paths, "grpo", Fence(paths, None), {prompt.id: prompt for prompt in PROMPTS})
    source = Source(PROMPTS, section.prompts_per_step, section.group_size, seed=3, shuffle=True)
    async with EngineClient(None, timeout=20.0) as client:
        flight = Flight(client, engines, graders, how)
        try:
            yield Run(section, engines, flight, journal, supervisor, source, flush_seconds)
        finally:
            await flight.cancel()
            graders.close()


def plain(batch: Batch) -> dict[str, Any]:
    """A batch as values that compare."""
    return {
        "step": batch.step,
        "groups": [_plain_group(group) for group in batch.groups],
        "carried": [_plain_group(group) for group in batch.carried],
        "dropped": [asdict(each) for each in batch.dropped],
        "cursor": batch.cursor,
        "quarantined": batch.quarantined_total,
    }


def _plain_group(group: Group) -> dict[str, Any]:
    samples = [{**asdict(sample), "prompt": sample.prompt.id} for sample in group.samples]
    for sample in samples:
        routes: np.ndarray | None = sample["routed_experts"]
        sample["routed_experts"] = None if routes is None else routes.tolist()
    return {"prompt": group.prompt.id, "at": (group.position, group.epoch, group.born), "samples": samples}


async def until(condition: Callable[[], object]) -> None:
    """Wait for something to happen, at most ten seconds."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)
