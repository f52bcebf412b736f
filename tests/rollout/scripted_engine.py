"""A scripted engine: a real HTTP server whose `/generate` answers are decided by each test."""

from __future__ import annotations

import base64
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from aiohttp import web


def answer(tokens: list[int], *, text: str | None = None, finish: str = "stop", **meta: Any) -> dict[str, Any]:
    """One SGLang answer; log-probabilities are -0.5 per token."""
    return {
        "text": "".join(map(chr, tokens)) if text is None else text,
        "output_ids": tokens,
        "meta_info": {
            "id": "r",
            "finish_reason": {"type": finish},
            "output_token_logprobs": [[-0.5, token, None] for token in tokens],
            "weight_version": "default",
            **meta,
        },
    }


def echo_seeds(body: dict[str, Any]) -> list[dict[str, Any]]:
    """A response that depends on the seed only: its decimal digits."""
    return [answer([ord(c) for c in str(params["sampling_seed"])]) for params in body["sampling_params"]]


@dataclass
class ScriptedEngine:
    """What the server answers, and what it saw."""

    generate: Callable[[dict[str, Any]], Any] = echo_seeds
    wait: Callable[[dict[str, Any]], Awaitable[None]] | None = None
    statuses: list[int] = field(default_factory=list)
    """Statuses of the next answers; 200 when used up."""
    seen: list[tuple[str, Any]] = field(default_factory=list)
    tokens: list[str | None] = field(default_factory=list)
    in_flight: int = 0
    most_in_flight: int = 0
    url: str = ""

    async def handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.json() if request.can_read_body else None
        self.seen.append((request.path, body))
        self.tokens.append(request.headers.get("Authorization"))
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            if self.wait is not None:
                await self.wait(body)
            status = self.statuses.pop(0) if self.statuses else 200
            if status != 200:
                return web.json_response({"error": {"message": f"scripted {status}"}}, status=status)
            if request.path == "/generate":
                return web.json_response(self.generate(body))
            if request.path == "/flush_cache":
                return web.Response(text="Cache flushed.\n")
            return web.json_response({"success": True, "path": request.path, "body": body})
        finally:
            self.in_flight -= 1


def routed(array: np.ndarray) -> str:
    """Routed experts as SGLang sends them: base64 of little-endian int32."""
    return base64.b64encode(array.astype("<i4").tobytes()).decode()
