"""Asynchronous client of several inference servers that speak SGLang's HTTP API.

Owns requests: which engine gets one, how often it is tried again, how an error reads. It knows prompts and
seeds, not groups, rewards or weights. One client belongs to one event loop; close it (`async with`) when
done.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import aiohttp

from miles.config.schema import RolloutSection
from miles.errors import EngineError, UnknownRouteError
from miles.rollout.answers import ExpertShape, Generation, read_generation

log = logging.getLogger(__name__)

FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 10.0


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


class UnavailableError(Exception):
    """The engine could not be reached or answered 5xx: another attempt may succeed."""


class EngineClient:
    """Sends generation to the least loaded of several engines, and control calls to all of them."""

    def __init__(
        self, urls: Sequence[str], token: str | None, *, timeout: float = 1800.0, max_retries: int = 3
    ) -> None:
        """`timeout` in seconds bounds one request; `max_retries` is how often a generation is tried again."""
        assert urls, "a client needs an engine"
        self.urls = [url.rstrip("/") for url in urls]
        self._headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self._timeout = aiohttp.ClientTimeout(total=timeout)
        self._max_retries = max_retries
        self._load = [0] * len(self.urls)
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
        prompt_tokens: Sequence[int],
        seeds: Sequence[int],
        params: SamplingParams,
        *,
        experts: ExpertShape | None = None,
    ) -> list[Generation]:
        """One response per seed to the same prompt, in one request. `experts`: record the routed experts as
        well.

        Tried again, on another engine where there is one, while engines are unreachable or answer 5xx; what
        a seed draws does not depend on the engine. Raises EngineError.
        """
        body = {
            "input_ids": [list(prompt_tokens)] * len(seeds),
            "sampling_params": [params.to_json(seed) for seed in seeds],
            "return_logprob": True,
            "return_routed_experts": experts is not None,
        }
        engine, answers = await self._post_to_any("/generate", body, load=len(seeds))
        try:
            if not isinstance(answers, list):
                raise TypeError(f"it is a {type(answers).__name__}, not a list")
            if len(answers) != len(seeds):
                raise ValueError(f"{len(answers)} answers to {len(seeds)} requests")
            return [read_generation(answer, len(prompt_tokens), experts) for answer in answers]
        except (ValueError, KeyError, TypeError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise EngineError(f"engine {self.urls[engine]} gave an unusable answer: {reason}") from error

    async def post_each(self, path: str, bodies: Sequence[dict[str, Any]]) -> list[Any]:
        """POST bodies[i] to engine i, all at once; their answers (JSON, or text where it is none) in that
        order.

        Not tried again: a control call that fails is an error. Raises EngineError.
        """
        assert len(bodies) == len(self.urls)
        calls = (self._request_once("POST", i, path, body) for i, body in enumerate(bodies))
        return list(await asyncio.gather(*calls))

    async def post_all(self, path: str, body: dict[str, Any] | None = None) -> list[Any]:
        """POST the same body to every engine; see `post_each`."""
        return await self.post_each(path, [body or {}] * len(self.urls))

    async def get_all(self, path: str) -> list[Any]:
        """GET from every engine; answers in the order of the engines. Raises EngineError."""
        calls = (self._request_once("GET", i, path, None) for i in range(len(self.urls)))
        return list(await asyncio.gather(*calls))

    async def health(self) -> dict[str, str | None]:
        """For each engine's URL, None where it can generate, else what is wrong."""
        calls = (self._request_once("GET", i, "/health_generate", None) for i in range(len(self.urls)))
        results = await asyncio.gather(*calls, return_exceptions=True)
        return {
            url: str(result) if isinstance(result, BaseException) else None
            for url, result in zip(self.urls, results, strict=True)
        }

    async def _post_to_any(self, path: str, body: dict[str, Any], *, load: int) -> tuple[int, Any]:
        """The engine that answered, and its answer."""
        failed: list[int] = []
        pause = FIRST_PAUSE_SECONDS
        while True:
            engine = self._least_loaded(avoid=failed)
            self._load[engine] += load
            try:
                return engine, await self._request("POST", engine, path, body)
            except UnavailableError as error:
                failed.append(engine)
                if len(failed) > self._max_retries:
                    raise EngineError(
                        f"engine {self.urls[engine]}: {error} ({len(failed)} attempts)",
                        fix="see the engine's log; rollout.max_retries bounds the attempts",
                    ) from error
                log.warning("engine %s: %s; trying again in %g s", self.urls[engine], error, pause)
            finally:
                self._load[engine] -= load
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    def _least_loaded(self, avoid: Sequence[int]) -> int:
        """The engine with the fewest responses in flight, of those that failed least often."""
        return min(range(len(self.urls)), key=lambda i: (list(avoid).count(i), self._load[i], i))

    async def _request_once(self, method: str, engine: int, path: str, body: dict[str, Any] | None) -> Any:
        try:
            return await self._request(method, engine, path, body)
        except UnavailableError as error:
            raise EngineError(
                f"engine {self.urls[engine]}{path}: {error}", fix="see the engine's log for why"
            ) from error

    async def _request(self, method: str, engine: int, path: str, body: dict[str, Any] | None) -> Any:
        """The decoded answer. Raises UnavailableError, or EngineError where another attempt cannot help."""
        url = self.urls[engine] + path
        try:
            async with self._open().request(method, url, json=body, headers=self._headers) as response:
                text = await response.text()
        except TimeoutError as error:
            raise UnavailableError(f"no answer within {self._timeout.total:g} s") from error
        except aiohttp.ClientError as error:
            raise UnavailableError(f"{type(error).__name__}: {error}") from error
        if response.status >= 500:
            raise UnavailableError(f"answered {response.status}: {_error_message(text)}")
        if response.status == 404:
            raise UnknownRouteError(f"engine {url} answered 404: it does not know this route")
        if response.status >= 400:
            raise EngineError(f"engine {url} answered {response.status}: {_error_message(text)}")
        return _decoded(text)

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            # A fresh connection per request: while the trainer computes, nobody runs the event loop, and on a
            # connection that the server closed in the meantime the next request would fail.
            connector = aiohttp.TCPConnector(limit=0, force_close=True)
            self._session = aiohttp.ClientSession(connector=connector, timeout=self._timeout)
        return self._session


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
