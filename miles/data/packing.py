"""Which sequence goes into which micro-batch of which data-parallel rank.

Owns the plan (pure arithmetic on lengths) and the micro-batches of one rank made from it. What a micro-batch
is belongs to `miles.data.batch`. Balance is counted in tokens; the quadratic part of attention is not.
"""

from __future__ import annotations

import heapq
from dataclasses import replace

import torch

from miles.data.batch import MicroBatch, Sequence, pack
from miles.errors import DataError
from miles.training.backend import Layout

Plan = list[list[list[int]]]
"""[data-parallel rank][micro-batch][index of a sequence]"""


def rank_micro_batches(sequences: list[Sequence], max_tokens: int, layout: Layout) -> list[MicroBatch]:
    """Micro-batches of this rank out of the whole batch `sequences`, as many as on every other rank.

    Where the plan leaves a micro-batch empty, a dummy of weight 0 keeps the ranks in step.
    """
    plan = plan_micro_batches([len(row) for row in sequences], max_tokens, layout.data_parallel_size)
    return [
        pack(sequences, indices) if indices else dummy_micro_batch(sequences[0])
        for indices in plan[layout.data_parallel_rank]
    ]


def dummy_micro_batch(like: Sequence) -> MicroBatch:
    """Two tokens with the fields of `like` that weigh nothing; its `indices` are [-1]."""
    row = Sequence(
        tokens=like.tokens[:2],
        loss_mask=torch.zeros_like(like.loss_mask[:2]),
        weights=torch.zeros_like(like.weights[:2]),
        extras={name: torch.zeros_like(value[:2]) for name, value in like.extras.items()},
        routed_experts=None if like.routed_experts is None else like.routed_experts[:1],
    )
    return replace(pack([row], [0]), indices=[-1])


def plan_micro_batches(lengths: list[int], max_tokens: int, data_parallel_size: int) -> Plan:
    """Divide sequences into micro-batches of at most `max_tokens` tokens, the same number on every rank.

    Every index occurs once. Token counts of two ranks differ by at most the longest sequence. The j-th
    micro-batches of all ranks are neighbours in size, because ranks wait for each other at each of them, and
    the largest come first, so that a run that needs too much memory fails at once. Micro-batches may be
    empty. Deterministic.

    Raises DataError where a sequence is longer than `max_tokens`.
    """
    for index, length in enumerate(lengths):
        if length > max_tokens:
            raise DataError(
                f"sequence {index} has {length} tokens, more than max_tokens_per_micro_batch = {max_tokens}",
                fix=f"set train.max_tokens_per_micro_batch to {max(lengths)} or more, or shorten sequences",
            )
    bins = sorted(_fill_bins(lengths, max_tokens, data_parallel_size), key=lambda b: (-_size(b, lengths), b))
    plan: Plan = [[] for _ in range(data_parallel_size)]
    totals = [0] * data_parallel_size
    for first in range(0, len(bins), data_parallel_size):
        lightest_first = sorted(range(data_parallel_size), key=totals.__getitem__)
        for rank, chosen in zip(lightest_first, bins[first : first + data_parallel_size], strict=True):
            plan[rank].append(chosen)
            totals[rank] += _size(chosen, lengths)
    return plan


def _fill_bins(lengths: list[int], max_tokens: int, multiple: int) -> list[list[int]]:
    """As few bins, a multiple of `multiple`, as longest-first into the emptiest fits into the budget."""
    count = -(-sum(lengths) // (max_tokens * multiple)) * multiple
    while True:
        bins = _balanced_bins(lengths, count)
        if all(_size(chosen, lengths) <= max_tokens for chosen in bins):
            return bins
        count += multiple


def _balanced_bins(lengths: list[int], count: int) -> list[list[int]]:
    """LPT rule (Graham 1969): longest sequence first, each into the bin with the fewest tokens."""
    bins: list[list[int]] = [[] for _ in range(count)]
    heap = [(0, number) for number in range(count)]
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        size, number = heap[0]
        bins[number].append(index)
        heapq.heapreplace(heap, (size + lengths[index], number))
    return [sorted(chosen) for chosen in bins]


def _size(indices: list[int], lengths: list[int]) -> int:
    return sum(lengths[index] for index in indices)
