"""INT4 and FP8 formats (none yet)."""
