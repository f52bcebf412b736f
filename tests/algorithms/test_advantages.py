"""Group-relative advantages against numbers computed by hand."""

import pytest
import torch

from miles.algorithms.advantages import group_relative_advantages


def test_normalized() -> None:
    advantages = group_relative_advantages(torch.tensor([0.0, 0.0, 0.0, 1.0]), normalize_std=True)
    # mean 1/4, sample variance (3/16 + 9/16) / 3 = 1/4, so std 1/2.
    torch.testing.assert_close(advantages, torch.tensor([-0.5, -0.5, -0.5, 1.5]), atol=1e-5, rtol=0)


def test_not_normalized() -> None:
    advantages = group_relative_advantages(torch.tensor([0.0, 0.0, 0.0, 1.0]), normalize_std=False)
    assert advantages.tolist() == [-0.25, -0.25, -0.25, 0.75]


@pytest.mark.parametrize("rewards", [[0.1] * 7, [3.0]])
@pytest.mark.parametrize("normalize_std", [True, False])
def test_equal_rewards_say_nothing(rewards: list[float], normalize_std: bool) -> None:
    advantages = group_relative_advantages(torch.tensor(rewards), normalize_std=normalize_std)
    assert advantages.tolist() == [0.0] * len(rewards)


def test_invariant_to_shift_and_scale_of_the_reward() -> None:
    rewards = torch.tensor([0.3, 1.2, -0.4, 0.9])
    torch.testing.assert_close(
        group_relative_advantages(5 * rewards + 100, normalize_std=True),
        group_relative_advantages(rewards, normalize_std=True),
        atol=1e-4,
        rtol=1e-4,
    )
