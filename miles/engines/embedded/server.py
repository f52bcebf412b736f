"""The HTTP server: SGLang's routes on top of one engine thread.

Owns routing, authorization, and the bodies and statuses of the control routes; `/generate` is in `generate`.
`docs/engines.md` lists where the answers differ from SGLang's.
"""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

import miles
from miles.engines.embedded.gate import Gate
from miles.engines.embedded.generate import Generator, error_response
from miles.engines.embedded.protocol import ModelFacts
from miles.engines.embedded.scheduler import Scheduler
from miles.engines.embedded.weights import WeightUpdateError
from miles.engines.embedded.worker import EngineWorker
from miles.errors import EngineError
from miles.sync.wire import loads

HEALTH_TIMEOUT = 20.0
"""Seconds in which the engine's thread must answer."""
MEMORY_TAGS = {"weights", "kv_cache"}
PAUSE_MODES = ("abort", "retract", "in_place")
FLUSHED = (
    "Cache flushed.\nPlease check backend logs for more details. "
    "(When there are running or waiting requests, the operation will not be performed.)\n"
)
OUTSIDE_SESSION = "update_weights_from_tensor must run between begin_weight_update() and end_weight_update()"


class Server:
    """The handlers. One instance serves one model."""

    def __init__(self, worker: EngineWorker, facts: ModelFacts, info: dict[str, Any]) -> None:
        self._worker = worker
        self._gate = Gate()
        self._generator = Generator(worker, self._gate, facts)
        self._info = info

    def app(self, token: str | None) -> ASGIApp:
        """The ASGI application; requests must carry `token` when there is one."""
        routes = [
            Route("/health", self.health),
            Route("/health_generate", self.health_generate),
            Route("/generate", self.generate, methods=["POST", "PUT"]),
            Route("/server_info", self.server_info),
            Route("/model_info", self.model_info),
            Route("/flush_cache", self.flush_cache, methods=["GET", "POST"]),
            Route("/abort_request", self.abort_request, methods=["POST"]),
            Route("/pause_generation", self.pause_generation, methods=["POST"]),
            Route("/continue_generation", self.continue_generation, methods=["POST"]),
            Route("/release_memory_occupation", self.release_memory, methods=["GET", "POST"]),
            Route("/resume_memory_occupation", self.resume_memory, methods=["GET", "POST"]),
            Route("/begin_weight_update", self.begin_weight_update, methods=["POST"]),
            Route("/update_weights_from_tensor", self.update_from_tensor, methods=["POST"]),
            Route("/update_weights_from_disk", self.update_from_disk, methods=["POST"]),
            Route("/end_weight_update", self.end_weight_update, methods=["POST"]),
            Route("/update_weight_version", self.update_weight_version, methods=["POST"]),
            Route("/weights_checker", self.weights_checker, methods=["GET", "POST"]),
        ]
        handlers = {HTTPException: _http_error, EngineError: _engine_error, json.JSONDecodeError: _json_error}
        app: ASGIApp = Starlette(routes=routes, exception_handlers=handlers)
        return _Authorization(app, token) if token else app

    def fail(self, error: BaseException) -> None:
        """Answer everybody who waits with `error`. Called on the event loop."""
        self._generator.fail(error)

    async def _run(self, command: Callable[[Scheduler], Any]) -> Any:
        """Run a command on the engine's thread, between two passes."""
        if self._worker.failure is not None:
            raise HTTPException(503, f"the engine failed: {self._worker.failure}")
        return await asyncio.wrap_future(self._worker.call(command))

    async def health(self, request: Request) -> Response:
        """200 when the engine's thread answers."""
        try:
            await asyncio.wait_for(self._run(lambda scheduler: None), HEALTH_TIMEOUT)
        except TimeoutError:
            return Response(status_code=503)
        return Response(status_code=200)

    async def health_generate(self, request: Request) -> Response:
        """The same, after generating one token where nothing runs or is held."""
        scheduler = self._worker.scheduler
        if self._gate.inside or self._gate.paused or scheduler.released:
            return await self.health(request)
        body = {"input_ids": [0], "sampling_params": {"max_new_tokens": 1, "temperature": 0}}
        try:
            answer = await asyncio.wait_for(self._generator.respond(request, body), HEALTH_TIMEOUT)
        except TimeoutError:
            return Response(status_code=503)
        return Response(status_code=200 if answer.status_code == 200 else 503)

    async def generate(self, request: Request) -> Response:
        if self._worker.scheduler.released:
            return error_response("memory is released: call /resume_memory_occupation first")
        return await self._generator.respond(request, await request.json())

    async def server_info(self, request: Request) -> Response:
        running, waiting, drawn = await self._run(lambda scheduler: (*scheduler.counts, scheduler.drawn))
        state = {"num_running_reqs": running, "num_waiting_reqs": waiting, "num_drawn_tokens": drawn}
        state["paused"] = self._gate.paused
        return JSONResponse({**self._info, "version": miles.__version__, "internal_states": [state]})

    async def model_info(self, request: Request) -> Response:
        version = self._worker.scheduler.version
        keys = ("model_path", "tokenizer_path", "model_type", "architectures")
        return JSONResponse(
            {"is_generation": True, "weight_version": version, **{key: self._info[key] for key in keys}}
        )

    async def flush_cache(self, request: Request) -> Response:
        if await self._run(lambda scheduler: scheduler.flush()):
            return PlainTextResponse(FLUSHED)
        return PlainTextResponse("Flush cache failed.\n", status_code=400)

    async def abort_request(self, request: Request) -> Response:
        body = await _body(request)
        rid = body.get("rid") or ""
        if body.get("abort_all"):
            await self._run(lambda scheduler: scheduler.abort(None))
        elif rid:
            await self._run(lambda scheduler: scheduler.abort(rid))
        return Response(status_code=200)

    async def pause_generation(self, request: Request) -> Response:
        mode = (await _body(request)).get("mode", "abort")
        if mode not in PAUSE_MODES:
            return error_response(f"mode must be one of {', '.join(PAUSE_MODES)}, got {mode!r}")
        await self._gate.set_paused(True)
        await self._run(lambda scheduler: scheduler.pause(mode))
        if mode == "abort":
            await self._gate.empty()
        return JSONResponse({"message": "Generation paused successfully.", "status": "ok"})

    async def continue_generation(self, request: Request) -> Response:
        await self._run(lambda scheduler: scheduler.resume())
        await self._gate.set_paused(False)
        return JSONResponse({"message": "Generation continued successfully.", "status": "ok"})

    async def release_memory(self, request: Request) -> Response:
        tags = _tags(await _body(request))
        await self._run(lambda scheduler: scheduler.release(tags))
        return JSONResponse(None)

    async def resume_memory(self, request: Request) -> Response:
        tags = _tags(await _body(request))
        await self._run(lambda scheduler: scheduler.reacquire(tags))
        return JSONResponse(None)

    async def begin_weight_update(self, request: Request) -> Response:
        def begin(scheduler: Scheduler) -> str:
            if scheduler.session_open:
                raise WeightUpdateError("a weight-update session is already open; call end_weight_update() first")
            scheduler.session_open = True
            return "Success"

        return await self._update(begin)

    async def end_weight_update(self, request: Request) -> Response:
        def end(scheduler: Scheduler) -> str:
            if not scheduler.session_open:
                raise WeightUpdateError("no weight-update session is open; call begin_weight_update() first")
            scheduler.session_open = False
            return "Success"

        return await self._update(end)

    async def update_from_tensor(self, request: Request) -> Response:
        body = await _body(request)
        handles = body.get("serialized_named_tensors")
        if not isinstance(handles, list) or not handles or not isinstance(handles[0], str):
            return error_response("serialized_named_tensors must be a list of base64 strings")
        if body.get("load_format") != "flattened_bucket":
            return error_response('the embedded engine takes load_format "flattened_bucket" only')

        def update(scheduler: Scheduler) -> str:
            if not scheduler.session_open:
                raise WeightUpdateError(OUTSIDE_SESSION)
            version = body.get("weight_version")
            try:
                scheduler.update_weights(loads(handles[0]), version, flush=body.get("flush_cache", True))
            except ValueError as error:
                raise WeightUpdateError(str(error)) from error
            return "Success" + _version_words(version)

        return await self._update(update)

    async def update_from_disk(self, request: Request) -> Response:
        body = await _body(request)
        path, version = body.get("model_path"), body.get("weight_version")
        if not isinstance(path, str):
            return error_response("model_path must be a string")

        def update(scheduler: Scheduler) -> str:
            scheduler.update_weights_from_disk(Path(path), version, flush=body.get("flush_cache", True))
            return "Succeeded to update model weights." + _version_words(version)

        return await self._update(update, num_paused_requests=0)

    async def update_weight_version(self, request: Request) -> Response:
        version = (await _body(request)).get("new_version")
        if not isinstance(version, str):
            return error_response("new_version must be a string")

        def rename(scheduler: Scheduler) -> None:
            scheduler.version = version

        await self._run(rename)
        message = f"Weight version updated to {version}"
        return JSONResponse({"success": True, "message": message, "new_version": version})

    async def weights_checker(self, request: Request) -> Response:
        action = (await _body(request)).get("action", "checksum")
        if action != "checksum":
            return JSONResponse({"success": False, "message": f"Unsupported action={action!r}"}, status_code=400)
        checksums = await self._run(lambda scheduler: scheduler.checksums())
        return JSONResponse({"success": True, "message": "Success.", "ranks": [{"checksums": checksums}]})

    async def _update(self, command: Callable[[Scheduler], str], **more: Any) -> Response:
        """Run a step of a weight update where SGLang would, and answer as it does."""
        async with self._gate.updating():
            try:
                message = await self._run(command)
            except WeightUpdateError as error:
                return JSONResponse({"success": False, "message": error.message, **more}, status_code=400)
        return JSONResponse({"success": True, "message": message, **more})


class _Authorization:
    """Lets requests through that carry the bearer token; health checks need none."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._expected = f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not scope["path"].startswith("/health"):
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self._expected):
                await JSONResponse({"error": "Unauthorized"}, status_code=401)(scope, receive, send)
                return
        await self._app(scope, receive, send)


async def _body(request: Request) -> dict[str, Any]:
    """The JSON object of the request; an empty one when there is no body."""
    raw = await request.body()
    body = json.loads(raw) if raw else {}
    if not isinstance(body, dict):
        raise EngineError("the body must be a JSON object")
    return body


def _tags(body: dict[str, Any]) -> set[str]:
    tags = set(body.get("tags") or MEMORY_TAGS)
    if tags - MEMORY_TAGS:
        unknown = ", ".join(sorted(tags - MEMORY_TAGS))
        raise EngineError(f"unknown tags {unknown}: the embedded engine knows {', '.join(sorted(MEMORY_TAGS))}")
    return tags


def _version_words(version: str | None) -> str:
    return "" if version is None else f" Weight version updated to {version}."


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"detail": error.detail}, status_code=error.status_code)


async def _engine_error(request: Request, error: Exception) -> Response:
    return error_response(str(error))


async def _json_error(request: Request, error: Exception) -> Response:
    return error_response(f"the body is not JSON: {error}")
