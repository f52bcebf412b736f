"""The virtual clock: it agrees with a naive simulation, and nothing physical can change what it decides."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from miles.rollout.closing import Decision, Progress, Rules, Undetermined, decide

patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""Examples are quick; the machine that runs them may be busy."""


@dataclass(frozen=True)
class World:
    """What the draws would give if every sample ran to its end."""

    rules: Rules
    admitted: tuple[int, ...]
    required: frozenset[int]
    quarantined: frozenset[int]
    lengths: dict[int, tuple[int, ...]]
    """New tokens of each sample; 0: it had ended before this step."""
    equal: frozenset[int]

    @property
    def cursor(self) -> int:
        return max(self.admitted) + 1

    def decide(self, progress: dict[int, Progress]) -> Decision | Undetermined:
        return decide(
            self.rules,
            self.admitted,
            self.cursor,
            progress,
            required=self.required,
            quarantined=self.quarantined,
        )

    def seen(self, position: int, tokens: int, *, graded: bool = True) -> Progress:
        """The group after each sample has drawn `tokens` tokens, or fewer where it ended."""
        lengths = self.lengths[position]
        counts = tuple(min(length, tokens) for length in lengths)
        ended = tuple(length <= tokens for length in lengths)
        return Progress(counts, ended, graded and all(ended), position in self.equal)

    def whole(self) -> dict[int, Progress]:
        return {position: self.seen(position, 10**6) for position in self.lengths}


@st.composite
def worlds(draw) -> World:
    target = draw(st.integers(1, 4))
    carried = draw(st.integers(0, target))
    fresh = draw(st.integers(target - carried, target + 3))
    gap = draw(st.integers(0, 2))
    admitted = (*range(carried), *range(carried + gap, carried + gap + fresh))
    max_filtered = draw(st.integers(0, 5))
    bad = draw(st.frozensets(st.integers(0, admitted[-1] + 6), max_size=4))
    far = admitted[-1] + 1 + max_filtered + len(bad) + 1
    new = st.lists(st.integers(1, 6), min_size=2, max_size=2).map(tuple)
    old = st.lists(st.integers(0, 6), min_size=2, max_size=2).map(tuple)
    lengths = {position: draw(old if position < carried else new) for position in range(far)}
    return World(
        Rules(target, draw(st.booleans()), max_filtered),
        admitted,
        draw(st.frozensets(st.sampled_from(range(carried)))) if carried else frozenset(),
        bad,
        lengths,
        draw(st.frozensets(st.integers(0, far))),
    )


def naive(world: World) -> tuple[int, list[int], list[int]]:
    """(time, batch, filtered), by counting time up one token at a time."""
    upcoming = iter(p for p in range(world.cursor, 10**6) if p not in world.quarantined)
    bad = world.quarantined & set(world.admitted)
    starts = {p: 0 for p in world.admitted if p not in bad}
    for _ in bad:
        starts[next(upcoming)] = 0
    reserved = set(world.required - world.quarantined)
    accepted: list[int] = []
    filtered: list[int] = []
    waiting: list[int] = []
    looked_at: set[int] = set()

    def judge(position: int, time: int) -> None:
        if world.rules.filter_equal and position in world.equal and len(filtered) < world.rules.max_filtered:
            filtered.append(position)
            starts[next(upcoming)] = time
        else:
            accepted.append(position)

    time = 0
    while True:
        for position in sorted(starts):
            if position in looked_at or starts[position] + max(world.lengths[position]) != time:
                continue
            looked_at.add(position)
            if position in reserved:
                reserved.remove(position)
                judge(position, time)
            else:
                waiting.append(position)
            while waiting and len(accepted) + len(reserved) < world.rules.target:
                judge(waiting.pop(0), time)
            if len(accepted) == world.rules.target:
                return time, sorted(accepted), filtered
        time += 1


@patient
@given(worlds())
def test_the_decision_is_that_of_counting_time_up(world):
    decision = world.decide(world.whole())
    assert isinstance(decision, Decision)
    assert (decision.time, list(decision.batch), list(decision.filtered)) == naive(world)


@patient
@given(worlds())
def test_every_draw_is_in_exactly_one_place(world):
    decision = world.decide(world.whole())
    assert isinstance(decision, Decision)
    places = [*decision.batch, *decision.filtered, *decision.carried]
    drawn = {*world.admitted, *range(world.cursor, decision.cursor)} - world.quarantined
    assert sorted(places) == sorted(drawn)
    assert len(decision.batch) == world.rules.target
    assert len(decision.filtered) <= world.rules.max_filtered
    assert not (world.required - world.quarantined) & decision.carried.keys()
    if not world.rules.filter_equal:
        assert world.required - world.quarantined <= set(decision.batch)


@patient
@given(worlds(), st.data())
def test_arrival_order_and_overrun_change_nothing(world, data):
    """Groups are advanced in any order and any amounts; as soon as the clock decides, it decides the same."""
    final = world.decide(world.whole())
    tokens: dict[int, int] = {}
    graded: set[int] = set()
    was_closing = False
    for _ in range(10_000):
        progress = {p: world.seen(p, count, graded=p in graded) for p, count in tokens.items()}
        outcome = world.decide(progress)
        if isinstance(outcome, Decision):
            break
        assert outcome.closing >= was_closing, "a step that closes does not open again"
        was_closing = outcome.closing
        complete = [p for p, seen in progress.items() if seen.complete and not seen.graded]
        choices = [*outcome.wanted, *complete]
        assert choices, "an open step must say what would decide it"
        position = data.draw(st.sampled_from(choices))
        if position in complete:
            graded.add(position)
        else:
            limit = outcome.wanted[position]
            assert limit is None or limit > 0
            most = 6 if limit is None or data.draw(st.booleans()) else limit
            tokens[position] = tokens.get(position, 0) + data.draw(st.integers(1, most))
    assert outcome == final


@patient
@given(worlds(), st.data())
def test_what_is_known_by_halves_never_decides_otherwise(world, data):
    final = world.decide(world.whole())
    tokens = {p: data.draw(st.integers(0, 7)) for p in world.lengths if data.draw(st.booleans())}
    outcome = world.decide({p: world.seen(p, count, graded=data.draw(st.booleans())) for p, count in tokens.items()})
    assert isinstance(outcome, Undetermined) or outcome == final


def test_the_synchronous_case_waits_for_all_and_carries_nothing():
    rules = Rules(target=2, filter_equal=False, max_filtered=0)
    long, short = Progress((9, 2), (True, True), graded=True), Progress((1, 1), (True, True), graded=True)
    running = Progress((9, 2), (False, True))
    assert decide(rules, [4, 5], 6, {4: running, 5: short}) == Undetermined({4: None}, 6, closing=False)
    assert decide(rules, [4, 5], 6, {4: long, 5: short}) == Decision(9, (4, 5), (), {}, 6)


def test_others_are_cut_off_at_the_time_of_the_last_accepted_group():
    rules = Rules(target=1, filter_equal=False, max_filtered=0)
    done = Progress((3, 5), (True, True), graded=True)
    behind = Progress((2, 4), (False, True))
    beyond = Progress((8, 4), (False, True))
    assert decide(rules, [0, 1], 2, {0: done, 1: behind}) == Undetermined({1: 5}, 2, closing=True)
    assert decide(rules, [0, 1], 2, {0: done, 1: beyond}) == Decision(5, (0,), (), {1: 5}, 2)


def test_a_replacement_starts_when_the_group_it_replaces_is_dropped():
    rules = Rules(target=1, filter_equal=True, max_filtered=1)
    dull = Progress((3,), (True,), graded=True, equal=True)
    assert decide(rules, [0], 1, {0: dull}) == Undetermined({1: None}, 2, closing=False)
    assert decide(rules, [0], 1, {0: dull, 1: Progress((2,), (True,), True)}) == Decision(5, (1,), (0,), {}, 2)
    assert decide(rules, [0], 1, {0: dull, 1: dull}) == Decision(6, (1,), (0,), {}, 2), "the bound is reached"


def test_a_required_group_keeps_its_slot():
    rules = Rules(target=1, filter_equal=False, max_filtered=0)
    done = Progress((2,), (True,), graded=True)
    late = Progress((7,), (True,), graded=True)
    known = {0: Progress((1,), (False,)), 1: done}
    assert decide(rules, [0, 1], 2, known, required=frozenset({0})) == Undetermined({0: None}, 2, closing=False)
    assert decide(rules, [0, 1], 2, {0: late, 1: done}, required=frozenset({0})) == Decision(7, (0,), (), {1: None}, 2)
