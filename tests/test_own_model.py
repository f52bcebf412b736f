"""docs/own-model.md end to end: a Hugging Face directory, a JSONL file and a grader that Miles has never seen.

Everything is real: the command line, two engine processes, two trainer ranks, the weight sync between them, the model
directory at the end.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from miles.runs.metrics import read_metrics
from miles.runs.paths import RunPaths

REPOSITORY = Path(__file__).parents[1]

CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

GRADER = """
def vowels(prompt, response, label, metadata, *, per):
    assert prompt.startswith("<system>Only vowels.</s><user>word ") and metadata["length"] == len(label)
    found = sum(letter in "aeiou" for letter in response)
    return {"reward": found / per, "letters": len(response)}
"""

RUN_FILE = """
extends = "preset:cpu"
name = "mine"
model = "my-model"

[data]
path = "words.jsonl"
prompt = "conversation"
label = "gold"
metadata = "facts"
id = "number"

[[rewards]]
grader = "graders.py:vowels"
weight = 0.5
args = { per = 4 }

[[rewards]]
grader = "exact"

[rollout]
prompts_per_step = 4
group_size = 4
max_response_tokens = 12

[train]
backend = "fsdp"
steps = 2
updates_per_step = 2
lr = 1e-2

[eval]
data = "heldout.jsonl"
samples = 2
pass_at = [1, 2]
pass_threshold = 0.1

[local]
ranks = 2
engines = 2
threads = 1

[steps.train]
kind = "rl"

[steps.measure]
kind = "eval"
model = "step:train/model"
local.engines = 1
"""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """What the user brings: a model, two data files, a grader, a run file."""
    write_model(tmp_path / "my-model")
    write_rows(tmp_path / "words.jsonl", range(6))
    write_rows(tmp_path / "heldout.jsonl", range(100, 103))
    (tmp_path / "graders.py").write_text(GRADER)
    (tmp_path / "run.toml").write_text(RUN_FILE)
    return tmp_path


def write_model(directory: Path) -> None:
    """A Llama of two layers over bytes, with a chat template."""
    special = ["</s>", "<system>", "<user>", "<assistant>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = Tokenizer(models.BPE({token: i for i, token in enumerate(special + letters)}, merges=[]))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens, eos_token="</s>", additional_special_tokens=special[1:], chat_template=CHAT_TEMPLATE
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def write_rows(path: Path, numbers: range) -> None:
    rows = [
        {
            "number": number,
            "conversation": [
                {"role": "system", "content": "Only vowels."},
                {"role": "user", "content": f"word {number}"},
            ],
            "gold": "aeiou" * (number % 3 + 1),
            "facts": {"length": 5 * (number % 3 + 1)},
        }
        for number in numbers
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def miles(directory: Path, *arguments: str) -> str:
    """What a command that must succeed prints."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "COLUMNS": "120"}
    done = subprocess.run(
        [sys.executable, "-m", "miles", *arguments], cwd=directory, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.timeout(600)
def test_own_model_is_trained_on_own_data(directory: Path) -> None:
    assert "run 'mine' with steps train (rl), measure (eval)" in miles(directory, "config", "check", "run.toml")
    shown = miles(directory, "submit", "run.toml", "--local")
    assert "mine: 2 of 2 steps done" in shown

    run = RunPaths(directory / "runs/mine")
    lines = {(line.stage, line.step): line.values for line in read_metrics(run)}
    assert set(lines) == {("train", 0), ("train", 1), ("train", 2), ("measure", 0)}
    for step in (1, 2):
        values = lines["train", step]
        assert values["mismatch/log_prob_abs_diff_max"] < 1e-4, "engine and trainer compute the same model"
        assert values["grad_norm"] > 0
        assert 0 < values["response/length_max"] <= 12
        parts = 0.5 * values["reward/vowels"] + values["reward/exact"]
        assert values["reward/mean"] == pytest.approx(parts)
        assert 0 < values["reward/vowels/letters"] <= 12
    assert {"eval/reward", "eval/pass@1", "eval/pass@2"} <= lines["train", 0].keys() & lines["train", 2].keys()

    before = LlamaForCausalLM.from_pretrained(directory / "my-model").state_dict()
    trained = AutoModelForCausalLM.from_pretrained(run.step("train") / "model")
    assert isinstance(trained, LlamaForCausalLM)
    after = trained.state_dict()
    assert before.keys() == after.keys()
    assert [name for name in before if torch.equal(before[name], after[name])] == []
    tokenizer = AutoTokenizer.from_pretrained(run.step("train") / "model")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "<user>x</s>"

    results = json.loads((run.step("measure") / "results.json").read_text())
    # Evaluations of a run draw with the same seeds: the saved model answers as the last weights in the engines did.
    for name in ("reward", "pass@1", "pass@2", "length_mean"):
        assert results[name] == pytest.approx(lines["train", 2][f"eval/{name}"]), name
    assert [result["id"] for result in results["results"]] == ["100", "101", "102"]
