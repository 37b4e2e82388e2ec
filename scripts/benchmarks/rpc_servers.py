"""The servers that `scripts/bench rpc` compares: `python rpc_servers.py NAME PORT` serves node.ping at http://127.0.0.1:PORT/rpc.

Law of this file: each is written as its own documentation shows it, with its own defaults, in one process on asyncio's own loop,
without an access log; all parse the same bytes and give the same result. `bare` is the floor: aiohttp that parses and answers those
bytes with orjson, and checks nothing. TARS itself is not here: the real `tars-node` is measured.
"""

from __future__ import annotations

import sys

PONG = {"node": "6e0f6a5e-0d7d-4d6c-8f0c-0b8f4b6f4a53", "version": "0.1.0", "state": "ready"}


def bare(port: int) -> None:
    import orjson
    from aiohttp import web

    async def handle(request: web.Request) -> web.Response:
        call = orjson.loads(await request.read())
        return web.Response(
            body=orjson.dumps({"jsonrpc": "2.0", "result": PONG, "id": call["id"]}), content_type="application/json"
        )

    app = web.Application()
    app.router.add_post("/rpc", handle)
    web.run_app(app, host="127.0.0.1", port=port, access_log=None, print=None)


def fastapi_jsonrpc(port: int) -> None:
    import fastapi_jsonrpc as jsonrpc
    import uvicorn

    app = jsonrpc.API()
    entrypoint = jsonrpc.Entrypoint("/rpc")

    @entrypoint.method(name="node.ping")
    async def ping() -> dict[str, str]:
        return PONG

    app.bind_entrypoint(entrypoint)
    # httptools is what uvicorn[standard] brings: its fastest parser.
    uvicorn.run(app, host="127.0.0.1", port=port, loop="asyncio", http="httptools", access_log=False, log_level="error")


def pjrpc(port: int) -> None:
    import pjrpc.server
    from aiohttp import web
    from pjrpc.server.integration import aiohttp as integration

    methods = pjrpc.server.MethodRegistry()

    @methods.add("node.ping")
    async def ping() -> dict[str, str]:
        return PONG

    app = integration.Application("/rpc")
    app.add_methods(methods)
    web.run_app(app.http_app, host="127.0.0.1", port=port, access_log=None, print=None)


def aiohttp_rpc(port: int) -> None:
    import aiohttp_rpc as rpc
    from aiohttp import web

    async def ping() -> dict[str, str]:
        return PONG

    rpc.rpc_server.add_method(rpc.protocol.JSONRPCMethod(ping, name="node.ping"))
    app = web.Application()
    app.router.add_routes([web.post("/rpc", rpc.rpc_server.handle_http_request)])
    web.run_app(app, host="127.0.0.1", port=port, access_log=None, print=None)


SERVERS = {"bare": bare, "fastapi-jsonrpc": fastapi_jsonrpc, "pjrpc": pjrpc, "aiohttp-rpc": aiohttp_rpc}

if __name__ == "__main__":
    SERVERS[sys.argv[1]](int(sys.argv[2]))
