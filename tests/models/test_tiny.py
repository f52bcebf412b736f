"""The tiny task: what it writes, that it is a function of the seed, and that held-out means held out."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from miles.config.schema import TinyTaskStep
from miles.errors import ConfigError
from miles.models.tiny import build_tiny_task, build_tokenizer, draw_problems


def tiny_step(**changes) -> TinyTaskStep:
    return TinyTaskStep(kind="tiny-task", **{"layers": 1, "train_prompts": 300, "heldout_prompts": 40, **changes})


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("architecture", ["qwen3", "qwen3-moe"])
def test_model_reopens_with_the_same_weights_and_end_token(tmp_path, architecture):
    build_tiny_task(tiny_step(architecture=architecture), tmp_path, seed=1)
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    per_expert = "model.layers.0.mlp.experts.3.gate_proj.weight"
    assert (per_expert in tensors) == (architecture == "qwen3-moe")

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert torch.equal(model.state_dict()["lm_head.weight"], tensors["lm_head.weight"])
    assert not torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
    assert GenerationConfig.from_pretrained(tmp_path / "model").eos_token_id == tokenizer.eos_token_id
    assert len(tokenizer) <= model.config.vocab_size <= 128


def test_tokenizer_round_trips_and_templates(tmp_path):
    build_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "sort 381920\n  = [x]!"
    assert len(tokenizer(text).input_ids) == len(text)
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    messages = [{"role": "user", "content": "hi"}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == "<|user|>hi<|end|><|assistant|>"
    assert len(tokenizer(prompt).input_ids) == 5
    full = tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": "yo"}], tokenize=False)
    assert full == prompt + "yo<|end|>"


@pytest.mark.parametrize("task", ["sort", "add"])
def test_answers_are_right_and_heldout_problems_are_nowhere_else(tmp_path, task):
    build_tiny_task(tiny_step(task=task), tmp_path, seed=3)
    train, heldout = rows(tmp_path / "train.jsonl"), rows(tmp_path / "heldout.jsonl")
    demonstrations = rows(tmp_path / "demonstrations.jsonl")
    assert (len(train), len(heldout)) == (300, 40)
    assert len({row["id"] for row in train + heldout}) == 340

    def key(prompt):
        operand = prompt.split()[1]
        return tuple(sorted(operand if task == "sort" else operand.split("+")))

    def answer(prompt):
        operand = prompt.split()[1]
        if task == "sort":
            return "".join(sorted(operand))
        return str(sum(map(int, operand.split("+"))))[::-1]

    assert all(row["label"] == answer(row["prompt"]) for row in train + heldout)
    assert all(row["response"] == answer(row["prompt"]) for row in demonstrations)
    seen = {key(row["prompt"]) for row in train + demonstrations}
    assert not seen & {key(row["prompt"]) for row in heldout}


def test_same_seed_same_files_other_seed_other_files(tmp_path):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        build_tiny_task(tiny_step(), tmp_path / name, seed)
    for file in ("model/model.safetensors", "train.jsonl", "heldout.jsonl", "demonstrations.jsonl"):
        first = (tmp_path / "a" / file).read_bytes()
        assert first == (tmp_path / "b" / file).read_bytes()
        assert first != (tmp_path / "c" / file).read_bytes()


def test_building_leaves_the_global_random_state_alone(tmp_path):
    before = torch.random.get_rng_state()
    build_tiny_task(tiny_step(), tmp_path, seed=1)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"task": "add", "train_prompts": 8050}, ["8050", "'add'", "train_prompts to at most"]),
        ({"hidden_size": 100}, ["100", "multiple of 64", "hidden_size = 128"]),
        ({"experts": 1}, ["experts = 1", "at least 2"]),
    ],
)
def test_impossible_requests_name_value_bound_and_fix(tmp_path, changes, words):
    with pytest.raises(ConfigError) as error:
        build_tiny_task(tiny_step(**changes), tmp_path / "out", seed=0)
    assert all(word in str(error.value) for word in words)
    assert not (tmp_path / "out").exists()


def test_drawing_is_pure():
    assert draw_problems(tiny_step(), 9) == draw_problems(tiny_step(), 9)
