"""Collecting steps over real HTTP, graders and journal: the batch depends on the draws alone."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest
from harness import PROMPTS, Run, Supervisor, decode, plain, run_of, until
from scripted_engine import END, ScriptedEngine, Storyteller, answer

from miles.config.schema import RolloutSection
from miles.data.sample import FinishReason, sample_seed
from miles.errors import DataError, EngineError
from miles.rollout.manager import Collected, NeedWeights, Stopped

SECTION = RolloutSection(
    prompts_per_step=3,
    group_size=2,
    max_response_tokens=40,
    over_sampling=2.0,
    filter="zero-variance",
    max_concurrent_groups=4,
    max_retries=1,
)


@pytest.fixture
async def launch(tmp_path, start_engines):
    """`await launch(engine, ...)` starts engines and a run on them, each run in a directory of its own."""
    async with AsyncExitStack() as stack:
        number = 0

        async def start(*engines: ScriptedEngine, name: str | None = None, section=SECTION, **options) -> Run:
            nonlocal number
            number += 1
            await start_engines(*engines)
            supervisor = Supervisor(tmp_path / f"engines-{number}.json", list(engines))
            root = tmp_path / (name or f"run-{number}")
            run = await stack.enter_async_context(run_of(root, supervisor, section=section, **options))
            stack.push_async_callback(lambda: asyncio.gather(*(engine.close() for engine in supervisor.engines)))
            return run

        yield start


async def steps_of(run: Run, count: int = 3) -> list[dict]:
    batches = [(await run.step(step)).batch for step in range(1, count + 1)]
    assert [plain(run.journal.read_batch(batch.step)) for batch in batches] == [plain(batch) for batch in batches]
    return [plain(batch) for batch in batches]


async def test_three_partial_steps_do_not_depend_on_engines_chunks_and_concurrency(launch):
    expected = await steps_of(await launch(Storyteller()))
    carried = [sample for batch in expected for group in batch["carried"] for sample in group["samples"]]
    assert any(sample["finish_reason"] is None and sample["response_tokens"] for sample in carried)
    versions = {tuple(sample["weight_versions"]) for b in expected for g in b["groups"] for sample in g["samples"]}
    assert any(len(set(each)) > 1 for each in versions), "some response spans several steps"
    assert any(batch["dropped"] for batch in expected)

    one = SECTION.model_copy(update={"max_concurrent_groups": 1})
    assert expected == await steps_of(await launch(Storyteller(), section=one, shortest_chunk=40))
    many = SECTION.model_copy(update={"max_concurrent_groups": 64})
    assert expected == await steps_of(await launch(Storyteller(), Storyteller(pace=0.002), section=many))
    assert expected == await steps_of(await launch(*(Storyteller(pace=0.001) for _ in range(3)), shortest_chunk=1))


async def test_routes_are_those_of_one_pass_over_each_token(launch):
    run = await launch(Storyteller(experts=8), experts=True, shortest_chunk=3)
    for batch in [(await run.step(step)).batch for step in (1, 2)]:
        for sample in [sample for group in [*batch.groups, *batch.carried] for sample in group.samples]:
            if not sample.response_tokens:
                assert sample.routed_experts is None
                continue
            expected = [(token + i) % 8 for i, token in enumerate(sample.tokens[:-1])]
            assert sample.routed_experts is not None
            assert sample.routed_experts[:, 0, 0].tolist() == expected


async def test_the_synchronous_case_reads_the_prompts_of_the_step_and_fills_samples(launch):
    section = SECTION.model_copy(update={"over_sampling": 1.0, "filter": "none"})
    run = await launch(Storyteller(), section=section)
    first, second = (await run.step(1)).batch, (await run.step(2)).batch
    assert [group.position for group in first.groups + second.groups] == list(range(6))
    assert not first.carried and first.cursor == 3
    group = second.groups[0]
    assert (group.epoch, group.born) == (0, 2)
    for sample in group.samples:
        assert sample.seed == sample_seed(3, group.prompt.id, sample.index)
        assert sample.text == decode(sample.response_tokens)
        assert set(sample.weight_versions) == {1}
        ended = sample.response_tokens[-1] == END
        assert sample.finish_reason is (FinishReason.STOP if ended else FinishReason.LENGTH)
        assert ended or len(sample.response_tokens) == 40
        assert sample.reward == float(len(sample.text) % 3 == 0)


async def test_a_group_that_waited_long_enough_is_in_the_batch(launch):
    section = SECTION.model_copy(update={"filter": "none", "max_staleness": 1})
    run = await launch(Storyteller(longest=60), section=section)
    carried: list[int] = []
    for step in range(1, 5):
        collected = await run.step(step)
        assert set(carried) <= {group.position for group in collected.batch.groups}
        carried = [group.position for group in collected.batch.carried]
        assert carried
        assert collected.metrics["rollout/carried_groups"] == len(carried)
    assert collected.metrics["rollout/off_policy_token_fraction"] > 0


async def test_groups_in_flight_are_bounded(launch):
    engine = Storyteller(pace=0.001)
    run = await launch(engine, section=SECTION.model_copy(update={"max_concurrent_groups": 2}))
    await run.step(1)
    assert engine.most_in_flight == 2


async def test_a_stop_keeps_every_token_and_the_next_attempt_goes_on(launch):
    expected = await steps_of(await launch(Storyteller()))

    run = await launch(Storyteller(), name="stopped")
    assert plain((await run.step(1)).batch) == expected[0]
    run.supervisor.engines[0].pace = 0.01
    run.push(1)
    run.stop = lambda: any(each.counts and max(each.counts) > 5 for each in run.collection._progress.values())
    assert isinstance(await run.attempt(2), Stopped)
    assert not run.flight.generating
    assert run.supervisor.engines[0].in_flight == 0

    again = await launch(Storyteller(), name="stopped")
    again.frontier = again.frontier.after(again.journal.read_batch(1))
    open_step = again.journal.read_open(2)
    assert open_step.groups
    again.resume_with(open_step)
    collected = await again.step(2)
    assert plain(collected.batch) == expected[1]
    assert collected.metrics["rollout/resumed_tokens"] > 5
    assert plain((await again.step(3)).batch) == expected[2]


async def test_a_killed_attempt_goes_on_from_its_last_flush(launch):
    expected = await steps_of(await launch(Storyteller()), 2)

    run = await launch(Storyteller(), name="killed", flush_seconds=0.01)
    await run.step(1)
    run.supervisor.engines[0].pace = 0.01
    run.push(1)
    task = asyncio.create_task(run.attempt(2))
    segments = run.journal._directory.glob
    await until(lambda: len(list(segments("step-000002/segment-*"))) > 3)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)

    again = await launch(Storyteller(), name="killed")
    again.frontier = again.frontier.after(again.journal.read_batch(1))
    open_step = again.journal.read_open(2)
    assert any(sample.response_tokens for group in open_step.groups for sample in group.samples)
    again.resume_with(open_step)
    assert plain((await again.step(2)).batch) == expected[1]


async def test_an_engine_that_dies_costs_nothing_and_gets_weights_when_it_is_back(launch):
    expected = await steps_of(await launch(Storyteller()))

    run = await launch(Storyteller(pace=0.003), Storyteller(pace=0.003))
    supervisor = run.supervisor
    assert plain((await run.step(1)).batch) == expected[0]
    run.push(1)
    task = asyncio.create_task(run.attempt(2))
    await until(lambda: supervisor.engines[0].in_flight)
    await supervisor.kill(0)
    await asyncio.sleep(0.02)
    await supervisor.restart(0)
    outcome = await task
    assert outcome == NeedWeights()
    assert run.flight.generating, "what the other engine generates goes on"
    assert run.engines.receivers(1) == [0]
    assert plain((await run.step(2)).batch) == expected[1]
    assert run.pushes[-1] == [0]
    assert plain((await run.step(3)).batch) == expected[2]


async def test_without_an_engine_in_service_it_waits_until_one_is_back(launch):
    expected = await steps_of(await launch(Storyteller()), 1)
    run = await launch(Storyteller(pace=0.002))
    run.push(0)
    task = asyncio.create_task(run.attempt(1))
    await until(lambda: run.supervisor.engines[0].in_flight)
    await run.supervisor.kill(0)
    await asyncio.sleep(0.3)
    assert not task.done()
    await run.supervisor.restart(0)
    assert isinstance(await task, NeedWeights)
    assert plain((await run.step(1)).batch) == expected[0]


async def test_answers_of_other_weights_are_not_used(launch):
    run = await launch(Storyteller())
    run.push(0)
    run.supervisor.engines[0].version = 7
    assert isinstance(await run.attempt(1), NeedWeights)
    collected = await run.step(1)
    assert {v for g in collected.batch.groups for s in g.samples for v in s.weight_versions} == {0}


def kills_on(prompt: str, supervisor: Supervisor, index: int, tasks: list[asyncio.Task]):
    """A wait of an engine that dies of a prompt, and comes back a little later."""
    poison = next(each.tokens[0] for each in PROMPTS if each.id == prompt)

    async def back() -> None:
        await supervisor.kill(index)
        await asyncio.sleep(0.005)
        await supervisor.restart(index)

    async def wait(body) -> None:
        if any(ids[0] == poison for ids in body["input_ids"]):
            await asyncio.sleep(0.003)
            tasks.append(asyncio.create_task(back()))
            await tasks[-1]

    return wait


@pytest.mark.parametrize("count", [1, 2])
async def test_a_prompt_that_kills_engines_is_found_and_set_aside_alone(launch, count):
    calm = await launch(Storyteller())
    victim = (await calm.step(1)).batch.groups[0].prompt.id

    run = await launch(*(Storyteller(pace=0.001) for _ in range(count)), section=SECTION)
    supervisor, tasks = run.supervisor, []
    for index, engine in enumerate(supervisor.engines):
        engine.wait = kills_on(victim, supervisor, index, tasks)
    supervisor.again = lambda index: Storyteller(wait=kills_on(victim, supervisor, index, tasks), pace=0.001)
    collected = await run.step(1)
    dropped = [each for each in collected.batch.dropped if each.reason == "quarantined"]
    assert [each.prompt_id for each in dropped] == [victim]
    assert "it kills engines, alone as well" in dropped[0].detail
    assert collected.batch.quarantined_total == 1
    assert collected.metrics["groups/quarantined"] == 1
    await asyncio.gather(*tasks)


async def test_a_refused_prompt_is_replaced_and_the_rest_is_as_if_it_did_not_exist(launch):
    section = SECTION.model_copy(update={"filter": "none", "over_sampling": 1.0})
    expected = (await (await launch(Storyteller(), section=section)).step(1)).batch
    run = await launch(Storyteller(refused=expected.groups[1].prompt.tokens[0]), section=section)
    collected = await run.step(1)
    assert [group.position for group in collected.batch.groups] == [0, 2, 3]
    assert plain(collected.batch)["groups"][0] == plain(expected)["groups"][0]
    (dropped,) = collected.batch.dropped
    assert (dropped.position, dropped.reason) == (1, "quarantined")
    assert "answered 400: too long" in dropped.detail


async def test_too_many_prompts_that_fail_stop_the_run_with_the_reasons(launch):
    section = SECTION.model_copy(update={"max_quarantined": 1, "max_retries": 0})
    run = await launch(ScriptedEngine(statuses=[503] * 99), section=section)
    run.push(0)
    with pytest.raises(EngineError) as error:
        await run.attempt(1)
    assert "rollout.max_quarantined = 1" in str(error.value)
    assert "scripted 503 (1 attempts)" in str(error.value)
    assert not run.flight.generating


async def test_an_engine_that_fails_and_lives_is_asked_again_elsewhere(launch):
    expected = await steps_of(await launch(Storyteller()), 1)
    assert expected == await steps_of(await launch(Storyteller(statuses=[500]), Storyteller()), 1)


async def test_abort_without_a_request_to_abort_counts_as_a_failure(launch):
    aborted = answer([97], finish_reason={"type": "abort", "message": "out of memory"}, weight_version="0")
    section = SECTION.model_copy(update={"max_quarantined": 0})
    run = await launch(ScriptedEngine(generate=lambda body: [aborted] * 2), section=section)
    run.push(0)
    with pytest.raises(EngineError, match=r"aborted a response: out of memory \(2 attempts\)"):
        await run.attempt(1)


async def test_a_grader_that_must_stop_the_run_does(launch):
    broken = "async def score(prompt, response, label, metadata):\n    raise ValueError('no ' + prompt)\n"
    run = await launch(Storyteller(), grader=broken)
    run.push(0)
    with pytest.raises(DataError, match="ValueError: no question"):
        await run.attempt(1)
    assert not run.flight.generating


async def test_dropped_groups_are_bounded(launch):
    section = SECTION.model_copy(update={"max_filtered": 1.0, "over_sampling": 1.0, "group_size": 1})
    collected = await (await launch(Storyteller(), section=section)).step(1)
    assert isinstance(collected, Collected)
    assert [each.position for each in collected.batch.dropped] == [0, 1, 2]
    assert collected.batch.dropped[0].detail in ("all rewards are 0", "all rewards are 1")
    assert collected.metrics["groups/filtered"] == 3
    assert collected.metrics["groups/unfiltered"] == 3
