"""Model families that the megatron backend knows, by the `model_type` of a Hugging Face config. No torch.

How a family's weights map to megatron-core is in `miles.models.mapping`.
"""

MEGATRON_FAMILIES = ("llama", "qwen2", "qwen3", "qwen3_moe")
