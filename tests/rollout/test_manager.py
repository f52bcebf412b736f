"""The rollout manager over real HTTP and real graders: order, overlap, bounds, errors."""

import asyncio
from contextlib import asynccontextmanager

import numpy as np
import pytest
from scripted_engine import ScriptedEngine, answer, echo_seeds, routed

from miles.config.schema import RewardSection
from miles.data.sample import FinishReason, Prompt, sample_seed
from miles.errors import DataError, EngineError
from miles.rewards.grader import build_grader
from miles.rollout.answers import ExpertShape
from miles.rollout.client import EngineClient, SamplingParams
from miles.rollout.manager import RolloutManager

PARAMS = SamplingParams(temperature=1.0, max_new_tokens=8)


def prompts(count: int) -> list[Prompt]:
    return [Prompt(f"p{i}", [i], f"question {i}", label=str(sample_seed(3, f"p{i}", 1))) for i in range(count)]


@asynccontextmanager
async def manager_of(urls, reward: RewardSection | None = None, **options):
    grader = build_grader([reward or RewardSection(grader="exact")])
    options = {"group_size": 3, "max_concurrent_groups": 8, "seed": 3, **options}
    async with EngineClient(urls, None, max_retries=0) as client:
        try:
            yield RolloutManager(client, grader, PARAMS, **options)
        finally:
            grader.close()


async def test_groups_come_in_the_order_of_the_prompts_whatever_finished_first(start_engines):
    async def first_prompts_last(body):
        await asyncio.sleep(0.05 - 0.01 * body["input_ids"][0][0])

    engine = ScriptedEngine(wait=first_prompts_last)
    progress = []
    async with manager_of(await start_engines(engine)) as manager:
        groups = await manager.collect(prompts(5), [0] * 5, lambda done, total: progress.append((done, total)))
    assert [group.prompt.id for group in groups] == ["p0", "p1", "p2", "p3", "p4"]
    assert progress == [(done, 5) for done in range(1, 6)]


async def test_samples_are_filled_completely_and_graded(start_engines):
    array = np.ones((1 + 2 - 1, 2, 1), dtype=np.int32)
    generated = answer([65, 66], finish="length", weight_version="4", routed_experts=routed(array))
    engine = ScriptedEngine(generate=lambda body: [generated])
    shape = ExpertShape(layers=2, top_k=1, experts=4)
    async with manager_of(await start_engines(engine), group_size=1, experts=shape) as manager:
        (group,) = await manager.collect([Prompt("p", [1], "t", "AB")], [2])
    (sample,) = group.samples
    assert (sample.index, sample.seed) == (0, sample_seed(3, "p", 0, epoch=2))
    assert (sample.tokens, sample.text) == ([1, 65, 66], "AB")
    assert (sample.log_probs, sample.loss_mask, sample.weight_versions) == ([-0.5] * 2, [1, 1], [4, 4])
    assert sample.finish_reason is FinishReason.LENGTH
    assert sample.routed_experts is not None and sample.routed_experts.shape == (2, 2, 1)
    assert (sample.reward, sample.reward_parts) == (1.0, {"exact": 1.0})


async def test_seeds_depend_on_prompt_index_and_epoch_only(start_engines):
    engine = ScriptedEngine()
    urls = await start_engines(engine)
    async with manager_of(urls) as manager:
        together = await manager.collect(prompts(3), [0, 0, 1])
        alone = await manager.collect(prompts(3)[2:], [1])
    assert [s.text for s in together[2].samples] == [s.text for s in alone[0].samples]
    assert [s.reward for s in together[0].samples] == [0.0, 1.0, 0.0]
    assert [s.reward for s in together[2].samples] == [0.0, 0.0, 0.0]
    assert len({s.seed for group in together for s in group.samples}) == 9


async def test_groups_in_flight_are_bounded(start_engines):
    async def a_moment(body):
        await asyncio.sleep(0.01)

    engine = ScriptedEngine(wait=a_moment)
    async with manager_of(await start_engines(engine), max_concurrent_groups=3) as manager:
        await manager.collect(prompts(10), [0] * 10)
    assert engine.most_in_flight == 3


async def test_grading_does_not_hold_up_generation(start_engines, tmp_path):
    """The grader of the first group waits for a file that only a later request to the engine creates."""
    marker = tmp_path / "second-request"
    file = tmp_path / "waiting.py"
    file.write_text(
        "import asyncio, pathlib\n"
        "async def score(prompt, response, label, metadata):\n"
        f"    while not pathlib.Path({str(marker)!r}).exists():\n"
        "        await asyncio.sleep(0.001)\n"
        "    return 1\n"
    )

    def generate(body):
        if body["input_ids"][0] == [1]:
            marker.touch()
        return echo_seeds(body)

    engine = ScriptedEngine(generate=generate)
    reward = RewardSection(grader=f"{file}:score", timeout=20.0)
    async with manager_of(await start_engines(engine), reward, max_concurrent_groups=1) as manager:
        groups = await manager.collect(prompts(2), [0, 0])
    assert [sample.reward for group in groups for sample in group.samples] == [1.0] * 6


async def test_the_first_error_ends_everything_in_flight(start_engines, tmp_path):
    file = tmp_path / "picky.py"
    file.write_text("async def score(prompt, response, label, metadata):\n    raise ValueError('no ' + prompt)\n")

    async def all_but_the_first_forever(body):
        if body["input_ids"][0] != [0]:
            await asyncio.sleep(60)

    engine = ScriptedEngine(wait=all_but_the_first_forever)
    async with manager_of(await start_engines(engine), RewardSection(grader=f"{file}:score")) as manager:
        with pytest.raises(DataError, match="ValueError: no question 0"):
            await manager.collect(prompts(3), [0] * 3)


async def test_an_aborted_response_is_an_engine_error(start_engines):
    aborted = answer([1], finish_reason={"type": "abort", "message": "out of memory"})
    engine = ScriptedEngine(generate=lambda body: [aborted] * 3)
    async with manager_of(await start_engines(engine)) as manager:
        with pytest.raises(EngineError, match="aborted response 0 to prompt 'p0': out of memory"):
            await manager.collect(prompts(1), [0])
