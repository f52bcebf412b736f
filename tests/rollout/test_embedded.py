"""The rollout room on real engines: two embedded servers with the tiny mixture-of-experts model."""

from __future__ import annotations

import json
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from embedded_process import TOKEN, engine_processes
from transformers import AutoModelForCausalLM

from miles.config.schema import DataSection, EvalSection, RewardSection, RolloutSection, TinyTaskStep
from miles.data.prompts import load_prompts
from miles.data.sample import FinishReason, Group, Prompt
from miles.data.template import end_token_ids, load_tokenizer
from miles.errors import EngineError
from miles.models.tiny import build_tiny_task
from miles.rewards.grader import build_grader
from miles.rollout.answers import ExpertShape, expert_shape
from miles.rollout.client import EngineClient, SamplingParams
from miles.rollout.evaluate import evaluate
from miles.rollout.manager import RolloutManager


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("task")
    step = TinyTaskStep(kind="tiny-task", layers=2, hidden_size=64, train_prompts=32, heldout_prompts=8)
    build_tiny_task(step, output, seed=0)
    return output / "model"


@pytest.fixture
def engines(model):
    """Two engines that are ready."""
    with engine_processes(model, 2) as started:
        yield started


def shape_of(model: Path) -> ExpertShape:
    shape = expert_shape(json.loads((model / "config.json").read_text()))
    assert shape is not None
    return shape


def prompts_of(model: Path, file: str) -> list[Prompt]:
    data = DataSection(path=str(model.parent / file))
    return load_prompts(data, load_tokenizer(model), max_prompt_tokens=100)


@asynccontextmanager
async def manager_of(model: Path, urls: list[str], *, temperature: float = 0.8, group_size: int = 4):
    rollout = RolloutSection(max_response_tokens=12, temperature=0.8)
    params = SamplingParams.of(rollout, end_token_ids(model, load_tokenizer(model)), temperature)
    grader = build_grader([RewardSection(grader="exact")])
    async with EngineClient(urls, TOKEN, max_retries=2) as client:
        yield RolloutManager(
            client,
            grader,
            params,
            group_size=group_size,
            max_concurrent_groups=8,
            seed=5,
            experts=shape_of(model),
        )


def drawn(groups: list[Group]) -> list[list[int]]:
    return [sample.response_tokens for group in groups for sample in group.samples]


async def collect(model: Path, urls: list[str], prompts: list[Prompt]) -> list[Group]:
    async with manager_of(model, urls) as manager:
        return await manager.collect(prompts, [0] * len(prompts))


async def test_samples_on_real_engines(model, engines):
    prompts = prompts_of(model, "train.jsonl")[:6]
    both = await collect(model, [engine.url for engine in engines], prompts)

    check_against_hugging_face(model, both)
    samples = [sample for group in both for sample in group.samples]
    assert {sample.finish_reason for sample in samples} <= {FinishReason.STOP, FinishReason.LENGTH}
    assert all(set(sample.weight_versions) == {0} and sample.reward in (0.0, 1.0) for sample in samples)

    alone = await collect(model, [engines[0].url], prompts[3:4])
    assert drawn(alone) == drawn(both[3:4]), "what a prompt draws must not depend on the other prompts"

    engines[0].process.kill()
    engines[0].process.wait()
    after = await collect(model, [engine.url for engine in engines], prompts)
    assert drawn(after) == drawn(both), "the engine that is left must draw what both drew"

    async with manager_of(model, [engines[1].url], temperature=0.0, group_size=2) as manager:
        section = EvalSection(samples=2, pass_at=[1, 2], max_prompts=5)
        result = await evaluate(manager, prompts_of(model, "heldout.jsonl"), section)
    assert len(result.groups) == 5
    assert all(first == second for first, second in map(drawn, ([group] for group in result.groups)))

    too_long = Prompt("long", [7] * 200, "")
    with pytest.raises(EngineError, match=r"400: .*longer than the model's context length"):
        await collect(model, [engines[1].url], [too_long])


def check_against_hugging_face(model: Path, groups: list[Group]) -> None:
    """Log-probabilities are those of the temperature-scaled distribution, routes those of the model."""
    reference = AutoModelForCausalLM.from_pretrained(model)
    for sample in (sample for group in groups for sample in group.samples):
        tokens = torch.tensor([sample.tokens])
        with torch.no_grad():
            output = reference(tokens, output_router_logits=True)
        log_probs = (output.logits[0, :-1] / 0.8).log_softmax(-1)
        taken = log_probs.gather(1, tokens[0, 1:, None])[:, 0][len(sample.prompt.tokens) - 1 :]
        assert torch.allclose(taken, torch.tensor(sample.log_probs), atol=1e-5)
        routes = torch.stack([layer[:-1].topk(2).indices for layer in output.router_logits], dim=1)
        assert sample.routed_experts is not None and sample.routed_experts.dtype == np.uint8
        assert np.array_equal(np.sort(sample.routed_experts), routes.sort().values.numpy())
