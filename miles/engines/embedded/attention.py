"""Attention of many requests at once: a KV cache with one row per request, and the plan of one forward pass.

All tokens of a forward pass, prompts and single decoded tokens alike, are packed into one sequence without padding
between requests. `plan_attention` groups them so that each group is one call of scaled-dot-product attention;
`slot_attention` is what a Hugging Face model calls in place of its own attention (`ALL_ATTENTION_FUNCTIONS`).

What a token attends to is computed from shapes that follow from its own position, never from its neighbours: on a CPU
the result is then bit for bit the same alone, in any batch, in a prompt or decoded (`docs/engines.md` says what was
measured).

Shape legend: T tokens of the pass, S segments of a group, N queries of a segment, L keys, H query heads, K key-value
heads, D head size.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface

from miles.engines.embedded.rounding import MIN_ROWS
from miles.errors import EngineError

NAME = "miles_slots"
"""Name of the attention in transformers' registry."""
FIRST_KEYS = 64
"""Smallest number of keys that is read, see `keys_read`."""
UNSUPPORTED = ("softcap", "s_aux", "position_bias")


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive tokens of one request: positions [start, start + length) of cache row `row`."""

    row: int
    start: int
    length: int

    @property
    def stop(self) -> int:
        return self.start + self.length


@dataclass(slots=True)
class Group:
    """Segments that attend in one call."""

    rows: torch.Tensor
    """int64 [S], cache rows"""
    in_order: bool
    """The rows are 0, 1, ..., S - 1."""
    tokens: torch.Tensor
    """int64 [S * N], where each query lies in the packed pass; padding repeats the segment's last token"""
    positions: torch.Tensor
    """int64 [S, N]"""
    keys: int
    """Keys that are read, L"""
    masks: dict[tuple[int | None, int], torch.Tensor] = field(default_factory=dict)

    def mask(self, window: int | None, repeat: int, dtype: torch.dtype) -> torch.Tensor:
        """[S, 1, repeat * N, L], 0 or -inf: causal, and within the sliding window where the layer has one."""
        if (window, repeat) not in self.masks:
            key = torch.arange(self.keys)
            hidden = key > self.positions[:, :, None]
            if window is not None:
                hidden |= key <= self.positions[:, :, None] - window
            mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)
            self.masks[window, repeat] = mask.repeat(1, repeat, 1)[:, None]
        return self.masks[window, repeat]


@dataclass(slots=True)
class AttentionPlan:
    """One forward pass: where its keys and values go, and who attends to what."""

    cache: SlotCache
    rows: torch.Tensor
    """int64 [T]"""
    positions: torch.Tensor
    """int64 [T]"""
    groups: list[Group]

    def __len__(self) -> int:
        return self.rows.numel()


class SlotCache:
    """Keys and values of all layers. Rows 0..n-1 are in use; the room grows by doubling when it is needed."""

    def __init__(self) -> None:
        self.rows = 0
        self.length = 0
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def reserve(self, rows: int, length: int) -> None:
        """Make room for `rows` requests of `length` tokens; what is stored stays."""
        if rows <= self.rows and length <= self.length:
            return
        old_rows, old_length = self.rows, self.length
        self.rows = _grown(old_rows, rows, 8)
        self.length = _grown(old_length, length, FIRST_KEYS)
        for layer, stored in self._layers.items():
            grown = tuple(tensor.new_zeros(self.rows, self.length, *tensor.shape[2:]) for tensor in stored)
            for new, old in zip(grown, stored, strict=True):
                new[:old_rows, :old_length] = old
            self._layers[layer] = (grown[0], grown[1])

    def write(self, layer: int, plan: AttentionPlan, key: torch.Tensor, value: torch.Tensor) -> None:
        """Store the pass's keys and values, each [T, K, D]."""
        if layer not in self._layers:
            self._layers[layer] = (
                key.new_zeros(self.rows, self.length, *key.shape[1:]),
                value.new_zeros(self.rows, self.length, *value.shape[1:]),
            )
        flat = plan.rows * self.length + plan.positions
        for stored, new in zip(self._layers[layer], (key, value), strict=True):
            stored.view(-1, *stored.shape[2:]).index_copy_(0, flat, new)

    def read(self, layer: int, group: Group) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the group's rows, each [S, K, L, D]; a view when the group is all rows in order."""
        key, value = (tensor[:, : group.keys] for tensor in self._layers[layer])
        if group.in_order:
            key, value = (tensor[: group.rows.numel()] for tensor in (key, value))
        else:
            key, value = (tensor.index_select(0, group.rows) for tensor in (key, value))
        return key.transpose(1, 2), value.transpose(1, 2)

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of row `source` over row `target`."""
        for stored in self._layers.values():
            for tensor in stored:
                tensor[target, :length] = tensor[source, :length]

    def release(self) -> None:
        """Free everything."""
        self.rows = self.length = 0
        self._layers.clear()


def _grown(have: int, need: int, least: int) -> int:
    size = max(have, least)
    while size < need:
        size *= 2
    return size


def keys_read(position: int) -> int:
    """How many keys a query at `position` reads: the first of 64, 128, 192, 256, 384, 512, 768, 1024, ... above it.

    Kernels sum in an order that depends on the number of keys, so that number must follow from the position alone.
    """
    size = FIRST_KEYS
    while size <= position:
        size *= 2
    three_quarters = size * 3 // 4
    return three_quarters if size > 2 * FIRST_KEYS and position < three_quarters else size


def plan_attention(segments: Sequence[Segment], cache: SlotCache, repeat: int) -> AttentionPlan:
    """The plan of a pass whose packed tokens are those of `segments`, one after the other.

    `repeat` is the number of query heads that share a key-value head.
    """
    pieces: dict[tuple[int, int], list[tuple[Segment, int]]] = defaultdict(list)
    rows: list[int] = []
    positions: list[int] = []
    for segment in segments:
        start = segment.start
        while start < segment.stop:
            keys = keys_read(start)
            piece = Segment(segment.row, start, min(segment.stop, keys) - start)
            # A decoded token shares no call with a prompt: it would be padded to the prompt's length.
            width = _grown(-(-MIN_ROWS // repeat), piece.length, 1)
            pieces[keys, width].append((piece, len(positions) + start - segment.start))
            start = piece.stop
        rows += [segment.row] * segment.length
        positions += range(segment.start, segment.stop)
    cache.reserve(max(rows) + 1, max(keys for keys, _ in pieces))
    return AttentionPlan(
        cache=cache,
        rows=torch.tensor(rows),
        positions=torch.tensor(positions),
        groups=[_group(members, keys, width) for (keys, width), members in pieces.items()],
    )


def _group(members: list[tuple[Segment, int]], keys: int, width: int) -> Group:
    # Padding repeats the last query of a piece: its rows come out alike and are written to the same place.
    steps = [[min(step, piece.length - 1) for step in range(width)] for piece, _ in members]
    rows = [piece.row for piece, _ in members]
    return Group(
        rows=torch.tensor(rows),
        in_order=rows == list(range(len(rows))),
        tokens=torch.tensor([offset + s for (_, offset), row in zip(members, steps, strict=True) for s in row]),
        positions=torch.tensor([[p.start + s for s in row] for (p, _), row in zip(members, steps, strict=True)]),
        keys=keys,
    )


def slot_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    plan: AttentionPlan | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """The attention that the model calls: query [1, H, P, D], key and value [1, K, P, D], where P >= T is padded.

    Returns [1, P, H, D]; rows past T are zero.
    """
    refused = [name for name in UNSUPPORTED if kwargs.get(name) is not None]
    if plan is None or refused:
        what = f"its attention needs {refused[0]}" if refused else "it does not pass arguments on to its attention"
        raise EngineError(f"the embedded engine cannot run this model: {what}", fix='use engine.kind = "sglang"')
    layer = module.layer_idx
    assert isinstance(layer, int)
    queries, keys, values = (heads[0, :, : len(plan)].transpose(0, 1) for heads in (query, key, value))
    plan.cache.write(layer, plan, keys, values)
    output = query.new_zeros(query.shape[2], query.shape[1], value.shape[-1])
    for group in plan.groups:
        attended = _attend(group, layer, plan.cache, queries, scaling, sliding_window)
        output.index_copy_(0, group.tokens, attended)
    return output[None], None


def _attend(
    group: Group, layer: int, cache: SlotCache, queries: torch.Tensor, scaling: float | None, window: int | None
) -> torch.Tensor:
    """Attention of one group: queries [T, H, D] of the whole pass, result [S * N, H, D]."""
    keys, values = cache.read(layer, group)
    segments, width = group.positions.shape
    heads, kv_heads = queries.shape[1], keys.shape[1]
    # The query heads that share a key-value head become further rows of one product.
    repeat = heads // kv_heads
    rows = queries.index_select(0, group.tokens).view(segments, width, kv_heads, repeat, -1).permute(0, 2, 3, 1, 4)
    rows = rows.reshape(segments, kv_heads, repeat * width, -1)
    if segments * kv_heads == 1:
        # The threads would share the rows of a single product, and get too few each; of two products each gets one.
        rows, keys, values = (tensor.expand(2, -1, -1, -1) for tensor in (rows, keys, values))
    mask = group.mask(window, repeat, queries.dtype)
    attended = F.scaled_dot_product_attention(rows, keys, values, attn_mask=mask, scale=scaling)[:segments]
    attended = attended.view(segments, kv_heads, repeat, width, -1).permute(0, 3, 1, 2, 4)
    return attended.reshape(segments * width, heads, -1)


AttentionInterface.register(NAME, slot_attention)
