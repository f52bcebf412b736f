"""What is in flight: at most one request per group, and the grading of groups that are finished.

Owns the tasks: which engine gets a request, how long it is, what its answer or its failure means for the group. Which
groups should run, and how far, is the caller's to say (`miles.rollout.manager`, `miles.rollout.evaluate`). Between two
calls the tasks live on as long as the event loop runs.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from miles.data.sample import FinishReason, Group, Sample
from miles.rewards.grader import Grader
from miles.rollout.answers import ExpertShape, Generation
from miles.rollout.blame import Blame
from miles.rollout.client import Continuation, EngineClient, Failure, RequestError, SamplingParams
from miles.rollout.engines import Engine, EngineList
from miles.rollout.responses import extend, new_tokens
from miles.rollout.text import ResponseText

log = logging.getLogger(__name__)

LANDING_SECONDS = 0.25
"""How often engines are asked again to end what they generate: a request that was on its way did not hear it."""


@dataclass(frozen=True, slots=True)
class Generating:
    """How responses are generated, whoever asks for them."""

    params: SamplingParams
    text: ResponseText
    max_groups: int
    """Groups in flight at once."""
    max_retries: int
    experts: ExpertShape | None = None
    """Record the routed experts of every token."""
    chunk_seconds: float | None = None
    """About how long one request generates, so that partial responses come back; None: to the end."""
    shortest_chunk: int = 64
    """Tokens that a request may generate at least: what it costs to ask again is not to be noticed."""


@dataclass(frozen=True, slots=True)
class _Request:
    """A group's request in flight."""

    group: Group
    engine: Engine
    allowed: list[tuple[Sample, int]]
    """The samples that it continues, and how many tokens each may get."""
    alone: bool
    """Nothing else is in flight as long as it is."""
    began: float


@dataclass
class Flight:
    """Groups in flight under one set of parameters. Positions tell them apart."""

    client: EngineClient
    engines: EngineList
    grader: Grader
    how: Generating
    blame: Blame = field(init=False)
    _requests: dict[asyncio.Task[list[Generation]], _Request] = field(default_factory=dict)
    _gradings: dict[asyncio.Task[None], Group] = field(default_factory=dict)
    _landing: bool = False
    _tokens_per_second: float = 0.0
    """Of one response, as of late."""

    def __post_init__(self) -> None:
        self.blame = Blame(self.how.max_retries)

    @property
    def generating(self) -> bool:
        """Whether a request is in flight."""
        return bool(self._requests)

    def start(self, groups: Mapping[int, Group], wanted: Mapping[int, int | None]) -> None:
        """Send as many requests as may be in flight, in the order of `wanted`.

        `wanted`: by position, how many tokens of the newest weights each sample of the group should have; None: all.
        Groups in flight are left alone. Suspects run alone, when nobody else wants to run.
        """
        busy = {request.group.position for request in self._requests.values()}
        if any(map(self.blame.is_suspect, busy)):
            return
        others = [position for position in wanted if not self.blame.is_suspect(position)]
        for position in others:
            if len(self._requests) >= self.how.max_groups:
                return
            if position not in busy and self.blame.may_start(position):
                self._send(groups[position], wanted[position], alone=False)
        if not others and not busy:
            suspect = next((position for position in wanted if self.blame.may_start(position)), None)
            if suspect is not None:
                self._send(groups[suspect], wanted[suspect], alone=True)

    def grade(self, group: Group) -> None:
        """Grade a finished group."""
        self._gradings[asyncio.create_task(self.grader.grade([group]))] = group

    async def wait(self, seconds: float) -> set[int]:
        """Wait until something came back, at most so long; the positions of groups that changed.

        Finished groups begin to be graded. Raises EngineError and DataError for what must stop the run.
        """
        tasks = {*self._requests, *self._gradings}
        if not tasks:
            await asyncio.sleep(seconds)
            return set()
        await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        changed: set[int] = set()
        for grading in [task for task in self._gradings if task.done()]:
            changed.add(self._gradings.pop(grading).position)
            grading.result()
        for task in [task for task in self._requests if task.done()]:
            request = self._requests[task]
            self._forget(task)
            if self._take(request, task):
                changed.add(request.group.position)
        return changed

    async def land(self, patience: float) -> set[int]:
        """End all requests and take what they have; the positions of groups that changed. What has not come back after
        `patience` seconds is given up.
        """
        changed: set[int] = set()
        deadline = time.monotonic() + patience
        self._landing = True
        try:
            while self._requests and time.monotonic() < deadline:
                await self.client.abort({request.engine for request in self._requests.values()})
                changed |= await self.wait(LANDING_SECONDS)
            await self._give_up()
        finally:
            self._landing = False
        return changed

    async def cancel(self) -> None:
        """Give up all requests and gradings."""
        await self._give_up()
        await _cancelled(self._gradings)
        self._gradings.clear()

    async def _give_up(self) -> None:
        await _cancelled(self._requests)
        for task in list(self._requests):
            self._forget(task)

    def _forget(self, task: asyncio.Task[list[Generation]]) -> None:
        request = self._requests.pop(task)
        request.engine.load -= len(request.allowed)

    def _send(self, group: Group, until: int | None, *, alone: bool) -> None:
        engine = self.engines.least_loaded(self.blame.avoid(group.position))
        if engine is None:
            return
        allowed = self._allowed(group, until)
        responses = [Continuation(sample.tokens, sample.seed, count) for sample, count in allowed]
        call = self.client.generate(engine, responses, self.how.params, experts=self.how.experts)
        engine.load += len(responses)
        self._requests[asyncio.create_task(call)] = _Request(group, engine, allowed, alone, time.monotonic())

    def _allowed(self, group: Group, until: int | None) -> list[tuple[Sample, int]]:
        """The samples that go on, and the tokens that each may get in the next request."""
        chunk = self.how.params.max_new_tokens
        if self.how.chunk_seconds is not None:
            chunk = max(self.how.shortest_chunk, int(self._tokens_per_second * self.how.chunk_seconds))
        allowed = []
        for sample in group.samples:
            if sample.finish_reason is not None:
                continue
            count = min(chunk, self.how.params.max_new_tokens - len(sample.response_tokens))
            if until is not None:
                count = min(count, until - self._new_tokens(sample))
            if count > 0:
                allowed.append((sample, count))
        assert allowed, f"group {group.position} has nothing to generate"
        return allowed

    def _new_tokens(self, sample: Sample) -> int:
        assert self.engines.version is not None
        return new_tokens(sample, self.engines.version)

    def _take(self, request: _Request, task: asyncio.Task[list[Generation]]) -> bool:
        """Use the outcome of a request; whether its group changed."""
        group, engine = request.group, request.engine
        try:
            generations = task.result()
            self._check(engine, generations)
        except RequestError as error:
            self._failed(request, error)
            return group.position in self.blame.quarantined
        engine.answered()
        self.blame.answered(group.position)
        longest = max(len(generation.tokens) for generation in generations)
        self._tokens_per_second = longest / max(time.monotonic() - request.began, 1e-3)
        for (sample, _), generation in zip(request.allowed, generations, strict=True):
            extend(sample, generation, self.how.text, self.how.params.max_new_tokens)
        if group.finished:
            self.grade(group)
        return longest > 0

    def _check(self, engine: Engine, generations: list[Generation]) -> None:
        """Raise RequestError for answers that must not be used."""
        versions = {version for generation in generations for version in generation.weight_versions}
        if self.engines.version is not None and versions - {self.engines.version}:
            engine.weights = None
            detail = f"{engine} answered with weights of version {sorted(versions)}, not {self.engines.version}"
            raise RequestError(Failure.UNREACHABLE, detail)
        aborted = [each for each in generations if each.finish_reason is FinishReason.ABORT]
        if aborted and not self._landing:
            detail = f"{engine} aborted a response: {aborted[0].abort_message or 'no reason given'}"
            raise RequestError(Failure.FAILED, detail)

    def _failed(self, request: _Request, error: RequestError) -> None:
        position, engine, detail = request.group.position, request.engine, str(error)
        if error.kind in (Failure.DIED, Failure.UNREACHABLE):
            if engine.unreachable():
                log.warning("%s; its requests go to others, or wait for it", detail)
        else:
            log.warning("prompt '%s': %s", request.group.prompt.id, detail)
        if error.kind is Failure.REFUSED:
            self.blame.refused(position, detail)
        elif error.kind is Failure.DIED:
            self.blame.died(position, detail, alone=request.alone)
        elif error.kind is Failure.FAILED and not self._landing:
            self.blame.failed(position, engine, detail)


async def _cancelled(tasks: Iterable[asyncio.Task]) -> None:
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
