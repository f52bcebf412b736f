"""The inputs of a step, opened: model directory, tokenizer, data files, with `step:` references resolved."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miles.config.schema import DataSection, ModelSection, SftStep
from miles.data.prompts import load_demonstrations
from miles.data.template import end_token_ids, load_tokenizer
from miles.errors import DataError
from miles.models.families import context_length
from miles.runs.paths import RunPaths

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from miles.data.batch import Sequence


@dataclass(frozen=True, slots=True)
class ModelInput:
    """A model directory and what text needs of it."""

    directory: Path
    tokenizer: PreTrainedTokenizerBase
    end_tokens: list[int]
    """Token ids that end a response."""
    config: dict[str, Any]
    """config.json"""

    @property
    def context_length(self) -> int:
        """Most tokens of prompt and response together. Raises DataError where the config does not state it."""
        length = context_length(self.config)
        if length is None:
            raise DataError(
                f"{self.directory / 'config.json'} states no max_position_embeddings",
                fix="add the model's context length to config.json",
            )
        return length


def open_model(model: ModelSection, paths: RunPaths) -> ModelInput:
    """Open tokenizer and config of a step's model; the weights stay where they are. Raises DataError."""
    directory = paths.resolve(model.path)
    tokenizer_directory = directory if model.tokenizer is None else paths.resolve(model.tokenizer)
    tokenizer = load_tokenizer(tokenizer_directory, trust_remote_code=model.trust_remote_code)
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    return ModelInput(directory, tokenizer, end_token_ids(directory, tokenizer), config)


def resolved(data: DataSection, paths: RunPaths) -> DataSection:
    """The section with its path resolved to a file."""
    return data.model_copy(update={"path": str(paths.resolve(data.path))})


def open_demonstrations(step: SftStep, paths: RunPaths) -> tuple[ModelInput, list[Sequence]]:
    """The model and the training rows of a supervised step. Raises DataError."""
    model = open_model(step.model, paths)
    rows = load_demonstrations(
        resolved(step.data, paths),
        model.tokenizer,
        max_tokens=min(model.context_length, step.train.max_tokens_per_micro_batch),
        end_tokens=model.end_tokens,
    )
    return model, rows
