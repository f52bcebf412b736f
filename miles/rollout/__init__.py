"""Engine client, routing over engines, the rollout manager, evaluation."""
