"""Samples as deltas: what is new since a mark, and groups put together again from deltas. Pure.

A delta names its sample (position, index) and where it starts; it replaces all that is known of the sample from there
on. So one that arrives twice, or again and longer, does no harm, and one that starts behind the end of what is known
(a segment between them is lost) does not fit and is left out.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from miles.data.sample import FinishReason, Group, Prompt, Sample

log = logging.getLogger(__name__)

FindPrompt = Callable[[str, list[int]], Prompt]
"""`find(id, tokens)`: the prompt with this id. Raises DataError when there is none or it has other tokens."""


@dataclass(frozen=True, slots=True)
class Opening:
    """That a group exists. What was known of its position before is void: all its samples follow from their start."""

    position: int
    epoch: int
    born: int
    prompt_id: str
    prompt_tokens: list[int]
    carried: bool = False

    @classmethod
    def of(cls, group: Group, *, carried: bool = False) -> Opening:
        """The opening of a group."""
        return cls(group.position, group.epoch, group.born, group.prompt.id, group.prompt.tokens, carried)


@dataclass(frozen=True, slots=True)
class Mark:
    """How much of a sample is known already. Equal marks of one sample: nothing happened in between."""

    tokens: int
    last: tuple[int, float] | None
    """The last token and its log-probability: a sample that was begun anew is told by it."""
    rows: int
    """Rows of routed experts; -1: no routes."""
    text: str
    finish_reason: FinishReason | None
    reward: float | None
    reward_parts: dict[str, float]

    @classmethod
    def of(cls, sample: Sample) -> Mark:
        """All that the sample holds now."""
        count = len(sample.response_tokens)
        return cls(
            tokens=count,
            last=_token(sample, count),
            rows=-1 if sample.routed_experts is None else len(sample.routed_experts),
            text=sample.text,
            finish_reason=sample.finish_reason,
            reward=sample.reward,
            reward_parts=dict(sample.reward_parts),
        )

    def continued_by(self, sample: Sample) -> bool:
        """Whether the sample begins with what was marked."""
        rows = -1 if sample.routed_experts is None else len(sample.routed_experts)
        same = len(sample.response_tokens) >= self.tokens and _token(sample, self.tokens) == self.last
        return same and rows >= self.rows


@dataclass(frozen=True, slots=True)
class SampleDelta:
    """A sample from `start` on: the four per-token lists have one length; the rest is as of now."""

    position: int
    index: int
    seed: int
    start: int
    """Response tokens that precede this delta."""
    tokens: Sequence[int]
    log_probs: Sequence[float]
    loss_mask: Sequence[int]
    weight_versions: Sequence[int]
    rows_start: int
    """Rows of routed experts that precede this delta."""
    routed_experts: np.ndarray | None
    """Unsigned [rows, layers, top_k]; None: the sample has no routes."""
    text_start: int
    """Characters of the text that precede this delta."""
    text: str
    finish_reason: FinishReason | None
    reward: float | None
    reward_parts: dict[str, float]


def delta_since(mark: Mark | None, position: int, sample: Sample) -> SampleDelta:
    """What the sample holds beyond the mark; all of it when it does not continue what was marked."""
    if mark is None or not mark.continued_by(sample):
        mark = _NOTHING
    routes = sample.routed_experts
    rows_start = max(mark.rows, 0)
    text_start = len(mark.text) if sample.text.startswith(mark.text) else 0
    return SampleDelta(
        position=position,
        index=sample.index,
        seed=sample.seed,
        start=mark.tokens,
        tokens=sample.response_tokens[mark.tokens :],
        log_probs=sample.log_probs[mark.tokens :],
        loss_mask=sample.loss_mask[mark.tokens :],
        weight_versions=sample.weight_versions[mark.tokens :],
        rows_start=rows_start,
        routed_experts=None if routes is None else routes[rows_start:],
        text_start=text_start,
        text=sample.text[text_start:],
        finish_reason=sample.finish_reason,
        reward=sample.reward,
        reward_parts=sample.reward_parts,
    )


_NOTHING = Mark(tokens=0, last=None, rows=-1, text="", finish_reason=None, reward=None, reward_parts={})


def _token(sample: Sample, count: int) -> tuple[int, float] | None:
    return (sample.response_tokens[count - 1], sample.log_probs[count - 1]) if count else None


@dataclass(slots=True)
class _Known:
    """A group as far as it is known."""

    opening: Opening
    group: Group
    samples: dict[int, Sample] = field(default_factory=dict)
    routes: dict[int, list[np.ndarray]] = field(default_factory=dict)
    """Pieces of each sample's routed experts, by index."""


class Replay:
    """Puts groups together from openings and deltas, in the order in which they were written."""

    def __init__(self, find: FindPrompt) -> None:
        self._find = find
        self._known: dict[int, _Known] = {}
        self._unfit: dict[tuple[int, int], int] = {}

    def open(self, opening: Opening) -> None:
        """Begin a group. Raises DataError when its prompt is not known."""
        prompt = self._find(opening.prompt_id, opening.prompt_tokens)
        group = Group(prompt, [], position=opening.position, epoch=opening.epoch, born=opening.born)
        self._known[opening.position] = _Known(opening, group)

    def apply(self, delta: SampleDelta) -> None:
        """Add a delta, or leave it out when it does not fit."""
        known = self._known.get(delta.position)
        if known is None or not self._fits(known, delta):
            key = delta.position, delta.index
            self._unfit[key] = self._unfit.get(key, 0) + 1
            return
        if (sample := known.samples.get(delta.index)) is None:
            sample = known.samples[delta.index] = Sample(known.group.prompt, delta.index, delta.seed)
            known.group.samples.append(sample)
        sample.seed = delta.seed
        sample.response_tokens[delta.start :] = delta.tokens
        sample.log_probs[delta.start :] = delta.log_probs
        sample.loss_mask[delta.start :] = delta.loss_mask
        sample.weight_versions[delta.start :] = delta.weight_versions
        known.routes[delta.index] = _joined(known.routes.get(delta.index, []), delta)
        sample.text = sample.text[: delta.text_start] + delta.text
        sample.finish_reason = delta.finish_reason
        sample.reward = delta.reward
        sample.reward_parts = delta.reward_parts

    def finish(self) -> list[tuple[Opening, Group]]:
        """All groups in the order in which they were opened. What did not fit is logged."""
        for (position, index), count in self._unfit.items():
            log.warning(
                "sample %d of position %d: %d deltas follow what is lost; the rest of it is generated again",
                index,
                position,
                count,
            )
        for known in self._known.values():
            for index, pieces in known.routes.items():
                known.samples[index].routed_experts = _concatenated(pieces)
        return [(known.opening, known.group) for known in self._known.values()]

    def _fits(self, known: _Known, delta: SampleDelta) -> bool:
        sample = known.samples.get(delta.index)
        tokens, characters = (len(sample.response_tokens), len(sample.text)) if sample is not None else (0, 0)
        rows = sum(map(len, known.routes.get(delta.index, [])))
        return delta.start <= tokens and delta.text_start <= characters and delta.rows_start <= rows


def _joined(pieces: list[np.ndarray], delta: SampleDelta) -> list[np.ndarray]:
    """The pieces up to the delta's first row, and its own."""
    if delta.routed_experts is None:
        return []
    if delta.rows_start == 0:
        return [delta.routed_experts]
    if delta.rows_start < sum(map(len, pieces)):
        pieces = [np.concatenate(pieces)[: delta.rows_start]]
    return [*pieces, delta.routed_experts]


def _concatenated(pieces: list[np.ndarray]) -> np.ndarray | None:
    match pieces:
        case []:
            return None
        case [whole]:
            return whole
        case _:
            return np.concatenate(pieces)


def whole_group(group: Group, *, carried: bool = False) -> tuple[Opening, Iterable[SampleDelta]]:
    """A group's opening, and its samples from their start."""
    return Opening.of(group, carried=carried), (delta_since(None, group.position, sample) for sample in group.samples)
