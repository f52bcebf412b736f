"""Miles: reinforcement-learning post-training for language models on Slurm supercomputers."""

__version__ = "0.1.0"
