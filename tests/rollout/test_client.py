"""The engine client against real HTTP servers: what it sends, and what each failure means."""

import asyncio

import pytest
from scripted_engine import ScriptedEngine, answer

from miles.config.schema import RolloutSection
from miles.errors import EngineError, EngineLost, UnknownRouteError
from miles.rollout.client import Continuation, EngineClient, Failure, RequestError, SamplingParams
from miles.rollout.engines import Engine
from miles.runs.endpoints import Endpoint

PARAMS = SamplingParams(temperature=1.0, max_new_tokens=8, stop_token_ids=(2,))
ONE = [Continuation([5, 6], seed=10, max_new_tokens=8)]


def engine_at(url: str) -> Engine:
    return Engine(Endpoint(0, url, start=1, ready=True))


DEAD = engine_at("http://127.0.0.1:9")
"""Port 9 (discard) is closed."""


@pytest.fixture
async def ask(start_engines):
    """`await ask(engine)` sends one request to a scripted engine."""

    async def send(scripted: ScriptedEngine, responses=ONE, timeout: float = 20.0):
        await start_engines(scripted)
        async with EngineClient("secret", timeout=timeout) as client:
            return await client.generate(engine_at(scripted.url), responses, PARAMS)

    return send


async def failure_of(call) -> tuple[Failure, str]:
    with pytest.raises(RequestError) as error:
        await call
    return error.value.kind, str(error.value)


async def test_one_request_continues_several_responses(ask):
    engine = ScriptedEngine()
    responses = [Continuation([5, 6], 10, 8), Continuation([5, 6, 7], 11, 3)]
    generations = await ask(engine, responses)
    assert ["".join(map(chr, generation.tokens[:-1])) for generation in generations] == ["10", "11"]
    ((path, body),) = engine.seen
    assert path == "/generate"
    assert body["input_ids"] == [[5, 6], [5, 6, 7]]
    sent = [(params["sampling_seed"], params["max_new_tokens"]) for params in body["sampling_params"]]
    assert sent == [(10, 8), (11, 3)]
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


async def test_a_refusal_says_why(ask):
    kind, text = await failure_of(ask(ScriptedEngine(statuses=[400])))
    assert kind is Failure.REFUSED
    assert "answered 400: scripted 400" in text


async def test_an_error_of_an_engine_that_is_well_is_a_failure(ask):
    engine = ScriptedEngine(statuses=[503])
    kind, text = await failure_of(ask(engine))
    assert kind is Failure.FAILED
    assert all(word in text for word in [engine.url, "503", "scripted 503"])


async def test_an_error_of_an_engine_that_is_not_well_are_its_last_words(ask):
    kind, _ = await failure_of(ask(ScriptedEngine(statuses=[500], healthy=False)))
    assert kind is Failure.DIED


async def test_an_engine_that_goes_away_with_the_request_died(ask):
    async def die(body) -> None:
        await engine.kill()

    engine = ScriptedEngine(wait=die)
    kind, text = await failure_of(ask(engine))
    assert kind is Failure.DIED
    assert "went away" in text


async def test_an_engine_that_was_not_there_is_unreachable():
    async with EngineClient(None) as client:
        kind, text = await failure_of(client.generate(DEAD, ONE, PARAMS))
    assert kind is Failure.UNREACHABLE
    assert "Cannot connect" in text


async def test_no_answer_in_time_is_a_failure(ask):
    async def long(body) -> None:
        await asyncio.sleep(1)

    kind, text = await failure_of(ask(ScriptedEngine(wait=long), timeout=0.05))
    assert kind is Failure.FAILED
    assert "no answer within 0.05 s" in text


@pytest.mark.parametrize("status", [401, 403, 404])
async def test_what_no_request_can_change_is_an_error(ask, status):
    with pytest.raises(EngineError, match=f"answered {status}"):
        await ask(ScriptedEngine(statuses=[status]))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "argument 2 is shorter"),
        ([{"text": "x", "output_ids": [1]}], "no 'meta_info'"),
        ([answer([1], weight_version="x")], "invalid literal"),
        ({"success": True}, "a dict, not a list"),
        (None, "a NoneType, not a list"),
    ],
)
async def test_an_unusable_answer_is_a_failure_of_that_engine(ask, given, words):
    engine = ScriptedEngine(generate=lambda body: given)
    kind, text = await failure_of(ask(engine))
    assert kind is Failure.FAILED
    assert engine.url in text
    assert words in text


async def test_control_calls_answer_json_or_text(start_engines):
    scripted = ScriptedEngine()
    await start_engines(scripted)
    engine = engine_at(scripted.url)
    async with EngineClient(None) as client:
        assert (await client.post(engine, "/pause_generation", {"mode": "abort"}))["body"] == {"mode": "abort"}
        assert await client.post(engine, "/flush_cache", {}) == "Cache flushed.\n"


@pytest.mark.parametrize(("status", "kind"), [(500, EngineLost), (404, UnknownRouteError), (400, EngineError)])
async def test_a_failed_control_call_is_an_error_at_once(start_engines, status, kind):
    scripted = ScriptedEngine(statuses=[status])
    await start_engines(scripted)
    async with EngineClient(None) as client:
        with pytest.raises(EngineError) as error:
            await client.post(engine_at(scripted.url), "/flush_cache", {})
    assert type(error.value) is kind
    assert scripted.url in str(error.value)
    assert len(scripted.seen) == 1


async def test_a_control_call_to_an_engine_that_is_gone_says_so():
    async with EngineClient(None) as client:
        with pytest.raises(EngineLost, match="Cannot connect"):
            await client.post(DEAD, "/flush_cache", {})


async def test_aborting_asks_every_engine_and_passes_over_the_dead(start_engines):
    scripted = ScriptedEngine()
    await start_engines(scripted)
    async with EngineClient(None) as client:
        await client.abort([DEAD, engine_at(scripted.url)])
    assert scripted.seen == [("/abort_request", {"abort_all": True})]
