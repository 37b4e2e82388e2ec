"""Who may call: Host, Origin, API key and content type of every request, on every route of the node's web application.

Law of this file: exact comparisons only, made before a body is read; a refusal says what to configure and never what would have
been right (no key, no list of keys). A name in DNS can be made to point at 127.0.0.1, so a browser's page could reach a node on
loopback: it cannot forge Host, Origin or a JSON content type, and those three are what is checked.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import psutil
from aiohttp import hdrs, web
from aiohttp.typedefs import Middleware
from multidict import CIMultiDictProxy

from tars.errors import Forbidden, TarsError, Unauthorized, UnsupportedMediaType
from tars.mesh.client_keys import ClientKeys
from tars.rpc.method_table import Role
from tars.rpc.options import AccessOptions

CALLER: web.RequestKey[str] = web.RequestKey("caller", str)
"""Where the middleware leaves the caller's name (the API key's, or `local`) on the request."""

ROLE: web.RequestKey[Role] = web.RequestKey("role", Role)
"""And what the caller may do."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
RenderError = Callable[[web.Request, TarsError], web.StreamResponse]
"""How a face says an error in its own shape."""

_WITH_BODY = frozenset({"POST", "PUT", "PATCH", "DELETE"})
"""Methods that may change something: a browser sends these across sites without asking, unless the content type is JSON."""
_DEFAULT_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent a request, and what that allows."""

    name: str
    role: Role


LOCAL_CALLER = Caller("local", Role.ADMINISTRATOR)


class Access:
    """The checks. One per node; `allow_address` is told where the server really listens (a port of 0 is known only then).

    `keys` are all that the node accepts; without it, those of the options. `open_without_keys` False: a key is asked for even while none
    exists, as on every address but loopback; then only the operator key lets somebody in.
    """

    def __init__(
        self, options: AccessOptions, keys: ClientKeys | None = None, *, open_without_keys: bool = True
    ) -> None:
        self._options = options
        self._keys = keys or ClientKeys(configured=options.api_keys)
        self._open_without_keys = open_without_keys
        self._hosts = frozenset(host.lower() for host in options.allowed_hosts)
        self._origins = frozenset(origin.lower().rstrip("/") for origin in options.allowed_origins)

    @property
    def asks_for_key(self) -> bool:
        """True where calls need a key."""
        return self._keys.exist or not self._open_without_keys

    def allow_address(self, host: str, port: int) -> None:
        """Accept `Host: host:port` and pages of this node itself; on loopback also its other names, on a wildcard each address."""
        names = _names_of(host)
        hosts = {f"{name}:{port}" for name in names}
        for allowed in self._options.allowed_hosts:
            if not _has_port(allowed):
                hosts.add(f"{allowed.lower()}:{port}")
        if port == _DEFAULT_PORTS["http"]:
            hosts |= names
        self._hosts |= hosts
        self._origins |= {f"http://{one}" for one in hosts}

    def check(self, method: str, headers: CIMultiDictProxy[str], *, needs_key: bool = True) -> Caller:
        """Who it is. Raises `Forbidden`, `Unauthorized` or `UnsupportedMediaType`."""
        host = headers.getall(hdrs.HOST, ())
        # The exact spelling first: lowering every header of every call costs more than the look-up.
        if len(host) != 1 or (host[0] not in self._hosts and host[0].lower() not in self._hosts):
            raise Forbidden(
                "This node does not serve the name in the Host header (or there is not exactly one), so nothing was run. Use "
                "the address that the node printed, or add the name to security.allowed_hosts in its configuration."
            )
        if hdrs.ORIGIN in headers:
            origin = headers.getall(hdrs.ORIGIN)
            if len(origin) != 1 or origin[0].lower() not in self._origins:
                raise Forbidden(
                    "This node does not answer web pages of that origin, so nothing was run. Add it to "
                    "security.allowed_origins in the node's configuration if you trust the page."
                )
        if hdrs.CONTENT_ENCODING in headers:
            # A few KB unpack to gigabytes; no client of these APIs packs its requests, so nothing is lost by never unpacking.
            raise UnsupportedMediaType(
                "This node unpacks no request, so nothing was run. Send the body as it is, without the header Content-Encoding."
            )
        if method in _WITH_BODY:
            content_type = headers.get(hdrs.CONTENT_TYPE, "")
            if content_type != "application/json" and not is_json(content_type):
                raise UnsupportedMediaType(
                    "The body must be JSON and say so, so nothing was run. Send the header Content-Type: application/json."
                )
        if not self.asks_for_key:
            return LOCAL_CALLER
        return self._key_holder(headers) if needs_key else Caller("local", Role.CLIENT)

    def _key_holder(self, headers: CIMultiDictProxy[str]) -> Caller:
        scheme, _, key = headers.get(hdrs.AUTHORIZATION, "").partition(" ")
        holder = self._keys.holder(key.strip())
        if holder is None or scheme.lower() != "bearer":
            raise Unauthorized(
                "This node asks for an API key, and got none or a wrong one; nothing was run. Send the header "
                "Authorization: Bearer KEY; `tars key new NAME` on the node's own PC makes a key."
            )
        return Caller(holder.name, Role.ADMINISTRATOR if holder.admin else Role.CLIENT)


def access_middleware(access: Access, render: RenderError, public: frozenset[str] = frozenset()) -> Middleware:
    """The checks for a whole application: put it first. `public` paths (a page without data, `/health`) need no key, and all the rest."""

    @web.middleware
    async def checked(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            needs_key = not (access.asks_for_key and request.path in public)
            caller = access.check(request.method, request.headers, needs_key=needs_key)
            request[CALLER], request[ROLE] = caller.name, caller.role
        except TarsError as refusal:
            response = render(request, refusal)
            if isinstance(refusal, Unauthorized):
                response.headers[hdrs.WWW_AUTHENTICATE] = "Bearer"
            # The body was not read: what is left of it must not be taken for the next request.
            response.force_close()
            return response
        return await handler(request)

    return checked


def is_json(content_type: str) -> bool:
    """Whether a header Content-Type declares JSON in UTF-8."""
    kind, _, parameters = content_type.partition(";")
    if kind.strip().lower() != "application/json":
        return False
    charset = parameters.strip().lower().replace(" ", "").replace('"', "")
    return charset in ("", "charset=utf-8")


def _has_port(host: str) -> bool:
    return host.rpartition(":")[2].isdigit() and not (host.count(":") > 1 and not host.startswith("["))


def _names_of(host: str) -> set[str]:
    """How a Host header may write the address that was bound, without the port."""
    if host.lower() == "localhost":
        return {"localhost", "127.0.0.1", "[::1]"}
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return {host.lower()}
    if address.is_unspecified:
        loopback = {"localhost", "127.0.0.1", "[::1]"}
        found = (entry.address.partition("%")[0] for entries in psutil.net_if_addrs().values() for entry in entries)
        return loopback | {_bracketed(one) for one in found if _is_ip(one)}
    if address.is_loopback:
        return {"localhost", "127.0.0.1", "[::1]", _bracketed(str(address))}
    return {_bracketed(str(address))}


def _is_ip(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _bracketed(address: str) -> str:
    return f"[{address.lower()}]" if ":" in address else address
