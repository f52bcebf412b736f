"""Scripted engines: real HTTP servers whose `/generate` answers are decided by each test, and that can be killed."""

from __future__ import annotations

import asyncio
import base64
import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from aiohttp import web

END = 0
"""The token that ends a response of `Storyteller`."""


def answer(tokens: list[int], *, finish: str = "stop", **meta: Any) -> dict[str, Any]:
    """One SGLang answer; log-probabilities are -0.5 per token."""
    return {
        "text": "not looked at",
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
    """A response that depends on the seed only: its decimal digits, and an end token."""
    return [answer([*map(ord, str(params["sampling_seed"])), END]) for params in body["sampling_params"]]


Wait = Callable[[dict[str, Any]], Awaitable[None]]


@dataclass
class ScriptedEngine:
    """What the server answers, and what it saw."""

    generate: Callable[[dict[str, Any]], Any] = echo_seeds
    wait: Wait | None = None
    """Awaited before each answer to `/generate`."""
    statuses: list[int] = field(default_factory=list)
    """Statuses of the next answers, but to health checks; 200 when used up."""
    healthy: bool = True
    seen: list[tuple[str, Any]] = field(default_factory=list)
    tokens: list[str | None] = field(default_factory=list)
    in_flight: int = 0
    most_in_flight: int = 0
    url: str = ""
    runner: web.AppRunner | None = None
    site: web.TCPSite | None = None
    transports: set[asyncio.BaseTransport] = field(default_factory=set)

    async def start(self) -> None:
        """Listen on a free port."""
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self.handle)
        self.runner = web.AppRunner(app, shutdown_timeout=0.0)
        await self.runner.setup()
        self.site = web.TCPSite(self.runner, "127.0.0.1", 0)
        await self.site.start()
        host, port = self.runner.addresses[0]
        self.url = f"http://{host}:{port}"

    async def kill(self) -> None:
        """Be gone at once, with everything in flight."""
        assert self.site is not None
        await self.site.stop()
        for transport in self.transports:
            transport.abort()

    async def close(self) -> None:
        """Free the port."""
        if self.runner is not None:
            await self.runner.cleanup()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        self.transports.add(request.transport)
        if request.path == "/health":
            return web.Response(status=200 if self.healthy else 503)
        body = await request.json() if request.can_read_body else None
        self.seen.append((request.path, body))
        self.tokens.append(request.headers.get("Authorization"))
        status = self.statuses.pop(0) if self.statuses else 200
        if status != 200:
            return web.json_response({"error": {"message": f"scripted {status}"}}, status=status)
        if request.path == "/generate":
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
            try:
                return web.json_response(await self.respond(body))
            finally:
                self.in_flight -= 1
        if request.path == "/abort_request":
            self.abort()
            return web.Response()
        if request.path == "/flush_cache":
            return web.Response(text="Cache flushed.\n")
        return web.json_response({"success": True, "path": request.path, "body": body})

    async def respond(self, body: dict[str, Any]) -> Any:
        """The JSON of one `/generate`."""
        if self.wait is not None:
            await self.wait(body)
        return self.generate(body)

    def abort(self) -> None:
        """`/abort_request`"""

    def paths(self, path: str) -> list[Any]:
        """Bodies that were sent there."""
        return [body for seen, body in self.seen if seen == path]


def digest(*parts: object) -> int:
    """A number that depends on all parts."""
    return int.from_bytes(hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=6).digest(), "big")


@dataclass
class Storyteller(ScriptedEngine):
    """Generates like a model: a token depends on seed, place and weights; responses end by themselves; aborts leave the
    tokens so far; every token costs time."""

    version: int = 0
    longest: int = 30
    pace: float = 0.0
    """Seconds per token."""
    experts: int | None = None
    refused: int | None = None
    """Requests whose prompt begins with this token are answered 400."""
    aborts: asyncio.Event = field(default_factory=asyncio.Event)

    async def respond(self, body: dict[str, Any]) -> Any:
        if self.wait is not None:
            await self.wait(body)
        if body["input_ids"][0][0] == self.refused:
            raise web.HTTPBadRequest(text='{"error": {"message": "too long"}}')
        requests = list(zip(body["input_ids"], body["sampling_params"], strict=True))
        stories = [self.story(ids, params) for ids, params in requests]
        longest = max(map(len, stories))
        told, aborts = 0, self.aborts
        while told < longest and not aborts.is_set():
            await asyncio.sleep(self.pace)
            told += 1
        return [self.told(ids, params, story[:told]) for (ids, params), story in zip(requests, stories, strict=True)]

    def story(self, ids: list[int], params: dict[str, Any]) -> list[int]:
        """The tokens up to the end or to max_new_tokens."""
        tokens: list[int] = []
        while len(tokens) < params["max_new_tokens"] and tokens[-1:] != [END]:
            place = len(ids) + len(tokens)
            draw = digest(params["sampling_seed"], place, self.version)
            tokens.append(END if draw % self.longest == 0 else 97 + draw % 26)
        return tokens

    def told(self, ids: list[int], params: dict[str, Any], tokens: list[int]) -> dict[str, Any]:
        places = range(len(ids), len(ids) + len(tokens))
        meta: dict[str, Any] = {
            "weight_version": str(self.version),
            "output_token_logprobs": [
                [-(digest("p", params["sampling_seed"], place, self.version) % 1000) / 999, token, None]
                for place, token in zip(places, tokens, strict=True)
            ],
        }
        if self.experts is not None and tokens:
            every = [*ids, *tokens][:-1]
            meta["routed_experts"] = routed(np.array([(token + i) % self.experts for i, token in enumerate(every)]))
        complete = len(tokens) == params["max_new_tokens"]
        finish = "stop" if tokens[-1:] == [END] else "length" if complete else "abort"
        return answer(tokens, finish=finish, **meta)

    def abort(self) -> None:
        self.aborts.set()
        self.aborts = asyncio.Event()


def routed(array: np.ndarray) -> str:
    """Routed experts as SGLang sends them: base64 of little-endian int32."""
    return base64.b64encode(array.astype("<i4").tobytes()).decode()
