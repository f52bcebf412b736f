"""Groups and samples for tests of the journal: drawn by hypothesis, built by hand, and compared to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from miles.data.sample import FinishReason, Group, Prompt, Sample
from miles.runs.claim import Fence
from miles.runs.journal import Batch, Dropped, Journal
from miles.runs.paths import RunPaths

PROMPTS = {
    id: Prompt(id, tokens, f"text of {id}", label={"answer": 4}, metadata={"source": "here"})
    for id, tokens in {"a": [1, 2, 3], "ä/\U0001f600": [150_000, 0], "": [], "b" * 70: list(range(40))}.items()
}

log_probs = st.one_of(
    st.floats(width=32, allow_nan=False), st.floats(-20, 0, allow_nan=False), st.sampled_from([0.0, -0.0, -1e-300])
)
rewards = st.one_of(st.none(), st.floats(allow_nan=False), st.sampled_from([0.0, 1.0, -0.0]))
texts = st.text(st.characters(codec=None, categories=None), max_size=8)
dropped_reasons = st.sampled_from(["zero-variance", "quarantined"])


@st.composite
def samples(draw: st.DrawFn, prompt: Prompt, index: int, routes: tuple[str, int, int] | None) -> Sample:
    """One sample; `routes`: dtype, layers and experts per token, of a model that has them."""
    count = draw(st.integers(0, 12))
    per_token = {"min_size": count, "max_size": count}
    experts = None
    if routes is not None and draw(st.booleans()):
        dtype, layers, top_k = routes
        rows = max(0, len(prompt.tokens) + count - 1)
        seed = draw(st.integers(0, 2**32 - 1))
        top = np.iinfo(dtype).max
        experts = np.random.default_rng(seed).integers(0, top, (rows, layers, top_k), dtype, endpoint=True)
    return Sample(
        prompt=prompt,
        index=index,
        seed=draw(st.integers(0, 2**63 - 1)),
        response_tokens=draw(st.lists(st.one_of(st.integers(0, 300), st.integers(0, 2**32 - 1)), **per_token)),
        log_probs=draw(st.lists(log_probs, **per_token)),
        loss_mask=draw(st.lists(st.integers(0, 1), **per_token)),
        weight_versions=draw(st.lists(st.integers(0, 100_000), **per_token)),
        routed_experts=experts,
        text=draw(texts),
        finish_reason=draw(st.sampled_from([None, *FinishReason])),
        reward=draw(rewards),
        reward_parts=draw(st.dictionaries(texts, st.floats(allow_nan=False), max_size=3)),
    )


@st.composite
def groups(draw: st.DrawFn, position: int, routes: tuple[str, int, int] | None) -> Group:
    prompt = draw(st.sampled_from(sorted(PROMPTS.values(), key=lambda prompt: prompt.id)))
    size = draw(st.integers(0, 3))
    return Group(
        prompt,
        [draw(samples(prompt, index, routes)) for index in range(size)],
        position=position,
        epoch=draw(st.integers(0, 300)),
        born=draw(st.integers(0, 2**40)),
    )


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    routes = draw(
        st.one_of(st.none(), st.tuples(st.sampled_from(["uint8", "uint16"]), st.integers(1, 3), st.integers(1, 2)))
    )
    positions = draw(st.lists(st.integers(0, 2**40), unique=True, max_size=6))
    drawn = [draw(groups(position, routes)) for position in positions]
    cut = draw(st.integers(0, len(drawn)))
    dropped = st.builds(Dropped, st.integers(0, 2**40), texts, dropped_reasons, texts)
    return Batch(
        step=draw(st.integers(1, 10**6)),
        groups=drawn[:cut],
        carried=drawn[cut:],
        dropped=draw(st.lists(dropped, max_size=3)),
        cursor=draw(st.integers(0, 2**40)),
        quarantined_total=draw(st.integers(0, 1000)),
    )


def finished(position: int, *, prompt: str = "a", size: int = 2, tokens: int = 40, routes: bool = True) -> Group:
    """A graded group that is the same whenever it is asked for."""
    noise = np.random.default_rng(position)
    found = PROMPTS[prompt]
    rows = len(found.tokens) + tokens - 1
    return Group(
        found,
        [
            Sample(
                found,
                index,
                seed=1000 * position + index,
                response_tokens=noise.integers(0, 500, tokens).tolist(),
                log_probs=noise.normal(-1, 1, tokens).astype(np.float32).tolist(),
                loss_mask=[1] * tokens,
                weight_versions=[0] * (tokens // 2) + [1] * (tokens - tokens // 2),
                routed_experts=noise.integers(0, 8, (rows, 2, 2), np.uint8) if routes else None,
                text=f"response {index} of {position} é" * 3,
                finish_reason=FinishReason.STOP,
                reward=float(index),
                reward_parts={"math": 0.5, "length": float(index)},
            )
            for index in range(size)
        ],
        position=position,
        born=1,
    )


def partial(group: Group, tokens: int) -> Group:
    """The group when its samples had that many tokens; from their last token on they are as they are."""
    return Group(
        group.prompt,
        [_partial(sample, tokens) for sample in group.samples],
        position=group.position,
        epoch=group.epoch,
        born=group.born,
    )


def _partial(sample: Sample, tokens: int) -> Sample:
    if tokens > len(sample.response_tokens):
        return sample
    rows = max(0, len(sample.prompt.tokens) + tokens - 1)
    return Sample(
        sample.prompt,
        sample.index,
        sample.seed,
        sample.response_tokens[:tokens],
        sample.log_probs[:tokens],
        sample.loss_mask[:tokens],
        sample.weight_versions[:tokens],
        None if sample.routed_experts is None or tokens == 0 else sample.routed_experts[:rows],
        sample.text[:tokens],
    )


def batch(step: int, positions: list[int], *, carried: list[Group] | None = None) -> Batch:
    """A batch of finished groups."""
    dropped = [Dropped(100 * step, "a", "zero-variance", "all rewards are 1")]
    return Batch(step, [finished(position) for position in positions], carried or [], dropped, cursor=100 * step + 1)


def journal(root: Path, fence: Fence | None = None) -> Journal:
    paths = RunPaths(root)
    return Journal(paths, "grpo", fence or Fence(paths, None), PROMPTS)


def facts(group: Group) -> Any:
    """All of a group, comparable to the bit."""
    return (
        group.prompt,
        group.position,
        group.epoch,
        group.born,
        [_sample_facts(sample) for sample in group.samples],
    )


def batch_facts(batch: Batch) -> Any:
    """All of a batch, comparable to the bit."""
    return (
        batch.step,
        [facts(group) for group in batch.groups],
        [facts(group) for group in batch.carried],
        batch.dropped,
        batch.cursor,
        batch.quarantined_total,
    )


def _sample_facts(sample: Sample) -> Any:
    routes = sample.routed_experts
    return (
        sample.index,
        sample.seed,
        sample.response_tokens,
        [value.hex() for value in sample.log_probs],
        sample.loss_mask,
        sample.weight_versions,
        None if routes is None else (routes.dtype, routes.shape, routes.tobytes()),
        sample.text,
        sample.finish_reason,
        None if sample.reward is None else sample.reward.hex(),
        [(name, value.hex()) for name, value in sample.reward_parts.items()],
    )
