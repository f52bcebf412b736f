"""The engine client against real HTTP servers: routing, retries, control calls and errors."""

import asyncio

import pytest
from scripted_engine import ScriptedEngine, answer

from miles.config.schema import RolloutSection
from miles.errors import EngineError
from miles.rollout import client as client_module
from miles.rollout.client import EngineClient, SamplingParams

PARAMS = SamplingParams(temperature=1.0, max_new_tokens=8, stop_token_ids=(2,))
DEAD = "http://127.0.0.1:9"
"""Port 9 (discard) is closed."""


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(client_module, "FIRST_PAUSE_SECONDS", 0.001)


async def test_a_group_is_one_request_with_a_seed_per_sample(start_engines):
    engine = ScriptedEngine()
    async with EngineClient(await start_engines(engine), "secret") as client:
        generations = await client.generate([5, 6], [10, 11], PARAMS)
    assert [generation.text for generation in generations] == ["10", "11"]
    ((path, body),) = engine.seen
    assert path == "/generate"
    assert body["input_ids"] == [[5, 6], [5, 6]]
    assert [params["sampling_seed"] for params in body["sampling_params"]] == [10, 11]
    assert body["sampling_params"][0]["stop_token_ids"] == [2]
    assert (body["return_logprob"], body["return_routed_experts"]) == (True, False)
    assert engine.tokens == ["Bearer secret"]


def test_sampling_params_follow_the_rollout_section():
    rollout = RolloutSection(temperature=0.7, max_response_tokens=5, stop=["\n"], stop_token_ids=[9, 2])
    sent = SamplingParams.of(rollout, [2, 1]).to_json(seed=3)
    assert sent == {
        "temperature": 0.7,
        "max_new_tokens": 5,
        "top_p": 1.0,
        "top_k": -1,
        "stop": ["\n"],
        "stop_token_ids": [1, 2, 9],
        "sampling_seed": 3,
    }
    assert SamplingParams.of(rollout, [], temperature=0.0).temperature == 0.0


async def test_requests_go_to_the_least_loaded_engine(start_engines):
    release = asyncio.Event()

    async def until_released(body):
        await release.wait()

    engines = [ScriptedEngine(wait=until_released) for _ in range(2)]
    async with EngineClient(await start_engines(*engines), None) as client:
        large = asyncio.create_task(client.generate([1], [0, 1, 2], PARAMS))
        await asyncio.sleep(0)
        small = [asyncio.create_task(client.generate([1], [seed], PARAMS)) for seed in range(3)]
        while sum(len(engine.seen) for engine in engines) < 4:
            await asyncio.sleep(0.001)
        assert sorted(len(body["input_ids"]) for _, body in engines[1].seen) == [1, 1, 1]
        release.set()
        await asyncio.gather(large, *small)


async def test_another_engine_takes_over_from_one_that_fails(start_engines):
    broken, healthy = ScriptedEngine(statuses=[500] * 9), ScriptedEngine()
    async with EngineClient(await start_engines(broken, healthy), None) as client:
        assert (await client.generate([1], [7], PARAMS))[0].text == "7"
    assert (len(broken.seen), len(healthy.seen)) == (1, 1)

    async with EngineClient([DEAD, healthy.url], None) as client:
        assert (await client.generate([1], [8], PARAMS))[0].text == "8"


async def test_retries_are_bounded_and_the_error_names_engine_and_message(start_engines):
    engine = ScriptedEngine(statuses=[503] * 9)
    async with EngineClient(await start_engines(engine), None, max_retries=2) as client:
        with pytest.raises(EngineError) as error:
            await client.generate([1], [7], PARAMS)
    assert len(engine.seen) == 3
    assert all(word in str(error.value) for word in [engine.url, "503", "scripted 503", "3 attempts"])


async def test_an_engine_that_recovers_is_asked_again(start_engines):
    engine = ScriptedEngine(statuses=[500, 500])
    async with EngineClient(await start_engines(engine), None, max_retries=2) as client:
        assert (await client.generate([1], [7], PARAMS))[0].text == "7"


async def test_no_answer_in_time_counts_as_lost(start_engines):
    async def forever(body):
        await asyncio.sleep(60)

    engine = ScriptedEngine(wait=forever)
    async with EngineClient(await start_engines(engine), None, timeout=0.05, max_retries=0) as client:
        with pytest.raises(EngineError, match=r"no answer within 0\.05 s"):
            await client.generate([1], [7], PARAMS)


async def test_a_refused_request_is_not_tried_again(start_engines):
    engine = ScriptedEngine(statuses=[400])
    async with EngineClient(await start_engines(engine), None) as client:
        with pytest.raises(EngineError, match="/generate answered 400: scripted 400"):
            await client.generate([1], [7], PARAMS)
    assert len(engine.seen) == 1


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "0 answers to 1 requests"),
        ([{"text": "x", "output_ids": [1]}], "no 'meta_info'"),
        ([answer([1], weight_version="x")], "invalid literal"),
        ({"success": True}, "a dict, not a list"),
        (None, "a NoneType, not a list"),
    ],
)
async def test_an_unusable_answer_is_an_error_of_that_engine(start_engines, given, words):
    engine = ScriptedEngine(generate=lambda body: given)
    async with EngineClient(await start_engines(engine), None) as client:
        with pytest.raises(EngineError) as error:
            await client.generate([1], [7], PARAMS)
    assert engine.url in str(error.value) and words in str(error.value)


async def test_control_calls_reach_every_engine_in_order(start_engines):
    engines = [ScriptedEngine(), ScriptedEngine()]
    async with EngineClient(await start_engines(*engines), None) as client:
        answers = await client.post_all("/pause_generation", {"mode": "abort"})
        assert [each["body"] for each in answers] == [{"mode": "abort"}] * 2
        answers = await client.post_each("/update_weights_from_tensor", [{"n": 0}, {"n": 1}])
        assert [each["body"]["n"] for each in answers] == [0, 1]
        assert await client.post_all("/flush_cache") == ["Cache flushed.\n"] * 2
        assert [each["path"] for each in await client.get_all("/server_info")] == ["/server_info"] * 2


async def test_a_failed_control_call_is_an_error_at_once(start_engines):
    engines = [ScriptedEngine(), ScriptedEngine(statuses=[500])]
    async with EngineClient(await start_engines(*engines), None) as client:
        with pytest.raises(EngineError) as error:
            await client.post_all("/flush_cache")
    assert engines[1].url in str(error.value) and "scripted 500" in str(error.value)
    assert len(engines[1].seen) == 1


async def test_health_says_which_engine_is_not_well(start_engines):
    engine = ScriptedEngine()
    (url,) = await start_engines(engine)
    async with EngineClient([url, DEAD], None) as client:
        health = await client.health()
    assert health[url] is None
    assert "Cannot connect" in str(health[DEAD])
