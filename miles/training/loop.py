"""The reinforcement-learning loop, one screen. Every arrow of docs/architecture.md section 5 is one call here.

Owns the order of things only; `miles.training.rl` does them.
"""

from __future__ import annotations

from miles.training.rl import ReinforcementLearning


def train(run: ReinforcementLearning) -> None:
    """Run the training steps of an `rl` step that are not done; every rank calls it.

    After a restart, steps whose batch the journal holds are trained again without the engines.
    """
    done = run.restore()  # newest checkpoint, or the initial model
    run.sync_weights(version=done)
    run.evaluate(step=done)
    for step in range(done + 1, run.steps + 1):
        run.stop_if_asked(before=step)
        groups = run.next_batch(step)  # the journal, or prompts -> engines -> rewards -> the journal
        batches = run.make_batches(groups, step)  # advantages, loss weights
        with run.engines_asleep():
            run.score(batches, step)  # old and reference log-probabilities
            run.update(batches, step)  # packed micro-batches -> loss -> optimizer
        run.sync_weights(version=step)  # trainer -> engines, verified
        run.evaluate(step)
        run.record(step)
        run.checkpoint(step)  # when due, in the background
    run.finish()
