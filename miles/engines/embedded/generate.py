"""The `/generate` endpoint: one HTTP request to engine requests, and their answers back, at once or as a stream."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse

from miles.engines.embedded.gate import Gate
from miles.engines.embedded.protocol import BadRequestError, Generation, ModelFacts, Wanted, parse_generate
from miles.engines.embedded.request import Answer, Request
from miles.engines.embedded.scheduler import Scheduler
from miles.engines.embedded.worker import EngineWorker

Event = tuple[int, Answer] | BaseException
"""(index of the response, its answer so far), or why the engine died."""


class Generator:
    """Turns bodies into requests of `worker` and waits for them behind `gate`."""

    def __init__(self, worker: EngineWorker, gate: Gate, facts: ModelFacts) -> None:
        self._worker = worker
        self._gate = gate
        self._facts = facts
        self._open: set[asyncio.Queue[Event]] = set()

    async def respond(self, http: HttpRequest, body: Any) -> Response:
        """Answer one `/generate` request."""
        try:
            generation = parse_generate(body, self._facts)
        except BadRequestError as error:
            if isinstance(body, dict) and body.get("stream"):
                return StreamingResponse(_events([_stream_error(str(error))]), media_type="text/event-stream")
            return error_response(str(error))
        if generation.stream:
            return StreamingResponse(self._stream(generation), media_type="text/event-stream")
        work = asyncio.ensure_future(self._collect(generation))
        gone = asyncio.ensure_future(_disconnected(http))
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        gone.cancel()
        if not work.done():
            work.cancel()
            return Response(status_code=499)
        return await work

    def fail(self, error: BaseException) -> None:
        """Tell everybody who waits that the engine died. Called on the event loop."""
        for waiting in self._open:
            waiting.put_nowait(error)

    async def _collect(self, generation: Generation) -> Response:
        answers: dict[int, Answer] = {}
        async for event in self._run(generation):
            if isinstance(event, BaseException):
                return error_response(f"the engine failed: {event}", 500)
            answers[event[0]] = event[1]
        for answer in answers.values():
            finish = answer["meta_info"]["finish_reason"]
            if finish.get("status_code"):
                return error_response(finish["message"], finish["status_code"])
        ordered = [answers[i] for i in range(len(generation.wanted))]
        return JSONResponse(ordered[0] if generation.single else ordered)

    async def _stream(self, generation: Generation) -> AsyncIterator[str]:
        async for event in self._run(generation):
            if isinstance(event, BaseException):
                yield _event(_stream_error(f"the engine failed: {event}", 500))
                return
            index, answer = event
            yield _event(answer if generation.single else {**answer, "index": index})
        yield DONE

    async def _run(self, generation: Generation) -> AsyncIterator[Event]:
        """Events until every response is finished. Leaving early aborts what still runs."""
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event] = asyncio.Queue()
        unfinished = {wanted.rid for wanted in generation.wanted}
        async with self._gate.generating():
            self._open.add(events)
            try:
                for index, wanted in enumerate(generation.wanted):
                    self._worker.submit(_request(index, wanted, generation.stream, events, loop))
                while unfinished:
                    event = await events.get()
                    if isinstance(event, BaseException):
                        unfinished.clear()
                    elif event[1]["meta_info"]["finish_reason"] is not None:
                        unfinished.discard(event[1]["meta_info"]["id"])
                    yield event
            finally:
                self._open.discard(events)
                for rid in unfinished:
                    self._worker.call(partial(Scheduler.abort, rid=rid))


def _request(
    index: int, wanted: Wanted, stream: bool, events: asyncio.Queue[Event], loop: asyncio.AbstractEventLoop
) -> Request:
    def notify(answer: Answer) -> None:
        loop.call_soon_threadsafe(events.put_nowait, (index, answer))

    return Request(
        rid=wanted.rid,
        group=wanted.group,
        prompt=wanted.prompt,
        params=wanted.params,
        notify=notify,
        return_log_probs=wanted.return_log_probs,
        prompt_log_probs_from=wanted.prompt_log_probs_from,
        return_routes=wanted.return_routes,
        stream=stream,
    )


async def _disconnected(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


DONE = "data: [DONE]\n\n"


def _event(payload: dict[str, Any]) -> str:
    return f"data: {json.dumps(payload, separators=(',', ':'), ensure_ascii=False)}\n\n"


async def _events(payloads: list[dict[str, Any]]) -> AsyncIterator[str]:
    for payload in payloads:
        yield _event(payload)
    yield DONE


def _stream_error(message: str, code: int = 400) -> dict[str, Any]:
    kind = "invalid_request_error" if code == 400 else "internal_server_error"
    return {"error": {"message": message, "type": kind, "code": code, "retryable": False}}


def error_response(message: str, status: int = 400) -> JSONResponse:
    """SGLang's error object."""
    return JSONResponse({"error": {"message": message}}, status_code=status)
