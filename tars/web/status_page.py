"""The status page at `/`: its files, and the node's description once a second at `/events` (with the deployed models and the mesh, when
they change).

Law of this file: it hands out bytes; what they look like is `static/`'s. The files are read once, served from memory and under their
own names only (field notes: no `web.static`), with a content policy that lets the page talk to its own node and to nobody else.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from importlib.resources import files

from aiohttp import hdrs, web

from tars.messages.mesh_state import MeshParams
from tars.rpc.admission import Admission
from tars.rpc.options import RpcOptions
from tars.serving.service import NodeService
from tars.web.exchange import Exchange, event
from tars.web.rest import rest_face
from tars.web.status_feed import StatusFeed

CONTENT_TYPES = {
    "app.js": "text/javascript; charset=utf-8",
    "connection.js": "text/javascript; charset=utf-8",
    "dom.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
    "index.html": "text/html; charset=utf-8",
    "mesh.js": "text/javascript; charset=utf-8",
    "panels.js": "text/javascript; charset=utf-8",
    "style.css": "text/css; charset=utf-8",
    "try_it.js": "text/javascript; charset=utf-8",
}
"""Every file there is: a name that does not stand here is not served."""

PUBLIC_PATHS = frozenset({"/", *(f"/static/{name}" for name in CONTENT_TYPES if name != "index.html")})
"""The page itself holds nothing of the node; it asks for the key and fetches the rest with it."""

PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    # Asked again each time, answered with 304: after an update the page is never a mixture of two versions.
    hdrs.CACHE_CONTROL: "no-cache",
}

HEARTBEAT = b": the node could not be described this time\n\n"


def add_status_page(
    app: web.Application,
    service: NodeService,
    options: RpcOptions,
    admission: Admission,
    feed: StatusFeed | None = None,
) -> None:
    """Serve the page, its files and its events; the events end when the application shuts down."""
    feed = feed or StatusFeed(service)
    app.router.add_get("/", _file("index.html"))
    for name in CONTENT_TYPES:
        if name != "index.html":
            app.router.add_get(f"/static/{name}", _file(name))
    app.router.add_get("/events", rest_face(service, options, admission).look(_events(service, feed)))

    async def close(_: web.Application) -> None:
        await feed.close()

    app.on_shutdown.append(close)


def _file(name: str) -> Callable[[web.Request], Awaitable[web.Response]]:
    body = (files("tars.web") / "static" / name).read_bytes()
    tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    headers = {**PAGE_HEADERS, hdrs.CONTENT_TYPE: CONTENT_TYPES[name], hdrs.ETAG: tag}

    async def serve(request: web.Request) -> web.Response:
        known = {f'"{given.value}"' for given in request.if_none_match or ()}
        if tag in known:
            return web.Response(status=304, headers=headers)
        return web.Response(body=body, headers=headers)

    return serve


class _Beside:
    """What goes beside a description: the deployed models and the mesh, made once for all watchers."""

    def __init__(self, service: NodeService, feed: StatusFeed):
        self._service = service
        self._feed = feed
        self._looks = 0
        self._made = (b"", b"")

    def events(self) -> tuple[bytes, bytes]:
        """The two events."""
        if self._looks != self._feed.looks:
            self._looks = self._feed.looks
            # A deployed model that fits nowhere has no replica, and the description does not know it.
            deployed = [model for model in self._service.models().models if model.deployed]
            mesh = self._service.describe_mesh(MeshParams())
            self._made = (event({"models": deployed}, "models"), event(mesh, "mesh"))
        return self._made


def _events(service: NodeService, feed: StatusFeed) -> Callable[[Exchange], Awaitable[web.StreamResponse]]:
    beside = _Beside(service, feed)

    async def serve(exchange: Exchange) -> web.StreamResponse:
        async def frames() -> AsyncGenerator[bytes, None]:
            shown = (b"", b"")
            async with aclosing(feed.watch()) as descriptions:
                async for description in descriptions:
                    if description is None:
                        yield HEARTBEAT
                        continue
                    now = beside.events()
                    news = [after for before, after in zip(shown, now, strict=True) if before != after]
                    yield b"".join([*news, event(description, "description")])
                    shown = now

        return await exchange.watch(frames(), lambda error: HEARTBEAT)

    return serve
