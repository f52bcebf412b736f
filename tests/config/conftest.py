"""A directory with a model and prompts, enough for the config room to find nothing missing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

MODEL = {
    "model_type": "qwen3",
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
}


def make_model(directory: Path, **config: object) -> Path:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(MODEL | config))
    (directory / "model.safetensors").touch()
    (directory / "tokenizer.json").touch()
    return directory


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with `hf`, `hf-moe`, `hf-other`, `prompts.jsonl`, `prompts.csv`, `grader.py`."""
    make_model(tmp_path / "hf")
    make_model(tmp_path / "hf-moe", model_type="qwen3_moe", num_experts=6)
    make_model(tmp_path / "hf-other", model_type="phi3")
    (tmp_path / "prompts.jsonl").touch()
    (tmp_path / "prompts.csv").touch()
    (tmp_path / "grader.py").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def write(folder: Path) -> Callable[..., Path]:
    """Write a run file; the first line is line 1 of the text."""

    def write_file(text: str, name: str = "run.toml") -> Path:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.removeprefix("\n"))
        return path

    return write_file
