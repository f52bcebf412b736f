"""Policy and supervised losses: by hand, against a naive loop, and split over micro-batches."""

import math
from dataclasses import replace

import pytest
import torch

from miles.algorithms.losses import (
    clipped_surrogate,
    perplexity,
    policy_loss,
    sft_loss,
    token_means,
    truncated_importance_weight,
)
from miles.config.schema import AlgorithmSection
from miles.data.batch import MicroBatch, Sequence, pack
from miles.training.backend import LossOutput, TokenOutputs

FIELDS = ("advantages", "rollout_log_probs", "old_log_probs", "ref_log_probs")


def sequences(lengths: tuple[int, ...] = (5, 3, 4)) -> list[Sequence]:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in lengths:
        mask = (torch.arange(length) >= 2).float()
        extras = {name: 0.4 * torch.randn(length, generator=generator) * mask for name in FIELDS}
        rows.append(Sequence(tokens=torch.arange(length), loss_mask=mask, weights=mask / 10, extras=extras))
    return rows


def outputs(length: int) -> TokenOutputs:
    generator = torch.Generator().manual_seed(1)
    values = 0.4 * torch.randn(2, length, generator=generator)
    return TokenOutputs(log_probs=values[0].requires_grad_(), entropy=values[1].abs().requires_grad_())


def naive_policy_loss(algorithm: AlgorithmSection, model: TokenOutputs, batch: MicroBatch) -> float:
    total = 0.0
    for t in range(len(batch.tokens)):
        log_prob = model.log_probs[t].item()
        advantage, engine, old, reference = (batch.extras[name][t].item() for name in FIELDS)
        if algorithm.old_log_probs == "engine":
            old = engine
        ratio = math.exp(log_prob - old)
        clipped = min(max(ratio, 1 - algorithm.clip_low), 1 + algorithm.clip_high)
        value = -min(ratio * advantage, clipped * advantage)
        if algorithm.importance_correction == "tis":
            value *= min(math.exp(old - engine), algorithm.tis_cap)
        distance = log_prob - reference
        kl = {"k1": distance, "k2": distance**2 / 2, "k3": math.exp(-distance) - 1 + distance}
        value += algorithm.kl_coef * kl[algorithm.kl_estimator]
        value -= algorithm.entropy_coef * model.entropy[t].item()
        total += batch.weights[t].item() * value
    return total


@pytest.mark.parametrize(
    "algorithm",
    [
        AlgorithmSection(),
        AlgorithmSection(clip_low=0.1, clip_high=0.3, importance_correction="none"),
        AlgorithmSection(old_log_probs="engine"),
        AlgorithmSection(tis_cap=1.05, kl_coef=0.3, kl_estimator="k1"),
        AlgorithmSection(kl_coef=0.3, kl_estimator="k2", entropy_coef=0.2),
        AlgorithmSection(kl_coef=0.3, kl_estimator="k3"),
    ],
)
def test_policy_loss_equals_naive(algorithm: AlgorithmSection) -> None:
    batch, model = pack(sequences(), [0, 1, 2]), outputs(12)
    assert policy_loss(algorithm)(model, batch).loss.item() == pytest.approx(
        naive_policy_loss(algorithm, model, batch), abs=1e-6
    )


def test_clipping_by_hand() -> None:
    ratio = torch.tensor([1.5, 0.5, 1.5, 0.5, 1.0])
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0, 2.0])
    values, clipped = clipped_surrogate(ratio, advantages, 0.2, 0.28)
    # A good token is not pushed above 1.28, a bad one not below 0.8; the way back is never blocked.
    torch.testing.assert_close(values, torch.tensor([-1.28, -0.5, 1.5, 0.8, -2.0]))
    assert clipped.tolist() == [True, False, False, True, False]


def test_on_policy_gradient_is_the_policy_gradient() -> None:
    batch, model = pack(sequences(), [0, 1, 2]), outputs(12)
    batch.extras["old_log_probs"] = batch.extras["rollout_log_probs"] = model.log_probs.detach()
    policy_loss(AlgorithmSection())(model, batch).loss.backward()
    torch.testing.assert_close(model.log_probs.grad, -batch.extras["advantages"] * batch.weights)


def test_importance_weight_by_hand() -> None:
    weight, capped = truncated_importance_weight(
        torch.tensor([0.0, -1.0, -2.0]), torch.tensor([0.0, -3.0, -1.0]), cap=2.0
    )
    torch.testing.assert_close(weight, torch.tensor([1.0, 2.0, math.exp(-1.0)]))
    assert capped.tolist() == [False, True, False]


def test_importance_weight_carries_no_gradient() -> None:
    trainer = torch.tensor([-1.0], requires_grad=True)
    assert not truncated_importance_weight(trainer, torch.tensor([-1.5]), cap=2.0)[0].requires_grad


def test_entropy_has_no_gradient_without_a_bonus() -> None:
    batch, model = pack(sequences(), [0, 1, 2]), outputs(12)
    policy_loss(AlgorithmSection())(model, batch).loss.backward()
    assert model.entropy.grad is None


def test_absurd_log_probs_stay_finite() -> None:
    batch, model = pack(sequences(), [0, 1, 2]), outputs(12)
    shifted = replace(model, log_probs=model.log_probs - torch.linspace(-300, 300, 12))
    loss = policy_loss(AlgorithmSection(kl_coef=1.0))(shifted, batch).loss
    loss.backward()
    assert loss.isfinite() and model.log_probs.grad is not None
    assert model.log_probs.grad.isfinite().all()


def test_metrics_are_means_over_trained_tokens() -> None:
    algorithm = AlgorithmSection(kl_coef=0.1, tis_cap=1.1)
    batch, model = pack(sequences(), [0, 1, 2]), outputs(12)
    metrics = token_means({k: v.item() for k, v in policy_loss(algorithm)(model, batch).metrics.items()})
    mask, extras = batch.loss_mask.bool(), batch.extras
    ratio = (model.log_probs - extras["old_log_probs"]).exp()[mask]
    weight = (extras["old_log_probs"] - extras["rollout_log_probs"]).exp()[mask]
    assert set(metrics) == {
        "ratio/mean",
        "ratio/clip_fraction",
        "entropy",
        "kl/reference",
        "importance/weight_mean",
        "importance/capped_fraction",
    }
    assert metrics["ratio/mean"] == pytest.approx(ratio.mean().item())
    assert metrics["entropy"] == pytest.approx(model.entropy[mask].mean().item())
    assert metrics["importance/weight_mean"] == pytest.approx(weight.clamp(max=1.1).mean().item())
    assert metrics["importance/capped_fraction"] == pytest.approx((weight > 1.1).float().mean().item())
    assert 0 < metrics["ratio/clip_fraction"] < 1


def parts_of(model: TokenOutputs, bounds: tuple[tuple[int, int], ...]) -> list[TokenOutputs]:
    return [TokenOutputs(model.log_probs[a:b], model.entropy[a:b]) for a, b in bounds]


def add(results: list[LossOutput]) -> dict[str, float]:
    names = results[0].metrics
    sums = {name: sum(r.metrics[name].item() for r in results) for name in names}
    return sums | {"loss": sum(r.loss.item() for r in results)}


@pytest.mark.parametrize("loss", [policy_loss(AlgorithmSection(kl_coef=0.1, entropy_coef=0.1)), sft_loss])
def test_invariant_to_the_micro_batch_split(loss) -> None:
    rows, model = sequences(), outputs(12)
    whole = add([loss(model, pack(rows, [0, 1, 2]))])
    first, second = parts_of(model, ((0, 5), (5, 12)))
    split = add([loss(first, pack(rows, [0])), loss(second, pack(rows, [1, 2]))])
    assert split == pytest.approx(whole, abs=1e-6)


def test_sft_loss_by_hand() -> None:
    row = Sequence(tokens=torch.arange(3), loss_mask=torch.tensor([0.0, 1, 1]), weights=torch.tensor([0.0, 0.5, 0.5]))
    model = TokenOutputs(torch.tensor([7.0, -1.0, -3.0]), torch.zeros(3))
    result = sft_loss(model, pack([row], [0]))
    assert result.loss.item() == 2.0
    assert token_means({k: v.item() for k, v in result.metrics.items()}) == {"nll": 2.0}


def test_perplexity() -> None:
    assert perplexity(math.log(8)) == pytest.approx(8)
    assert math.isfinite(perplexity(1e6))
