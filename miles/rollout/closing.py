"""When a training step's rollout closes, and with which groups: a virtual clock that no real one can disturb.

The clock counts, for every sample, the tokens that it has drawn in this step. All groups admitted at the start of the
step start at time 0; a group is complete at the largest count of its samples. Groups are looked at in the order of
(time, position). One whose rewards are all equal is dropped where the filter says so, and the next draw takes its place
and starts at that time. The step closes at time t*, when `target` groups are accepted. Required groups keep their slot
in the batch until they are looked at. Every other sample is cut off at what it had at t* and goes on in the next step.

So the batch, and what is carried, depend on the draws alone: not on which engine was faster, nor on how far samples
have really run beyond t*. Pure; the running belongs to `miles.rollout.manager`.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

Key = tuple[int, int]
"""(virtual time, position)"""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a group has really come in this step."""

    counts: tuple[int, ...]
    """New tokens of each sample."""
    ended: tuple[bool, ...]
    """Whether that sample has its last token; otherwise at least one follows."""
    graded: bool = False
    equal: bool = False
    """Whether all rewards are the same; meaningful once graded."""

    @property
    def complete(self) -> bool:
        return all(self.ended)

    @property
    def earliest(self) -> int:
        """When the group completes, counted from its start, or the first time at which it still can."""
        return max(count + (not ended) for count, ended in zip(self.counts, self.ended, strict=True))

    def reaches(self, time: int) -> bool:
        """Whether every sample has ended or has `time` tokens."""
        return all(ended or count >= time for count, ended in zip(self.counts, self.ended, strict=True))


@dataclass(frozen=True, slots=True)
class Rules:
    """What `[rollout]` says about a step's batch."""

    target: int
    """Groups of a batch."""
    filter_equal: bool
    """Whether groups with equal rewards are dropped."""
    max_filtered: int
    """Most groups that the filter may drop in one step."""


@dataclass(frozen=True, slots=True)
class Decision:
    """The step is closed."""

    time: int
    """t*"""
    batch: tuple[int, ...]
    """Positions, ascending."""
    filtered: tuple[int, ...]
    """Positions dropped by the filter, in the order in which they were looked at."""
    carried: Mapping[int, int | None]
    """Every other group by position: the new tokens that its samples keep; None: it is complete and stays so."""
    cursor: int
    """First position that was not drawn."""


@dataclass(frozen=True, slots=True)
class Undetermined:
    """What is known does not decide the step."""

    wanted: Mapping[int, int | None]
    """Groups that must run on, by position, the older first: new tokens that each of their samples must reach; None:
    its end. Empty where only rewards are missing."""
    cursor: int
    """First position that nobody asks for yet; those before it should run."""
    closing: bool
    """Whether the step closes with what is complete, at the latest: only what `wanted` says is still of use."""


def decide(
    rules: Rules,
    admitted: Sequence[int],
    cursor: int,
    progress: Mapping[int, Progress],
    *,
    required: frozenset[int] = frozenset(),
    quarantined: frozenset[int] = frozenset(),
) -> Decision | Undetermined:
    """Close the step, or say what must run on.

    `admitted` are the positions at time 0, `cursor` the first one after all draws so far. A group that `progress`
    does not name has no token yet. `quarantined` groups count as if the sequence did not have them. `required` must
    be a part of `admitted`, of at most `rules.target` groups.
    """
    clock = _Clock(rules, cursor, progress, required - quarantined, quarantined)
    for position in sorted(admitted):
        clock.start(position, 0)
    clock.run()
    return clock.outcome()


@dataclass
class _Clock:
    """The simulation. Groups that are not complete never end in it; `settled` says whether that can matter."""

    rules: Rules
    cursor: int
    progress: Mapping[int, Progress]
    required: frozenset[int]
    quarantined: frozenset[int]
    starts: dict[int, int] = field(default_factory=dict)
    """Virtual start of every group that was not dropped."""
    events: list[Key] = field(default_factory=list)
    """Heap of groups that complete."""
    unknown: list[Key] = field(default_factory=list)
    """Heap: the first time at which each of the other groups could complete."""
    surplus: deque[int] = field(default_factory=deque)
    """Complete, without a slot."""
    accepted: list[int] = field(default_factory=list)
    filtered: list[int] = field(default_factory=list)
    now: int = 0
    settled: bool = True

    def __post_init__(self) -> None:
        self.reserved = set(self.required)
        assert len(self.reserved) <= self.rules.target

    @property
    def closed(self) -> bool:
        return len(self.accepted) == self.rules.target

    @property
    def free_slots(self) -> int:
        return self.rules.target - len(self.accepted) - len(self.reserved)

    def start(self, position: int, time: int) -> None:
        """Let a group start, or the next draw where it is quarantined."""
        while position in self.quarantined:
            position = self._draw()
        self.starts[position] = time
        progress = self.progress.get(position)
        if progress is None:
            heapq.heappush(self.unknown, (time + 1, position))
        elif progress.complete and progress.graded:
            heapq.heappush(self.events, (time + progress.earliest, position))
        else:
            heapq.heappush(self.unknown, (time + progress.earliest, position))

    def run(self) -> None:
        """Look at complete groups until the step closes or none is left."""
        while not self.closed and self.events:
            key = heapq.heappop(self.events)
            if self.unknown and self.unknown[0] < key:
                self.settled = False
            self.now, position = key
            if position in self.reserved:
                self.reserved.remove(position)
                self._judge(position)
            else:
                self.surplus.append(position)
            while self.surplus and self.free_slots > 0:
                self._judge(self.surplus.popleft())

    def outcome(self) -> Decision | Undetermined:
        running = sorted(position for _, position in self.unknown if not self._complete(position))
        if not self.closed:
            return Undetermined(dict.fromkeys(running), self.cursor, closing=False)
        limits = {position: self._limit(position) for position in running}
        wanted = {position: limit for position, limit in limits.items() if not self._reaches(position, limit)}
        ungraded = any(time <= self.now and self._complete(position) for time, position in self.unknown)
        if wanted or ungraded or not self.settled:
            return Undetermined(wanted, self.cursor, closing=True)
        live = self.starts.keys() - set(self.accepted)
        done = set(self.surplus) | {position for time, position in self.events if time <= self.now}
        carried = {position: None if position in done else self._limit(position) for position in sorted(live)}
        return Decision(self.now, tuple(sorted(self.accepted)), tuple(self.filtered), carried, self.cursor)

    def _judge(self, position: int) -> None:
        """Accept a complete group, or drop it and start the next draw."""
        may_drop = self.rules.filter_equal and len(self.filtered) < self.rules.max_filtered
        if not (may_drop and self.progress[position].equal):
            self.accepted.append(position)
            return
        self.filtered.append(position)
        del self.starts[position]
        self.start(self._draw(), self.now)

    def _draw(self) -> int:
        self.cursor += 1
        return self.cursor - 1

    def _limit(self, position: int) -> int:
        """New tokens that a sample of a group has when the step closes."""
        return self.now - self.starts[position]

    def _complete(self, position: int) -> bool:
        progress = self.progress.get(position)
        return progress is not None and progress.complete

    def _reaches(self, position: int, limit: int) -> bool:
        progress = self.progress.get(position)
        return limit == 0 if progress is None else progress.reaches(limit)
