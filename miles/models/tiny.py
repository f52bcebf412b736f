"""The tiny task: a random small model with its own tokenizer, and problems whose answers a program checks.

Owns what the `tiny-task` step writes: `model/`, `demonstrations.jsonl`, `train.jsonl` and `heldout.jsonl`.
Everything is a function of the seed. It does not train: the weights are random, and supervised steps read the
demonstrations.

A held-out problem occurs in no other file, nor does a rearrangement of it (the same digits in another order,
the same two summands swapped), so that a good held-out score cannot come from memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from miles.config.schema import TinyTaskStep
from miles.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

CONTEXT_LENGTH = 128
HEAD_DIM = 64
"""SGLang's GPU kernels take no smaller one."""
WIDTH_PER_HEAD = 32
EXPERTS_PER_TOKEN = 2
DEMONSTRATIONS = 4096

PAD, UNKNOWN, END = "<|pad|>", "<|unknown|>", "<|end|>"
ROLES = ("system", "user", "assistant")
SPECIAL_TOKENS = [PAD, UNKNOWN, END, *(f"<|{role}|>" for role in ROLES)]
CHARACTERS = ["\n", *map(chr, range(32, 127))]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Problem:
    """A prompt and its only right answer. Problems with one `identity` are rearrangements of each other."""

    prompt: str
    answer: str
    identity: str


def sort_problem(number: int) -> Problem:
    """Six digits, to be put in ascending order; `number` in [0, 10**6)."""
    digits = f"{number:06d}"
    ordered = "".join(sorted(digits))
    return Problem(f"sort {digits}", ordered, ordered)


def add_problem(number: int) -> Problem:
    """Sum of two two-digit numbers, least significant digit first; `number` in [0, 90**2)."""
    first, second = 10 + number // 90, 10 + number % 90
    return Problem(f"add {first}+{second}", str(first + second)[::-1], str(sorted((first, second))))


TASKS = {"sort": (sort_problem, 10**6), "add": (add_problem, 90**2)}


def build_tiny_task(step: TinyTaskStep, output: Path, seed: int) -> None:
    """Write the model and the three data files of `step` into the directory `output`.

    Raises ConfigError where the step asks for more problems than the task has, or for an impossible shape.
    """
    heldout, train, demonstrations = draw_problems(step, seed)
    tokenizer = build_tokenizer()
    model = build_model(step, tokenizer, seed)

    output.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(output / "model")
    tokenizer.save_pretrained(output / "model")
    _write_jsonl(output / "heldout.jsonl", _prompt_rows("heldout", heldout))
    _write_jsonl(output / "train.jsonl", _prompt_rows("train", train))
    _write_jsonl(
        output / "demonstrations.jsonl",
        ({"prompt": problem.prompt, "response": problem.answer} for problem in demonstrations),
    )


def draw_problems(step: TinyTaskStep, seed: int) -> tuple[list[Problem], list[Problem], list[Problem]]:
    """Held-out problems, training problems and demonstrations; distinct within each list.

    Training problems and demonstrations are drawn from the same pool, so some are in both.
    """
    problem, space = TASKS[step.task]
    rng = np.random.default_rng(seed)
    drawn = map(problem, rng.permutation(space).tolist())

    heldout = list(islice(drawn, step.heldout_prompts))
    reserved = {held.identity for held in heldout}
    free = (other for other in drawn if other.identity not in reserved)
    pool = list(islice(free, step.train_prompts + DEMONSTRATIONS))
    if len(pool) < step.train_prompts:
        raise ConfigError(
            f"train_prompts = {step.train_prompts}: the task '{step.task}' has {len(pool)} problems beside"
            f" the {len(heldout)} held-out ones and their rearrangements",
            fix=f"set train_prompts to at most {len(pool)}, or lower heldout_prompts",
        )
    demonstrations = rng.permutation(len(pool))[:DEMONSTRATIONS].tolist()
    return heldout, pool[: step.train_prompts], [pool[i] for i in demonstrations]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per printable ASCII character, six special tokens, and a chat template made of them."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *CHARACTERS])}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    characters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=characters,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
        additional_special_tokens=[f"<|{role}|>" for role in ROLES],
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def build_model(step: TinyTaskStep, tokenizer: PreTrainedTokenizerFast, seed: int) -> PreTrainedModel:
    """A float32 Qwen3 or Qwen3-MoE with random weights.

    The embeddings are not tied: SGLang reads a wrong output matrix from a tied Qwen3-MoE.
    """
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig, Qwen3Config, Qwen3MoeConfig

    _check_shape(step)
    heads = step.hidden_size // WIDTH_PER_HEAD
    shape = {
        "vocab_size": -(-len(tokenizer) // 8) * 8,
        "hidden_size": step.hidden_size,
        "num_hidden_layers": step.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 2),
        "head_dim": HEAD_DIM,
        "intermediate_size": 2 * step.hidden_size,
        "max_position_embeddings": CONTEXT_LENGTH,
        "tie_word_embeddings": False,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config: Qwen3Config | Qwen3MoeConfig
    if step.architecture == "qwen3":
        config = Qwen3Config(**shape)
    else:
        config = Qwen3MoeConfig(
            **shape,
            num_experts=step.experts,
            num_experts_per_tok=EXPERTS_PER_TOKEN,
            moe_intermediate_size=step.hidden_size,
            norm_topk_prob=True,
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=True
    )
    return model


def _check_shape(step: TinyTaskStep) -> None:
    if step.hidden_size % (2 * WIDTH_PER_HEAD):
        multiple = max(1, round(step.hidden_size / (2 * WIDTH_PER_HEAD))) * 2 * WIDTH_PER_HEAD
        raise ConfigError(
            f"hidden_size = {step.hidden_size} is not a multiple of {2 * WIDTH_PER_HEAD} (head pairs)",
            fix=f"set hidden_size = {multiple}",
        )
    if step.architecture == "qwen3-moe" and step.experts < EXPERTS_PER_TOKEN:
        raise ConfigError(
            f"experts = {step.experts}: every token takes {EXPERTS_PER_TOKEN} experts",
            fix=f"set experts to at least {EXPERTS_PER_TOKEN}, or architecture = 'qwen3'",
        )


def _prompt_rows(name: str, problems: list[Problem]) -> Iterator[dict[str, str]]:
    for i, problem in enumerate(problems):
        yield {"id": f"{name}-{i:06d}", "prompt": problem.prompt, "label": problem.answer}


def _write_jsonl(path: Path, rows: Iterator[dict[str, str]]) -> None:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
