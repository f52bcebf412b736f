"""One generation request and what becomes of it.

Owns the state of a single response and its translation into SGLang's answer. When it runs belongs to `scheduler`.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from miles.engines.embedded.sampling import SamplingParams

Answer = dict[str, Any]


@dataclass(slots=True, eq=False)
class Request:
    """A prompt, how to continue it, and the continuation so far."""

    rid: str
    prompt: list[int]
    params: SamplingParams
    notify: Callable[[Answer], None]
    """Called on the engine's thread with the final answer, and with every token when streaming."""
    group: str = ""
    """The `rid` that the client sent, where several responses share it."""
    return_log_probs: bool = False
    prompt_log_probs_from: int | None = None
    """First prompt position whose log-probability is reported; None: none."""
    return_routes: bool = False
    stream: bool = False

    output: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    prompt_log_probs: list[float] = field(default_factory=list)
    """Of the prompt tokens from `prompt_log_probs_from` + 1."""
    routes: list[torch.Tensor] = field(default_factory=list)
    """int32 [tokens, layers, top_k] of consecutive passes"""
    routed: int = 0
    """Tokens whose routes are known."""
    versions: list[tuple[str, int]] = field(default_factory=list)
    """(weight version, number of tokens drawn when it ended), in order; the last is open."""
    stored: int = 0
    """Tokens whose keys and values are in the cache."""
    retractions: int = 0
    finish: dict[str, Any] | None = None
    arrived: float = field(default_factory=time.perf_counter)

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.output

    @property
    def total(self) -> int:
        return len(self.prompt) + len(self.output)

    def take_routes(self, start: int, routes: torch.Tensor) -> None:
        """Keep the routes of positions from `start` on, [tokens, layers, top_k].

        Positions that are read again after a retraction keep the routes of their first reading.
        """
        new = routes[max(0, self.routed - start) :]
        self.routes.append(new)
        self.routed += new.shape[0]

    def append(self, token: int, log_prob: float, version: str) -> None:
        """Take the next token, drawn by weights of `version`."""
        self.output.append(token)
        self.log_probs.append(log_prob)
        if self.versions and self.versions[-1][0] == version:
            self.versions.pop()
        self.versions.append((version, len(self.output)))


def finish_reason(
    request: Request, eos: frozenset[int], tokenizer: PreTrainedTokenizerBase | None
) -> dict[str, Any] | None:
    """Why the response ends with its newest token, in SGLang's words and order of precedence; None: it goes on."""
    params = request.params
    if params.stop and tokenizer is not None:
        # The newest token completes a stop string of b bytes that spreads over at most b tokens.
        tail = max(len(text.encode()) for text in params.stop) + 1
        text = tokenizer.decode(request.output[-tail:], skip_special_tokens=params.skip_special_tokens)
        for stop in params.stop:
            if stop in text:
                return {"type": "stop", "matched": stop}
    newest = request.output[-1]
    if not params.ignore_eos and (newest in eos or newest in params.stop_token_ids):
        return {"type": "stop", "matched": newest}
    if len(request.output) >= params.max_new_tokens:
        return {"type": "length", "length": params.max_new_tokens}
    return None


ABORTED = {"type": "abort", "message": "Aborted", "status_code": None, "err_type": None}


def answer(request: Request, version: str, tokenizer: PreTrainedTokenizerBase | None) -> Answer:
    """SGLang's JSON answer to `/generate`; cumulative while the request streams."""
    meta: dict[str, Any] = {
        "id": request.rid,
        "finish_reason": request.finish,
        "prompt_tokens": len(request.prompt),
        "weight_version": request.versions[-1][0] if request.versions else version,
        "num_retractions": request.retractions,
    }
    if request.return_log_probs:
        meta["input_token_logprobs"] = _prompt_log_probs(request)
        meta["output_token_logprobs"] = [
            [log_prob, token, None] for log_prob, token in zip(request.log_probs, request.output, strict=True)
        ]
        meta["output_token_logprobs_length"] = len(request.output)
    meta |= {
        "reasoning_tokens": 0,
        "completion_tokens": len(request.output),
        "cached_tokens": 0,
        "cached_tokens_details": None,
    }
    if request.finish is not None:
        meta["weight_versions"] = _spans(request, version)
        if request.return_routes:
            meta["routed_experts"] = _routes(request)
    meta["dp_rank"] = None
    if request.finish is not None:
        meta["e2e_latency"] = time.perf_counter() - request.arrived
    return {"text": _text(request, tokenizer), "output_ids": list(request.output), "meta_info": meta}


def _prompt_log_probs(request: Request) -> list[list[float | int | None]]:
    start = request.prompt_log_probs_from
    if start is None or start >= len(request.prompt):
        return []
    return [
        [log_prob, token, None]
        for log_prob, token in zip([None, *request.prompt_log_probs], request.prompt[start:], strict=False)
    ]


def _spans(request: Request, version: str) -> list[dict[str, Any]]:
    if not request.versions:
        return [{"version": version, "start": 0, "end": 0}]
    starts = [0, *(end for _, end in request.versions[:-1])]
    return [
        {"version": name, "start": start, "end": end}
        for start, (name, end) in zip(starts, request.versions, strict=True)
    ]


def _routes(request: Request) -> str:
    """Base64 of little-endian int32 [prompt + output - 1, layers, top_k]."""
    if not request.routes:
        return ""
    routes = torch.cat(request.routes)[: request.total - 1]
    return base64.b64encode(routes.numpy().astype("<i4").tobytes()).decode()


def _text(request: Request, tokenizer: PreTrainedTokenizerBase | None) -> str:
    if tokenizer is None:
        return ""
    params, tokens, matched = request.params, request.output, (request.finish or {}).get("matched")
    if isinstance(matched, int) and not params.no_stop_trim:
        tokens = tokens[:-1]
    text = tokenizer.decode(tokens, skip_special_tokens=params.skip_special_tokens)
    assert isinstance(text, str)
    if isinstance(matched, str) and matched in text:
        end = text.find(matched) + (len(matched) if params.no_stop_trim else 0)
        text = text[:end]
    return text
