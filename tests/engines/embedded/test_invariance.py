"""What a request gets does not depend on its neighbours: bit for bit on this machine, tokens and log-probabilities."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from miles.engines.embedded.attention import Segment
from miles.engines.embedded.model import Runner, load_runner
from miles.engines.embedded.request import Answer, Request
from miles.engines.embedded.sampling import ALL_TOKENS, SamplingParams
from miles.engines.embedded.scheduler import Limits, Scheduler

VOCABULARY = 300
SHARED: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
}


def build(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if name == "one key-value head":
        return Qwen3ForCausalLM(
            Qwen3Config(intermediate_size=96, num_attention_heads=5, num_key_value_heads=1, **SHARED)
        )
    if name == "no shared heads":
        return Qwen3ForCausalLM(
            Qwen3Config(intermediate_size=96, num_attention_heads=4, num_key_value_heads=4, **SHARED)
        )
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            moe_intermediate_size=48,
            num_experts=8,
            num_experts_per_tok=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            norm_topk_prob=True,
            **SHARED,
        )
    )


@pytest.fixture(scope="module", params=["one key-value head", "no shared heads", "moe"])
def runner(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    directory: Path = tmp_path_factory.mktemp("model")
    build(request.param).save_pretrained(directory)
    return load_runner(directory, torch.float32)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def draw_prompts(lengths: list[int]) -> list[list[int]]:
    source = random.Random(0)
    return [[source.randrange(VOCABULARY) for _ in range(length)] for length in lengths]


def logits_of(runner: Runner, prompts: list[list[int]]) -> list[torch.Tensor]:
    """Logits at every position of each prompt, read in one pass."""
    runner.cache.release()
    tokens = [token for prompt in prompts for token in prompt]
    segments = [Segment(row, 0, len(prompt)) for row, prompt in enumerate(prompts)]
    logits = runner.forward(tokens, segments, range(len(tokens))).logits
    return list(logits.split([len(prompt) for prompt in prompts]))


def test_a_prompt_alone_and_in_a_batch(runner: Runner, threads: int) -> None:
    prompts = draw_prompts([1, 5, 64, 129, 257, 400])
    together = logits_of(runner, prompts)
    for prompt, logits in zip(prompts, together, strict=True):
        assert torch.equal(logits_of(runner, [prompt])[0], logits)


def test_decoding_and_reading(runner: Runner, threads: int) -> None:
    """A token's logits are the same whether its sequence is read at once or one token at a time in a batch."""
    prompts = draw_prompts([3, 66, 131])
    read = logits_of(runner, prompts)
    runner.cache.release()
    for position in range(max(map(len, prompts))):
        # Shorter sequences leave: each pass has its own batch size.
        rows = [row for row, prompt in enumerate(prompts) if position < len(prompt)]
        tokens = [prompts[row][position] for row in rows]
        result = runner.forward(tokens, [Segment(row, position, 1) for row in rows], range(len(rows)))
        for row, logits in zip(rows, result.logits, strict=True):
            assert torch.equal(logits, read[row][position]), (row, position)


def generate(
    runner: Runner, jobs: list[tuple[list[int], SamplingParams]], limits: Limits | None = None
) -> list[Answer]:
    scheduler = Scheduler(runner, None, limits or Limits(), eos=[])
    answers: dict[str, Answer] = {}
    for index, (prompt, params) in enumerate(jobs):

        def notify(answer: Answer) -> None:
            answers[answer["meta_info"]["id"]] = answer

        scheduler.add(
            Request(str(index), prompt, params, notify, return_log_probs=True, return_routes=runner.has_routes)
        )
    while not scheduler.idle:
        scheduler.step()
    return [answers[str(index)] for index in range(len(jobs))]


def params(seed: int, tokens: int, **more: Any) -> SamplingParams:
    given = {"temperature": 0.8, "top_p": 1.0, "top_k": ALL_TOKENS, "ignore_eos": True} | more
    return SamplingParams(max_new_tokens=tokens, seed=seed, **given)


def outcome(answer: Answer) -> tuple[Any, ...]:
    meta = answer["meta_info"]
    return answer["output_ids"], meta["output_token_logprobs"], meta.get("routed_experts")


def test_samples_alone_and_in_a_ragged_batch(runner: Runner, threads: int) -> None:
    prompts = draw_prompts([4, 40, 60, 17, 90, 8, 30])
    jobs = [(prompt, params(seed, 3 + 3 * seed)) for seed, prompt in enumerate(prompts)]
    jobs[3] = (prompts[3], params(3, 20, top_p=0.7, top_k=40))
    together = generate(runner, jobs)
    few_rows = generate(runner, jobs, Limits(max_running=2, prefill_tokens=16))
    for index, job in enumerate(jobs):
        alone = generate(runner, [job])[0]
        assert outcome(alone) == outcome(together[index]) == outcome(few_rows[index])


def test_a_continued_response_is_the_uninterrupted_one(runner: Runner, threads: int) -> None:
    prompt = draw_prompts([20])[0]
    whole = generate(runner, [(prompt, params(9, 60))])[0]
    partial = whole["output_ids"][:23]
    neighbours = [(other, params(1, 30)) for other in draw_prompts([50, 3])]
    rest = generate(runner, [(prompt + partial, params(9, 60 - 23)), *neighbours])[0]
    assert partial + rest["output_ids"] == whole["output_ids"]
    log_probs = whole["meta_info"]["output_token_logprobs"]
    assert rest["meta_info"]["output_token_logprobs"] == log_probs[23:]
    assert rest["meta_info"].get("routed_experts") == whole["meta_info"].get("routed_experts")
