"""HTTP to one inference server at a time, in SGLang's protocol: what to send, and what a failure means.

Owns the bodies of requests and the judgement of errors: is it the request's fault, the engine's, or is the engine gone.
Nothing is tried again here. It knows tokens and seeds, not groups, rewards or weights. One client belongs to one event
loop; close it (`async with`) when done.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from types import TracebackType
from typing import Any

import aiohttp

from miles.config.schema import RolloutSection
from miles.errors import EngineError, EngineLost, UnknownRouteError
from miles.rollout.answers import ExpertShape, Generation, read_generation
from miles.rollout.engines import Engine

HEALTH_SECONDS = 10.0
"""An engine that does not say within this time that it is well counts as dead."""
ABORT_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to sample one response, but for its seed."""

    temperature: float
    """0: greedy."""
    max_new_tokens: int
    top_p: float = 1.0
    top_k: int = -1
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()

    @classmethod
    def of(cls, rollout: RolloutSection, end_tokens: Sequence[int], temperature: float | None = None) -> SamplingParams:
        """As `[rollout]` says, with the model's end tokens; `temperature` overrides it (evaluation)."""
        return cls(
            temperature=rollout.temperature if temperature is None else temperature,
            max_new_tokens=rollout.max_response_tokens,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
            stop=tuple(rollout.stop),
            stop_token_ids=tuple(sorted({*end_tokens, *rollout.stop_token_ids})),
        )

    def to_json(self, seed: int) -> dict[str, Any]:
        """SGLang's `sampling_params` of one response."""
        return {
            "temperature": self.temperature,
            "max_new_tokens": self.max_new_tokens,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "stop": list(self.stop),
            "stop_token_ids": list(self.stop_token_ids),
            "sampling_seed": seed,
        }


@dataclass(frozen=True, slots=True)
class Continuation:
    """One response of a request: what is there, and how many tokens may follow."""

    tokens: list[int]
    """Prompt, and response so far."""
    seed: int
    max_new_tokens: int


class Failure(Enum):
    """What a failed generation says about its request."""

    REFUSED = "refused"
    """The engine is well and answers 4xx: it will never serve this request."""
    FAILED = "failed"
    """The engine lives, and gave no usable answer."""
    DIED = "died"
    """The engine went away while it held the request."""
    UNREACHABLE = "unreachable"
    """The engine was not there before: nothing is known about the request."""


class RequestError(Exception):
    """A generation without an answer."""

    def __init__(self, kind: Failure, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind


class EngineClient:
    """Speaks to engines."""

    def __init__(self, token: str | None, *, timeout: float = 1800.0) -> None:
        """`timeout` in seconds bounds one request."""
        self._headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self._timeout = aiohttp.ClientTimeout(total=timeout)
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> EngineClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close all connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def generate(
        self,
        engine: Engine,
        responses: Sequence[Continuation],
        params: SamplingParams,
        *,
        experts: ExpertShape | None = None,
    ) -> list[Generation]:
        """What follows on each of `responses`, in one request. `experts`: record the routed experts as well.

        Raises RequestError, and EngineError where no request can succeed.
        """
        body = {
            "input_ids": [response.tokens for response in responses],
            "sampling_params": [
                replace(params, max_new_tokens=response.max_new_tokens).to_json(response.seed) for response in responses
            ],
            "return_logprob": True,
            "return_routed_experts": experts is not None,
        }
        answers = await self._generate(engine, body)
        try:
            if not isinstance(answers, list):
                raise TypeError(f"it is a {type(answers).__name__}, not a list")
            return [
                read_generation(answer, len(response.tokens), experts)
                for response, answer in zip(responses, answers, strict=True)
            ]
        except (ValueError, KeyError, TypeError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise RequestError(Failure.FAILED, f"{engine} gave an unusable answer: {reason}") from error

    async def post(self, engine: Engine, path: str, body: dict[str, Any]) -> Any:
        """The answer to a control call: JSON, or text where it is none. Not tried again.

        Raises EngineLost when the engine is unreachable or broken, UnknownRouteError, and EngineError for a refusal.
        """
        url = engine.endpoint.url + path
        try:
            status, text = await self._request("POST", url, body, self._timeout)
        except (TimeoutError, aiohttp.ClientError) as error:
            raise EngineLost(f"{engine}{path}: {_describe(error)}", fix="see the engine's log for why") from error
        if status >= 500:
            raise EngineLost(f"{engine}{path} answered {status}: {_error_message(text)}", fix="see the engine's log")
        if status == 404:
            raise UnknownRouteError(f"{engine}{path} answered 404: it does not know this route")
        if status >= 400:
            raise EngineError(f"{engine}{path} answered {status}: {_error_message(text)}")
        return _decoded(text)

    async def abort(self, engines: Iterable[Engine]) -> None:
        """Have engines end every request with what they have. One that does not answer has nothing to end."""
        timeout = aiohttp.ClientTimeout(total=ABORT_SECONDS)
        calls = (
            self._request("POST", engine.endpoint.url + "/abort_request", {"abort_all": True}, timeout)
            for engine in engines
        )
        for outcome in await asyncio.gather(*calls, return_exceptions=True):
            if isinstance(outcome, BaseException) and not isinstance(outcome, TimeoutError | aiohttp.ClientError):
                raise outcome

    async def healthy(self, engine: Engine) -> bool:
        """Whether the server says that it is well."""
        timeout = aiohttp.ClientTimeout(total=HEALTH_SECONDS)
        try:
            status, _ = await self._request("GET", engine.endpoint.url + "/health", None, timeout)
        except (TimeoutError, aiohttp.ClientError):
            return False
        return status == 200

    async def _generate(self, engine: Engine, body: dict[str, Any]) -> Any:
        try:
            status, text = await self._request("POST", engine.endpoint.url + "/generate", body, self._timeout)
        except TimeoutError as error:
            raise RequestError(Failure.FAILED, f"{engine}: no answer within {self._timeout.total:g} s") from error
        except aiohttp.ClientConnectorError as error:
            raise RequestError(Failure.UNREACHABLE, f"{engine}: {_describe(error)}") from error
        except aiohttp.ClientError as error:
            raise RequestError(Failure.DIED, f"{engine} went away: {_describe(error)}") from error
        if status == 200:
            return _decoded(text)
        message = f"{engine} answered {status}: {_error_message(text)}"
        if status in (401, 403, 404):
            raise EngineError(message, fix="see the engine's log; another server may listen there")
        if status < 500:
            raise RequestError(Failure.REFUSED, message)
        # The last words of an engine that is going down look like an answer that it cannot give.
        raise RequestError(Failure.FAILED if await self.healthy(engine) else Failure.DIED, message)

    async def _request(
        self, method: str, url: str, body: dict[str, Any] | None, timeout: aiohttp.ClientTimeout
    ) -> tuple[int, str]:
        async with self._open().request(method, url, json=body, headers=self._headers, timeout=timeout) as response:
            return response.status, await response.text()

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            # A fresh connection per request: while the trainer computes, nobody runs the event loop, and on a
            # connection that the server closed in the meantime the next request would fail.
            connector = aiohttp.TCPConnector(limit=0, force_close=True)
            self._session = aiohttp.ClientSession(connector=connector)
        return self._session


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _decoded(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _error_message(text: str) -> str:
    """The message of SGLang's error JSON, or the start of whatever else came."""
    answer = _decoded(text)
    if isinstance(answer, dict):
        error = answer.get("error", answer)
        answer = error.get("message", text) if isinstance(error, dict) else error
    return str(answer).strip()[:500] or "(empty answer)"
