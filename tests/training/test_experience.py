"""Groups become training rows: alignment, masks, advantages, and weights that add up within each update."""

import pytest
import torch

from miles.config.schema import AlgorithmSection
from miles.data.sample import FinishReason, Group, Prompt, Sample
from miles.training.experience import build_updates, group_rows


def make_group(name: str, rewards: list[float], lengths: list[int]) -> Group:
    prompt = Prompt(id=name, tokens=[1, 2, 3], text=name)
    samples = [
        Sample(
            prompt,
            index,
            seed=index,
            response_tokens=list(range(10, 10 + length)),
            log_probs=[-0.5 - i for i in range(length)],
            loss_mask=[1] * length,
            weight_versions=[0] * length,
            finish_reason=FinishReason.STOP,
            reward=reward,
        )
        for index, (reward, length) in enumerate(zip(rewards, lengths, strict=True))
    ]
    return Group(prompt, samples)


def test_a_row_is_aligned_with_the_token_it_speaks_of():
    row, _ = group_rows(make_group("a", [1.0, 0.0], [2, 4]), AlgorithmSection(normalize_std=False))
    assert row.tokens.tolist() == [1, 2, 3, 10, 11]
    assert row.loss_mask.tolist() == [0, 0, 0, 1, 1]
    assert row.extras["rollout_log_probs"].tolist() == [0, 0, 0, -0.5, -1.5]
    assert row.extras["advantages"].tolist() == [0, 0, 0, 0.5, 0.5]


def test_tokens_that_a_tool_wrote_are_not_trained_on():
    group = make_group("a", [1.0, 0.0], [3, 3])
    group.samples[0].loss_mask = [1, 0, 1]
    row, _ = group_rows(group, AlgorithmSection())
    assert row.loss_mask.tolist() == [0, 0, 0, 1, 0, 1]
    assert row.extras["advantages"][4] == 0


@pytest.mark.parametrize("updates", [1, 2, 4])
def test_every_sample_is_in_one_update_and_each_update_weighs_one(updates):
    groups = [make_group(name, [1.0, 0.0], [2 + i, 3]) for i, name in enumerate("abcd")]
    parts = build_updates(groups, AlgorithmSection(), updates=updates, max_response_tokens=8, seed=3)
    assert [len(part) for part in parts] == [8 // updates] * updates
    lengths = sorted(len(row) for part in parts for row in part)
    assert lengths == sorted(len(s.tokens) for group in groups for s in group.samples)
    for part in parts:
        torch.testing.assert_close(sum(row.weights.sum() for row in part), torch.tensor(1.0))


def test_the_deal_is_a_function_of_the_seed():
    def order(seed):
        groups = [make_group(name, [1.0, 0.0], [2 + i, 9 - i]) for i, name in enumerate("abcd")]
        parts = build_updates(groups, AlgorithmSection(), updates=2, max_response_tokens=9, seed=seed)
        return [len(row) for part in parts for row in part]

    assert order(1) == order(1)
    assert order(1) != order(2)
