"""Evaluation: responses to held-out prompts, their mean reward, and pass@k.

Owns the numbers and `results.json`. Requests and gradings are those of `miles.rollout.flight`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import comb
from pathlib import Path
from typing import Any

from miles.config.schema import EvalSection
from miles.data.sample import Group, Prompt
from miles.errors import EngineError, EngineLost, Interrupted
from miles.rollout.flight import Flight
from miles.rollout.manager import TICK_SECONDS, OnProgress
from miles.rollout.responses import new_group

EVALUATION_EPOCH = 0


@dataclass(frozen=True, slots=True)
class EvalResult:
    """The outcome of one evaluation."""

    reward: float
    """Mean over all samples."""
    pass_at: dict[int, float]
    """pass@k by k, mean over prompts."""
    length_mean: float
    """Tokens per response."""
    truncated_fraction: float
    groups: list[Group]

    def metrics(self) -> dict[str, float]:
        """`eval/...` values for metrics.jsonl."""
        return {f"eval/{name}": value for name, value in self._numbers().items()}

    def write(self, path: Path) -> None:
        """Write results.json: the numbers, then every prompt with its responses."""
        document = {
            **self._numbers(),
            "prompts": len(self.groups),
            "samples": len(self.groups[0].samples),
            "results": [_prompt_result(group) for group in self.groups],
        }
        text = json.dumps(document, indent=1, ensure_ascii=False, default=str)
        path.write_text(text + "\n", encoding="utf-8")

    def _numbers(self) -> dict[str, float]:
        return {
            "reward": self.reward,
            **{f"pass@{k}": value for k, value in self.pass_at.items()},
            "length_mean": self.length_mean,
            "truncated_fraction": self.truncated_fraction,
        }


async def evaluate(
    flight: Flight,
    prompts: Sequence[Prompt],
    section: EvalSection,
    *,
    seed: int,
    stop: Callable[[], bool],
    on_progress: OnProgress = lambda done, total: None,
    wait_for_engines: bool = False,
) -> EvalResult:
    """Evaluate on the first `section.max_prompts` of `prompts`, with `section.samples` responses to each.

    Every evaluation of a run draws with the same seeds (`seed` is the run's), so that two of them differ by the
    weights alone. Raises Interrupted when `stop()` turns true; EngineLost when no engine is in service any more,
    unless it should `wait_for_engines`; EngineError and DataError. In no case does anything stay in flight.
    """
    groups = {
        position: new_group(
            prompt, run_seed=seed, size=section.samples, position=position, epoch=EVALUATION_EPOCH, born=0
        )
        for position, prompt in enumerate(prompts[: section.max_prompts])
    }
    done: set[int] = set()
    try:
        while len(done) < len(groups):
            if stop():
                raise Interrupted("stopped during an evaluation, which begins again when the run continues")
            flight.engines.refresh()
            if not (wait_for_engines or flight.engines.in_service):
                raise EngineLost("no engine with current weights is left to evaluate on")
            flight.start(groups, {position: None for position, group in groups.items() if not group.finished})
            changed = await flight.wait(TICK_SECONDS)
            _check(flight, groups, changed)
            done |= {position for position in changed if groups[position].graded}
            on_progress(len(done), len(groups))
    finally:
        await flight.cancel()
    return summarize(list(groups.values()), section)


def _check(flight: Flight, groups: Mapping[int, Group], changed: Iterable[int]) -> None:
    """Raise EngineError for a prompt that no engine can serve: an evaluation without it would be another one."""
    for position in changed:
        if position in flight.blame.quarantined:
            raise EngineError(
                f"prompt '{groups[position].prompt.id}': {flight.blame.quarantined[position]}",
                fix="see the engine's log; correct the prompt, or remove it from eval.data",
            )


def summarize(groups: Sequence[Group], section: EvalSection) -> EvalResult:
    """The result of graded groups, all of the same size."""
    samples = [sample for group in groups for sample in group.samples]
    passes = [sum(_passes(sample.reward, section) for sample in group.samples) for group in groups]
    size = len(groups[0].samples)
    return EvalResult(
        reward=sum(sample.reward or 0.0 for sample in samples) / len(samples),
        pass_at={k: sum(pass_at_k(size, passed, k) for passed in passes) / len(groups) for k in section.pass_at},
        length_mean=sum(len(sample.response_tokens) for sample in samples) / len(samples),
        truncated_fraction=sum(sample.truncated for sample in samples) / len(samples),
        groups=list(groups),
    )


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Unbiased probability that one of k samples passes, from `passed` of `samples` (Chen et al.

    2021, eq. 1).
    """
    assert 0 <= passed <= samples and 1 <= k <= samples
    return 1.0 - comb(samples - passed, k) / comb(samples, k)


def _passes(reward: float | None, section: EvalSection) -> bool:
    assert reward is not None, "an evaluated sample is graded"
    return reward >= section.pass_threshold


def _prompt_result(group: Group) -> dict[str, Any]:
    return {
        "id": group.prompt.id,
        "prompt": group.prompt.text,
        "label": group.prompt.label,
        "responses": [
            {
                "text": sample.text,
                "reward": sample.reward,
                "reward_parts": sample.reward_parts,
                "finish_reason": sample.finish_reason,
                "length": len(sample.response_tokens),
            }
            for sample in group.samples
        ],
    }
