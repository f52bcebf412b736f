"""Evaluation: responses to held-out prompts, their mean reward, and pass@k.

Owns the numbers and `results.json`. Generating and grading are the rollout manager's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from pathlib import Path
from typing import Any

from miles.config.schema import EvalSection
from miles.data.sample import Group, Prompt
from miles.rollout.manager import OnProgress, RolloutManager

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
    manager: RolloutManager,
    prompts: Sequence[Prompt],
    section: EvalSection,
    on_progress: OnProgress | None = None,
) -> EvalResult:
    """Evaluate on the first `section.max_prompts` of `prompts`.

    `manager` draws `section.samples` per prompt at `section.temperature`. Every evaluation of a run draws
    with the same seeds, so that two of them differ by the weights alone. Raises EngineError and DataError.
    """
    chosen = prompts[: section.max_prompts]
    groups = await manager.collect(chosen, [EVALUATION_EPOCH] * len(chosen), on_progress)
    return summarize(groups, section)


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
