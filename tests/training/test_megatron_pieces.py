"""Flat ranges as boxes of a tensor."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from miles.training.megatron.pieces import boxes


@st.composite
def ranges(draw: st.DrawFn) -> tuple[tuple[int, ...], int, int]:
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    start = draw(st.integers(0, math.prod(shape)))
    return shape, start, draw(st.integers(start, math.prod(shape)))


@given(ranges())
def test_boxes_are_the_range_in_its_order(case: tuple[tuple[int, ...], int, int]) -> None:
    shape, start, stop = case
    whole = torch.arange(math.prod(shape)).view(shape)
    parts = [
        whole[tuple(slice(a, a + n) for a, n in zip(offset, size, strict=True))].flatten()
        for offset, size in boxes(shape, start, stop)
    ]
    assert torch.cat([torch.empty(0, dtype=torch.long), *parts]).tolist() == list(range(start, stop))
    assert all(len(part) for part in parts)


@given(ranges())
def test_a_range_of_a_matrix_is_at_most_three_boxes(case: tuple[tuple[int, ...], int, int]) -> None:
    shape, start, stop = case
    assert len(list(boxes(shape, start, stop))) <= max(1, 2 * len(shape) - 1)


def test_whole_rows_stay_together() -> None:
    assert list(boxes((4, 3), 3, 9)) == [((1, 0), (2, 3))]
    assert list(boxes((4, 3), 2, 10)) == [((0, 2), (1, 1)), ((1, 0), (2, 3)), ((3, 0), (1, 1))]
    assert list(boxes((4, 3), 4, 4)) == []
