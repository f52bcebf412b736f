"""The rollout of one training step: from the draws to a batch that is in the journal.

Owns a step's groups and the order of things: draw, generate and grade at the same time, flush, close, carry. When the
step closes and with what is decided by the virtual clock of `miles.rollout.closing`, so that nothing here can change
it; requests belong to `miles.rollout.flight`, writing to `miles.rollout.flusher`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from miles.config.schema import RolloutSection
from miles.data.sample import Group
from miles.errors import EngineError
from miles.rollout.closing import Decision, Progress, Rules, Undetermined, decide
from miles.rollout.draws import Source
from miles.rollout.flight import Flight
from miles.rollout.flusher import Flusher
from miles.rollout.responses import cut_off, new_tokens, progress_of, snapshot
from miles.rollout.statistics import batch_metrics
from miles.runs.journal import Batch, Dropped, OpenStep

log = logging.getLogger(__name__)

OnProgress = Callable[[int, int], None]
"""`on_progress(done, total)`, in groups."""

TICK_SECONDS = 0.1
"""How often a waiting collection looks at the engines and at the request to stop."""
LANDING_PATIENCE = 10.0
"""Seconds until an engine that does not end its requests is not waited for."""
STOPPING_PATIENCE = 3.0


@dataclass(frozen=True, slots=True)
class Collected:
    """A step's batch, which the journal has."""

    batch: Batch
    metrics: dict[str, float]
    """Of the batch, and of the effort that it took."""


@dataclass(frozen=True, slots=True)
class NeedWeights:
    """An engine has come up that must be given weights before it serves. The step goes on meanwhile."""


@dataclass(frozen=True, slots=True)
class Stopped:
    """Asked to stop: nothing is in flight, and everything that was generated is in the journal."""


@dataclass
class Frontier:
    """Where the rollout of a stage stands between two steps."""

    cursor: int = 0
    """First position that was not drawn."""
    carried: list[Group] = field(default_factory=list)
    quarantined_total: int = 0

    @classmethod
    def after(cls, batch: Batch | None) -> Frontier:
        """After that step; None: at the beginning."""
        if batch is None:
            return cls()
        return cls(batch.cursor, list(batch.carried), batch.quarantined_total)


class StepCollection:
    """The collection of one step's batch. `run` it until it is collected or stopped."""

    def __init__(
        self,
        step: int,
        frontier: Frontier,
        section: RolloutSection,
        *,
        source: Source,
        flight: Flight,
        flusher: Flusher,
        stop: Callable[[], bool],
    ) -> None:
        self.step = step
        self._frontier = frontier
        self._section = section
        self._source = source
        self._flight = flight
        self._flusher = flusher
        self._stop = stop
        self._version = step - 1
        self._rules = Rules(
            target=section.prompts_per_step,
            filter_equal=section.filter == "zero-variance",
            max_filtered=int(section.max_filtered * section.prompts_per_step),
        )
        # The batch of the step before belongs to whoever has it.
        self._groups = {group.position: snapshot(group) for group in frontier.carried}
        self._progress: dict[int, Progress] = {}
        self._quarantined: dict[int, Dropped] = {}
        self._closing = False
        self._restored_tokens = 0
        fresh = max(0, math.ceil(section.prompts_per_step * section.over_sampling) - len(frontier.carried))
        self._cursor = frontier.cursor + fresh
        self._admitted = [*self._groups, *range(frontier.cursor, self._cursor)]
        self._required = frozenset(g.position for g in frontier.carried if step - g.born >= section.max_staleness)

    def restore(self, open_step: OpenStep) -> None:
        """Take what an earlier attempt had generated for this step. Call before `run`."""
        for group in open_step.groups:
            self._groups[group.position] = self._source.completed(group, self._groups.get(group.position))
        self._quarantined = {each.position: each for each in open_step.dropped if each.reason == "quarantined"}
        self._restored_tokens = self._new_tokens()

    async def run(self, on_progress: OnProgress) -> Collected | NeedWeights | Stopped:
        """Collect until the batch is decided; see the results' own words. After NeedWeights call it again.

        Raises EngineError, DataError and RunError; then nothing stays in flight.
        """
        try:
            return await self._run(on_progress)
        except BaseException:
            await self._flight.cancel()
            raise

    async def _run(self, on_progress: OnProgress) -> Collected | NeedWeights | Stopped:
        if not self._progress:
            self._begin()
        while True:
            outcome = self._decide()
            if isinstance(outcome, Decision):
                return await self._close(outcome)
            complete = sum(each.graded for each in self._progress.values())
            on_progress(min(complete, self._rules.target), self._rules.target)
            changed: set[int] = set()
            while not changed:
                if self._stop():
                    return await self._end()
                self._flight.engines.refresh()
                if self._flight.engines.needs_weights():
                    return NeedWeights()
                if outcome.closing and not self._closing:
                    self._closing = True
                    changed |= await self._flight.land(LANDING_PATIENCE)
                    continue
                self._flight.start(self._groups, outcome.wanted)
                changed |= await self._flight.wait(TICK_SECONDS)
                await self._flusher.tick(self.step, self._groups.values(), list(self._quarantined.values()))
            self._note(changed)

    def _begin(self) -> None:
        self._note(self._groups)
        for group in self._groups.values():
            if group.finished and not group.graded:
                self._flight.grade(group)

    def _note(self, changed: Iterable[int]) -> None:
        """Take up what happened to groups. Raises EngineError when too many of the run are quarantined."""
        for position in changed:
            group = self._groups[position]
            self._progress[position] = progress_of(group, self._version)
            detail = self._flight.blame.quarantined.get(position)
            if detail is not None and position not in self._quarantined:
                log.error("prompt '%s' is set aside: %s", group.prompt.id, detail)
                self._quarantined[position] = Dropped(position, group.prompt.id, "quarantined", detail)
        total = self._frontier.quarantined_total + len(self._quarantined)
        if total > self._section.max_quarantined:
            reasons = "\n".join(f"  prompt '{each.prompt_id}': {each.detail}" for each in self._quarantined.values())
            raise EngineError(
                f"{total} prompts could not be served, more than rollout.max_quarantined ="
                f" {self._section.max_quarantined}; those of step {self.step}:\n{reasons}",
                fix="see the engines' logs; correct or remove the prompts, or raise rollout.max_quarantined",
            )

    def _decide(self) -> Decision | Undetermined:
        """What the clock says, with every group drawn that it asks for."""
        outcome = decide(
            self._rules,
            self._admitted,
            self._cursor,
            self._progress,
            required=self._required,
            quarantined=frozenset(self._quarantined),
        )
        wanted = outcome.wanted if isinstance(outcome, Undetermined) else outcome.carried
        for position in wanted.keys() - self._groups.keys():
            self._groups[position] = self._source.group(position, born=self.step)
        return outcome

    async def _close(self, decision: Decision) -> Collected:
        """End what still runs, cut everything off at the decision, and write it down."""
        await self._flight.land(LANDING_PATIENCE)
        await self._flight.cancel()
        generated = self._new_tokens() - self._restored_tokens
        carried = [self._cut_off(position, limit) for position, limit in decision.carried.items()]
        dropped = self._dropped_by(decision)
        quarantined = sum(each.reason == "quarantined" for each in dropped)
        batch = Batch(
            step=self.step,
            groups=[self._groups[position] for position in decision.batch],
            carried=carried,
            dropped=dropped,
            cursor=decision.cursor,
            quarantined_total=self._frontier.quarantined_total + quarantined,
        )
        await self._flusher.commit(batch)
        kept = _count_new_tokens([*batch.groups, *batch.carried], self._version)
        effort = {
            "rollout/generated_tokens": float(generated),
            "rollout/resumed_tokens": float(self._restored_tokens),
            "rollout/discarded_tokens": float(generated + self._restored_tokens - kept),
        }
        return Collected(batch, batch_metrics(batch, self._section) | effort)

    async def _end(self) -> Stopped:
        await self._flight.land(STOPPING_PATIENCE)
        await self._flight.cancel()
        await self._flusher.flush(self.step, self._groups.values(), list(self._quarantined.values()))
        return Stopped()

    def _cut_off(self, position: int, limit: int | None) -> Group:
        group = self._groups[position]
        return group if limit is None else cut_off(group, self._version, limit)

    def _dropped_by(self, decision: Decision) -> list[Dropped]:
        """What the step dropped, by position. A draw that only looked needed is not drawn."""
        dropped = [each for each in self._quarantined.values() if each.position < decision.cursor]
        for position in decision.filtered:
            group = self._groups[position]
            detail = f"all rewards are {group.samples[0].reward:g}"
            dropped.append(Dropped(position, group.prompt.id, "zero-variance", detail))
        return sorted(dropped, key=lambda each: each.position)

    def _new_tokens(self) -> int:
        return _count_new_tokens(self._groups.values(), self._version)


def _count_new_tokens(groups: Iterable[Group], version: int) -> int:
    return sum(new_tokens(sample, version) for group in groups for sample in group.samples)
