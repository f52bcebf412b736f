"""The `eval` step: a model that an engine serves, on held-out prompts, into results.json."""

from __future__ import annotations

from contextlib import closing

from miles.config.schema import EvalStep
from miles.rollout.session import RolloutSession
from miles.runs.metrics import MetricsWriter
from miles.runs.progress import Progress, write_progress
from miles.training.context import Context


def evaluate_step(context: Context, step: EvalStep) -> None:
    """Run the step. Output: results.json, and one line of metrics as step 0 of the stage."""
    session = RolloutSession(
        step,
        paths=context.paths,
        stage=context.name,
        seed=context.seed,
        engines_file=context.engines_file,
        fence=context.fence,
        stop=lambda: context.stop.requested,
    )

    def on_progress(done: int, total: int) -> None:
        write_progress(context.paths, Progress(context.name, step.kind, 0, 1, "eval", done, total))

    with closing(session):
        session.wait_ready()
        # The engines loaded this model themselves: there is nothing to push, also not to one that was started again.
        result = session.evaluate(on_progress)
    context.output.mkdir(parents=True, exist_ok=True)
    result.write(context.output / "results.json")
    MetricsWriter(context.paths).write(context.name, 0, result.metrics())
