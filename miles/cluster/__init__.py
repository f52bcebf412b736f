"""Where processes run: local supervision now, Slurm submission, ports, signals. No torch, no RL."""
