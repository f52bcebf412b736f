"""The order of prompts: every epoch complete, no prompt twice in a step, the same for everybody who asks."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from miles.data.order import draws, prompts_of_step

shapes = st.tuples(st.integers(1, 40), st.integers(1, 60))


def whole_epochs(n: int, per_step: int, epochs: int, seed: int, shuffle: bool):
    """All draws of the first `epochs` epochs, by asking step after step."""
    steps = -(-epochs * n // per_step)
    found = [prompts_of_step(n, per_step, step, seed=seed, shuffle=shuffle) for step in range(steps)]
    return found, [draw for step in found for draw in step][: epochs * n]


@settings(deadline=None)
@given(shapes, st.integers(1, 6), st.integers(0, 2**32), st.booleans())
def test_every_epoch_uses_every_prompt_once(shape, epochs, seed, shuffle):
    n, per_step = shape
    found, flat = whole_epochs(n, per_step, epochs, seed, shuffle)
    assert all(len(step) == per_step for step in found)
    for epoch in range(epochs):
        part = flat[epoch * n : (epoch + 1) * n]
        assert {draw.epoch for draw in part} == {epoch}
        assert sorted(draw.index for draw in part) == list(range(n))


@settings(deadline=None)
@given(shapes, st.integers(0, 30), st.integers(0, 2**32), st.booleans())
def test_no_prompt_twice_in_a_step_unless_there_are_too_few(shape, step, seed, shuffle):
    n, per_step = shape
    found = prompts_of_step(n, per_step, step, seed=seed, shuffle=shuffle)
    times = Counter(draw.index for draw in found)
    if n >= per_step:
        assert max(times.values()) == 1
    assert len({(draw.index, draw.epoch) for draw in found}) == per_step


@settings(deadline=None)
@given(shapes, st.integers(0, 80), st.integers(0, 50), st.integers(0, 2**32), st.booleans())
def test_any_part_of_the_sequence_is_that_of_the_steps(shape, start, count, seed, shuffle):
    n, per_step = shape
    steps = range((start + count) // per_step + 1)
    whole = [draw for step in steps for draw in prompts_of_step(n, per_step, step, seed=seed, shuffle=shuffle)]
    assert draws(n, per_step, start, count, seed=seed, shuffle=shuffle) == whole[start : start + count]


def test_an_epoch_boundary_inside_a_step_takes_the_rest_of_one_epoch_and_the_start_of_the_next():
    found = prompts_of_step(5, 2, 2, seed=0, shuffle=False)
    assert [(draw.index, draw.epoch) for draw in found] == [(4, 0), (0, 1)]
    repeated = prompts_of_step(3, 2, 1, seed=0, shuffle=False)
    assert [(draw.index, draw.epoch) for draw in repeated] == [(2, 0), (0, 1)]


def test_file_order_without_shuffle_and_other_orders_with():
    plain = prompts_of_step(100, 10, 3, seed=0, shuffle=False)
    assert [draw.index for draw in plain] == list(range(30, 40))
    first, other_seed, next_epoch = (
        [draw.index for draw in prompts_of_step(100, 100, step, seed=seed, shuffle=True)]
        for step, seed in ((0, 0), (0, 1), (1, 0))
    )
    assert first != other_seed
    assert first != next_epoch
    assert first != sorted(first)


def test_the_order_is_frozen():
    """A changed order would make a resumed run train on other prompts than the run it continues."""
    found = prompts_of_step(10, 10, 0, seed=7, shuffle=True)
    assert [draw.index for draw in found] == [8, 4, 1, 6, 3, 2, 7, 5, 9, 0]
