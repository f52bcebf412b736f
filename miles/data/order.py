"""The endless sequence of draws: a seeded permutation of the prompts per epoch, as a pure function of the position.

No state is kept, so a resumed run, or a look at step 1,000, needs nothing but the run's seed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True, slots=True)
class Draw:
    """One place of the sequence."""

    index: int
    """Position in the list of prompts."""
    epoch: int
    """How often the whole list was used up before; part of the sampling seed."""


def draws(n_prompts: int, prompts_per_step: int, start: int, count: int, *, seed: int, shuffle: bool) -> list[Draw]:
    """The draws at positions start .. start + count - 1 of the sequence: epoch 0, epoch 1, ..., each with every prompt
    once.

    `prompts_per_step` consecutive positions from a multiple of it never hold a prompt twice (an epoch that starts among
    them starts with others), unless there are fewer prompts than that.
    """
    assert n_prompts > 0 and prompts_per_step > 0 and start >= 0 and count >= 0
    end = start + count
    found: list[Draw] = []
    for epoch in range(start // n_prompts, -(-end // n_prompts)):
        order = _epoch_order(n_prompts, prompts_per_step, epoch, seed, shuffle)
        offset = epoch * n_prompts
        chosen = order[max(start - offset, 0) : min(end - offset, n_prompts)]
        found += [Draw(index, epoch) for index in chosen.tolist()]
    return found


def prompts_of_step(n_prompts: int, prompts_per_step: int, step: int, *, seed: int, shuffle: bool) -> list[Draw]:
    """The `prompts_per_step` draws of training step `step` (0, 1, ...) where every step uses up what it draws."""
    start = step * prompts_per_step
    return draws(n_prompts, prompts_per_step, start, prompts_per_step, seed=seed, shuffle=shuffle)


@lru_cache(maxsize=4)
def _epoch_order(n: int, per_step: int, epoch: int, seed: int, shuffle: bool) -> np.ndarray:
    """Order of one epoch, int64 [n]: its permutation, rearranged at the front for the step it shares.

    The step that straddles the start of an epoch already holds the last prompts of the epoch before, so the
    order of an epoch depends on its predecessor's tail. That chain is short: it starts where an epoch
    begins with a step, and with two steps or more per epoch a changed front never reaches the tail.
    """
    if n < per_step:
        return _permutation(n, seed, epoch, shuffle)
    start = epoch
    while start * n % per_step and (n < 2 * per_step or start == epoch):
        start -= 1
    order = _permutation(n, seed, start, shuffle)
    for later in range(start + 1, epoch + 1):
        in_shared_step = later * n % per_step
        following = _permutation(n, seed, later, shuffle)
        if in_shared_step:
            following = _avoid(following, order[-in_shared_step:], per_step - in_shared_step)
        order = following
    return order


def _avoid(order: np.ndarray, used: np.ndarray, count: int) -> np.ndarray:
    """`order` with its first `count` entries outside `used` moved to the front; otherwise unchanged."""
    front = np.flatnonzero(~np.isin(order, used))[:count]
    return np.concatenate([order[front], np.delete(order, front)])


def _permutation(n: int, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
    """int64 [n].

    Sorted raw Philox output: numpy promises that stream for good, and `Generator.permutation` not.
    """
    if not shuffle:
        return np.arange(n)
    keys = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(n)
    return np.argsort(keys, kind="stable")
