"""The `Grader`: scores finished samples with every grader of `[[rewards]]` and adds the scores up.

Owns where a grader runs (built-in `exact` at once, synchronous functions in processes of their own,
asynchronous ones in the caller's event loop), its timeout, and what an error means. What a grader is called
belongs to `miles.rewards.functions`.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections import Counter
from collections.abc import Sequence

from miles.config.schema import RewardSection
from miles.data.sample import Group, Prompt, Sample
from miles.errors import DataError
from miles.rewards.exact import exact
from miles.rewards.functions import GraderFunction, describe, load_function
from miles.rewards.processes import Call, Outcome, ProcessPool, judge

log = logging.getLogger(__name__)

LABEL_GRADERS = ("exact", "math")


class Grader:
    """All graders of a step. Close it when done; samples of several groups may be graded at the same time."""

    def __init__(self, parts: list[Part]) -> None:
        self.parts = parts
        self.failures: Counter[str] = Counter()
        """Calls that raised or timed out and were scored 0, by grader name."""

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raise DataError where a grader needs a label that a prompt does not have.

        To be called before a run.
        """
        needy = next((part for part in self.parts if part.section.grader in LABEL_GRADERS), None)
        without = [prompt for prompt in prompts if prompt.label is None]
        if needy is not None and without:
            raise DataError(
                f"grader '{needy.name}' compares with a label, and {len(without)} of {len(prompts)} prompts"
                f" have none (first: '{without[0].id}')",
                fix="set data.label to the column with the reference answers",
            )

    async def grade(self, groups: Sequence[Group]) -> None:
        """Fill `reward` and `reward_parts` of every sample.

        Raises DataError for a grader that must stop the run.
        """
        try:
            async with asyncio.TaskGroup() as tasks:
                for group in groups:
                    for sample in group.samples:
                        tasks.create_task(self._grade_sample(sample))
        except* DataError as errors:
            raise errors.exceptions[0] from None

    def close(self) -> None:
        """End the graders' processes."""
        for part in self.parts:
            part.close()

    async def _grade_sample(self, sample: Sample) -> None:
        reward = 0.0
        parts: dict[str, float] = {}
        for part in self.parts:
            scores = self._scores(part, sample, await part.run(sample))
            score = scores.pop("reward")
            reward += part.section.weight * score
            parts[part.name] = score
            parts |= {f"{part.name}/{key}": value for key, value in scores.items()}
        sample.reward, sample.reward_parts = reward, parts

    def _scores(self, part: Part, sample: Sample, outcome: Outcome) -> dict[str, float]:
        """The scores of one call, or what `on_error` makes of a failure."""
        where = f"response {sample.index} to prompt '{sample.prompt.id}'"
        if outcome.invalid is not None:
            raise DataError(
                f"grader '{part.section.grader}' gave no reward for {where}: {outcome.invalid}",
                fix="return a finite number, a bool, or a dict of them with the key 'reward'",
            )
        if outcome.failure is None:
            return outcome.scores
        message = f"grader '{part.section.grader}' {outcome.failure}, for {where}"
        if part.section.on_error == "stop":
            raise DataError(
                message,
                fix='correct the grader or raise its timeout; on_error = "zero" scores such responses 0',
            )
        self.failures[part.name] += 1
        log.warning("%s; scored 0", message)
        return {"reward": 0.0}


class Part:
    """One grader with its weight, its arguments and the place where it runs."""

    def __init__(self, name: str, section: RewardSection) -> None:
        self.name = name
        self.section = section
        self._function: GraderFunction = load_function(section.grader, section.args)
        runs_here = self._function is exact or inspect.iscoroutinefunction(self._function)
        self._pool = None if runs_here else ProcessPool(section.grader, section.args)

    async def run(self, sample: Sample) -> Outcome:
        """The outcome for one sample, within the grader's timeout."""
        call = Call(sample.prompt.text, sample.text, sample.prompt.label, sample.prompt.metadata)
        if self._pool is not None:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._pool.threads, self._pool.call, call, self.section.timeout)
        arguments = (call.prompt, call.response, call.label, call.metadata)
        if self._function is exact:
            return judge(exact(*arguments, **self.section.args))
        return await self._run_coroutine(arguments)

    async def _run_coroutine(self, arguments: tuple[object, ...]) -> Outcome:
        try:
            async with asyncio.timeout(self.section.timeout) as limit:
                result = await self._function(*arguments, **self.section.args)
        except Exception as error:  # whatever user code raises
            if limit.expired():
                return Outcome({}, failure=f"took longer than {self.section.timeout:g} s")
            return Outcome({}, failure=f"raised {describe(error)}")
        return judge(result)

    def close(self) -> None:
        """End the processes of this grader."""
        if self._pool is not None:
            self._pool.close()


def build_grader(rewards: Sequence[RewardSection]) -> Grader:
    """The grader of a step.

    Every function is imported here, so that a wrong name stops before anything starts.
    """
    names = grader_names(rewards)
    return Grader([Part(name, section) for name, section in zip(names, rewards, strict=True)])


def grader_names(rewards: Sequence[RewardSection]) -> list[str]:
    """Short unique names for metrics.

    `exact`, the function's name, and `name-2` for the second of the same.
    """
    names: list[str] = []
    seen: Counter[str] = Counter()
    for section in rewards:
        name = section.grader.rpartition(":")[2]
        seen[name] += 1
        names.append(name if seen[name] == 1 else f"{name}-{seen[name]}")
    return names
