"""Slurm: scripts, commands, states, submission."""
