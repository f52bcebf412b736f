"""How the losses of tokens become one number: a weight for each token of the global batch.

The weights are computed once over the whole batch of an update, before it is divided into micro-batches and
ranks; loss and gradient are then plain sums, whatever the division. Pure functions of masks.
"""

from __future__ import annotations

import torch

from miles.config.schema import Aggregation
from miles.errors import DataError


def token_weights(
    loss_masks: list[torch.Tensor], aggregation: Aggregation, *, max_response_tokens: int
) -> list[torch.Tensor]:
    """Weight of each token, float32 like the masks ([len] each), for all sequences of one optimizer update.

    With N sequences of which sequence i trains on len_i tokens:

    - `token-mean`: 1 / sum_i len_i (DAPO, Yu et al. 2025, arXiv 2503.14476, eq. 8)
    - `seq-mean-token-mean`: 1 / (N len_i) (GRPO, Shao et al. 2024, 2402.03300, eq. 3)
    - `seq-mean-token-sum-norm`: 1 / (N max_response_tokens) (Dr. GRPO, Liu et al. 2025, 2503.20783)

    N counts only sequences that train on something, so that a masked-out response does not weaken the others.
    """
    counts = [int(mask.count_nonzero()) for mask in loss_masks]
    if sum(counts) == 0:
        raise DataError(
            f"none of the {len(loss_masks)} sequences of this batch has a token to train on",
            fix="check that responses are not empty and that loss masks are not all 0",
        )
    sequences = sum(count > 0 for count in counts)
    match aggregation:
        case Aggregation.TOKEN_MEAN:
            denominators = [sum(counts)] * len(counts)
        case Aggregation.SEQUENCE_MEAN_TOKEN_MEAN:
            denominators = [sequences * max(count, 1) for count in counts]
        case Aggregation.SEQUENCE_MEAN_TOKEN_SUM_NORM:
            denominators = [sequences * max_response_tokens] * len(counts)
    return [mask / denominator for mask, denominator in zip(loss_masks, denominators, strict=True)]
