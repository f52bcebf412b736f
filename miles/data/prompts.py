"""Prompts and demonstrations: from the rows of a data file to tokens.

Owns the meaning of the columns that `[data]` names, and the checks that happen before anything starts.
Reading the file belongs to `miles.data.rows`, the chat template to `miles.data.template`.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from miles.config.schema import DataSection
from miles.data.rows import Row, has_column, kind_of, read_rows, require_column
from miles.data.sample import Prompt
from miles.data.template import Renderer
from miles.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from miles.data.batch import Sequence

log = logging.getLogger(__name__)
T = TypeVar("T")


def load_prompts(data: DataSection, tokenizer: PreTrainedTokenizerBase, *, max_prompt_tokens: int) -> list[Prompt]:
    """All prompts of `data.path`, in file order.

    `max_prompt_tokens` is what context and response length leave; `data.max_prompt_tokens` may lower it. A
    longer prompt is an error, or left out with a warning (`data.too_long`). Raises DataError.
    """
    renderer = Renderer(data, tokenizer)
    rows, ids = read_prompt_rows(data)
    texts = [renderer.prompt(row.values[data.prompt], row.place) for row in rows]
    prompts = [
        Prompt(id, tokens, text, row.values.get(data.label), _metadata(row, data.metadata))
        for id, tokens, text, row in zip(ids, renderer.encode(texts), texts, rows, strict=True)
    ]
    remedy = "lower rollout.max_response_tokens"
    if data.max_prompt_tokens is not None and data.max_prompt_tokens < max_prompt_tokens:
        max_prompt_tokens, remedy = data.max_prompt_tokens, "raise data.max_prompt_tokens"
    bound = Bound("prompt", max_prompt_tokens, remedy)
    return _within(bound, data, rows, prompts, lambda prompt: len(prompt.tokens))


def read_prompt_rows(data: DataSection) -> tuple[list[Row], list[str]]:
    """The rows of `data.path`, with every column that prompts need, and their unique ids. Raises DataError."""
    rows = read_rows(Path(data.path))
    require_column(rows, data.prompt, "data.prompt")
    named = data.label != DataSection.model_fields["label"].default
    if named or has_column(rows, data.label):
        require_column(rows, data.label, "data.label")
    return rows, _prompt_ids(rows, data.id)


def load_demonstrations(
    data: DataSection, tokenizer: PreTrainedTokenizerBase, *, max_tokens: int, end_tokens: list[int]
) -> list[Sequence]:
    """All prompt/response pairs of `data.path` as training rows of at most `max_tokens` tokens. Raises
    DataError.

    Trained on is the response and the end token after it (`end_tokens` as of `end_token_ids`). `weights`
    equals the loss mask: who builds a batch scales it to the batch's aggregation.
    """
    renderer = Renderer(data, tokenizer)
    rows = read_demonstration_rows(data)
    prompts = [renderer.prompt(row.values[data.prompt], row.place) for row in rows]
    responses = [
        renderer.response(row.values[data.prompt], _response(row, data.response), prompt, row.place)
        for row, prompt in zip(rows, prompts, strict=True)
    ]
    # Prompt and response are tokenized apart, as in a rollout, where the prompt's tokens are given.
    response_tokens = tokenizer(responses, add_special_tokens=False)["input_ids"]
    sequences = [
        _demonstration(prompt, _ended(response, end_tokens, tokenizer.eos_token_id))
        for prompt, response in zip(renderer.encode(prompts), response_tokens, strict=True)
    ]
    bound = Bound("demonstration", max_tokens, "raise train.max_tokens_per_micro_batch up to the model's context")
    return _within(bound, data, rows, sequences, len)


def read_demonstration_rows(data: DataSection) -> list[Row]:
    """The rows of `data.path`, with every column that demonstrations need. Raises DataError."""
    rows = read_rows(Path(data.path))
    require_column(rows, data.prompt, "data.prompt")
    require_column(rows, data.response, "data.response")
    return rows


def _prompt_ids(rows: list[Row], column: str) -> list[str]:
    """Unique ids: the column's, or hashes of the rows; a row that occurs again gets a hash and its count."""
    if not has_column(rows, column):
        seen: Counter[str] = Counter()
        ids = []
        for row in rows:
            content = json.dumps(row.values, sort_keys=True, default=str)
            digest = hashlib.blake2b(content.encode(), digest_size=8).hexdigest()
            seen[digest] += 1
            ids.append(digest if seen[digest] == 1 else f"{digest}-{seen[digest]}")
        return ids
    require_column(rows, column, "data.id")
    places: dict[str, str] = {}
    for row in rows:
        value = row.values[column]
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise DataError(
                f"{row.place}: the id is {json.dumps(value, default=str)}", fix="use strings or whole numbers as ids"
            )
        if str(value) in places:
            raise DataError(
                f"{row.place}: the id '{value}' is that of {places[str(value)]} already",
                fix="make ids unique, or set data.id to another column",
            )
        places[str(value)] = row.place
    return list(places)


def _metadata(row: Row, column: str) -> dict[str, Any]:
    value = row.values.get(column)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise DataError(
            f"{row.place}: '{column}' is {kind_of(value)}, not an object",
            fix="write a JSON object, or set data.metadata to another column",
        )
    return value


def _response(row: Row, column: str) -> str:
    value = row.values[column]
    if not isinstance(value, str) or not value:
        raise DataError(
            f"{row.place}: '{column}' is {'empty' if value == '' else kind_of(value)}",
            fix="write the response as a non-empty string",
        )
    return value


def _ended(tokens: list[int], end_tokens: list[int], eos: int | None) -> list[int]:
    """`tokens` up to the last end token (templates write a line break after it), or with one appended."""
    last = max((i for i, token in enumerate(tokens) if token in end_tokens), default=None)
    if last is not None:
        return tokens[: last + 1]
    return [*tokens, end_tokens[0] if eos is None else eos]


def _demonstration(prompt: list[int], response: list[int]) -> Sequence:
    import torch

    from miles.data.batch import Sequence

    mask = torch.tensor([0.0] * len(prompt) + [1.0] * len(response))
    # Index 0 is predicted from nothing, so it is never trained on (see miles.data.batch).
    mask[0] = 0.0
    return Sequence(torch.tensor(prompt + response), mask, mask.clone())


@dataclass(frozen=True, slots=True)
class Bound:
    """How many tokens an item may have."""

    item: str
    tokens: int
    remedy: str
    """What makes room for longer ones."""


def _within(bound: Bound, data: DataSection, rows: list[Row], items: list[T], length: Callable[[T], int]) -> list[T]:
    """The items that fit; the others are an error or left out, as `data.too_long` says."""
    if bound.tokens < 1:
        raise DataError(
            f"no token is left for a {bound.item}: the bound is {bound.tokens}",
            fix="lower rollout.max_response_tokens, or raise the context length",
        )
    long = [(row, length(item)) for row, item in zip(rows, items, strict=True) if length(item) > bound.tokens]
    if not long:
        return items
    row, tokens = long[0]
    message = (
        f"{row.place}: a {bound.item} of {tokens} tokens, where at most {bound.tokens} fit"
        f" ({len(long)} of {len(rows)} rows are longer, up to {max(n for _, n in long)} tokens)"
    )
    if len(long) == len(rows):
        raise DataError(message, fix=f"{bound.remedy}, or shorten them")
    if data.too_long == "error":
        raise DataError(message, fix=f'{bound.remedy}, shorten them, or set data.too_long = "drop"')
    log.warning("%s; left out", message)
    return [item for item in items if length(item) <= bound.tokens]
