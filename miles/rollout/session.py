"""What the trainer's rank 0 holds of the rollout: prompts, grader, engines, journal, behind plain blocking calls.

Owns the event loop that the asynchronous parts run in, and where the stage stands between two steps. How a step is
collected belongs to `miles.rollout.manager`; which steps are replayed from the journal is the trainer's to decide.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from miles.config.schema import EvalStep, RlStep
from miles.data.sample import Prompt
from miles.errors import EngineError, EngineLost, Interrupted, UnknownRouteError
from miles.rollout.answers import expert_shape
from miles.rollout.client import EngineClient, SamplingParams
from miles.rollout.draws import Source
from miles.rollout.engines import Engine, EngineList
from miles.rollout.evaluate import EvalResult, evaluate
from miles.rollout.flight import Flight, Generating
from miles.rollout.flusher import Flusher
from miles.rollout.inputs import open_inputs
from miles.rollout.manager import (
    TICK_SECONDS,
    Collected,
    Frontier,
    NeedWeights,
    OnProgress,
    StepCollection,
    Stopped,
)
from miles.rollout.text import ResponseText
from miles.runs.claim import Fence
from miles.runs.journal import Batch, Journal, OpenStep
from miles.runs.paths import RunPaths

T = TypeVar("T")

__all__ = ["Collected", "NeedWeights", "RolloutSession", "Stopped"]


class RolloutSession:
    """The rollout of one `rl` or `eval` step. Close it when done."""

    def __init__(
        self,
        step: RlStep | EvalStep,
        *,
        paths: RunPaths,
        stage: str,
        seed: int,
        engines_file: Path,
        fence: Fence,
        stop: Callable[[], bool],
    ) -> None:
        """Read and check prompts and graders; engines need not be there yet. Raises DataError.

        `stop` is asked about ten times a second whether waiting and generating should end.
        """
        self._step = step
        self._seed = seed
        self._stop = stop
        self._inputs = open_inputs(step, paths)
        self.prompts: Mapping[str, Prompt] = {prompt.id: prompt for prompt in self._inputs.prompts}
        """The prompts that are trained on, by id."""
        self.journal = Journal(paths, stage, fence, self.prompts)
        """Reading and pruning it is the caller's; `collect` writes it."""
        self._engines = EngineList(engines_file, receive_weights=isinstance(step, RlStep))
        self._client = EngineClient(
            paths.engine_token.read_text(encoding="utf-8").strip(), timeout=step.rollout.request_timeout
        )
        self._runner = asyncio.Runner()
        self._frontier = Frontier()
        self._open_step: OpenStep | None = None
        self._collection: StepCollection | None = None
        if isinstance(step, RlStep):
            # A token waits for the rest of its request, and then for the next flush: a kill loses both at most.
            half = step.journal.flush_seconds / 2
            self._train_flight = self._flight(step.rollout.temperature, chunk_seconds=half)
            self._flusher = Flusher(self.journal, half)

    def restore(self, batch: Batch | None, open_step: OpenStep | None) -> None:
        """Stand where the rollout stood after the step of `batch` (None: before the first), with what the journal
        holds of the step after it.
        """
        self._frontier = Frontier.after(batch)
        self._open_step = open_step
        self._collection = None

    def collect(self, step: int, on_progress: OnProgress) -> Collected | NeedWeights | Stopped:
        """The batch of training step `step` (1, 2, ...), written to the journal.

        The engines must have been given weights of version `step - 1`. NeedWeights: give them to `stale_engines(step -
        1)` and call again; what other engines generate is not touched. Stopped: only `close` makes sense now. Raises
        EngineError, DataError and RunError.
        """
        assert isinstance(self._step, RlStep)
        assert self._engines.version == step - 1, "the engines have other weights"
        if self._collection is None:
            self._collection = self._begin(self._step, step)
        assert self._collection.step == step
        outcome = self._run(self._collection.run(on_progress))
        if isinstance(outcome, Collected):
            self._frontier = Frontier.after(outcome.batch)
            self._collection = None
        return outcome

    def evaluate(self, on_progress: OnProgress) -> EvalResult:
        """Evaluate the engines' weights on the held-out prompts.

        Raises Interrupted on a stop, EngineLost when no engine with the current weights is left (an `eval` step waits
        for one instead), EngineError and DataError.
        """
        call = evaluate(
            self._flight(self._step.eval.temperature),
            self._inputs.heldout,
            self._step.eval,
            seed=self._seed,
            stop=self._stop,
            on_progress=on_progress,
            wait_for_engines=isinstance(self._step, EvalStep),
        )
        return self._run(call)

    def wait_ready(self) -> None:
        """Wait until every engine of the file answers. Raises Interrupted on a stop."""

        async def wait() -> None:
            while not self._engines.all_ready:
                if self._stop():
                    raise Interrupted("stopped while the engines were starting")
                await asyncio.sleep(TICK_SECONDS)
                self._engines.refresh()

        self._engines.refresh()
        self._run(wait())

    def stale_engines(self, version: int) -> list[int]:
        """Engines that are up and do not hold weights of `version`; they serve from now on only with them. `post` and
        `weights_pushed` mean these starts of them until the next call.
        """
        return self._engines.receivers(version)

    def post(
        self, path: str, bodies: Sequence[dict[str, Any]], engines: Sequence[int]
    ) -> list[dict[str, Any] | EngineLost]:
        """POST bodies[i] to engines[i], all at once; the answers in that order.

        The answer of an engine that is gone, or was started again since `stale_engines`, is an EngineLost. Raises
        UnknownRouteError, and EngineError for a refusal.
        """

        async def post_all() -> list[dict[str, Any] | EngineLost]:
            calls = (self._post_to(index, path, body) for index, body in zip(engines, bodies, strict=True))
            return list(await asyncio.gather(*calls))

        return self._run(post_all())

    def weights_pushed(self, version: int, engines: Sequence[int]) -> None:
        """These engines hold `version` now, which `stale_engines` was asked for."""
        self._engines.pushed(version, engines)

    def sleep(self) -> None:
        """Have the idle engines give up their GPU memory; one that is lost is passed over. SGLang dies when it still
        holds a request.
        """

        async def one(engine: Engine) -> None:
            await self._client.post(engine, "/flush_cache", {})
            await self._client.post(engine, "/release_memory_occupation", {})
            engine.asleep = True

        self._run(self._each([engine for engine in self._engines.ready if not engine.asleep], one))

    def wake(self) -> None:
        """Give the engines that sleep their memory back; their weights are garbage until the next push."""

        async def one(engine: Engine) -> None:
            await self._client.post(engine, "/resume_memory_occupation", {})
            engine.asleep, engine.weights = False, None

        self._run(self._each([engine for engine in self._engines.ready if engine.asleep], one))

    def close(self) -> None:
        """End whatever is in flight, graders and connections."""

        async def close() -> None:
            if isinstance(self._step, RlStep):
                await self._train_flight.cancel()
            await self._client.close()

        self._run(close())
        self._inputs.grader.close()
        self._runner.close()

    def _begin(self, section: RlStep, step: int) -> StepCollection:
        rollout = section.rollout
        source = Source(
            self._inputs.prompts, rollout.prompts_per_step, rollout.group_size, self._seed, section.data.shuffle
        )
        collection = StepCollection(
            step,
            self._frontier,
            rollout,
            source=source,
            flight=self._train_flight,
            flusher=self._flusher,
            stop=self._stop,
        )
        if self._open_step is not None:
            collection.restore(self._open_step)
            self._open_step = None
        return collection

    def _flight(self, temperature: float, chunk_seconds: float | None = None) -> Flight:
        rollout, model = self._step.rollout, self._inputs.model
        params = SamplingParams.of(rollout, model.end_tokens, temperature)

        def decode(tokens: list[int]) -> str:
            text = model.tokenizer.decode(tokens, skip_special_tokens=True)
            assert isinstance(text, str)
            return text

        how = Generating(
            params,
            ResponseText(decode, params.stop),
            max_groups=rollout.max_concurrent_groups,
            max_retries=rollout.max_retries,
            experts=expert_shape(model.config) if self._step.engine.return_routed_experts else None,
            chunk_seconds=chunk_seconds,
        )
        return Flight(self._client, self._engines, self._inputs.grader, how)

    async def _post_to(self, index: int, path: str, body: dict[str, Any]) -> dict[str, Any] | EngineLost:
        engine = self._engines.receiver(index)
        if engine is None:
            return EngineLost(f"engine {index} was started again")
        try:
            answer: dict[str, Any] = await self._client.post(engine, path, body)
        except EngineLost as error:
            engine.unreachable()
            return error
        except UnknownRouteError:
            raise
        except EngineError:
            # A new start on the same port refuses the rest of what was meant for the one before.
            self._engines.refresh(now=True)
            if self._engines.current(engine):
                raise
            return EngineLost(f"engine {index} was started again")
        return answer

    async def _each(self, engines: Sequence[Engine], call: Callable[[Engine], Coroutine[Any, Any, None]]) -> None:
        outcomes = await asyncio.gather(*map(call, engines), return_exceptions=True)
        for engine, outcome in zip(engines, outcomes, strict=True):
            if isinstance(outcome, EngineLost):
                engine.weights = None
            elif isinstance(outcome, BaseException):
                raise outcome

    def _run(self, call: Coroutine[Any, Any, T]) -> T:
        return self._runner.run(call)
