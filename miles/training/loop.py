"""The reinforcement-learning loop, one screen. Every arrow of docs/architecture.md section 5 is one call here.

Owns the order of things only; `miles.training.rl` does them.
"""

from __future__ import annotations

from miles.errors import Interrupted
from miles.training.rl import ReinforcementLearning


def train(run: ReinforcementLearning) -> None:
    """Run all training steps of an `rl` step; every rank calls it."""
    run.sync_weights(version=0)
    run.evaluate(step=0)
    for step in range(1, run.steps + 1):
        if run.stop.agreed():
            raise Interrupted(f"stopped before step {step} of {run.steps}")
        groups = run.generate(step)  # prompts -> engines -> rewards
        batches = run.make_batches(groups, step)  # advantages, loss weights
        with run.engines_asleep():
            run.score(batches, step)  # old and reference log-probabilities
            run.update(batches, step)  # packed micro-batches -> loss -> optimizer
        run.sync_weights(version=step)  # trainer -> engines, verified
        run.evaluate(step)
        run.record(step)
    run.finish()
