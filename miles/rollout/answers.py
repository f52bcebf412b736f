"""What an engine's `/generate` answer says, as typed values. Pure; the HTTP belongs to
`miles.rollout.client`.

The JSON is SGLang's: `output_ids`, and `meta_info` with `finish_reason`, `output_token_logprobs`
(`[log_prob, id, null]` per token), `weight_version`, `weight_versions` (spans, newer servers) and
`routed_experts`.
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from miles.data.sample import FinishReason


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """What is needed to read routed experts, whose bytes carry no shape."""

    layers: int
    """Transformer layers, dense ones included."""
    top_k: int
    """Experts that each token takes."""
    experts: int
    """Experts of a layer."""

    @property
    def dtype(self) -> np.dtype:
        """The smallest unsigned type that holds every expert's index."""
        return np.min_scalar_type(self.experts - 1)


@dataclass(frozen=True, slots=True)
class Generation:
    """What one request added to a response. The per-token lists have equal lengths, the end token included."""

    tokens: list[int]
    log_probs: list[float]
    weight_versions: list[int]
    finish_reason: FinishReason
    abort_message: str
    """Why the engine gave up, where `finish_reason` is `abort`."""
    routed_experts: np.ndarray | None
    """Unsigned [input + output - 1, layers, top_k]; None without output."""


def expert_shape(config: Mapping[str, Any]) -> ExpertShape | None:
    """The shape of routed experts for a Hugging Face `config.json`; None for a dense model."""
    config = config.get("text_config", config)
    top_k = config.get("num_experts_per_tok")
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    experts = next((config[name] for name in names if config.get(name)), None)
    if not top_k or not experts:
        return None
    return ExpertShape(config["num_hidden_layers"], top_k, experts)


def read_generation(answer: Mapping[str, Any], input_tokens: int, experts: ExpertShape | None) -> Generation:
    """One answer of a server.

    Raises ValueError, KeyError or TypeError with a reason where it is not as promised.
    """
    meta = answer["meta_info"]
    finish = meta["finish_reason"]
    # A request that was aborted before its prompt was read has nothing to report, whatever was asked for.
    tokens = list(answer.get("output_ids", []) if finish["type"] == FinishReason.ABORT else answer["output_ids"])
    shape = experts if tokens else None
    return Generation(
        tokens=tokens,
        log_probs=_log_probs(meta.get("output_token_logprobs") or [], tokens),
        weight_versions=_weight_versions(meta, len(tokens)),
        finish_reason=FinishReason(finish["type"]),
        abort_message=str(finish.get("message") or ""),
        routed_experts=None if shape is None else _routed_experts(meta, input_tokens + len(tokens), shape),
    )


def _log_probs(entries: list[list[Any]], tokens: list[int]) -> list[float]:
    if [entry[1] for entry in entries] != tokens:
        raise ValueError(f"log-probabilities of {len(entries)} tokens do not belong to the {len(tokens)} output tokens")
    log_probs = [float(entry[0]) for entry in entries]
    if not all(map(math.isfinite, log_probs)):
        raise ValueError("a log-probability is not finite")
    return log_probs


def _weight_versions(meta: Mapping[str, Any], length: int) -> list[int]:
    """Version of each token: from the spans where the server reports them, else one version for all."""
    spans = meta.get("weight_versions")
    if not length:
        return []
    if not spans:
        return [_version(meta["weight_version"])] * length
    versions: list[int] = []
    for span in spans:
        versions += [_version(span["version"])] * (min(span["end"], length) - len(versions))
    if len(versions) != length:
        raise ValueError(f"weight versions cover {len(versions)} of {length} tokens")
    return versions


def _version(text: str) -> int:
    """Miles counts versions from 0; a server that never got weights says `default`."""
    return 0 if text == "default" else int(text)


def _routed_experts(meta: Mapping[str, Any], tokens: int, shape: ExpertShape) -> np.ndarray:
    encoded = meta.get("routed_experts")
    if encoded is None:
        raise ValueError("no routed experts; the server must run with --enable-return-routed-experts")
    try:
        flat = np.frombuffer(base64.b64decode(encoded, validate=True), dtype="<i4")
    except binascii.Error as error:
        raise ValueError(f"routed experts are not base64: {error}") from error
    expected = (tokens - 1, shape.layers, shape.top_k)
    if flat.size != math.prod(expected):
        raise ValueError(f"{flat.size} routed experts, where {expected} (tokens - 1, layers, top_k) were expected")
    if flat.size and not 0 <= int(flat.min()) <= int(flat.max()) < shape.experts:
        raise ValueError(f"routed experts from {flat.min()} to {flat.max()}; the model has {shape.experts}")
    return flat.reshape(expected).astype(shape.dtype)
