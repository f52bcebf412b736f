"""SGLang's `/generate` body -> requests: what is accepted, its defaults, and the words of every refusal.

Pure functions of the parsed JSON. Unknown sampling parameters and unknown keys are refused, so that a misspelling
cannot change what is sampled; keys of SGLang that the engine does not implement are refused by name when they ask for
something.
"""

from __future__ import annotations

import math
import secrets
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from miles.engines.embedded.sampling import ALL_TOKENS, SamplingParams
from miles.errors import did_you_mean

DEFAULT_NEW_TOKENS = 128
GREEDY_BELOW = 1e-6
"""Temperatures below are greedy (SGLang's own bound)."""
KEYS = {
    "text", "input_ids", "sampling_params", "rid", "return_logprob", "logprob_start_len", "top_logprobs_num",
    "token_ids_logprob", "return_text_in_logprobs", "stream", "return_hidden_states", "return_routed_experts",
}  # fmt: skip
SAMPLING_KEYS = {
    "max_new_tokens", "temperature", "top_p", "top_k", "stop", "stop_token_ids", "ignore_eos", "n", "sampling_seed",
    "skip_special_tokens", "spaces_between_special_tokens", "no_stop_trim",
    # Accepted at the value that changes nothing:
    "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty", "min_new_tokens",
    "json_schema", "regex", "ebnf", "structural_tag", "logit_bias", "custom_params", "stop_regex",
}  # fmt: skip
NEUTRAL = {
    "min_p": 0.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "repetition_penalty": 1.0,
    "min_new_tokens": 0,
}
"""Values of unsupported sampling parameters that change nothing; None for those not listed."""


class BadRequestError(ValueError):
    """Answered as 400 `{"error": {"message": ...}}`."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the model at hand allows."""

    vocabulary: int
    context_length: int
    has_routes: bool
    encode: Callable[[str], list[int]] | None
    """The tokenizer; None where the model directory has none."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """One response that a body asks for."""

    rid: str
    group: str
    prompt: list[int]
    params: SamplingParams
    return_log_probs: bool
    prompt_log_probs_from: int | None
    return_routes: bool


@dataclass(frozen=True, slots=True)
class Generation:
    """A parsed `/generate` body."""

    wanted: list[Wanted]
    single: bool
    """Answer with an object instead of a list."""
    stream: bool


def parse_generate(body: Any, facts: ModelFacts) -> Generation:
    """BadRequestError says what is wrong with `body`, in SGLang's words where it has some."""
    if not isinstance(body, dict):
        raise BadRequestError("the body must be a JSON object")
    _refuse_unknown(body, KEYS, "")
    prompts, batch = _prompts(body, facts)
    count = len(prompts)
    sampling = _per_prompt(body, "sampling_params", count, batch, {})
    samples = _samples(sampling)
    rids = _rids(body, count, batch)
    log_probs = _per_prompt(body, "return_logprob", count, batch, False)
    starts = _per_prompt(body, "logprob_start_len", count, batch, -1)
    tops = _per_prompt(body, "top_logprobs_num", count, batch, 0)
    if any(tops) or body.get("token_ids_logprob") or body.get("return_text_in_logprobs"):
        raise BadRequestError(
            "the embedded engine reports the log-probability of the chosen token only: leave out top_logprobs_num"
        )
    if body.get("return_hidden_states"):
        raise BadRequestError("the embedded engine does not return hidden states")
    if body.get("return_routed_experts") and not facts.has_routes:
        raise BadRequestError("return_routed_experts: this model has no experts that transformers routes itself")
    wanted = []
    for i, prompt in enumerate(prompts):
        _check_prompt(prompt, facts)
        for sample in range(samples):
            params = _sampling_params(sampling[i], len(prompt), facts, sample)
            start = starts[i] if log_probs[i] and starts[i] is not None and starts[i] >= 0 else None
            wanted.append(
                Wanted(
                    rid=rids[i] if samples == 1 else uuid.uuid4().hex,
                    group=rids[i],
                    prompt=prompt,
                    params=params,
                    return_log_probs=bool(log_probs[i]),
                    prompt_log_probs_from=start,
                    return_routes=bool(body.get("return_routed_experts")),
                )
            )
    return Generation(wanted=wanted, single=not batch and samples == 1, stream=bool(body.get("stream")))


def _refuse_unknown(given: dict[str, Any], known: set[str], where: str) -> None:
    for key in given:
        if key not in known:
            raise BadRequestError(f"unknown key {where}{key!r}.{did_you_mean(key, known)}")


def _prompts(body: dict[str, Any], facts: ModelFacts) -> tuple[list[list[int]], bool]:
    """Token ids of each prompt, and whether the body gave a list of prompts."""
    text, ids = body.get("text"), body.get("input_ids")
    if text is None and ids is None:
        raise BadRequestError("Either text, input_ids or input_embeds should be provided.")
    if text is not None and ids is not None:
        raise BadRequestError("text and input_ids cannot be provided at the same time")
    if text is not None:
        if facts.encode is None:
            raise BadRequestError("this model directory has no tokenizer: send input_ids")
        texts = text if isinstance(text, list) else [text]
        if not texts or not all(isinstance(t, str) for t in texts):
            raise BadRequestError("text must be a string or a list of strings")
        return [facts.encode(t) for t in texts], isinstance(text, list)
    if not isinstance(ids, list):
        raise BadRequestError("input_ids must be a list of token ids or a list of such lists")
    if not ids:
        raise BadRequestError("input_ids cannot be empty.")
    batch = isinstance(ids[0], list)
    return (ids if batch else [ids]), batch


def _check_prompt(prompt: Any, facts: ModelFacts) -> None:
    if not isinstance(prompt, list) or not all(type(token) is int for token in prompt):
        raise BadRequestError("input_ids must be a list of token ids or a list of such lists")
    if not prompt:
        raise BadRequestError("input_ids cannot be empty.")
    outside = [token for token in prompt if not 0 <= token < facts.vocabulary]
    if outside:
        raise BadRequestError(f"token id {outside[0]} is outside the vocabulary [0, {facts.vocabulary})")
    if len(prompt) >= facts.context_length:
        raise BadRequestError(
            f"The input ({len(prompt)} tokens) is longer than the model's context length "
            f"({facts.context_length} tokens)."
        )


def _per_prompt(body: dict[str, Any], key: str, count: int, batch: bool, default: Any) -> list[Any]:
    """`body[key]` for each prompt; one value stands for all."""
    value = body.get(key)
    if isinstance(value, list):
        if not batch or len(value) != count:
            raise BadRequestError(f"The length of {key} should be equal to the batch size.")
        return [default if item is None else item for item in value]
    return [default if value is None else value] * count


def _rids(body: dict[str, Any], count: int, batch: bool) -> list[str]:
    rid = body.get("rid")
    if rid is None:
        return [uuid.uuid4().hex for _ in range(count)]
    rids = rid if isinstance(rid, list) else [rid] if not batch else [f"{rid}_{i}" for i in range(count)]
    if len(rids) != count or not all(isinstance(r, str) for r in rids):
        raise BadRequestError("rid must be a string, or a list of strings of the length of the batch")
    duplicates = sorted({r for r in rids if rids.count(r) > 1})
    if duplicates:
        raise BadRequestError(f"Duplicate request IDs detected within the request: {duplicates}")
    return rids


def _samples(sampling: list[Any]) -> int:
    """`n`, the number of responses to each prompt."""
    if not all(isinstance(params, dict) for params in sampling):
        raise BadRequestError("sampling_params must be an object or a list of objects")
    counts = {params.get("n") or 1 for params in sampling}
    if len(counts) > 1:
        raise BadRequestError("The parallel_sample_num should be the same for all samples in sample params.")
    n = counts.pop()
    if type(n) is not int or n < 1:
        raise BadRequestError(f"n must be a positive integer, got {n}.")
    return n


def _sampling_params(given: dict[str, Any], prompt_tokens: int, facts: ModelFacts, sample: int) -> SamplingParams:
    """Defaults and bounds are SGLang's. The seeds of `n` samples follow on `sampling_seed`."""
    _refuse_unknown(given, SAMPLING_KEYS, "sampling_params.")
    for key, value in given.items():
        supported = key in SamplingParams.__slots__ or key in {"n", "sampling_seed", "spaces_between_special_tokens"}
        if not supported and value is not None and value != NEUTRAL.get(key):
            raise BadRequestError(f"the embedded engine does not support sampling_params.{key}")
    temperature = _number(given, "temperature", 1.0)
    if not math.isfinite(temperature) or temperature < 0:
        raise BadRequestError(f"temperature must be a non-negative finite number, got {temperature}.")
    top_p = _number(given, "top_p", 1.0)
    if not 0.0 < top_p <= 1.0:
        raise BadRequestError(f"top_p must be in (0, 1], got {top_p}.")
    top_k = _integer(given, "top_k", -1)
    if top_k < 1 and top_k != -1:
        raise BadRequestError(f"top_k must be -1 (disable) or at least 1, got {top_k}.")
    greedy = temperature < GREEDY_BELOW
    seed = given.get("sampling_seed")
    if seed is not None and type(seed) is not int:
        raise BadRequestError(f"sampling_seed must be an integer, got {type(seed).__name__}.")
    return SamplingParams(
        max_new_tokens=_new_tokens(given, prompt_tokens, facts),
        temperature=1.0 if greedy else temperature,
        top_p=top_p,
        top_k=1 if greedy else ALL_TOKENS if top_k == -1 else top_k,
        seed=secrets.randbits(63) if seed is None else seed + sample,
        stop=_stop(given),
        stop_token_ids=frozenset(_integers(given, "stop_token_ids")),
        ignore_eos=bool(given.get("ignore_eos")),
        skip_special_tokens=given.get("skip_special_tokens") is not False,
        no_stop_trim=bool(given.get("no_stop_trim")),
    )


def _new_tokens(given: dict[str, Any], prompt_tokens: int, facts: ModelFacts) -> int:
    room = facts.context_length - prompt_tokens
    if given.get("max_new_tokens") is None:
        return min(DEFAULT_NEW_TOKENS, room)
    count = _integer(given, "max_new_tokens", DEFAULT_NEW_TOKENS)
    if count < 0:
        raise BadRequestError(f"max_new_tokens must be at least 0, got {count}.")
    if count > room:
        raise BadRequestError(
            f"Requested token count exceeds the model's maximum context length of {facts.context_length} tokens. "
            f"You requested a total of {prompt_tokens + count} tokens: {prompt_tokens} tokens from the input messages "
            f"and {count} tokens for the completion. Please reduce the number of tokens in the input messages or the "
            "completion to fit within the limit."
        )
    return count


def _number(given: dict[str, Any], key: str, default: float) -> float:
    value = given.get(key)
    if value is None:
        return default
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise BadRequestError(f"{key} must be a number, got {type(value).__name__}.")
    return value


def _integer(given: dict[str, Any], key: str, default: int) -> int:
    value = given.get(key)
    if value is None:
        return default
    if type(value) is not int:
        raise BadRequestError(f"{key} must be an integer, got {type(value).__name__}.")
    return value


def _integers(given: dict[str, Any], key: str) -> list[int]:
    value = given.get(key) or []
    if not isinstance(value, list) or not all(type(item) is int for item in value):
        raise BadRequestError(f"{key} must be a list of integers.")
    return value


def _stop(given: dict[str, Any]) -> tuple[str, ...]:
    value = given.get("stop") or []
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise BadRequestError("stop must be a string or a list of non-empty strings.")
    return tuple(stops)
