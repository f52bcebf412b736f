"""Mismatch between trainer and engine, by hand."""

import math

import pytest
import torch

from miles.algorithms.mismatch import NO_MISMATCH, measure_mismatch

TRAINER = torch.tensor([-1.0, -2.0, -9.0, -0.5])
ENGINE = torch.tensor([-1.1, -2.3, -1.0, -0.5])
MASK = torch.tensor([1.0, 1.0, 0.0, 1.0])


def test_by_hand() -> None:
    metrics = measure_mismatch(TRAINER, ENGINE, MASK).metrics()
    assert metrics["mismatch/log_prob_abs_diff_mean"] == pytest.approx(0.4 / 3, rel=1e-6)
    assert metrics["mismatch/log_prob_abs_diff_max"] == pytest.approx(0.3, rel=1e-6)
    k3 = (math.exp(0.1) - 1 - 0.1) + (math.exp(0.3) - 1 - 0.3)
    assert metrics["mismatch/kl_k3"] == pytest.approx(k3 / 3, rel=1e-5)


def test_parts_add_up() -> None:
    parts = [measure_mismatch(TRAINER[part], ENGINE[part], MASK[part]) for part in (slice(0, 1), slice(1, 4))]
    whole = measure_mismatch(TRAINER, ENGINE, MASK).metrics()
    assert sum(parts, NO_MISMATCH).metrics() == pytest.approx(whole)


def test_nothing_trained() -> None:
    assert measure_mismatch(TRAINER, ENGINE, torch.zeros(4)) == NO_MISMATCH
    assert NO_MISMATCH.metrics()["mismatch/kl_k3"] == 0.0
