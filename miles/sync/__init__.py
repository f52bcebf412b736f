"""Trainer weights to engine weights: names, flattened buckets, shared memory or CUDA IPC, verification."""
