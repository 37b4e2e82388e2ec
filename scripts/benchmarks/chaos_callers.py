"""The callers of `scripts/bench chaos`: a gateway as its callers see it, one call through it, and what is kept of each call.

Law of this file: a caller is as patient as a good client and no cleverer. It sends a call again where its gateway itself is gone (no
connection, no sign of life, or it says that it is leaving), to the other one and under the same idempotency key; where a gateway is
overloaded it comes back when it was told to; the one whose patience ends then, before its answer is there, is late. Every other error is a
lost call.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, TypeVar

import aiohttp
from chaos_answers import Heard, Step, Text
from chaos_deck import Call, Kind

from tars.client import Client
from tars.errors import DeadlineExceeded, Draining, Overloaded, PeerUnreachable, TarsError, from_json
from tars.messages.inference import Choice, CompleteResult, TokenLogprob
from tars.rpc.http_client import NodeNotReachable

Answer = TypeVar("Answer")
Connect = Callable[[tuple[Any, ...]], Any] | None
"""A socket factory of the callers' PC; None: this process's own network."""

PING_SECONDS, SILENT_SECONDS = 0.5, 4.0
"""A caller's load balancer asks each gateway so often, and gives its calls up after so long without a sign of life from it, while another
gateway gives some: where nobody does, it is the callers' own PC or an overload, and calls that are sent again only add to it."""
AGAIN_SECONDS, AGAIN_MOST_SECONDS = 0.1, 3.0
"""Before a call is sent again; doubles each time."""
PATIENCE_SECONDS = 90.0
"""How long a caller wants an answer, and comes back where it was told that there is no room."""
ALTERNATIVES = 20
"""Of each token of an undisturbed run: the most that may be asked for."""


class GatewayGone(Exception):
    """The gateway itself: it takes no connection, broke one, or says that it is leaving. The call may be sent to another one."""


class Gateway:
    """One node that takes callers' calls."""

    def __init__(self, name: str, url: str, api_key: str | None, connect: Connect) -> None:
        self.name, self.url = name, url
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._connect = connect
        self.client = Client(url, api_key=api_key, timeout=PATIENCE_SECONDS)
        self.client._connection._socket_factory = connect  # no service needs to choose its own sockets
        self._session: aiohttp.ClientSession | None = None
        self.up = True
        """Whether new calls are sent to it: it answers, and is not leaving."""
        self.heard_at = time.monotonic()
        """The last sign of life."""
        self._gone = asyncio.Event()
        self._watch: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Gateway:
        self._session = aiohttp.ClientSession(
            headers=self._headers,
            connector=aiohttp.TCPConnector(limit=0, socket_factory=self._connect),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=5.0),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.wait([self._watch])
        await self.client.close()
        assert self._session is not None
        await self._session.close()

    def watch(self, others: Sequence[Gateway]) -> None:
        """Keep asking it for a sign of life, from now on. `others` are watched too."""
        self._watch = asyncio.create_task(self._keep_asking(others))

    async def _keep_asking(self, others: Sequence[Gateway]) -> None:
        self.heard_at = time.monotonic()
        while True:
            began = time.monotonic()
            try:
                async with asyncio.timeout(SILENT_SECONDS / 2):
                    self.up = (await self.client.ping(timeout=SILENT_SECONDS)).state != "draining"
                self.heard_at = time.monotonic()
            except (TarsError, TimeoutError):
                now = time.monotonic()
                self.up = False
                # What this process was late by is nobody's silence.
                self.heard_at += max(0.0, now - began - SILENT_SECONDS / 2)
            now = time.monotonic()
            somebody = any(now - other.heard_at < SILENT_SECONDS / 2 for other in others if other is not self)
            if now - self.heard_at > SILENT_SECONDS and somebody:
                self._gone.set()
            elif self.up:
                self._gone.clear()
            await asyncio.sleep(PING_SECONDS)

    async def while_up(self, work: Awaitable[Answer]) -> Answer:
        """What `work` gives. Raises `GatewayGone` as soon as the gateway is given up; `work` is cancelled then."""
        running = asyncio.ensure_future(work)
        gone = asyncio.create_task(self._gone.wait())
        try:
            await asyncio.wait({running, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not running.done():
                raise GatewayGone("no sign of life")
            return running.result()
        finally:
            for task in (running, gone):
                if not task.done():
                    task.cancel()
                    await asyncio.wait([task])
                if not task.cancelled():
                    task.exception()

    # --- one call ---------------------------------------------------------------------------------------------------------

    async def by_rpc(
        self, call: Call, seconds: float, key: str | None, piece: Callable[[], None], *, steps: bool = False
    ) -> tuple[Heard, list[dict[str, Any]]]:
        """The answer and its attempts. `piece` is called for each piece that comes; `steps` asks for log probabilities.

        Raises `GatewayGone`, and what the gateway says as `TarsError`s.
        """
        params, around = dict(call.params), {"timeout": seconds}
        if steps and call.kind is not Kind.EMBEDDING:
            params["logprobs"] = ALTERNATIVES
        if key is not None:
            around["idempotency_key"] = key  # type: ignore[assignment]  # the other one is a number
        try:
            if not call.kind.streams:
                result = await self.client.call(call.method, params, **around)  # type: ignore[arg-type]  # as above
                return _heard(result, None), result["served_by"].get("attempts", [])
            pieces: dict[int, str] = {}
            tokens: dict[int, list[int]] = {}
            stream = self.client.stream(call.method, params, **around)  # type: ignore[arg-type]  # as above
            async with aclosing(stream) as events:  # type: ignore[type-var]  # it is a generator
                async for name, body in events:
                    if name is None:
                        streamed = (pieces, tokens)
                        return _heard(body, streamed), body["served_by"].get("attempts", [])
                    if name != "inference.delta":
                        continue
                    # Read as it is: a message is checked in microseconds, and the callers share the machine with the nodes.
                    index = body.get("index", 0)
                    pieces[index] = pieces.get(index, "") + body["text"]
                    tokens.setdefault(index, []).extend(body["token_ids"])
                    piece()
            raise GatewayGone("the stream ended without an answer")
        except (NodeNotReachable, Draining) as gone:
            raise GatewayGone(f"{gone.kind}: {gone.message}") from None
        except PeerUnreachable as broken:
            # What the node itself says comes with details; the client's own word on the connection has none.
            if broken.details:
                raise
            raise GatewayGone(broken.message) from None

    async def by_openai(self, call: Call, seconds: float, key: str | None, piece: Callable[[], None]) -> Heard:
        """The same as any HTTP client would, in the OpenAI API's shapes."""
        path, body = _openai(call)
        headers = {"X-Request-Timeout-Ms": str(int(seconds * 1000))}
        if key is not None:
            headers["Idempotency-Key"] = key
        assert self._session is not None
        try:
            async with self._session.post(self.url + path, json=body, headers=headers) as response:
                if response.status != 200:
                    raise _refusal(await response.read(), response.headers)
                if not call.kind.streams:
                    return _heard_openai(call, await response.json())
                return await self._read_stream(response, piece)
        except (aiohttp.ClientError, ConnectionError, TimeoutError) as broken:
            raise GatewayGone(f"{type(broken).__name__}") from None
        except Draining as gone:
            raise GatewayGone(gone.message) from None

    async def _read_stream(self, response: aiohttp.ClientResponse, piece: Callable[[], None]) -> Heard:
        pieces: dict[int, str] = {}
        ends: dict[int, str] = {}
        usage: dict[str, Any] = {}
        async for event in _server_sent_events(response):
            if event == "[DONE]":
                texts = tuple(
                    Text(pieces[index], ends.get(index, "none"), pieces=pieces[index]) for index in sorted(pieces)
                )
                return Heard(texts, usage.get("completion_tokens"))
            chunk = json.loads(event)
            if "error" in chunk:
                raise _refusal(event.encode(), {})
            usage = chunk.get("usage") or usage
            for choice in chunk["choices"]:
                index = choice["index"]
                said = choice["delta"].get("content") if "delta" in choice else choice["text"]
                pieces[index] = pieces.get(index, "") + (said or "")
                if said:
                    piece()
                if choice["finish_reason"] is not None:
                    ends[index] = choice["finish_reason"]
        raise GatewayGone("the stream ended without [DONE]")


async def _server_sent_events(response: aiohttp.ClientResponse) -> AsyncIterator[str]:
    buffer = b""
    async for chunk in response.content.iter_any():
        buffer += chunk
        *events, buffer = buffer.split(b"\n\n")
        for event in events:
            data = [line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:")]
            if data:
                yield b"\n".join(data).decode()


def _refusal(body: bytes, headers: Any) -> TarsError:
    """The OpenAI error as one of TARS's, by its `code`."""
    try:
        error = json.loads(body)["error"]
        kind, message = error["code"], error["message"]
    except (ValueError, KeyError, TypeError):
        return TarsError(f"no OpenAI error: {body[:200]!r}")
    after = headers.get("Retry-After-Ms")
    return from_json({"message": message, "data": {"kind": kind, "retry_after_ms": int(after) if after else None}})


def _openai(call: Call) -> tuple[str, dict[str, Any]]:
    if call.kind is Kind.EMBEDDING:
        return "/v1/embeddings", dict(call.params)
    path = "/v1/chat/completions" if call.method == "inference.chat" else "/v1/completions"
    body = dict(call.params)
    if call.kind.streams:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return path, body


def _heard(result: dict[str, Any], streamed: tuple[dict[int, str], dict[int, list[int]]] | None) -> Heard:
    """A JSON-RPC result. `streamed`: the pieces and tokens of each answer that came before it."""
    served_by, timings = result["served_by"], result["timings"]
    run = f"{served_by['node']} {served_by['replica']} {timings['total_ms']} {result.get('seed')}"
    if "embeddings" in result:
        return Heard(vectors=tuple(map(tuple, result["embeddings"])), run=run)
    if "message" in result:
        first = {"index": 0, "text": result["message"]["content"], "finish_reason": result["finish_reason"]}
        first["logprobs"] = result.get("logprobs")
        choices = [Choice.model_validate(first), *map(Choice.model_validate, result.get("further", []))]
    else:
        choices = CompleteResult.model_validate(result).choices()
    texts = []
    for choice in choices:
        pieces, tokens = streamed if streamed is not None else ({}, {})
        texts.append(
            Text(
                choice.text,
                choice.finish_reason,
                pieces=None if streamed is None else pieces.get(choice.index, ""),
                # One that was joined, or repeated, under its key comes in one piece and without its tokens.
                token_ids=tuple(tokens[choice.index]) if tokens.get(choice.index) else None,
                steps=tuple(map(_step, choice.logprobs or ())),
            )
        )
    return Heard(tuple(texts), result["usage"]["completion_tokens"], run=run)


def _step(entry: TokenLogprob) -> Step:
    return Step(entry.token, entry.token_id, entry.logprob, tuple((text, logprob) for text, logprob in entry.top))


def _heard_openai(call: Call, body: dict[str, Any]) -> Heard:
    if call.kind is Kind.EMBEDDING:
        return Heard(vectors=tuple(tuple(one["embedding"]) for one in body["data"]))
    texts = tuple(
        Text(choice["message"]["content"] if "message" in choice else choice["text"], choice["finish_reason"])
        for choice in body["choices"]
    )
    return Heard(texts, body["usage"]["completion_tokens"])


@dataclass(slots=True)
class CallRecord:
    """What became of one call. Times are seconds on the monotonic clock."""

    call: int
    kind: Kind
    face: str
    gateway: str
    keyed: bool
    sent: float
    phase: str = ""
    """`calm`, `chaos`, or `burst`: one of an overload's own."""
    twin: int | None = None
    """Of a call that was sent a second time under the same key: a number that the two share."""
    ended: float | None = None
    pieces: list[float] = field(default_factory=list)
    """When each piece of a stream came."""
    outcome: str = "running"
    """Then `right`, `wrong`, `lost`; `refused`: overloaded for all of the caller's patience; or `late`: let in at last, after it had been
    refused for want of room, and then its patience ended."""
    problems: list[str] = field(default_factory=list)
    parted: bool = False
    sent_again: list[tuple[float, str]] = field(default_factory=list)
    """To the other gateway, because its own was gone: when, and which one that was."""
    refusals: int = 0
    attempts: list[dict[str, Any]] = field(default_factory=list)
    run: str = ""

    @property
    def seconds(self) -> float:
        """From sending it until its answer was whole."""
        assert self.ended is not None
        return self.ended - self.sent

    @property
    def longest_gap(self) -> tuple[float, float] | None:
        """Between two pieces: (when it began, seconds)."""
        gaps = [(before, after - before) for before, after in zip(self.pieces, self.pieces[1:], strict=False)]
        return max(gaps, key=lambda gap: gap[1], default=None)


class Callers:
    """Send calls through gateways. `judge` says what is wrong with an answer and whether it parted from the undisturbed one."""

    def __init__(self, gateways: list[Gateway], judge: Callable[[Call, Heard], tuple[tuple[str, ...], bool]]) -> None:
        self.gateways = gateways
        self._judge = judge
        self.records: list[CallRecord] = []

    def _other_than(self, gateway: Gateway) -> Gateway:
        others = [each for each in self.gateways if each is not gateway and each.up]
        return others[0] if others else gateway

    async def make(
        self, call: Call, gateway: Gateway, *, face: str, key: str | None, phase: str, twin: int | None = None
    ) -> CallRecord:
        """Carry one call to its end, whatever it is; the record is kept."""
        if not gateway.up:
            gateway = self._other_than(gateway)
        face = "rpc" if call.only_rpc else face
        record = CallRecord(call.number, call.kind, face, gateway.name, key is not None, time.monotonic(), phase, twin)
        self.records.append(record)
        latest = record.sent + PATIENCE_SECONDS
        while True:
            try:
                heard = await self._once(call, gateway, face, key, record, latest - time.monotonic())
            except GatewayGone:
                record.sent_again.append((time.monotonic(), gateway.name))
                gateway = self._other_than(gateway)
                if time.monotonic() > latest - 1:
                    return self._ended(record, "lost", "no gateway was there for all of its patience")
                # Also where the same one is tried again: it has to come back first.
                await asyncio.sleep(min(AGAIN_SECONDS * 2 ** (len(record.sent_again) - 1), AGAIN_MOST_SECONDS))
            except Overloaded as full:
                record.refusals += 1
                wait = (full.retry_after_ms or 1000) / 1000
                if time.monotonic() + wait > latest - 1:
                    return self._ended(record, "refused", full.message)
                await asyncio.sleep(wait)
            except TarsError as error:
                late = isinstance(error, DeadlineExceeded) and record.refusals > 0
                return self._ended(record, "late" if late else "lost", f"{error.kind}: {error.message}")
            else:
                problems, record.parted = self._judge(call, heard)
                record.run = heard.run
                return self._ended(record, "wrong" if problems else "right", *problems)

    async def _once(
        self, call: Call, gateway: Gateway, face: str, key: str | None, record: CallRecord, seconds: float
    ) -> Heard:
        def piece() -> None:
            gateway.heard_at = time.monotonic()
            record.pieces.append(gateway.heard_at)

        if face == "openai":
            return await gateway.while_up(gateway.by_openai(call, seconds, key, piece))
        heard, record.attempts = await gateway.while_up(gateway.by_rpc(call, seconds, key, piece))
        return heard

    @staticmethod
    def _ended(record: CallRecord, outcome: str, *problems: str) -> CallRecord:
        record.ended, record.outcome = time.monotonic(), outcome
        record.problems += problems
        return record


async def undisturbed(gateway: Gateway, call: Call) -> Heard:
    """The call's right answer, with log probabilities; tried again while models are still loading. Raises the last `TarsError`."""
    latest = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            heard, _ = await gateway.by_rpc(call, PATIENCE_SECONDS, None, lambda: None, steps=True)
            return heard
        except TarsError as error:
            if not error.retryable or time.monotonic() > latest:
                raise
        await asyncio.sleep(0.5)
