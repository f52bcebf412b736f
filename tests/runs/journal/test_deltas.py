from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from journal_records import PROMPTS, facts, finished, partial

from miles.data.sample import Group
from miles.runs.journal.codec import prompt_finder
from miles.runs.journal.deltas import Mark, Opening, Replay, SampleDelta, delta_since

TOKENS = 40
counts = st.lists(st.integers(0, TOKENS + 1), min_size=1, max_size=10)


def written(states: list[Group]) -> list[list[SampleDelta]]:
    """Deltas of a group from one state to the next."""
    marks: dict[int, Mark] = {}
    flushes = []
    for group in states:
        flushes.append([delta_since(marks.get(sample.index), group.position, sample) for sample in group.samples])
        marks = {sample.index: Mark.of(sample) for sample in group.samples}
    return flushes


def replayed(opening: Opening, flushes: list[list[SampleDelta]]) -> Group:
    replay = Replay(prompt_finder(PROMPTS))
    replay.open(opening)
    for deltas in flushes:
        for delta in deltas:
            replay.apply(delta)
    ((_, group),) = replay.finish()
    return group


@given(counts)
@settings(deadline=None)
def test_deltas_of_any_history_give_its_end(history: list[int]) -> None:
    states = [partial(finished(1), count) for count in history]
    assert facts(replayed(Opening.of(states[0]), written(states))) == facts(states[-1])


@given(counts, st.sets(st.integers(0, 9)))
@settings(deadline=None)
def test_without_some_deltas_the_beginning_remains(growth: list[int], lost: set[int]) -> None:
    whole, states = finished(1, tokens=500), []
    for count in np.cumsum([each + 1 for each in growth]).tolist():
        states.append(partial(whole, count))
    kept = [deltas for number, deltas in enumerate(written(states)) if number not in lost]
    found = replayed(Opening.of(whole), kept)
    before = min((number for number in lost if number < len(states)), default=len(states))
    assert facts(found)[-1] == (facts(states[before - 1])[-1] if before else [])


@given(counts, st.integers(0, 9))
@settings(deadline=None)
def test_delta_that_comes_twice_does_no_harm(history: list[int], which: int) -> None:
    states = [partial(finished(1), count) for count in sorted(history)]
    flushes = written(states)
    which %= len(flushes)
    flushes.insert(which, flushes[which])
    assert facts(replayed(Opening.of(states[0]), flushes)) == facts(states[-1])


def test_delta_holds_only_what_is_new() -> None:
    group = finished(1)
    before = partial(group, 30).samples[0]
    delta = delta_since(Mark.of(before), 1, group.samples[0])
    assert (delta.start, len(delta.tokens), delta.rows_start) == (30, 10, 32)
    assert delta.routed_experts is not None and len(delta.routed_experts) == 10
    assert before.text + delta.text == group.samples[0].text


def test_text_that_changes_is_written_anew() -> None:
    sample = finished(1).samples[0]
    mark = replace(Mark.of(sample), text="half a character \ufffd")
    assert delta_since(mark, 1, sample).text == sample.text


def test_sample_without_routes_loses_those_it_had() -> None:
    group = finished(1, size=1)
    bare = finished(1, size=1, routes=False)
    assert facts(replayed(Opening.of(group), written([group, bare]))) == facts(bare)


def test_delta_of_a_group_nobody_opened_is_left_out() -> None:
    replay = Replay(prompt_finder(PROMPTS))
    replay.apply(delta_since(None, 1, finished(1).samples[0]))
    assert replay.finish() == []
