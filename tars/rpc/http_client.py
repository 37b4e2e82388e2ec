"""The calling side of JSON-RPC over HTTP: builds calls, checks answers, reads event streams. `tars.client` puts types on it.

Law of this file: what comes back is not trusted. jsonrpcclient builds and parses; version, id and shape are checked here, an answer
is bounded in size, and everything that can go wrong is a `TarsError`: the peer's own, `PeerUnreachable`, `DeadlineExceeded` or
`BadPeerAnswer`.
"""

from __future__ import annotations

import asyncio
import itertools
import socket
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any

import aiohttp
import orjson
from jsonrpcclient import Ok, parse
from jsonrpcclient import request as build_call

from tars.errors import BadPeerAnswer, DeadlineExceeded, NotAMember, PeerUnreachable, TarsError, from_json
from tars.mesh.identity import WrongPeer

_MAX_ANSWER_BYTES = 256 * 2**20
"""2,048 vectors of 4,096 dimensions in decimal are about 170 MB; what is larger is no answer of ours."""
_MAX_EVENT_BYTES = 16 * 2**20
"""One delta is a few tokens; the last event holds the whole text with its log probabilities."""
_GRACE_SECONDS = 2.0
"""How much longer than the call's own budget the client waits: the node's 'deadline exceeded' says more than the client's."""
_END_SECONDS = 1.0
"""For the end of a stream whose answer has come: a node sends both in one piece."""
_CONNECT_SECONDS = 5.0
"""A node on a LAN or tailnet answers a connection within milliseconds; a frozen one must not cost the whole budget."""


_KEEP_SECONDS = 15.0
"""aiohttp's own."""


class NodeNotReachable(PeerUnreachable):
    """The called node itself takes no connection: the call was never sent. Never travels; a `PeerUnreachable` may also be a node's word."""

    kind = "node_not_reachable"


class NotTls(BadPeerAnswer):
    """What listens there speaks something else than TLS: most often it is a node's port for clients. Never travels."""

    kind = "not_tls"


_EXPIRED, _NOT_YET_VALID = 10, 9
"""X509_V_ERR_CERT_HAS_EXPIRED and X509_V_ERR_CERT_NOT_YET_VALID (OpenSSL, x509_vfy.h)."""


@dataclass(frozen=True, slots=True)
class BatchCall:
    """One call of a batch."""

    method: str
    params: Mapping[str, Any] | None = None
    notification: bool = False


class RpcConnection:
    """Calls one node. `timeout` is each call's budget in seconds where the call names none. Close it, or use it in `async with`.

    `tls` is for a peer (`mesh.identity.Identity.client_context`); then `handshake_seconds` (`connect_seconds` where it is None) bounds the
    connection with its TLS handshake, which the other process makes and not its kernel. `keep_seconds`: how
    long a connection is kept that nothing needs. `silent_seconds`: how long the other PC's kernel may acknowledge nothing before its calls
    end with `PeerUnreachable`, however long the answer itself may take; None: as long as the system does.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout: float = 300.0,
        tls: ssl.SSLContext | None = None,
        connect_seconds: float = _CONNECT_SECONDS,
        handshake_seconds: float | None = None,
        keep_seconds: float = _KEEP_SECONDS,
        silent_seconds: float | None = None,
    ) -> None:
        self._root = url.rstrip("/").removesuffix("/rpc")
        self._url = self._root + "/rpc"
        self._timeout = timeout
        self._tls = tls
        self._connect_seconds = connect_seconds
        self._handshake_seconds = connect_seconds if handshake_seconds is None else handshake_seconds
        self._keep_seconds = keep_seconds
        self._socket_factory = None if silent_seconds is None else partial(_watched_socket, silent_seconds)
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._ids = itertools.count(1)
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> RpcConnection:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections; running calls end with `PeerUnreachable`."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def call(
        self, method: str, params: Mapping[str, Any] | None = None, *, timeout: float | None = None, **meta: Any
    ) -> Any:
        """The result as plain JSON. `meta` goes into `_meta` (`idempotency_key`, `traceparent`). Raises `TarsError`s."""
        call_id = next(self._ids)
        budget = self._timeout if timeout is None else timeout
        body = build_call(method, _with_meta(params, budget, meta), id=call_id)
        answer = await self._post(body, budget)
        return _result(_checked(answer, call_id))

    async def batch(self, calls: Sequence[BatchCall], *, timeout: float | None = None) -> list[Any | TarsError | None]:
        """Each call's result or error, in order; None for a notification. Raises only what befalls the whole batch."""
        if not calls:
            return []
        budget = self._timeout if timeout is None else timeout
        ids = [None if call.notification else next(self._ids) for call in calls]
        body = []
        for call, call_id in zip(calls, ids, strict=True):
            one = build_call(call.method, _with_meta(call.params, budget, {}), id=call_id)
            if call.notification:
                del one["id"]
            body.append(one)
        answer = await self._post(body, budget)
        if isinstance(answer, dict):
            # Refused whole: one error answer without an id.
            _result(_checked(answer, None))
        by_id: dict[Any, Any] = {}
        for one in answer or []:
            call_id = one.get("id") if isinstance(one, dict) else None
            if not isinstance(call_id, int) or call_id in by_id:
                raise _bad_answer("an answer in the batch belongs to no call")
            by_id[call_id] = one
        outcomes: list[Any | TarsError | None] = []
        for call_id in ids:
            if call_id is None:
                outcomes.append(None)
                continue
            if call_id not in by_id:
                raise _bad_answer("a call of the batch got no answer")
            try:
                outcomes.append(_result(_checked(by_id.pop(call_id), call_id)))
            except TarsError as error:
                outcomes.append(error)
        if by_id:
            raise _bad_answer("an answer in the batch belongs to no call")
        return outcomes

    async def stream(
        self, method: str, params: Mapping[str, Any] | None = None, *, timeout: float | None = None, **meta: Any
    ) -> AsyncIterator[tuple[str | None, Any]]:
        """Yields `(notification's method, its params without id)` for each delta, then `(None, result)`. Closing it cancels the work; one
        that is read to its own end leaves its connection to the next call.
        """
        call_id = next(self._ids)
        budget = self._timeout if timeout is None else timeout
        body = build_call(method, _with_meta(params, budget, meta), id=call_id)
        # Held against each wait and not around the whole: between two deltas it is the caller's own code that runs.
        latest = asyncio.get_running_loop().time() + budget + _GRACE_SECONDS
        try:
            async with self._request(body, {"Accept": "text/event-stream, application/json"}, latest) as response:
                if response.content_type != "text/event-stream":
                    yield None, _result(_checked(_parsed(await _read(response, latest)), call_id))
                    return
                async with aclosing(_events(response, latest)) as events:
                    async for event in events:
                        message = _parsed(event)
                        if isinstance(message, dict) and "method" in message:
                            yield _notification(message, call_id)
                        else:
                            yield None, _result(_checked(message, call_id))
                            await _to_its_end(response)
                            return
                raise PeerUnreachable("The node closed the stream before its answer was complete. Send the call again.")
        except TimeoutError:
            raise _too_late(budget) from None

    @asynccontextmanager
    async def get(
        self, path: str, headers: Mapping[str, str] | None = None, *, timeout: float | None = None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """`GET path` of the same node: the answer as it begins, whatever its status; read `content` to have it. `timeout`: until then.

        Raises what a call raises; what breaks while the content is read is aiohttp's own (`ClientError`, `ConnectionError`).
        """
        budget = self._timeout if timeout is None else timeout
        latest = asyncio.get_running_loop().time() + budget
        try:
            async with self._send("GET", self._root + path, None, headers or {}, latest) as response:
                yield response
        except TimeoutError:
            raise _too_late(budget) from None

    async def _post(self, body: object, budget: float) -> Any:
        latest = asyncio.get_running_loop().time() + budget + _GRACE_SECONDS
        try:
            async with self._request(body, {}, latest) as response:
                if response.status == 204:
                    return None
                return _parsed(await _read(response, latest))
        except TimeoutError:
            raise _too_late(budget) from None

    @asynccontextmanager
    async def _request(
        self, body: object, headers: Mapping[str, str], latest: float
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        try:
            data = orjson.dumps(body)
        except TypeError:
            raise TypeError(
                "params must be JSON: text without lone surrogates, 64-bit integers, lists, dicts"
            ) from None
        async with self._send("POST", self._url, data, headers, latest) as response:
            yield response

    @asynccontextmanager
    async def _send(
        self, method: str, url: str, data: bytes | None, headers: Mapping[str, str], latest: float
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                headers=self._headers,
                # The budget of each call bounds it; a bound on the whole would cut long streams.
                timeout=aiohttp.ClientTimeout(
                    total=None,
                    sock_connect=self._connect_seconds,
                    # A frozen peer's kernel takes the connection, and then nobody shakes hands.
                    connect=None if self._tls is None else self._handshake_seconds,
                ),
                # A service that calls many at once must not queue behind its own client.
                connector=aiohttp.TCPConnector(
                    limit=0,
                    ssl=self._tls or True,
                    keepalive_timeout=self._keep_seconds,
                    socket_factory=self._socket_factory,
                ),
            )
        try:
            # A redirect would carry the API key to wherever it points.
            async with asyncio.timeout_at(latest):
                response = await self._session.request(method, url, data=data, headers=headers, allow_redirects=False)
            async with response:
                yield response
        except aiohttp.ServerTimeoutError:
            raise NodeNotReachable(
                f"Nothing at {self._url} takes a connection within {self._connect_seconds:g} s"
                + (
                    f" and shakes hands within {self._handshake_seconds:g} s"
                    if self._handshake_seconds != self._connect_seconds
                    else ""
                )
                + ": a firewall, or a machine that is asleep."
            ) from None
        except (aiohttp.ClientError, ConnectionError, ssl.SSLError) as fault:
            if (distrust := _distrust(fault, self._root)) is not None:
                raise distrust from None
            if isinstance(fault, aiohttp.ClientConnectorError):
                raise NodeNotReachable(
                    f"No node answers at {self._url}. Start tars-node there, or correct the address."
                ) from None
            if isinstance(fault, aiohttp.InvalidURL):
                raise ValueError(f"{self._url} is no HTTP address; write it like http://127.0.0.1:8000") from None
            raise PeerUnreachable(
                f"The connection to {self._url} broke before the answer was complete. Send the call again."
            ) from None


def _watched_socket(silent_seconds: float, address: tuple[Any, ...]) -> socket.socket:
    """A socket whose kernel asks the other one's whether it is still there: a PC that lost its power, or a path that swallows packets,
    closes no connection, and Linux alone would wait for a quarter of an hour.
    """
    made = socket.socket(*address[:3])
    made.setblocking(False)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    whole = max(1, round(silent_seconds / 5))
    for name, value in (
        ("TCP_KEEPIDLE", 2 * whole),
        ("TCP_KEEPINTVL", whole),
        ("TCP_KEEPCNT", 3),
        # Of what was sent and not acknowledged; RFC 5482. Linux's, in milliseconds.
        ("TCP_USER_TIMEOUT", round(silent_seconds * 1000)),
    ):
        if (option := getattr(socket, name, None)) is not None:
            made.setsockopt(socket.IPPROTO_TCP, option, value)
    return made


def _distrust(fault: BaseException, root: str) -> TarsError | None:
    """What a failed TLS handshake means; None where it was another fault."""
    # The innermost first: aiohttp's own exceptions are ssl's too, by inheritance, but without what ssl says.
    causes = (getattr(fault, "certificate_error", None), getattr(fault, "os_error", None), fault.__cause__, fault)
    for cause in causes:
        if isinstance(cause, WrongPeer):
            return cause.error
    for cause in causes:
        if isinstance(cause, ssl.SSLCertVerificationError):
            now = f"this PC's clock says {datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
            code = getattr(cause, "verify_code", None)
            if code == _NOT_YET_VALID:
                return NotAMember(
                    f"The certificate of the node at {root} is not valid yet, and {now}: one of the two clocks is wrong. Set it "
                    "(timedatectl set-ntp true)."
                )
            if code == _EXPIRED:
                return NotAMember(
                    f"The certificate of the node at {root} has expired, and {now}: one of the two clocks is wrong (nodes renew their "
                    "certificates by themselves). Set it (timedatectl set-ntp true)."
                )
            return NotAMember(
                f"What answers at {root} is no node of this mesh: its certificate is not signed by this mesh's CA. Nothing was sent to it."
            )
        if isinstance(cause, ssl.SSLError):
            reason = getattr(cause, "reason", None) or ""
            if "ALERT" in reason:
                return NotAMember(
                    f"The node at {root} does not accept this node's certificate ({reason.lower().replace('_', ' ')}): it is of another "
                    "mesh, or one of the two clocks is wrong."
                )
            if isinstance(fault, aiohttp.ClientConnectorSSLError):
                return NotTls(
                    f"What answers at {root} does not speak TLS, so it is no node's mesh port. Correct the address."
                )
    return None


def _with_meta(params: Mapping[str, Any] | None, budget: float, meta: Mapping[str, Any]) -> dict[str, Any]:
    given = {key: value for key, value in meta.items() if value is not None}
    return {**(params or {}), "_meta": {"timeout_ms": max(1, int(budget * 1000)), **given}}


async def _read(response: aiohttp.ClientResponse, latest: float) -> bytes:
    read = bytearray()
    async with asyncio.timeout_at(latest):
        while chunk := await response.content.readany():
            read += chunk
            if len(read) > _MAX_ANSWER_BYTES:
                raise _bad_answer(f"the answer is larger than {_MAX_ANSWER_BYTES:,} bytes")
    return bytes(read)


async def _events(response: aiohttp.ClientResponse, latest: float) -> AsyncGenerator[bytes, None]:
    """The data of each server-sent event; comments and other fields are skipped (HTML standard, 9.2.6, for what nodes send)."""
    buffer = bytearray()
    searched = 0
    while True:
        async with asyncio.timeout_at(latest):
            chunk = await response.content.readany()
        if not chunk:
            return
        buffer += chunk
        while (end := buffer.find(b"\n\n", searched)) >= 0:
            lines = bytes(buffer[:end]).split(b"\n")
            del buffer[: end + 2]
            searched = 0
            data = [line[5:].removeprefix(b" ") for line in lines if line.startswith(b"data:")]
            if data:
                yield b"\n".join(data)
        # A long event comes in many pieces: each is searched once.
        searched = max(0, len(buffer) - 1)
        if len(buffer) > _MAX_EVENT_BYTES:
            raise _bad_answer(f"an event is larger than {_MAX_EVENT_BYTES:,} bytes")


async def _to_its_end(response: aiohttp.ClientResponse) -> None:
    """After the answer: the end comes with it, or at once. A connection that is left before that is closed."""
    with suppress(TimeoutError, aiohttp.ClientError, ConnectionError):
        async with asyncio.timeout(_END_SECONDS):
            while await response.content.readany():
                pass


def _parsed(body: bytes) -> Any:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        raise _bad_answer("it is not JSON") from None


def _checked(answer: Any, call_id: int | None) -> dict[str, Any]:
    """The answer to `call_id`, of the right version and shape. A node that refuses a body whole answers with the id null."""
    if not isinstance(answer, dict) or answer.get("jsonrpc") != "2.0" or ("result" in answer) == ("error" in answer):
        raise _bad_answer("it is no JSON-RPC 2.0 answer")
    error = answer.get("error")
    if "error" in answer and not (
        isinstance(error, dict) and type(error.get("code")) is int and isinstance(error.get("message"), str)
    ):
        raise _bad_answer("its error has no code and message")
    given = answer.get("id", ...)
    if given != call_id and not (error is not None and given is None):
        raise _bad_answer("its id is another call's")
    return answer


def _result(answer: dict[str, Any]) -> Any:
    parsed = parse(answer)
    if isinstance(parsed, Ok):
        return parsed.result
    raise from_json(answer["error"])


def _notification(message: dict[str, Any], call_id: int) -> tuple[str, Any]:
    params = message.get("params")
    if message.get("jsonrpc") != "2.0" or not isinstance(params, dict) or params.pop("id", None) != call_id:
        raise _bad_answer("a notification in the stream belongs to no call")
    return str(message["method"]), params


def _bad_answer(problem: str) -> BadPeerAnswer:
    return BadPeerAnswer(
        f"What answered is no TARS node, or a broken one: {problem}. Check the address and what listens there."
    )


def _too_late(budget: float) -> DeadlineExceeded:
    return DeadlineExceeded(
        f"No complete answer came within {budget:g} s. Give the call more time, or look at the node's state (node.describe)."
    )
