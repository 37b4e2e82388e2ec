"""Where nodes talk to each other: an application of its own, on a port of its own, over mutual TLS.

Law of this file: who calls is proved by a certificate, on each connection and again on each request, because a node may be removed in
between; then its open connections are closed at once. Without a certificate there are two things only: the CA's certificate, which is
public, and `mesh.join`. Routes that are added to `app` (model files) are behind the same checks.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Awaitable, Callable, Iterable

from aiohttp import hdrs, web

from tars.core.replicated_map import MEMBER
from tars.errors import InvalidRequest, LimitExceeded, NotAMember, TarsError, UnsupportedMediaType
from tars.mesh.certificates import PeerCertificate, peer_of
from tars.mesh.identity import Identity
from tars.mesh.member_check import MemberCheck
from tars.rpc.access import CALLER, ROLE, is_json
from tars.rpc.dispatcher import Dispatcher
from tars.rpc.http_server import PEER, RPC_PATH, SOURCE, add_dispatcher, error_response
from tars.rpc.listener import Listener, listen
from tars.rpc.method_table import Role
from tars.rpc.options import RpcOptions

CA_PATH = "/ca.pem"
"""The CA's certificate, for a joiner that compares its hash with its token's."""
HINT_PATH = "/mesh"
"""On the port for clients: which port is the mesh's. People paste the one for the other."""
PEERS = "mesh"
"""The caller's name for every peer: a forwarded call's idempotency key means the same whichever node it came through."""
STRANGER_BODY_BYTES = 16 * 1024
"""A join has about 1 KB; nobody who is not known yet may send megabytes."""

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class MeshListener:
    """Make it, add routes to `app`, then `start`. One per node; the dispatcher is the same that serves clients."""

    def __init__(self, identity: Identity, check: MemberCheck, dispatcher: Dispatcher, options: RpcOptions) -> None:
        self._identity = identity
        self._check = check
        self._dispatcher = dispatcher
        self._listener: Listener | None = None
        self._connections: dict[PeerCertificate, weakref.WeakSet[asyncio.Transport]] = {}
        self.app = web.Application(client_max_size=options.envelope.max_body_bytes, middlewares=[self._checked])
        add_dispatcher(self.app, dispatcher, options)
        self.app.router.add_get(CA_PATH, self._ca)

    async def start(self, host: str, port: int, *, shutdown_seconds: float = 1.0) -> None:
        """Bind and serve. Raises `ConfigError`."""
        self._listener = await listen(
            self.app, host, port, None, tls=self._identity.server_context(), shutdown_seconds=shutdown_seconds
        )

    @property
    def host(self) -> str:
        """What was bound."""
        return self._bound.host

    @property
    def port(self) -> int:
        """What was bound."""
        return self._bound.port

    async def close(self) -> None:
        """Stop; idempotent."""
        if self._listener is not None:
            await self._listener.close()
            self._listener = None

    def members_changed(self, keys: Iterable[str] | None = None) -> int:
        """Close the connections of whoever is no member any more; returns how many. `keys`: which records changed, None for any."""
        if keys is not None and not any(key.startswith(MEMBER) for key in keys):
            return 0
        closed = 0
        for peer, transports in list(self._connections.items()):
            try:
                self._check(peer)
            except NotAMember:
                for transport in list(transports):
                    # Not `close`, which would first say all that still waits to be said.
                    transport.abort()
                    closed += 1
                del self._connections[peer]
            else:
                if not transports:
                    del self._connections[peer]
        return closed

    @property
    def _bound(self) -> Listener:
        assert self._listener is not None, "not started"
        return self._listener

    @web.middleware
    async def _checked(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        try:
            transport = request.transport
            peer = peer_of(None if transport is None else transport.get_extra_info("ssl_object"))
            if peer is None:
                self._admit_stranger(request)
            else:
                self._check(peer)
                if transport is not None:
                    self._connections.setdefault(peer, weakref.WeakSet()).add(transport)
                request[CALLER], request[ROLE], request[PEER] = PEERS, Role.PEER, peer.node
            if request.method == hdrs.METH_POST and not is_json(request.headers.get(hdrs.CONTENT_TYPE, "")):
                raise UnsupportedMediaType(
                    "The body must be JSON and say so, so nothing was run. Send the header Content-Type: application/json."
                )
        except TarsError as refusal:
            response = error_response(self._dispatcher, refusal)
            # What was not read must not be taken for the next request, and whoever is refused needs no open connection.
            response.force_close()
            return response
        return await handler(request)

    def _admit_stranger(self, request: web.Request) -> None:
        if (request.method, request.path) not in {(hdrs.METH_GET, CA_PATH), (hdrs.METH_POST, RPC_PATH)}:
            raise NotAMember(
                "This is the port where the nodes of a mesh talk to each other, and no certificate of one was shown; nothing was run. "
                "Clients use the node's other port, with an API key."
            )
        if request.method == hdrs.METH_POST:
            length = request.content_length
            if length is None:
                raise InvalidRequest(
                    "Invalid Request: without a certificate, a body must come with its Content-Length."
                )
            if length > STRANGER_BODY_BYTES:
                raise LimitExceeded(
                    f"A body of {length:,} bytes from somebody without a certificate; a join has at most {STRANGER_BODY_BYTES:,}. Nothing "
                    "was run.",
                    details={"limit": STRANGER_BODY_BYTES, "actual": length},
                )
        request[CALLER], request[ROLE], request[SOURCE] = "stranger", Role.STRANGER, request.remote or "unknown"

    async def _ca(self, request: web.Request) -> web.Response:
        return web.Response(body=self._identity.ca_certificate_pem, content_type="application/x-pem-file")


def add_mesh_hint(app: web.Application, port: Callable[[], int | None]) -> None:
    """On the application for clients: say at `HINT_PATH` which port is the mesh's (None: this node has no mesh). Put it among the public
    paths of `access_middleware`: whoever wants to join has no key."""

    async def hint(request: web.Request) -> web.Response:
        return web.json_response({"mesh_port": port()})

    app.router.add_get(HINT_PATH, hint)
