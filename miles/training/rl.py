"""The arrows of the reinforcement-learning loop: what each line of `miles.training.loop` does.

Rank 0 talks to the engines through a `RolloutSession`; everything that all ranks need of its answers is broadcast.
Owns the state of one `rl` step; the order of things is the loop's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.distributed as dist

from miles.algorithms.losses import policy_loss, token_means
from miles.algorithms.mismatch import NO_MISMATCH, Mismatch, measure_mismatch
from miles.config.schema import RlStep
from miles.data.batch import MicroBatch, pack, unpack
from miles.data.packing import rank_micro_batches
from miles.data.sample import Group
from miles.engines.serve import choose_kind, has_gpu
from miles.rollout.session import RolloutSession
from miles.rollout.statistics import rollout_metrics
from miles.sync.push import WeightSync
from miles.training.context import Context, build_trainer, engine_dtype
from miles.training.distributed import from_rank_zero
from miles.training.experience import build_updates
from miles.training.output import write_model
from miles.training.recorder import Recorder
from miles.training.schedule import learning_rate
from miles.training.stopwatch import Stopwatch

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
        self._session = (
            RolloutSession(step, paths=context.paths, seed=context.seed, engine_urls=context.engine_urls)
            if context.is_rank_zero
            else None
        )
        dist.barrier()
        self._trainer = build_trainer(step.model, step.train, context)
        needs_reference = step.algorithm.kl_coef > 0
        self._reference = build_trainer(step.model, step.train, context) if needs_reference else None
        self._loss = policy_loss(step.algorithm)
        self._sync = WeightSync(
            self._session.post if self._session else None,
            engines=len(context.engine_urls),
            dtype=engine_dtype(step),
            bucket_bytes=step.engine.sync_bucket_mib * 2**20,
            # SGLang fuses tensors, so its checksums have other names than the checkpoint's.
            verify=step.engine.verify_sync and choose_kind(step.engine.kind, gpu=has_gpu()) == "embedded",
        )

    def sync_weights(self, version: int) -> None:
        """Give the engines the trainer's weights as `version`, and check that they hold the same bits."""
        self._recorder.progress(version, "sync")
        with self._watch.phase("sync"):
            stats = self._sync.push(self._trainer.named_weights(), version)
        self._values["sync/bytes"] = stats.bytes

    def evaluate(self, step: int) -> None:
        """Evaluate before the first step, after the last, and every `eval.every` steps in between."""
        every = self._step.eval.every
        due = step in (0, self.steps) or (every > 0 and step % every == 0)
        if self._step.eval.data is None or not due:
            return
        with self._watch.phase("eval"):
            if self._session is not None:
                result = self._session.evaluate(self._on_progress(step, "eval"))
                self._values |= result.metrics()
            dist.barrier()
        if step == 0:
            self._recorder.metrics(0, self._take_values())

    def generate(self, step: int) -> list[Group]:
        """Graded groups of this step's prompts; an empty list on ranks other than 0."""
        with self._watch.phase("generate"):
            if self._session is None:
                return []
            groups = self._session.collect(step, self._on_progress(step, "generate"))
        self._values |= rollout_metrics(groups)
        self._recorder.samples(step, groups)
        return groups

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
        self._recorder.metrics(step, self._take_values())

    def finish(self) -> None:
        """Write the trained model."""
        self._recorder.progress(self.steps, "save")
        write_model(self._trainer, self._context.output)

    def close(self) -> None:
        """End trackers and connections, whatever happened before."""
        self._recorder.close()
        if self._session is not None:
            self._session.close()

    def _build(self, groups: list[Group], step: int) -> list[MicroBatch]:
        """The rows of each update, packed: a few large tensors are broadcast faster than thousands of small ones."""
        updates = build_updates(
            groups,
            self._step.algorithm,
            updates=self._step.train.updates_per_step,
            max_response_tokens=self._step.rollout.max_response_tokens,
            seed=self._context.seed + step,
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
