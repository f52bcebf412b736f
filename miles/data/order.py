"""Which prompts a step trains on: a seeded permutation per epoch, as a pure function of the step number.

No state is kept, so a resumed run, or a look at step 1,000, needs nothing but the run's seed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Draw:
    """One prompt of a step."""

    index: int
    """Position in the list of prompts."""
    epoch: int
    """How often the whole list was used up before; part of the sampling seed."""


def prompts_of_step(n_prompts: int, prompts_per_step: int, step: int, *, seed: int, shuffle: bool) -> list[Draw]:
    """The `prompts_per_step` prompts of training step `step` (0, 1, ...), in order.

    Steps read one endless sequence: epoch 0, epoch 1, ..., each with every prompt once. A step that crosses
    from one epoch to the next never gets a prompt twice (the new epoch starts with others), unless there
    are fewer prompts than the step needs.
    """
    assert n_prompts > 0 and prompts_per_step > 0 and step >= 0
    first, end = step * prompts_per_step, (step + 1) * prompts_per_step
    draws: list[Draw] = []
    for epoch in range(first // n_prompts, (end - 1) // n_prompts + 1):
        order = _epoch_order(n_prompts, prompts_per_step, epoch, seed, shuffle)
        offset = epoch * n_prompts
        chosen = order[max(first - offset, 0) : min(end - offset, n_prompts)]
        draws += [Draw(index, epoch) for index in chosen.tolist()]
    return draws


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
