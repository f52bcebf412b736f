"""How often to save: the interval that loses the least time to saving and to doing work again. Pure.

Source: Daly 2006, "A higher order estimate of the optimum checkpoint interval for restart dumps", Future Generation
Computer Systems 22, equation 37; its first term is Young 1974.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from miles.runs.attempts import Attempt, EndReason

PLANNED_ENDS = (EndReason.FINISHED, EndReason.STOPPED, EndReason.TIME_LIMIT)
"""Ends that come with a last save: they say nothing about failures."""


def save_interval(save_seconds: float, mtbf_seconds: float, repeated_fraction: float = 1.0) -> float:
    """Seconds of work between two saves that cost `save_seconds` each, with a failure every `mtbf_seconds`.

    Of a save in the background, `save_seconds` are those for which training stands still.

    `repeated_fraction` is the share of lost work that has to be done again. With a journal that is the trainer's
    part of a step: the responses are there. Failures then cost less, as if they were that much rarer.
    """
    assert save_seconds >= 0 and mtbf_seconds > 0 and 0 < repeated_fraction <= 1
    rarity = mtbf_seconds / repeated_fraction
    if save_seconds >= 2 * rarity:
        return rarity
    ratio = save_seconds / (2 * rarity)
    return math.sqrt(2 * save_seconds * rarity) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - save_seconds


def mean_time_between_failures(attempts: Sequence[Attempt], *, prior: float, now: float) -> float:
    """Seconds between unplanned ends, from a run's attempts.

    `prior` counts as one failure after that many seconds, so that a young run has an answer. An attempt that left no
    word lasted at most until the next one began.
    """
    seconds, failures = prior, 1
    for attempt, following in zip(attempts, [*attempts, None][1:], strict=True):
        end = attempt.ended or (following.started if following else now)
        seconds += max(0.0, end - attempt.started)
        lost = attempt.ended is None and following is not None
        failures += lost or (attempt.ended is not None and attempt.reason not in PLANNED_ENDS)
    return seconds / failures
