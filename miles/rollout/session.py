"""What the trainer's rank 0 holds of the rollout: prompts, grader, engines, behind plain blocking calls.

Owns the event loop that the asynchronous parts run in. How generation works belongs to `miles.rollout.manager`,
reading and checking prompts and graders to `miles.rollout.inputs`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from miles.config.schema import EvalStep, RlStep
from miles.data.order import prompts_of_step
from miles.data.sample import Group
from miles.rollout.answers import expert_shape
from miles.rollout.client import EngineClient, SamplingParams
from miles.rollout.evaluate import EvalResult, evaluate
from miles.rollout.inputs import open_inputs
from miles.rollout.manager import OnProgress, RolloutManager
from miles.runs.paths import RunPaths

T = TypeVar("T")


class RolloutSession:
    """The rollout of one `rl` or `eval` step. Close it when done."""

    def __init__(self, step: RlStep | EvalStep, *, paths: RunPaths, seed: int, engine_urls: Sequence[str]) -> None:
        """Read and check prompts and graders, and connect. Raises DataError and EngineError."""
        self._step = step
        self._seed = seed
        self._inputs = open_inputs(step, paths)
        self._client = EngineClient(
            engine_urls,
            paths.engine_token.read_text(encoding="utf-8").strip(),
            timeout=step.rollout.request_timeout,
            max_retries=step.rollout.max_retries,
        )
        self._runner = asyncio.Runner()
        self._train_manager = self._manager(step.rollout.temperature, step.rollout.group_size)
        self._eval_manager = self._manager(step.eval.temperature, step.eval.samples)

    def collect(self, step: int, on_progress: OnProgress) -> list[Group]:
        """Graded groups of training step `step` (1, 2, ...), in the order in which its prompts are drawn."""
        assert isinstance(self._step, RlStep)
        draws = prompts_of_step(
            len(self._inputs.prompts),
            self._step.rollout.prompts_per_step,
            step - 1,
            seed=self._seed,
            shuffle=self._step.data.shuffle,
        )
        prompts = [self._inputs.prompts[draw.index] for draw in draws]
        epochs = [draw.epoch for draw in draws]
        return self._run(self._train_manager.collect(prompts, epochs, on_progress))

    def evaluate(self, on_progress: OnProgress) -> EvalResult:
        """Evaluate the engines' weights on the held-out prompts."""
        return self._run(evaluate(self._eval_manager, self._inputs.heldout, self._step.eval, on_progress))

    def post(self, path: str, bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """POST bodies[i] to engine i, all at once; the answers in that order."""
        return self._run(self._client.post_each(path, bodies))

    def sleep(self) -> None:
        """Have the idle engines give up their GPU memory. SGLang dies when it still holds a request."""
        self._run(self._client.post_all("/flush_cache"))
        self._run(self._client.post_all("/release_memory_occupation", {}))

    def wake(self) -> None:
        """Give the engines their memory back; their weights are garbage until the next push."""
        self._run(self._client.post_all("/resume_memory_occupation", {}))

    def close(self) -> None:
        """End graders and connections."""
        self._run(self._client.close())
        self._inputs.grader.close()
        self._runner.close()

    def _run(self, call: Coroutine[Any, Any, T]) -> T:
        return self._runner.run(call)

    def _manager(self, temperature: float, group_size: int) -> RolloutManager:
        rollout = self._step.rollout
        return RolloutManager(
            self._client,
            self._inputs.grader,
            SamplingParams.of(rollout, self._inputs.model.end_tokens, temperature),
            group_size=group_size,
            max_concurrent_groups=rollout.max_concurrent_groups,
            seed=self._seed,
            experts=expert_shape(self._inputs.model.config) if self._step.engine.return_routed_experts else None,
        )
