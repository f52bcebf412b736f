"""Weights pushed into real engines: they arrive bit for bit, and what did not arrive is noticed."""

from __future__ import annotations

import asyncio
import math

import pytest
import torch
from embedded_process import TOKEN, engine_processes
from transformers import AutoModelForCausalLM

from miles.config.schema import TinyTaskStep
from miles.engines.embedded.weights import CheckpointWeights
from miles.errors import EngineError
from miles.models.tiny import build_tiny_task
from miles.rollout.client import Continuation, EngineClient, SamplingParams
from miles.rollout.engines import Engine
from miles.runs.endpoints import Endpoint
from miles.sync.push import WeightSync

PROMPT = [5, 40, 41, 42, 43, 2]
BUCKET_BYTES = 200_000
"""Small beside the model's 2.5 MB, so that a push takes many buckets."""


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    output = tmp_path_factory.mktemp("task")
    build_tiny_task(TinyTaskStep(kind="tiny-task", train_prompts=4, heldout_prompts=4), output, seed=0)
    return output / "model"


@pytest.fixture(scope="module")
def urls(model_dir):
    with engine_processes(model_dir, 2) as engines:
        yield [engine.url for engine in engines]


@pytest.fixture
def trained(model_dir):
    """The model with other weights than the engines started with."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture
def calls(urls):
    """`post` of a client, and the client's generate, on one event loop."""
    with asyncio.Runner() as runner:
        client = EngineClient(TOKEN)
        yield Calls(runner, client, [Engine(Endpoint(i, url, start=1, ready=True)) for i, url in enumerate(urls)])
        runner.run(client.close())


class Calls:
    def __init__(self, runner, client, engines):
        self.runner, self.client, self.engines, self.paths = runner, client, engines, []

    def post(self, path, bodies, engines):
        self.paths.append(path)

        async def post_all():
            calls = (self.client.post(self.engines[i], path, body) for i, body in zip(engines, bodies, strict=True))
            return await asyncio.gather(*calls)

        return self.runner.run(post_all())

    def generate(self):
        params = SamplingParams(temperature=0.7, max_new_tokens=12)
        responses = [Continuation(PROMPT, seed, 12) for seed in range(8)]
        return self.runner.run(self.client.generate(self.engines[1], responses, params))


def sync_of(post, dtype=torch.float32, engines=2):
    return WeightSync(post, engines=engines, dtype=dtype, bucket_bytes=BUCKET_BYTES, verify=True)


def named_weights(model):
    return CheckpointWeights(model)._views.items()


def test_pushed_weights_are_held_bit_for_bit_and_used(trained, calls):
    stats = sync_of(calls.post).push(named_weights(trained), version=7, engines=[0, 1])
    assert stats.bytes == sum(parameter.nbytes for parameter in trained.parameters())
    assert calls.paths.count("/update_weights_from_tensor") >= math.floor(stats.bytes / BUCKET_BYTES)
    assert calls.paths[-1] == "/weights_checker"
    for generation in calls.generate():
        assert set(generation.weight_versions) == {7}
        tokens = torch.tensor([PROMPT + generation.tokens])
        logits = trained(tokens).logits[0, len(PROMPT) - 1 : -1] / 0.7
        expected = logits.log_softmax(-1).gather(1, tokens[0, len(PROMPT) :, None])[:, 0]
        torch.testing.assert_close(torch.tensor(generation.log_probs), expected, atol=1e-5, rtol=0)


def test_engines_that_read_late_find_the_bucket(trained, calls):
    """Each of four waits until those before it have read and let go; two processes play them."""

    def one_after_the_other(path, bodies, engines):
        if path != "/update_weights_from_tensor":
            return calls.post(path, bodies[:2], engines[:2]) * 2
        return [calls.post(path, [body], [engine % 2])[0] for body, engine in zip(bodies, engines, strict=True)]

    stats = sync_of(one_after_the_other, engines=4).push(named_weights(trained), version=7, engines=[0, 1, 2, 3])
    assert stats.reached == (0, 1, 2, 3)


def test_a_bucket_that_does_not_arrive_is_noticed(trained, calls):
    def lose_the_second(path, bodies, engines):
        if path == "/update_weights_from_tensor" and calls.paths.count(path) == 1:
            calls.paths.append(path)
            return [{"success": True}] * len(bodies)
        return calls.post(path, bodies, engines)

    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.mul_(1.5)
    with pytest.raises(EngineError, match=r"holds other weights than the trainer sent: [1-9]"):
        sync_of(lose_the_second).push(named_weights(trained), version=8, engines=[0, 1])


def test_a_name_that_the_engine_does_not_have_is_refused(calls):
    with pytest.raises(EngineError, match=r"model.layers.9.mlp.weight"):
        sync_of(calls.post).push([("model.layers.9.mlp.weight", torch.zeros(4))], version=9, engines=[0, 1])
