"""What the trainer's rank 0 holds of the rollout: prompts, grader, engines, behind plain blocking calls.

Owns the event loop that the asynchronous parts run in, and the checks of prompts and graders before anything starts.
How generation works belongs to `miles.rollout.manager`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from miles.config.schema import DataSection, EvalStep, RlStep
from miles.data.inputs import open_model, resolved
from miles.data.order import prompts_of_step
from miles.data.prompts import load_prompts
from miles.data.sample import Group, Prompt
from miles.rewards.grader import build_grader
from miles.rollout.answers import expert_shape
from miles.rollout.client import EngineClient, SamplingParams
from miles.rollout.evaluate import EvalResult, evaluate
from miles.rollout.manager import OnProgress, RolloutManager
from miles.runs.paths import RunPaths

T = TypeVar("T")


class RolloutSession:
    """The rollout of one `rl` or `eval` step. Close it when done."""

    def __init__(self, step: RlStep | EvalStep, *, paths: RunPaths, seed: int, engine_urls: Sequence[str]) -> None:
        """Read and check prompts and graders, and connect. Raises DataError and EngineError."""
        self._step = step
        self._seed = seed
        self._paths = paths
        self._model = open_model(step.model, paths)
        self._grader = build_grader(step.rewards)
        self._prompts = self._load(step.data) if isinstance(step, RlStep) else []
        self._heldout = [] if step.eval.data is None else self._load(step.eval.data)
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
            len(self._prompts),
            self._step.rollout.prompts_per_step,
            step - 1,
            seed=self._seed,
            shuffle=self._step.data.shuffle,
        )
        prompts = [self._prompts[draw.index] for draw in draws]
        epochs = [draw.epoch for draw in draws]
        return self._run(self._train_manager.collect(prompts, epochs, on_progress))

    def evaluate(self, on_progress: OnProgress) -> EvalResult:
        """Evaluate the engines' weights on the held-out prompts."""
        return self._run(evaluate(self._eval_manager, self._heldout, self._step.eval, on_progress))

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
        self._grader.close()
        self._runner.close()

    def _run(self, call: Coroutine[Any, Any, T]) -> T:
        return self._runner.run(call)

    def _load(self, data: DataSection) -> list[Prompt]:
        prompts = load_prompts(resolved(data, self._paths), self._model.tokenizer, max_prompt_tokens=self._room())
        self._grader.check(prompts)
        return prompts

    def _room(self) -> int:
        """Tokens that the longest response leaves for a prompt, in the engine's context and in a micro-batch."""
        step = self._step
        bounds = [self._model.context_length]
        if step.engine.context_length is not None:
            bounds.append(step.engine.context_length)
        if isinstance(step, RlStep):
            bounds.append(step.train.max_tokens_per_micro_batch)
        return min(bounds) - step.rollout.max_response_tokens

    def _manager(self, temperature: float, group_size: int) -> RolloutManager:
        rollout = self._step.rollout
        return RolloutManager(
            self._client,
            self._grader,
            SamplingParams.of(rollout, self._model.end_tokens, temperature),
            group_size=group_size,
            max_concurrent_groups=rollout.max_concurrent_groups,
            seed=self._seed,
            experts=expert_shape(self._model.config) if self._step.engine.return_routed_experts else None,
        )
