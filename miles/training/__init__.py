"""The loop and the trainer backends (megatron-core, FSDP2)."""
