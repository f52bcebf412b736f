"""The tokenizer and its chat template: from a prompt column to text, and to the tokens that end a response.

Owns opening the tokenizer and rendering one conversation. Reading files belongs to `miles.data.prompts`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miles.config.schema import DataSection
from miles.data.rows import kind_of
from miles.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]


def load_tokenizer(directory: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Open the tokenizer of a Hugging Face model directory. Raises DataError; never asks the network."""
    from transformers import AutoTokenizer

    if not directory.is_dir():
        raise DataError(
            f"model directory {directory} does not exist",
            fix="correct model.path; a model of the Hugging Face hub must be downloaded first",
        )
    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # the Rust library raises Exception itself for a damaged file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{directory} holds no usable tokenizer: {reason}",
            fix="copy tokenizer.json and tokenizer_config.json there, or set model.tokenizer",
        ) from error


def end_token_ids(directory: Path, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end a response: the tokenizer's end-of-sequence token and those of generation_config.json."""
    ids: list[int] = []
    file = directory / "generation_config.json"
    if file.is_file():
        try:
            named = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
        except (ValueError, AttributeError) as error:
            raise DataError(f"{file} is not a JSON object: {error}", fix="copy the model again") from error
        ids += named if isinstance(named, list) else [] if named is None else [named]
    if tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    if not ids:
        raise DataError(
            f"neither the tokenizer nor generation_config.json of {directory} names an end-of-sequence token",
            fix="set eos_token_id in generation_config.json",
        )
    return sorted(set(ids))


@dataclass(frozen=True, slots=True)
class Renderer:
    """Turns the value of a prompt column into text, as one `[data]` section says."""

    data: DataSection
    tokenizer: PreTrainedTokenizerBase

    def __post_init__(self) -> None:
        if self.data.chat_template and self.tokenizer.chat_template is None:
            raise DataError(
                f"the tokenizer {self.tokenizer.name_or_path} has no chat template",
                fix="set data.chat_template = false for a base model, or model.tokenizer to the chat model's",
            )
        if self.data.system is not None and not self.data.chat_template:
            raise DataError(
                "data.system is set, but data.chat_template = false leaves no place for a system message",
                fix="put the text into the prompts, or apply the chat template",
            )

    def prompt(self, value: Any, place: str) -> str:
        """Text of one prompt, up to where the response begins. Raises DataError naming `place`."""
        if not self.data.chat_template:
            return _plain_text(value, place)
        return self._apply(self._messages(value, place), place, add_generation_prompt=True)

    def response(self, value: Any, response: str, prompt: str, place: str) -> str:
        """Text of the response as the template writes it after `prompt`, its end token included."""
        if not self.data.chat_template:
            return response
        messages = [*self._messages(value, place), {"role": "assistant", "content": response}]
        whole = self._apply(messages, place, add_generation_prompt=False)
        if not whole.startswith(prompt):
            raise DataError(
                f"{place}: the chat template writes this prompt differently once a response follows",
                fix="adjust data.template_args, or template the file yourself (data.chat_template = false)",
            )
        return whole[len(prompt) :]

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of prompts. A template writes its own special tokens; plain text gets the tokenizer's."""
        return self.tokenizer(texts, add_special_tokens=not self.data.chat_template)["input_ids"]

    def _messages(self, value: Any, place: str) -> list[Message]:
        if isinstance(value, str):
            user = {"role": "user", "content": _plain_text(value, place)}
            return [user] if self.data.system is None else [{"role": "system", "content": self.data.system}, user]
        return _checked_messages(value, place)

    def _apply(self, messages: list[Message], place: str, *, add_generation_prompt: bool) -> str:
        import jinja2

        try:
            text = self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **self.data.template_args,
            )
        except (jinja2.TemplateError, TypeError, KeyError) as error:
            raise DataError(
                f"{place}: the chat template refuses this conversation: {error}",
                fix="check its roles, data.system and data.template_args",
            ) from error
        assert isinstance(text, str)
        return text


def _plain_text(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise DataError(
            f"{place}: the prompt is {kind_of(value)}, not a string",
            fix="with data.chat_template = false every prompt is one string",
        )
    if not value.strip():
        raise DataError(f"{place}: the prompt is empty", fix="fill it, or remove the row")
    return value


def _checked_messages(value: Any, place: str) -> list[Message]:
    """The chat messages of `value`, without the null fields that Parquet adds."""
    fix = 'write a string, or messages like [{"role": "user", "content": "..."}]'
    if not isinstance(value, list):
        raise DataError(f"{place}: the prompt is {kind_of(value)}", fix=fix)
    if not value:
        raise DataError(f"{place}: the prompt is empty", fix=fix)
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
            raise DataError(f"{place}: message {number} of the prompt has no role and content", fix=fix)
    return [{key: field for key, field in message.items() if field is not None} for message in value]
