"""Learning rate of a training step, as a pure function of the configuration."""

from __future__ import annotations

import math

from miles.config.schema import Schedule, TrainSection


def learning_rate(train: TrainSection, step: int) -> float:
    """Rate of training step `step`; steps count from 1 to train.steps.

    Rises linearly over the warm-up, from lr / lr_warmup_steps at step 1 to lr at its last step; then
    constant, or falling from lr at the first step after the warm-up to min_lr at the last step of the run.
    """
    if step <= train.lr_warmup_steps:
        return train.lr * step / train.lr_warmup_steps
    first = train.lr_warmup_steps + 1
    progress = (step - first) / (train.steps - first) if train.steps > first else 0.0
    match train.lr_schedule:
        case Schedule.CONSTANT:
            return train.lr
        case Schedule.LINEAR:
            remaining = 1.0 - progress
        case Schedule.COSINE:
            remaining = 0.5 * (1.0 + math.cos(math.pi * progress))
    return train.min_lr + (train.lr - train.min_lr) * remaining
