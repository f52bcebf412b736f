"""What a Hugging Face `config.json` says of a model: its family, its context length. No torch.

How a family's weights map to megatron-core is in `miles.models.mapping`.
"""

from __future__ import annotations

from typing import Any

MEGATRON_FAMILIES = ("llama", "qwen2", "qwen3", "qwen3_moe")
"""`model_type` of the models that the megatron backend knows."""

CONTEXT_KEYS = ("max_position_embeddings", "n_positions")
"""Where a config states its context length; the second is GPT-2's and its relatives'."""


def context_length(config: dict[str, Any]) -> int | None:
    """Most tokens of prompt and response together, or None where the config does not state it."""
    return next((config[key] for key in CONTEXT_KEYS if isinstance(config.get(key), int)), None)
