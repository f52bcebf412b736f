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

from miles.errors import EngineError

NAME = "miles_slots"
"""Name of the attention in transformers' registry."""
MIN_QUERIES = 4
"""Matrix kernels take another path, with other rounding, below four rows."""
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
    tokens: torch.Tensor
    """int64 [S, N], where each query lies in the packed pass; padding repeats the segment's last token"""
    positions: torch.Tensor
    """int64 [S, N]"""
    keys: int
    """Keys that are read, L"""
    masks: dict[tuple[int | None, int], torch.Tensor] = field(default_factory=dict)

    def mask(self, window: int | None, repeat: int) -> torch.Tensor:
        """Bool [S, 1, repeat * N, L]: causal, and within the sliding window where the layer has one."""
        if (window, repeat) not in self.masks:
            key = torch.arange(self.keys)
            visible = key <= self.positions[:, :, None]
            if window is not None:
                visible &= key > self.positions[:, :, None] - window
            self.masks[window, repeat] = visible.repeat(1, repeat, 1)[:, None]
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
        stored = self._layers[layer]
        count = len(group.rows)
        if group.rows[-1] == count - 1 and torch.equal(group.rows, torch.arange(count)):
            key, value = (tensor[:count, : group.keys].transpose(1, 2) for tensor in stored)
        else:
            key, value = (tensor[:, : group.keys][group.rows].transpose(1, 2) for tensor in stored)
        return key, value

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


def plan_attention(segments: Sequence[Segment], cache: SlotCache) -> AttentionPlan:
    """The plan of a pass whose packed tokens are those of `segments`, one after the other."""
    pieces: dict[tuple[int, int], list[tuple[Segment, int]]] = defaultdict(list)
    offset = 0
    for segment in segments:
        start = segment.start
        while start < segment.stop:
            keys = keys_read(start)
            stop = min(segment.stop, keys)
            piece = Segment(segment.row, start, stop - start)
            # A decoded token shares no call with a prompt: it would be padded to the prompt's length.
            width = _grown(MIN_QUERIES, piece.length, MIN_QUERIES)
            pieces[keys, width].append((piece, offset + start - segment.start))
            start = stop
        offset += segment.length
    cache.reserve(max(s.row for s in segments) + 1, max(keys for keys, _ in pieces))
    return AttentionPlan(
        cache=cache,
        rows=torch.cat([torch.full((s.length,), s.row) for s in segments]),
        positions=torch.cat([torch.arange(s.start, s.stop) for s in segments]),
        groups=[_group(members, keys, width) for (keys, width), members in pieces.items()],
    )


def _group(members: list[tuple[Segment, int]], keys: int, width: int) -> Group:
    lengths = torch.tensor([piece.length for piece, _ in members])
    # Only one query of a decoded token is real; repeating it keeps the kernel at MIN_QUERIES rows.
    step = torch.minimum(torch.arange(width), lengths[:, None] - 1)
    return Group(
        rows=torch.tensor([piece.row for piece, _ in members]),
        tokens=torch.tensor([offset for _, offset in members])[:, None] + step,
        positions=torch.tensor([piece.start for piece, _ in members])[:, None] + step,
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
    tokens = len(plan.rows)
    layer = module.layer_idx
    assert isinstance(layer, int)
    plan.cache.write(layer, plan, key[0, :, :tokens].transpose(0, 1), value[0, :, :tokens].transpose(0, 1))
    output = query.new_zeros(query.shape[2], query.shape[1], value.shape[-1])
    for group in plan.groups:
        output[group.tokens] = _attend(group, layer, plan.cache, query[0].transpose(0, 1), scaling, sliding_window)
    return output[None], None


def _attend(
    group: Group, layer: int, cache: SlotCache, query: torch.Tensor, scaling: float | None, window: int | None
) -> torch.Tensor:
    """Attention of one group: query [P, H, D] of the whole pass, result [S, N, H, D]."""
    keys, values = cache.read(layer, group)
    segments, width = group.tokens.shape
    heads, kv_heads = query.shape[1], keys.shape[1]
    # The query heads that share a key-value head become further rows of one product.
    repeat = heads // kv_heads
    rows = query[group.tokens].view(segments, width, kv_heads, repeat, -1).permute(0, 2, 3, 1, 4)
    attended = F.scaled_dot_product_attention(
        rows.reshape(segments, kv_heads, repeat * width, -1),
        keys,
        values,
        attn_mask=group.mask(window, repeat),
        scale=scaling,
    )
    return attended.view(segments, kv_heads, repeat, width, -1).permute(0, 3, 1, 2, 4).flatten(2, 3)


AttentionInterface.register(NAME, slot_attention)
