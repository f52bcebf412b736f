"""Learning rate of a training step, as a pure function of the configuration."""

from __future__ import annotations

import math

from miles.config.schema import Schedule, TrainSection


def learning_rate(train: TrainSection, step: int) -> float:
    """Rate of training step `step`, 0 <= step < train.steps.

    Rises linearly over the warm-up, lr / lr_warmup_steps at step 0 and lr at the warm-up's last step; then
    constant, or falling from lr at the first step after the warm-up to min_lr at the last step of the run.
    """
    if step < train.lr_warmup_steps:
        return train.lr * (step + 1) / train.lr_warmup_steps
    decay_steps = train.steps - 1 - train.lr_warmup_steps
    progress = min((step - train.lr_warmup_steps) / decay_steps, 1.0) if decay_steps > 0 else 0.0
    match train.lr_schedule:
        case Schedule.CONSTANT:
            return train.lr
        case Schedule.LINEAR:
            remaining = 1.0 - progress
        case Schedule.COSINE:
            remaining = 0.5 * (1.0 + math.cos(math.pi * progress))
    return train.min_lr + (train.lr - train.min_lr) * remaining
