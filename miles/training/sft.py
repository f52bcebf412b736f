"""Supervised fine-tuning: the `sft` step, from demonstrations to a model directory."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace

from miles.algorithms.aggregation import token_weights
from miles.algorithms.losses import perplexity, sft_loss, token_means
from miles.config.schema import Aggregation, SftStep
from miles.data.batch import Sequence
from miles.data.inputs import open_demonstrations
from miles.data.order import prompts_of_step
from miles.data.packing import rank_micro_batches
from miles.errors import Interrupted
from miles.training.checkpointing import Checkpointer
from miles.training.context import Context, build_trainer
from miles.training.output import write_model
from miles.training.recorder import Recorder
from miles.training.schedule import learning_rate
from miles.training.stopwatch import Stopwatch


def train_supervised(context: Context, step: SftStep) -> None:
    """Run the step; every rank calls it. Each rank reads the data itself: the order is a pure function."""
    train = step.train
    _, rows = open_demonstrations(step, context.paths)
    trainer = build_trainer(step.model, train, context)
    checkpointer = Checkpointer(context, step.checkpoint, trainer, backend=train.backend)
    with closing(Recorder(context, kind=step.kind, steps=train.steps, tracking=step.tracking)) as recorder:
        watch = Stopwatch()
        done = checkpointer.restore().step
        for number in range(done + 1, train.steps + 1):
            if context.stop.agreed():
                recorder.progress(number - 1, "save")
                checkpointer.save_last(number - 1)
                raise Interrupted(f"'{context.name}' stopped after step {number - 1} of {train.steps}")
            recorder.progress(number, "update")
            draws = prompts_of_step(
                len(rows), train.batch_size, number - 1, seed=context.seed, shuffle=step.data.shuffle
            )
            batch = weighted([rows[draw.index] for draw in draws])
            micro_batches = rank_micro_batches(batch, train.max_tokens_per_micro_batch, trainer.layout)
            lr = learning_rate(train, number)
            stats = trainer.update(micro_batches, sft_loss, lr=lr, temperature=1.0)
            values = {
                "loss": stats.loss,
                "perplexity": perplexity(token_means(stats.metrics)["nll"]),
                "grad_norm": stats.grad_norm,
                "lr": lr,
                "tokens/total": sum(len(row) for row in batch),
                **watch.take(),
            }
            recorder.metrics(number, values)
            checkpointer.poll()
            if checkpointer.due(number):
                with watch.phase("save"):
                    checkpointer.begin(number, metrics=values)
        recorder.progress(train.steps, "save")
        checkpointer.save_last(train.steps)
        write_model(trainer, context.output)


def weighted(rows: list[Sequence]) -> list[Sequence]:
    """The rows of one update with the loss weights of a mean over its tokens."""
    weights = token_weights([row.loss_mask for row in rows], Aggregation.TOKEN_MEAN, max_response_tokens=1)
    return [replace(row, weights=weight) for row, weight in zip(rows, weights, strict=True)]
