"""Packing sequences end to end, and taking them apart again."""

import numpy as np
import torch

from miles.data.batch import Sequence, pack, unpack


def row(length: int, routes: bool) -> Sequence:
    return Sequence(
        tokens=torch.arange(length),
        loss_mask=torch.ones(length),
        weights=torch.full((length,), 0.5),
        extras={"advantages": torch.randn(length)},
        routed_experts=np.zeros((length - 1, 2, 2), np.uint8) if routes else None,
    )


def test_unpack_is_the_inverse_of_pack():
    rows = [row(3, True), row(1, False), row(5, True)]
    again = unpack(pack(rows, [0, 1, 2]))
    for before, after in zip(rows, again, strict=True):
        assert torch.equal(before.tokens, after.tokens)
        assert torch.equal(before.loss_mask, after.loss_mask)
        assert torch.equal(before.weights, after.weights)
        assert torch.equal(before.extras["advantages"], after.extras["advantages"])
        assert before.routed_experts is after.routed_experts


def test_positions_restart_with_every_sequence():
    packed = pack([row(2, False), row(3, False)], [1, 0])
    assert packed.position_ids.tolist() == [0, 1, 2, 0, 1]
    assert packed.cu_seqlens.tolist() == [0, 3, 5]
    assert packed.indices == [1, 0]
