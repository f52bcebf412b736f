"""Data files, model directories and graders with something wrong in them, and what is said before a run begins.

In a message, DIR is the directory that holds the case's files: `data.jsonl`, `model/`, `grader.py`. docs/errors.md is
made of these entries; the test brings each about.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

GOOD = '{"prompt": "sort 21", "label": "12"}\n'
PAIR = '{"prompt": "sort 21", "response": "12"}\n'
GRADER = "def grade(prompt, response, label, metadata):\n    return 1.0\n"

RL: dict[str, Any] = {"kind": "rl", "rollout": {"max_response_tokens": 8}}
SFT: dict[str, Any] = {"kind": "sft"}


@dataclass(frozen=True, slots=True)
class BadInput:
    """One thing that is wrong, and the panel that it leads to (exit code 3)."""

    message: str
    fix: str
    data: str | bytes = GOOD
    file: str = "data.jsonl"
    model: Callable[[Path], None] | None = None
    """What is done to a good model directory."""
    grader: str = GRADER
    step: Mapping[str, Any] = field(default_factory=lambda: RL)


def _edit(file: str, **values: Any) -> Callable[[Path], None]:
    """Set keys of a JSON file of the model directory; None removes one."""

    def edit(directory: Path) -> None:
        content = json.loads((directory / file).read_text()) | values
        (directory / file).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    return edit


def _write(file: str, text: str) -> Callable[[Path], None]:
    return lambda directory: (directory / file).write_text(text) and None


def _without_end_token(directory: Path) -> None:
    _edit("tokenizer_config.json", eos_token=None)(directory)
    _edit("generation_config.json", eos_token_id=None)(directory)


def _cut_off_weights(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])


def _incomplete_shards(directory: Path) -> None:
    weight_map = {"model.norm.weight": "model.safetensors", "lm_head.weight": "model-00002-of-00002.safetensors"}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _graded(grader: str, **keys: Any) -> dict[str, Any]:
    return RL | {"rewards": [{"grader": grader, **keys}]}


BAD_DATA = {
    "A line is not JSON": BadInput(
        "DIR/data.jsonl:2: not JSON (<reason> at column 12)",
        "write one JSON object per line, in UTF-8",
        data=GOOD + '{"prompt": sort}\n',
    ),
    "A line is JSON, but not an object": BadInput(
        "DIR/data.jsonl:2: an array where a row (an object) belongs",
        "write one JSON object per line, in UTF-8",
        data=GOOD + '["sort 21", "12"]\n',
    ),
    "A line is not UTF-8": BadInput(
        "DIR/data.jsonl:2: not UTF-8 (invalid continuation byte at byte 12)",
        "write one JSON object per line, in UTF-8",
        data=GOOD.encode() + b'{"prompt": "\xe9"}\n',
    ),
    "The file is empty": BadInput(
        "DIR/data.jsonl holds no rows", "one JSON object per line, or a Parquet table with rows", data="\n\n"
    ),
    "A Parquet file is damaged": BadInput(
        "DIR/data.parquet cannot be read as Parquet: <reason>",
        "write the file again",
        data=b"PAR1 and nothing else",
        file="data.parquet",
    ),
    "A column does not exist": BadInput(
        "DIR/data.jsonl:1: no column 'prompt'. Did you mean 'promt'?",
        "set data.prompt to one of promt, label",
        data='{"promt": "sort 21", "label": "12"}\n',
    ),
    "A column is missing in some rows": BadInput(
        "DIR/data.jsonl:2: 'prompt' is missing or null, in 1 of 3 rows",
        "fill it in every row, or remove those rows",
        data=GOOD + '{"label": "12"}\n' + GOOD,
    ),
    "A column that was named does not exist": BadInput(
        "DIR/data.jsonl:1: no column 'answer'.",
        "set data.label to one of prompt, label",
        step=RL | {"data": {"label": "answer"}},
    ),
    "The grader needs labels and there are none": BadInput(
        "grader 'exact' compares with a label, and 1 of 1 prompts have none (first: '4a861b60d182451a')",
        "set data.label to the column with the reference answers",
        data='{"prompt": "sort 21"}\n',
    ),
    "A label is missing in some rows": BadInput(
        "DIR/data.jsonl:2: 'label' is missing or null, in 1 of 2 rows",
        "fill it in every row, or remove those rows",
        data=GOOD + '{"prompt": "sort 31"}\n',
    ),
    "An id occurs twice": BadInput(
        "DIR/data.jsonl:2: the id 'a' is that of DIR/data.jsonl:1 already",
        "make ids unique, or set data.id to another column",
        data='{"id": "a", "prompt": "p", "label": "l"}\n{"id": "a", "prompt": "q", "label": "l"}\n',
    ),
    "An id is neither string nor whole number": BadInput(
        "DIR/data.jsonl:1: the id is 1.5",
        "use strings or whole numbers as ids",
        data='{"id": 1.5, "prompt": "p", "label": "l"}\n',
    ),
    "Metadata is not an object": BadInput(
        "DIR/data.jsonl:1: 'metadata' is a string, not an object",
        "write a JSON object, or set data.metadata to another column",
        data='{"prompt": "p", "label": "l", "metadata": "easy"}\n',
    ),
    "A prompt is empty": BadInput(
        "DIR/data.jsonl:1: the prompt is empty", "fill it, or remove the row", data='{"prompt": " ", "label": "l"}\n'
    ),
    "A prompt is neither string nor messages": BadInput(
        "DIR/data.jsonl:1: the prompt is a number",
        'write a string, or messages like [{"role": "user", "content": "..."}]',
        data='{"prompt": 17, "label": "l"}\n',
    ),
    "A chat message has no role": BadInput(
        "DIR/data.jsonl:1: message 1 of the prompt has no role and content",
        'write a string, or messages like [{"role": "user", "content": "..."}]',
        data='{"prompt": [{"content": "sort 21"}], "label": "l"}\n',
    ),
    "Messages, and no chat template to write them": BadInput(
        "DIR/data.jsonl:1: the prompt is an array, not a string",
        "with data.chat_template = false every prompt is one string",
        data='{"prompt": [{"role": "user", "content": "sort 21"}], "label": "l"}\n',
        step=RL | {"data": {"chat_template": False}},
    ),
    "A prompt is longer than the context": BadInput(
        "DIR/data.jsonl:2: a prompt of 203 tokens, where at most 120 fit (1 of 2 rows are longer, up to 203 tokens)",
        'lower rollout.max_response_tokens, shorten them, or set data.too_long = "drop"',
        data=GOOD + json.dumps({"prompt": "x" * 200, "label": "l"}) + "\n",
    ),
    "A prompt is longer than data.max_prompt_tokens": BadInput(
        "DIR/data.jsonl:1: a prompt of 10 tokens, where at most 5 fit (1 of 1 rows are longer, up to 10 tokens)",
        "raise data.max_prompt_tokens, or shorten them",
        step=RL | {"data": {"max_prompt_tokens": 5}},
    ),
    "Every prompt is too long, and those are to be dropped": BadInput(
        "DIR/data.jsonl:1: a prompt of 10 tokens, where at most 5 fit (1 of 1 rows are longer, up to 10 tokens)",
        "raise data.max_prompt_tokens, or shorten them",
        step=RL | {"data": {"max_prompt_tokens": 5, "too_long": "drop"}},
    ),
    "The held-out file has a bad line": BadInput(
        "DIR/heldout.jsonl:1: not JSON (<reason> at column 1)",
        "write one JSON object per line, in UTF-8",
        step=RL | {"eval": {"data": "heldout.jsonl"}},
    ),
    "A demonstration has no response": BadInput(
        "DIR/data.jsonl:1: no column 'response'.", "set data.response to one of prompt, label", data=GOOD, step=SFT
    ),
    "A response is empty": BadInput(
        "DIR/data.jsonl:2: 'response' is empty",
        "write the response as a non-empty string",
        data=PAIR + '{"prompt": "sort 21", "response": ""}\n',
        step=SFT,
    ),
    "A demonstration is longer than a micro-batch": BadInput(
        "DIR/data.jsonl:1: a demonstration of 13 tokens, where at most 10 fit (1 of 1 rows are "
        "longer, up to 13 tokens)",
        "raise train.max_tokens_per_micro_batch up to the model's context, or shorten them",
        data=PAIR,
        step=SFT | {"train": {"max_tokens_per_micro_batch": 10}},
    ),
}

BAD_MODELS = {
    "The tokenizer has no chat template": BadInput(
        "the tokenizer DIR/model has no chat template",
        "set data.chat_template = false for a base model, or model.tokenizer to the chat model's",
        model=lambda directory: (directory / "chat_template.jinja").unlink(),
    ),
    "A system message without a chat template": BadInput(
        "data.system is set, but data.chat_template = false leaves no place for a system message",
        "put the text into the prompts, or apply the chat template",
        step=RL | {"data": {"chat_template": False, "system": "Be brief."}},
    ),
    "The chat template refuses a conversation": BadInput(
        "DIR/data.jsonl:1: the chat template refuses this conversation: roles must alternate",
        "check its roles, data.system and data.template_args",
        model=_write("chat_template.jinja", "{{ raise_exception('roles must alternate') }}"),
    ),
    "The tokenizer is damaged": BadInput(
        "DIR/model holds no usable tokenizer: <reason>",
        "copy tokenizer.json and tokenizer_config.json there, or set model.tokenizer",
        model=_write("tokenizer.json", "{"),
    ),
    "The tokenizer's file is of something else": BadInput(
        "DIR/model holds no usable tokenizer: <reason>",
        "copy tokenizer.json and tokenizer_config.json there, or set model.tokenizer",
        model=_write("tokenizer.json", '{"added_tokens": []}'),
    ),
    "No end-of-sequence token": BadInput(
        "neither the tokenizer nor generation_config.json of DIR/model names an end-of-sequence token",
        "set eos_token_id in generation_config.json",
        model=_without_end_token,
    ),
    "generation_config.json is damaged": BadInput(
        "DIR/model/generation_config.json is not a JSON object: <reason>",
        "copy the model again",
        model=_write("generation_config.json", "{"),
    ),
    "config.json states no context length": BadInput(
        "DIR/model/config.json states no max_position_embeddings",
        "add the model's context length to config.json",
        model=_edit("config.json", max_position_embeddings=None),
    ),
    "A weight file is cut off": BadInput(
        "cannot read DIR/model/model.safetensors: <reason>",
        "copy the file again",
        model=_cut_off_weights,
    ),
    "A weight file of the index is missing": BadInput(
        "DIR/model lacks model-00002-of-00002.safetensors, which model.safetensors.index.json names",
        "finish the download of the model",
        model=_incomplete_shards,
    ),
    "The index is damaged": BadInput(
        "DIR/model/model.safetensors.index.json is not JSON: <reason>",
        "copy the file again",
        model=_write("model.safetensors.index.json", "{"),
    ),
}

BAD_GRADERS = {
    "The file has a syntax error": BadInput(
        "grader 'DIR/grader.py:grade': running DIR/grader.py failed: SyntaxError: invalid syntax (at DIR/grader.py:1)",
        "make the file importable by itself: `python DIR/grader.py`",
        grader="def grade(:\n",
        step=_graded("grader.py:grade"),
    ),
    "The file raises when it is imported": BadInput(
        "grader 'DIR/grader.py:grade': running DIR/grader.py failed: ModuleNotFoundError: No module "
        "named 'no_such_package' (at DIR/grader.py:1)",
        "make the file importable by itself: `python DIR/grader.py`",
        grader="import no_such_package\n",
        step=_graded("grader.py:grade"),
    ),
    "The file ends the process when it is imported": BadInput(
        "grader 'DIR/grader.py:grade': running DIR/grader.py failed: SystemExit: 3 (at DIR/grader.py:1)",
        "make the file importable by itself: `python DIR/grader.py`",
        grader="raise SystemExit(3)\n",
        step=_graded("grader.py:grade"),
    ),
    "The file has no such function": BadInput(
        "grader 'DIR/grader.py:grad': DIR/grader.py has no function 'grad'. Did you mean 'grade'?",
        "define `def grad(prompt, response, label, metadata): ...` there",
        step=_graded("grader.py:grad"),
    ),
    "The module does not exist": BadInput(
        "grader 'no_such_module:grade': importing no_such_module failed: ModuleNotFoundError: No "
        "module named 'no_such_module'",
        "modules are found from the working directory and PYTHONPATH; files as path/file.py:function",
        step=_graded("no_such_module:grade"),
    ),
    "The function does not take an argument of rewards.args": BadInput(
        "grader 'DIR/grader.py:grade' cannot be called with rewards.args: it has no argument 'limit'.",
        "its signature is fn(prompt, response, label, metadata, **args), with a keyword for each of "
        "rewards.args (limit)",
        step=_graded("grader.py:grade", args={"limit": 3}),
    ),
    "The function lacks an argument that it needs": BadInput(
        "grader 'DIR/grader.py:grade' cannot be called with rewards.args: it has no argument "
        "'limt'. Did you mean 'limit'?",
        "its signature is fn(prompt, response, label, metadata, **args), with a keyword for each of "
        "rewards.args (limt)",
        grader="def grade(prompt, response, label, metadata, *, limit):\n    return 1.0\n",
        step=_graded("grader.py:grade", args={"limt": 3}),
    ),
}

SECTIONS = {"Data": BAD_DATA, "Models": BAD_MODELS, "Graders": BAD_GRADERS}
