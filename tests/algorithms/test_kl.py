"""KL estimators: values by hand, mean and gradient over a distribution that is summed exactly."""

import math

import pytest
import torch

from miles.algorithms.kl import kl_estimate

ESTIMATORS = ("k1", "k2", "k3")


def test_values_by_hand() -> None:
    policy, reference = torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.25)])
    values = [kl_estimate(policy, reference, name).item() for name in ESTIMATORS]
    assert values == pytest.approx([math.log(2), math.log(2) ** 2 / 2, 0.5 - 1 + math.log(2)])


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_zero_where_equal(estimator: str) -> None:
    log_probs = torch.tensor([-1.0, -3.0])
    assert kl_estimate(log_probs, log_probs, estimator).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_absurd_ratios_stay_finite(estimator: str) -> None:
    estimate = kl_estimate(torch.tensor([-500.0, 0.0]), torch.tensor([0.0, -500.0]), estimator)
    assert torch.isfinite(estimate).all()


def distributions() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 7, generator=generator, dtype=torch.float64)
    return logits[0].requires_grad_(), logits[1].log_softmax(0)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_mean_is_the_kl(estimator: str) -> None:
    logits, reference = distributions()
    policy = logits.log_softmax(0)
    mean = (policy.exp() * kl_estimate(policy, reference, estimator)).sum()
    torch.testing.assert_close(mean, (policy.exp() * (policy - reference)).sum())


@pytest.mark.parametrize(("estimator", "expected"), [("k1", 0.0), ("k2", 1.0)])
def test_mean_gradient_as_a_loss(estimator: str, expected: float) -> None:
    """k2's gradient is the KL's (factor 1); k1 used as a loss pulls nowhere on average (factor 0)."""
    logits, reference = distributions()
    policy = logits.log_softmax(0)
    sampled = (policy.detach().exp() * kl_estimate(policy, reference, estimator)).sum()
    [gradient] = torch.autograd.grad(sampled, logits, retain_graph=True)
    [kl_gradient] = torch.autograd.grad((policy.exp() * (policy - reference)).sum(), logits)
    torch.testing.assert_close(gradient, expected * kl_gradient)
