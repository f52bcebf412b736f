"""How an engine's answers become a sample: begun, continued over several requests, cut off, finished.

Per-token lists are never changed in place, so that a shallow copy of a sample is a snapshot of it. Pure; sending
belongs to `miles.rollout.flight`.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np

from miles.data.sample import FinishReason, Group, Prompt, Sample, sample_seed
from miles.rollout.answers import Generation
from miles.rollout.closing import Progress
from miles.rollout.text import ResponseText


def new_group(prompt: Prompt, *, run_seed: int, size: int, position: int, epoch: int, born: int) -> Group:
    """A group without tokens."""
    seeds = (sample_seed(run_seed, prompt.id, index, epoch) for index in range(size))
    samples = [Sample(prompt, index, seed) for index, seed in enumerate(seeds)]
    return Group(prompt, samples, position, epoch, born)


def snapshot(group: Group) -> Group:
    """The group as it is now, whatever becomes of its samples."""
    return replace(group, samples=[copy.copy(sample) for sample in group.samples])


def extend(sample: Sample, generation: Generation, text: ResponseText, max_tokens: int) -> None:
    """Append what an engine generated after `sample.tokens`; the sample is finished where that ends it.

    `max_tokens` bounds the whole response. A request that ended because it was allowed no more tokens, or that was
    aborted, leaves the sample partial.
    """
    known = len(sample.response_tokens)
    tokens = sample.response_tokens + generation.tokens
    finish = generation.finish_reason
    end = text.stop_across(tokens, known)
    if end is not None:
        tokens, finish = tokens[:end], FinishReason.STOP
    new = len(tokens) - known
    sample.response_tokens = tokens
    sample.log_probs = sample.log_probs + generation.log_probs[:new]
    sample.loss_mask = sample.loss_mask + [1] * new
    sample.weight_versions = sample.weight_versions + generation.weight_versions[:new]
    if generation.routed_experts is not None and new:
        sample.routed_experts = _with_routes(sample, generation.routed_experts)
    if finish is not FinishReason.STOP:
        finish = FinishReason.LENGTH
        if len(tokens) < max_tokens:
            return
    sample.finish_reason = finish
    sample.text = text.of(tokens, finish)


def _with_routes(sample: Sample, routes: np.ndarray) -> np.ndarray:
    """The sample's routes with those of its newest tokens.

    A continuation reads all earlier tokens again, maybe with newer weights; for those the routes stay that sampled
    them.
    """
    rows = len(sample.tokens) - 1
    if sample.routed_experts is None:
        return routes[:rows]
    return np.concatenate([sample.routed_experts, routes[len(sample.routed_experts) : rows]])


def new_tokens(sample: Sample, version: int) -> int:
    """Tokens at the end of the response that weights of `version` sampled."""
    older = next((i for i, v in enumerate(reversed(sample.weight_versions)) if v != version), None)
    return len(sample.weight_versions) if older is None else older


def progress_of(group: Group, version: int) -> Progress:
    """How far a group has come in the step whose engines hold weights of `version`."""
    return Progress(
        counts=tuple(new_tokens(sample, version) for sample in group.samples),
        ended=tuple(sample.finish_reason is not None for sample in group.samples),
        graded=group.graded,
        equal=group.graded and has_equal_rewards(group),
    )


def has_equal_rewards(group: Group) -> bool:
    """Such a group has no advantage to learn from."""
    return len({sample.reward for sample in group.samples}) == 1


def cut_off(group: Group, version: int, limit: int) -> Group:
    """The group with at most `limit` tokens of `version` in each sample; nothing of it is graded."""
    return replace(group, samples=[_cut_off(sample, new_tokens(sample, version) - limit) for sample in group.samples])


def _cut_off(sample: Sample, surplus: int) -> Sample:
    """Without the last `surplus` tokens; a sample that had ended among them goes on."""
    ungraded = replace(sample, reward=None, reward_parts={})
    if surplus <= 0:
        return ungraded
    kept = len(sample.response_tokens) - surplus
    rows = len(sample.prompt.tokens) + kept - 1
    return replace(
        ungraded,
        response_tokens=sample.response_tokens[:kept],
        log_probs=sample.log_probs[:kept],
        loss_mask=sample.loss_mask[:kept],
        weight_versions=sample.weight_versions[:kept],
        routed_experts=None if sample.routed_experts is None or kept == 0 else sample.routed_experts[:rows],
        text="",
        finish_reason=None,
    )
