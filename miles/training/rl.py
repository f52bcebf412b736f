"""The arrows of the reinforcement-learning loop: what each line of `miles.training.loop` does.

Rank 0 talks to the engines through a `RolloutSession`; everything that all ranks need of its answers is broadcast.
Owns the state of one `rl` step; the order of things is the loop's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist

from miles.algorithms.losses import policy_loss, token_means
from miles.algorithms.mismatch import NO_MISMATCH, Mismatch, measure_mismatch
from miles.config.schema import RlStep
from miles.data.batch import MicroBatch, pack, unpack
from miles.data.packing import rank_micro_batches
from miles.data.sample import Group
from miles.engines.serve import choose_kind, has_gpu
from miles.errors import EngineLost, Interrupted
from miles.rollout.session import Collected, NeedWeights, RolloutSession, Stopped
from miles.rollout.statistics import batch_metrics
from miles.runs.journal import Batch, read_batch, write_batch
from miles.sync.push import WeightSync
from miles.training.checkpointing import Checkpointer
from miles.training.context import Context, build_trainer, engine_dtype
from miles.training.distributed import from_rank_zero, together
from miles.training.experience import build_updates
from miles.training.output import write_model
from miles.training.recorder import Recorder
from miles.training.schedule import learning_rate
from miles.training.stopwatch import Stopwatch

ROLLOUT_FILE = "rollout.h5"
"""In a checkpoint: the cursor and the groups that its step left to later ones."""

Updates = list[list[MicroBatch]]
"""[optimizer update of this step][micro-batch of this rank]"""


class ReinforcementLearning:
    """One `rl` step on this rank. All public methods are collective."""

    def __init__(self, context: Context, step: RlStep) -> None:
        self.stop = context.stop
        self.steps = step.train.steps
        self._context = context
        self._step = step
        self._watch = Stopwatch()
        self._values: dict[str, float] = {}
        self._recorder = Recorder(context, kind=step.kind, steps=self.steps, tracking=step.tracking)
        # Prompts and graders are checked before the model is built: bad data should cost seconds.
        self._session = self._open_session() if context.is_rank_zero else None
        dist.barrier()
        self._trainer = build_trainer(step.model, step.train, context)
        needs_reference = step.algorithm.kl_coef > 0
        self._reference = build_trainer(step.model, step.train, context) if needs_reference else None
        self._loss = policy_loss(step.algorithm)
        self._checkpointer = Checkpointer(context, step.checkpoint, self._trainer, backend=step.train.backend)
        self._batch: Batch | None = None
        """On rank 0, the decision of the newest step: what it trains on and what it leaves to later ones."""
        self._ahead: Batch | None = None
        """On rank 0, the journaled decision of the step after it."""
        self._replaying = True
        self._recorded = -1
        """Last step with a line of metrics."""
        self._last_values: dict[str, float] = {}
        self._sync = WeightSync(
            self._session.post if self._session else None,
            engines=step.local.engines,
            dtype=engine_dtype(step),
            bucket_bytes=step.engine.sync_bucket_mib * 2**20,
            # SGLang fuses tensors, so its checksums have other names than the checkpoint's.
            verify=step.engine.verify_sync and choose_kind(step.engine.kind, gpu=has_gpu()) == "embedded",
        )

    def restore(self) -> int:
        """Load the newest intact checkpoint and look what the journal holds; returns the steps that are done."""
        self._recorder.progress(0, "restore")
        restored = self._checkpointer.restore()
        if self._session is not None and restored.directory is not None:
            self._batch = read_batch(restored.directory / ROLLOUT_FILE, self._session.prompts)
        self._look_ahead(restored.step + 1)
        return restored.step

    def stop_if_asked(self, before: int) -> None:
        """End with everything saved, when any rank was asked to. Raises Interrupted."""
        if self.stop.agreed():
            self._end(done=before - 1)

    def sync_weights(self, version: int) -> None:
        """Give the engines the trainer's weights as `version`, and check that they hold the same bits.

        While steps are replayed the engines need none.
        """
        if self._replaying:
            return
        self._recorder.progress(version, "sync")
        with self._watch.phase("sync"):
            self._wait_for_engines()
            self._push(version)

    def evaluate(self, step: int) -> None:
        """Evaluate before the first step, after the last, and every `eval.every` steps in between."""
        every = self._step.eval.every
        due = step in (0, self.steps) or (every > 0 and step % every == 0)
        if self._step.eval.data is None or not due or step <= self._recorded:
            return
        with self._watch.phase("eval"):
            while not self._evaluated(step):
                pass
        if step == 0:
            self.record(0)

    def next_batch(self, step: int) -> list[Group]:
        """Graded groups of this step, from the journal or from the engines; an empty list on ranks other than 0."""
        if self._replaying:
            self._recorder.progress(step, "replay")
            self._batch = self._ahead
            if self._batch is not None:
                self._values |= batch_metrics(self._batch, self._step.rollout)
        else:
            with self._watch.phase("generate"):
                self._generate(step)
        if self._batch is not None:
            self._recorder.samples(step, self._batch.groups)
        self._look_ahead(step + 1)
        return [] if self._batch is None else self._batch.groups

    def make_batches(self, groups: list[Group], step: int) -> Updates:
        """This rank's micro-batches of each optimizer update, with advantages and loss weights."""
        built = self._build(groups, step) if self._context.is_rank_zero else None
        updates = [unpack(packed) for packed in from_rank_zero(built)]
        self._values["tokens/total"] = sum(len(row) for rows in updates for row in rows)
        budget = self._step.train.max_tokens_per_micro_batch
        return [rank_micro_batches(rows, budget, self._trainer.layout) for rows in updates]

    @contextmanager
    def engines_asleep(self) -> Iterator[None]:
        """While the trainer computes on a GPU, the engines on it give up weights and KV cache."""
        shares_memory = self._trainer.device.type == "cuda"
        if shares_memory:
            self._wait_for_engines()
        if shares_memory and self._session is not None:
            self._session.sleep()
        dist.barrier()
        yield
        dist.barrier()
        if shares_memory and self._session is not None:
            self._session.wake()

    def score(self, updates: Updates, step: int) -> None:
        """Add the trainer's log-probabilities before the update, and the reference model's."""
        self._recorder.progress(step, "log_probs")
        temperature = self._step.rollout.temperature
        mismatch = NO_MISMATCH
        with self._watch.phase("log_probs"):
            for micro_batches in updates:
                old = self._trainer.log_probs(micro_batches, temperature)
                for micro_batch, outputs in zip(micro_batches, old, strict=True):
                    extras = micro_batch.extras
                    extras["old_log_probs"] = outputs.log_probs.cpu()
                    mismatch += measure_mismatch(
                        extras["old_log_probs"], extras["rollout_log_probs"], micro_batch.loss_mask
                    )
                if self._reference is not None:
                    reference = self._reference.log_probs(micro_batches, temperature)
                    for micro_batch, outputs in zip(micro_batches, reference, strict=True):
                        micro_batch.extras["ref_log_probs"] = outputs.log_probs.cpu()
        self._values |= self._add_over_ranks(mismatch).metrics()

    def update(self, updates: Updates, step: int) -> None:
        """One optimizer update per part of the batch."""
        lr = learning_rate(self._step.train, step)
        sums: dict[str, float] = {}
        stats = []
        with self._watch.phase("update"):
            for number, micro_batches in enumerate(updates):
                self._recorder.progress(step, "update", number, len(updates))
                temperature = self._step.rollout.temperature
                stats.append(self._trainer.update(micro_batches, self._loss, lr=lr, temperature=temperature))
                for name, value in stats[-1].metrics.items():
                    sums[name] = sums.get(name, 0.0) + value
        self._values |= token_means(sums)
        self._values["loss"] = sum(each.loss for each in stats) / len(stats)
        self._values["grad_norm"] = sum(each.grad_norm for each in stats) / len(stats)
        self._values["lr"] = lr

    def record(self, step: int) -> None:
        """Write this step's line of metrics."""
        self._recorded = max(self._recorded, step)
        self._last_values = self._take_values()
        self._recorder.metrics(step, self._last_values)

    def checkpoint(self, step: int) -> None:
        """Commit the save in progress if it has ended, and begin the next one when it is due."""
        self._prune(self._checkpointer.poll())
        generated = self._last_values.get("time/generate", 0.0) / self._last_values["time/step"]
        if self._checkpointer.due(step, repeated_fraction=max(1.0 - generated, 0.01)):
            self._recorder.progress(step, "save")
            with self._watch.phase("save"):
                self._checkpointer.begin(step, metrics=self._last_values, extra=self._write_rollout)

    def finish(self) -> None:
        """Save the last state and write the trained model."""
        self._recorder.progress(self.steps, "save")
        self._checkpointer.save_last(self.steps, metrics=self._last_values, extra=self._write_rollout)
        write_model(self._trainer, self._context.output)

    def close(self) -> None:
        """End trackers and connections, whatever happened before."""
        self._recorder.close()
        if self._session is not None:
            self._session.close()

    def _open_session(self) -> RolloutSession:
        context = self._context
        return RolloutSession(
            self._step,
            paths=context.paths,
            stage=context.name,
            seed=context.seed,
            engines_file=context.engines_file,
            fence=context.fence,
            stop=lambda: context.stop.requested,
        )

    def _look_ahead(self, step: int) -> None:
        """Read the journaled batch of `step`; without one, that step is generated, and so are all after it."""
        if self._session is not None and self._replaying:
            self._ahead = self._session.journal.read_batch(step) if step <= self.steps else None
            if self._ahead is None:
                self._go_live(self._session, step)
        self._replaying, self._recorded = from_rank_zero((self._ahead is not None, self._recorder.recorded))

    def _go_live(self, session: RolloutSession, step: int) -> None:
        """From `step` on the engines generate. What later steps left came from weights that may not come again."""
        session.journal.discard_from(step + 1, why=f"the journal of step {step} is missing or damaged")
        self._recorder.forget(after=step - 1)
        session.restore(self._batch, session.journal.read_open(step))

    def _generate(self, step: int) -> None:
        """Collect this step's batch; weights go to engines that are started again meanwhile. Raises Interrupted."""
        outcome: Collected | NeedWeights | Stopped | None = None
        while True:
            if self._session is not None:
                outcome = self._session.collect(step, self._on_progress(step, "generate"))
            match from_rank_zero(type(outcome)):
                case word if word is NeedWeights:
                    self._push(step - 1)
                case word if word is Stopped:
                    self._end(done=step - 1)
                case _:
                    break
        if isinstance(outcome, Collected):
            self._batch = outcome.batch
            self._values |= outcome.metrics

    def _evaluated(self, step: int) -> bool:
        """Evaluate the state after `step`; False when all engines were lost meanwhile. Raises Interrupted."""
        self._wait_for_engines()
        self._push(step)
        lost = False
        with together(Interrupted):
            if self._session is not None:
                try:
                    self._values |= self._session.evaluate(self._on_progress(step, "eval")).metrics()
                except EngineLost:
                    lost = True
        return not from_rank_zero(lost)

    def _wait_for_engines(self) -> None:
        with together(Interrupted):
            if self._session is not None:
                self._session.wait_ready()

    def _push(self, version: int) -> None:
        """Weights to every engine that is ready and does not hold them yet. Collective."""
        while engines := from_rank_zero(self._session.stale_engines(version) if self._session else None):
            stats = self._sync.push(self._trainer.named_weights(), version, engines)
            self._values["sync/bytes"] = stats.bytes
            if self._session is not None:
                self._session.weights_pushed(version, stats.reached)

    def _end(self, done: int) -> NoReturn:
        """Save the state after step `done` if time allows, and raise Interrupted on every rank."""
        self._recorder.progress(done, "save")
        saved = self._checkpointer.save_last(done, metrics=self._last_values, extra=self._write_rollout)
        where = "" if saved else f"; its state is that of step {self._checkpointer.saved_step} and the journal"
        raise Interrupted(f"'{self._context.name}' stopped after step {done} of {self.steps}{where}")

    def _write_rollout(self, directory: Path) -> None:
        """What the next step needs of the rollout: the cursor and the groups that were kept."""
        assert self._batch is not None
        write_batch(directory / ROLLOUT_FILE, replace(self._batch, groups=[]))

    def _prune(self, committed: int | None) -> None:
        """Once a checkpoint is on disk, the journal is needed from the oldest one that is kept."""
        if committed is not None and self._session is not None and self._step.journal.keep == "needed":
            self._session.journal.prune(self._checkpointer.oldest_step + 1)

    def _build(self, groups: list[Group], step: int) -> list[MicroBatch]:
        """The rows of each update, packed: a few large tensors are broadcast faster than thousands of small ones."""
        updates = build_updates(
            groups,
            self._step.algorithm,
            updates=self._step.train.updates_per_step,
            max_response_tokens=self._step.rollout.max_response_tokens,
            seed=self._context.seed + step,
            only_version=step - 1 if self._step.rollout.off_policy_tokens == "mask" else None,
        )
        return [pack(rows, list(range(len(rows)))) for rows in updates]

    def _on_progress(self, step: int, phase: str) -> Callable[[int, int], None]:
        return lambda done, total: self._recorder.progress(step, phase, done, total)

    def _take_values(self) -> dict[str, float]:
        values = self._values | self._watch.take()
        self._values = {}
        return values

    def _add_over_ranks(self, mine: Mismatch) -> Mismatch:
        """The sum over data-parallel ranks; tensor and pipeline peers hold copies and count once."""
        everyone: list[tuple[int, Mismatch]] = [(0, NO_MISMATCH)] * dist.get_world_size()
        dist.all_gather_object(everyone, (self._trainer.layout.data_parallel_rank, mine))
        return sum(dict(everyone).values(), start=NO_MISMATCH)
