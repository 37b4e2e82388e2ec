"""Streamed completions over HTTP, many callers at once: the same client, prompts and token counts for every server.

Law of this file: while the load runs only bytes and times are kept; they are read afterwards, so that the client costs every server the
same and little. A server's manner of asking and answering is a `Manner`; nothing else differs.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import aiohttp
from engine_results import Answer

ANSWER_SECONDS = 600.0
"""For one answer; a server that takes longer is stuck."""
STARTED_CHUNKS = 8
"""An answer is running when so many pieces of it have come."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What one event of a stream says."""

    tokens: int = 0
    last: bool = False
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated: int = 0
    problem: str | None = None


class Manner(Protocol):
    """How one kind of server is asked for a greedy completion of exactly `tokens` tokens, and how its events are read."""

    @property
    def path(self) -> str: ...

    @property
    def headers(self) -> Mapping[str, str]: ...

    def body(self, prompt: str, tokens: int) -> dict[str, Any]: ...

    def read(self, event: Any) -> Piece: ...


@dataclass(frozen=True, slots=True)
class TarsManner:
    """JSON-RPC with server-sent events. `never` are tokens that must not come: those that end an answer."""

    model: str
    never: tuple[int, ...] = ()
    path: str = "/rpc"
    headers: Mapping[str, str] = field(
        default_factory=lambda: {"Content-Type": "application/json", "Accept": "text/event-stream"}
    )

    def body(self, prompt: str, tokens: int) -> dict[str, Any]:
        params: dict[str, Any] = {"model": self.model, "prompt": prompt, "max_tokens": tokens, "temperature": 0}
        if self.never:
            params["logit_bias"] = {str(token): -100 for token in self.never}
        return {"jsonrpc": "2.0", "id": 1, "method": "inference.complete", "params": params}

    def read(self, event: Any) -> Piece:
        if "error" in event:
            return Piece(last=True, problem=str(event["error"]))
        if "result" in event:
            usage = event["result"]["usage"]
            return Piece(
                last=True,
                prompt_tokens=usage["prompt_tokens"],
                cached_tokens=usage.get("cached_tokens", 0),
                generated=usage["completion_tokens"],
            )
        return Piece(tokens=len(event["params"].get("token_ids", ())))


@dataclass(frozen=True, slots=True)
class LlamaServerManner:
    """llama-server's own `/completion`, with the shortest chain of samplers that is greedy."""

    cache_prompt: bool = True
    path: str = "/completion"
    headers: Mapping[str, str] = field(default_factory=lambda: {"Content-Type": "application/json"})

    def body(self, prompt: str, tokens: int) -> dict[str, Any]:
        return {
            "prompt": prompt,
            "n_predict": tokens,
            "stream": True,
            "ignore_eos": True,
            "cache_prompt": self.cache_prompt,
            "return_tokens": True,
            "temperature": 0,
            "top_k": 1,
            "samplers": ["top_k"],
        }

    def read(self, event: Any) -> Piece:
        if "error" in event:
            return Piece(last=True, problem=str(event["error"]))
        if event.get("stop"):
            timings = event.get("timings", {})
            return Piece(
                last=True,
                prompt_tokens=event["tokens_evaluated"],
                cached_tokens=timings.get("cache_n", 0),
                generated=event["tokens_predicted"],
            )
        return Piece(tokens=len(event.get("tokens", ())) or 1)


@dataclass(frozen=True, slots=True)
class OpenAiManner:
    """`/v1/completions`, one event a token: llama-cpp-python's own server."""

    path: str = "/v1/completions"
    headers: Mapping[str, str] = field(default_factory=lambda: {"Content-Type": "application/json"})

    def body(self, prompt: str, tokens: int) -> dict[str, Any]:
        return {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "top_k": 1, "stream": True}

    def read(self, event: Any) -> Piece:
        if event == "[DONE]":
            return Piece(last=True)
        if "error" in event:
            return Piece(last=True, problem=str(event["error"]))
        # Its last event carries the reason and no text.
        return Piece(tokens=0 if event["choices"][0]["finish_reason"] else 1)


@dataclass(slots=True)
class Recorded:
    """One answer's bytes as they came: (time, chunk)."""

    sent: float
    status: int = 0
    chunks: list[tuple[float, bytes]] = field(default_factory=list)
    ended: float = 0.0


def read_answer(recorded: Recorded, manner: Manner, tokens: int) -> Answer:
    """The answer in a record. An event counts when its last byte came; tokens that no event showed came with the last one.

    Raises RuntimeError where the server refused, or did not generate exactly `tokens` tokens.
    """
    if recorded.status != 200:
        raise RuntimeError(f"HTTP {recorded.status}: {b''.join(chunk for _, chunk in recorded.chunks)[:500]!r}")
    times: list[float] = []
    last = Piece()
    for at, event in _events(recorded):
        piece = manner.read(event)
        if piece.problem is not None:
            raise RuntimeError(f"the server answered with an error: {piece.problem}")
        times += [at] * piece.tokens
        if piece.last:
            last = piece
    if not last.last:
        raise RuntimeError("the stream ended before the answer did")
    times += [recorded.ended] * max(0, last.generated - len(times))
    # The event of a token that is not whole text yet is left out by some servers; more than asked never comes.
    if not tokens - 1 <= len(times) <= tokens or (last.generated and last.generated != tokens):
        raise RuntimeError(f"{len(times)} tokens in events, {last.generated} by the server's word, {tokens} asked")
    return Answer(recorded.sent, tuple(times), recorded.ended, last.prompt_tokens, last.cached_tokens)


def _events(recorded: Recorded) -> list[tuple[float, Any]]:
    found: list[tuple[float, Any]] = []
    rest = b""
    for at, chunk in recorded.chunks:
        *whole, rest = (rest + chunk).replace(b"\r\n", b"\n").split(b"\n\n")
        for event in whole:
            for line in event.split(b"\n"):
                if line.startswith(b"data:"):
                    data = line[5:].strip()
                    found.append((at, "[DONE]" if data == b"[DONE]" else json.loads(data)))
    return found


async def ask(
    session: aiohttp.ClientSession,
    url: str,
    manner: Manner,
    prompt: str,
    tokens: int,
    started: asyncio.Event | None = None,
) -> Recorded:
    """One call, recorded. `started` is set when a few tokens have come, or the answer has ended."""
    body = json.dumps(manner.body(prompt, tokens)).encode()
    recorded = Recorded(time.perf_counter())
    async with session.post(url + manner.path, data=body, headers=manner.headers) as response:
        recorded.status = response.status
        async for chunk in response.content.iter_any():
            recorded.chunks.append((time.perf_counter(), chunk))
            if started is not None and len(recorded.chunks) >= STARTED_CHUNKS:
                started.set()
    recorded.ended = time.perf_counter()
    if started is not None:
        started.set()
    return recorded


def session() -> aiohttp.ClientSession:
    """One for many callers."""
    return aiohttp.ClientSession(
        # A connection for every call, for every server alike: llama-server closes kept ones now and then, just when the next call comes.
        connector=aiohttp.TCPConnector(limit=0, force_close=True),
        timeout=aiohttp.ClientTimeout(total=ANSWER_SECONDS),
    )


async def _all_callers(url: str, manner: Manner, prompts: Sequence[Sequence[str]], tokens: int) -> list[Answer]:
    async with session() as client:

        async def caller(own: Sequence[str]) -> list[Recorded]:
            return [await ask(client, url, manner, prompt, tokens) for prompt in own]

        records = await asyncio.gather(*(caller(own) for own in prompts))
    return [read_answer(record, manner, tokens) for own in records for record in own]


def run_load(url: str, manner: Manner, prompts: Sequence[Sequence[str]], tokens: int) -> list[Answer]:
    """One caller for each list of prompts, all at once; each asks again as soon as it has its answer. Raises RuntimeError."""
    return asyncio.run(_all_callers(url, manner, prompts, tokens))


async def _beside(
    url: str, manner: Manner, prompts: Sequence[str], tokens: int, long_prompt: str
) -> tuple[list[Answer], Answer]:
    async with session() as client:
        started = [asyncio.Event() for _ in prompts]
        running = [
            asyncio.create_task(ask(client, url, manner, prompt, tokens, event))
            for prompt, event in zip(prompts, started, strict=True)
        ]
        for event in started:
            await event.wait()
        long = await ask(client, url, manner, long_prompt, 2)
        records = await asyncio.gather(*running)
    return [read_answer(each, manner, tokens) for each in records], read_answer(long, manner, 2)


def run_beside_a_long_prompt(
    url: str, manner: Manner, prompts: Sequence[str], tokens: int, long_prompt: str
) -> tuple[list[Answer], Answer]:
    """Answers of `tokens` tokens, and the answer to a long prompt that came in when all of them were running."""
    return asyncio.run(_beside(url, manner, prompts, tokens, long_prompt))
