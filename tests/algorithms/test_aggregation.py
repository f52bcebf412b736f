"""Token weights of the three aggregations, by hand and by what they must add up to."""

import pytest
import torch

from miles.algorithms.aggregation import token_weights
from miles.config.schema import Aggregation
from miles.errors import DataError

MASKS = [torch.tensor([0.0, 1.0, 1.0, 1.0]), torch.tensor([0.0, 1.0, 0.0])]


def weights(aggregation: Aggregation, masks: list[torch.Tensor] = MASKS) -> list[list[float]]:
    return [w.tolist() for w in token_weights(masks, aggregation, max_response_tokens=8)]


def test_token_mean() -> None:
    assert weights(Aggregation.TOKEN_MEAN) == [[0, 0.25, 0.25, 0.25], [0, 0.25, 0]]


def test_sequence_mean_token_mean() -> None:
    sixth = torch.tensor(1 / 6).item()
    assert weights(Aggregation.SEQUENCE_MEAN_TOKEN_MEAN) == [[0, sixth, sixth, sixth], [0, 0.5, 0]]


def test_sequence_mean_token_sum_norm() -> None:
    assert weights(Aggregation.SEQUENCE_MEAN_TOKEN_SUM_NORM) == [[0, 1 / 16, 1 / 16, 1 / 16], [0, 1 / 16, 0]]


@pytest.mark.parametrize("aggregation", list(Aggregation))
def test_a_masked_out_sequence_does_not_weaken_the_others(aggregation: Aggregation) -> None:
    assert weights(aggregation, [*MASKS, torch.zeros(5)]) == [*weights(aggregation), [0.0] * 5]


def test_nothing_to_train_on_is_an_error() -> None:
    with pytest.raises(DataError, match="none of the 2 sequences"):
        weights(Aggregation.TOKEN_MEAN, [torch.zeros(3), torch.zeros(2)])
