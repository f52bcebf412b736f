"""What is read from a `config.json` without transformers, against transformers."""

import pytest
from transformers import GPT2Config, LlamaConfig, PretrainedConfig

from miles.models.families import context_length


@pytest.mark.parametrize("config", [LlamaConfig(max_position_embeddings=96), GPT2Config(n_positions=96)])
def test_context_length_under_either_name(config: PretrainedConfig) -> None:
    assert context_length(config.to_dict()) == config.max_position_embeddings == 96


def test_context_length_that_is_not_stated() -> None:
    assert context_length({"model_type": "mamba"}) is None
