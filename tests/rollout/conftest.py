"""Scripted engines as a fixture."""

import asyncio

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from scripted_engine import ScriptedEngine


@pytest.fixture
async def start_engines():
    """`await start_engines(engine, ...)` serves each on a port of its own and sets its url."""
    servers: list[TestServer] = []

    async def start(*engines: ScriptedEngine) -> list[str]:
        for engine in engines:
            app = web.Application()
            app.router.add_route("*", "/{path:.*}", engine.handle)
            server = TestServer(app)
            await server.start_server()
            servers.append(server)
            engine.url = str(server.make_url("")).rstrip("/")
        return [engine.url for engine in engines]

    yield start
    await asyncio.gather(*(server.close() for server in servers))
