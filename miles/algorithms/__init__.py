"""Advantages, losses, importance corrections, KL: pure functions of tensors."""
