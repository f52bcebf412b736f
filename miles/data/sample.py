"""`Sample`: one response to one prompt, with everything that training needs to know about each of its tokens.

Owns the record only. How it is filled belongs to `miles.rollout`, how it is scored to `miles.rewards`, how it
becomes tensors to `miles.data.batch`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np


class FinishReason(StrEnum):
    """Why generation of a sample ended; SGLang's own words."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


@dataclass(frozen=True, slots=True)
class Prompt:
    """One row of the prompt file after the chat template and the tokenizer."""

    id: str
    """Stable over runs and machines: the row's own `id`, or a hash of its content."""
    tokens: list[int]
    text: str
    label: Any = None
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Sample:
    """One response. All per-token lists have the length of `response_tokens`."""

    prompt: Prompt
    index: int
    """Position in its group, 0 <= index < group_size."""
    seed: int
    """Sampling seed, `sample_seed(...)`: what this sample draws depends on nothing else."""
    response_tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    """log p of each response token under the engine's temperature-scaled distribution."""
    loss_mask: list[int] = field(default_factory=list)
    """1 where the policy wrote the token, 0 where a tool or an environment did."""
    weight_versions: list[int] = field(default_factory=list)
    """Version of the weights that sampled each token."""
    routed_experts: np.ndarray | None = None
    """Unsigned [prompt + response - 1, layers, top_k]; None for dense models or when not recorded."""
    text: str = ""
    finish_reason: FinishReason | None = None
    """None: not finished, a partial response that can be continued."""
    reward: float | None = None
    reward_parts: dict[str, float] = field(default_factory=dict)
    """Score of each grader before weighting, by grader name."""

    @property
    def tokens(self) -> list[int]:
        return self.prompt.tokens + self.response_tokens

    @property
    def truncated(self) -> bool:
        return self.finish_reason is FinishReason.LENGTH


@dataclass(slots=True)
class Group:
    """All samples of one prompt in one step; the unit of the group-relative advantage."""

    prompt: Prompt
    samples: list[Sample]
    position: int = 0
    """Place in the endless sequence of draws (`miles.data.order`): who a group is, for the whole of a run."""
    epoch: int = 0
    """How often the data was used up before it was drawn; part of its samples' seeds."""
    born: int = 0
    """Training step in which it was drawn; the difference to the step that trains on it is its staleness."""

    @property
    def finished(self) -> bool:
        """Whether every sample has its last token; graded or not."""
        return all(sample.finish_reason is not None for sample in self.samples)

    @property
    def graded(self) -> bool:
        return all(sample.reward is not None for sample in self.samples)


def sample_seed(run_seed: int, prompt_id: str, index: int, epoch: int = 0) -> int:
    """Counter-based seed of a sample in [0, 2**31): a hash of who it is, not of when or where it runs."""
    digest = hashlib.blake2b(f"{run_seed}/{prompt_id}/{epoch}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % 2**31
