"""The megatron-core trainer backend, on CPU (gloo) and GPU (NCCL)."""
