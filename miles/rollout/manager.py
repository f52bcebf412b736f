"""The rollout manager: from prompts to graded groups.

Owns concurrency and order: how many groups are in flight, grading one while others are generated, and a
result in the order of the prompts whatever finished first. Requests belong to `miles.rollout.client`,
scores to `miles.rewards`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from miles.data.sample import FinishReason, Group, Prompt, Sample, sample_seed
from miles.errors import EngineError, MilesError
from miles.rewards.grader import Grader
from miles.rollout.answers import ExpertShape, Generation
from miles.rollout.client import EngineClient, SamplingParams

OnProgress = Callable[[int, int], None]
"""`on_progress(done, total)`, in groups."""


class RolloutManager:
    """Generates and grades groups with fixed sampling parameters."""

    def __init__(
        self,
        client: EngineClient,
        grader: Grader,
        params: SamplingParams,
        *,
        group_size: int,
        max_concurrent_groups: int,
        seed: int,
        experts: ExpertShape | None = None,
    ) -> None:
        """`seed` is the run's; `experts` asks for the routed experts of every token."""
        self._client = client
        self._grader = grader
        self._params = params
        self._group_size = group_size
        self._max_concurrent_groups = max_concurrent_groups
        self._seed = seed
        self._experts = experts

    async def collect(
        self, prompts: Sequence[Prompt], epochs: Sequence[int], on_progress: OnProgress | None = None
    ) -> list[Group]:
        """One graded group per prompt, in the order of the prompts.

        `epochs[i]` is how often the data was used up before `prompts[i]` was drawn; with the prompt's id
        and the sample's index it decides what the sample draws. Raises EngineError and DataError; nothing
        stays in flight.
        """
        groups = [self._new_group(prompt, epoch) for prompt, epoch in zip(prompts, epochs, strict=True)]
        slots = asyncio.Semaphore(self._max_concurrent_groups)
        done = 0

        async def complete(group: Group) -> None:
            nonlocal done
            async with slots:
                await self._generate(group)
            await self._grader.grade([group])
            done += 1
            if on_progress is not None:
                on_progress(done, len(groups))

        try:
            async with asyncio.TaskGroup() as tasks:
                for group in groups:
                    tasks.create_task(complete(group))
        except* MilesError as errors:
            raise errors.exceptions[0] from None
        return groups

    def _new_group(self, prompt: Prompt, epoch: int) -> Group:
        seeds = (sample_seed(self._seed, prompt.id, index, epoch) for index in range(self._group_size))
        return Group(prompt, [Sample(prompt, index, seed) for index, seed in enumerate(seeds)])

    async def _generate(self, group: Group) -> None:
        """Generate all samples of a group in one request."""
        seeds = [sample.seed for sample in group.samples]
        generations = await self._client.generate(group.prompt.tokens, seeds, self._params, experts=self._experts)
        for sample, generation in zip(group.samples, generations, strict=True):
            _fill(sample, generation)


def _fill(sample: Sample, generation: Generation) -> None:
    if generation.finish_reason is FinishReason.ABORT:
        raise EngineError(
            f"an engine aborted response {sample.index} to prompt '{sample.prompt.id}':"
            f" {generation.abort_message or 'no reason given'}",
            fix="see the engine's log; nothing may abort requests while a step generates",
        )
    sample.response_tokens = generation.tokens
    sample.log_probs = generation.log_probs
    sample.loss_mask = [1] * len(generation.tokens)
    sample.weight_versions = generation.weight_versions
    sample.routed_experts = generation.routed_experts
    sample.text = generation.text
    sample.finish_reason = generation.finish_reason
