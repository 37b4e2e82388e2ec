"""Real servers in front of a pretended node."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable

import aiohttp
import pytest
from aiohttp import web
from fake_node import FakeNode

from tars.rpc.access import CALLER, Access, access_middleware
from tars.rpc.http_server import add_rpc_routes, refusal_renderer
from tars.rpc.listener import Listener, listen
from tars.rpc.options import RpcOptions


@pytest.fixture
def node() -> FakeNode:
    return FakeNode()


Serve = Callable[..., Awaitable[Listener]]


@pytest.fixture
async def serve(node: FakeNode) -> AsyncIterator[Serve]:
    """`await serve(options)`: the node behind the real middleware, routes and runner, as the composition root sets them up."""
    listeners: list[Listener] = []

    async def start(options: RpcOptions | None = None, public: frozenset[str] = frozenset()) -> Listener:
        options = options or RpcOptions()
        access = Access(options.access)
        app = web.Application()
        dispatcher = add_rpc_routes(app, node, options)
        app.middlewares.append(access_middleware(access, refusal_renderer(dispatcher), public))

        async def health(request: web.Request) -> web.Response:
            return web.json_response({"caller": request[CALLER]})

        app.router.add_get("/health", health)
        listeners.append(await listen(app, "127.0.0.1", 0, access, shutdown_seconds=1.0))
        return listeners[-1]

    yield start
    for listener in listeners:
        await listener.close()
    # Whatever a test does: every call that started has ended, and no place is still taken.
    assert len(node.started) == len(node.ended)


@pytest.fixture
async def url(serve: Serve) -> str:
    return (await serve()).url


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(headers={"Content-Type": "application/json"}) as one:
        yield one
