"""The packing plan as properties over random lengths, and the micro-batches that are made from it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from miles.data.batch import Sequence
from miles.data.packing import plan_micro_batches, rank_micro_batches
from miles.errors import DataError
from miles.training.backend import Layout

lengths_lists = st.lists(st.integers(min_value=1, max_value=100), min_size=1, max_size=60)
budgets = st.integers(min_value=100, max_value=400)
rank_counts = st.integers(min_value=1, max_value=8)


@given(lengths_lists, budgets, rank_counts)
def test_every_index_once_within_the_budget(lengths: list[int], budget: int, ranks: int) -> None:
    plan = plan_micro_batches(lengths, budget, ranks)
    assert sorted(i for rank in plan for chosen in rank for i in chosen) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in chosen) <= budget for rank in plan for chosen in rank)


@given(lengths_lists, budgets, rank_counts)
def test_ranks_are_in_step_and_balanced(lengths: list[int], budget: int, ranks: int) -> None:
    plan = plan_micro_batches(lengths, budget, ranks)
    assert len(plan) == ranks
    assert len({len(rank) for rank in plan}) == 1
    totals = [sum(lengths[i] for chosen in rank for i in chosen) for rank in plan]
    assert max(totals) - min(totals) <= max(lengths)


@given(lengths_lists, budgets, rank_counts)
def test_no_more_micro_batches_than_twice_the_minimum(lengths: list[int], budget: int, ranks: int) -> None:
    """A number of bins is given up only where all of them are more than half full."""
    count = len(plan_micro_batches(lengths, budget, ranks)[0])
    assert count <= 2 * -(-sum(lengths) // (budget * ranks))


@given(lengths_lists, budgets, rank_counts)
def test_deterministic(lengths: list[int], budget: int, ranks: int) -> None:
    assert plan_micro_batches(lengths, budget, ranks) == plan_micro_batches(list(lengths), budget, ranks)


def test_large_micro_batches_come_first() -> None:
    assert plan_micro_batches([30, 100, 60], 100, 1) == [[[1], [0, 2]]]


def test_neighbours_in_size_run_together() -> None:
    assert plan_micro_batches([10, 90, 80, 20], 90, 2) == [[[1], [0]], [[2], [3]]]


def test_too_long_sequence_names_value_bound_and_fix() -> None:
    with pytest.raises(DataError) as error:
        plan_micro_batches([5, 120, 7], 100, 2)
    assert "sequence 1 has 120 tokens" in str(error.value)
    assert "max_tokens_per_micro_batch = 100" in str(error.value)
    assert "to 120 or more" in str(error.value)


def sequence(length: int) -> Sequence:
    return Sequence(
        tokens=torch.arange(length),
        loss_mask=torch.ones(length),
        weights=torch.full((length,), 0.5),
        extras={"advantages": torch.ones(length)},
    )


def layout(rank: int, size: int) -> Layout:
    return Layout(rank=rank, world_size=size, data_parallel_rank=rank, data_parallel_size=size)


def test_rank_micro_batches_cover_the_batch() -> None:
    sequences = [sequence(n) for n in (4, 7, 3, 9, 2)]
    seen = []
    for rank in range(2):
        for micro_batch in rank_micro_batches(sequences, 12, layout(rank, 2)):
            for index, part in zip(micro_batch.indices, micro_batch.tokens.split(micro_batch.lengths), strict=True):
                assert torch.equal(part, sequences[index].tokens)
                seen.append(index)
    assert sorted(seen) == [0, 1, 2, 3, 4]


def test_a_rank_without_sequences_gets_a_dummy() -> None:
    batches = [rank_micro_batches([sequence(5)], 10, layout(rank, 2)) for rank in range(2)]
    assert [len(rank) for rank in batches] == [1, 1]
    [dummy] = batches[1]
    assert dummy.is_dummy and not batches[0][0].is_dummy
    assert dummy.lengths == [2]
    assert dummy.weights.sum() == dummy.loss_mask.sum() == dummy.extras["advantages"].sum() == 0
