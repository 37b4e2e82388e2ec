"""`scripts/bench soak`: mixed load on a real tars-node for minutes on end; is it the same node afterwards?

Law of this file: streamed chats, completions, embeddings, callers that go away in mid-stream and calls that must be refused, all at once
and all checked: an answer that did not come is lost, one that is not what was asked is wrong. Between bouts of load the node rests, and
only then is it weighed: memory, threads, file descriptors and KV cells at rest must not grow.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
from engine_prompts import COMMON_WORDS, embedding_texts, text_of
from engine_results import Aim, Trend, trend, verdict
from engine_servers import Deployed, tars_node
from random_model import english_words, random_model
from rich.console import Console
from server_process import Server, end_on_signals

from tars.client import Client
from tars.errors import TarsError

CHAT, EMBED = "random-124m", "all-minilm-l6-v2"
SLOTS, CONTEXT = 8, 1024
BOUT_SECONDS = 45.0
REST_SECONDS = 20.0
"""For the running calls to end after a bout; a call takes a few seconds."""
WARM_SHARE = 0.25
"""Of the weighings, the first ones: allocators, caches and thread pools still fill up."""
GROWTH_SHARE, GROWTH_LEAST_MIB = 0.02, 8.0
"""What a trend of resident memory may show from noise alone; a leak of 100 bytes a call is more in 20 minutes."""
FAITHFUL = 0.999
MIB = 2**20


@dataclass(slots=True)
class Tally:
    """Calls by kind: sent, right, and the first few of what went wrong."""

    sent: int = 0
    right: int = 0
    lost: int = 0
    wrong: int = 0
    problems: list[str] = field(default_factory=list)

    def problem(self, text: str) -> None:
        if len(self.problems) < 5:
            self.problems.append(text)


@dataclass(frozen=True, slots=True)
class Weighing:
    """The node and its workers at one moment; bytes and counts by process."""

    at: float
    resident: dict[str, int]
    descriptors: dict[str, int]
    threads: dict[str, int]
    kv_used: int = 0
    kv_cached: int = 0
    running: int = 0


class Wrong(Exception):
    """An answer that is not what was asked for."""


def worker_name(process: psutil.Process) -> str:
    """`chat worker 123` or `embedding worker 124`, by the engine that it has in its memory."""
    try:
        mapped = Path(f"/proc/{process.pid}/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return f"worker {process.pid}"
    kinds = [kind for kind, library in (("embedding ", "libtorch"), ("chat ", "libllama")) if library in mapped]
    return f"{kinds[0] if kinds else ''}worker {process.pid}"


def weigh(node: psutil.Process, at: float, counters: Sequence[dict[str, Any]]) -> Weighing:
    """Every process of the node now."""
    named = {"node": node} | {worker_name(child): child for child in node.children(recursive=True)}
    return Weighing(
        at=at,
        resident={name: process.memory_info().rss for name, process in named.items()},
        descriptors={name: process.num_fds() for name, process in named.items()},
        threads={name: process.num_threads() for name, process in named.items()},
        kv_used=sum(each["kv_used"] for each in counters),
        kv_cached=sum(each["kv_cached"] for each in counters),
        running=sum(each["running"] + each["waiting"] for each in counters),
    )


class Callers:
    """The calls; each method makes one, and raises `Wrong` or a `TarsError` where it does not go as it must."""

    def __init__(self, client: Client, words: Sequence[str], references: dict[str, npt.NDArray[np.float32]]) -> None:
        self._client = client
        self._words = words
        self._references = references
        self._draw = random.Random("soak")
        self._refusals = itertools.cycle(self._bad_calls())

    def kinds(self) -> dict[str, tuple[Callable[[], Awaitable[None]], int]]:
        """What is called and by how many callers at once: more than the slots, so that some wait."""
        return {
            "chat streams": (self.chat, 5),
            "completions": (self.complete, 4),
            "embeddings": (self.embed, 4),
            "cancelled": (self.cancel, 2),
            "refused": (self.refused, 1),
        }

    def _text(self, least: int, most: int) -> str:
        return text_of(self._words, self._draw.randint(least, most), f"{self._draw.random()}")

    async def chat(self) -> None:
        tokens = self._draw.randint(4, 64)
        messages = [
            {"role": "system", "content": text_of(self._words, 100, "system")},
            {"role": "user", "content": self._text(5, 200)},
        ]
        stream = self._client.chat_stream(messages, model=CHAT, max_tokens=tokens, temperature=0.8)
        text, ids = "", 0
        async with aclosing(stream):
            async for delta in stream:
                text += delta.text
                ids += len(delta.token_ids)
        result = stream.result
        if (result.usage.completion_tokens, ids) != (tokens, tokens) or result.finish_reason != "length":
            raise Wrong(f"{tokens} tokens asked, {result.usage.completion_tokens} given, {ids} streamed")
        if text != result.message.content:
            raise Wrong("the streamed pieces are not the whole text")

    async def complete(self) -> None:
        tokens = self._draw.randint(4, 64)
        result = await self._client.complete(self._text(5, 400), model=CHAT, max_tokens=tokens, temperature=0.0)
        if result.usage.completion_tokens != tokens or not result.text:
            raise Wrong(f"{tokens} tokens asked, {result.usage.completion_tokens} given")

    async def embed(self) -> None:
        texts = self._draw.sample(sorted(self._references), self._draw.randint(1, 8))
        result = await self._client.embed(texts, model=EMBED)
        for text, vector in zip(texts, result.embeddings, strict=True):
            cosine = float(np.asarray(vector, dtype=np.float32) @ self._references[text])
            if cosine < FAITHFUL:
                raise Wrong(f"a vector is another one than at the start: cosine {cosine:.4f}")

    async def cancel(self) -> None:
        stream = self._client.chat_stream(self._text(5, 200), model=CHAT, max_tokens=400, temperature=0.8)
        left = self._draw.randint(0, 6)
        async with aclosing(stream):
            async for _ in stream:
                if left == 0:
                    break
                left -= 1

    async def refused(self) -> None:
        kind, method, params = next(self._refusals)
        try:
            await self._client.call(method, params)
        except TarsError as error:
            if error.kind == kind:
                await asyncio.sleep(0.2)
                return
            raise Wrong(f"{method} was refused as {error.kind}, not {kind}: {error.message}") from None
        raise Wrong(f"{method} was answered, and had to be refused as {kind}")

    def _bad_calls(self) -> list[tuple[str, str, dict[str, Any]]]:
        chat, long = "inference.complete", " ".join(["word"] * (2 * CONTEXT))
        return [
            ("unknown_model", chat, {"model": "nobody", "prompt": "x"}),
            ("prompt_too_long", chat, {"model": CHAT, "prompt": long}),
            ("bad_grammar", chat, {"model": CHAT, "prompt": "x", "grammar": "root ::= ("}),
            ("wrong_model_kind", "inference.embed", {"model": CHAT, "input": "x"}),
            ("invalid_params", chat, {"model": CHAT, "prompt": "x", "max_tokens": 0}),
            ("invalid_params", "inference.chat", {"model": CHAT, "messages": []}),
            ("method_not_found", "inference.sing", {}),
        ]


class Soak:
    """One run: bouts of load and weighings at rest."""

    def __init__(self, server: Server, words: Sequence[str], minutes: float, console: Console) -> None:
        self._node = psutil.Process(server.pid)
        self._url = server.url
        self._words = words
        self._seconds = minutes * 60
        self._bout = min(BOUT_SECONDS, self._seconds / 8)
        self._console = console
        self.tallies: dict[str, Tally] = {}
        self.weighings: list[Weighing] = []
        self.restarts = 0

    async def run(self) -> None:
        """Until the time is over; Ctrl-C ends it as usual."""
        async with AsyncExitStack() as stack:
            client = await stack.enter_async_context(Client(self._url, timeout=120.0))
            texts = embedding_texts(self._words, 64, "soak")
            vectors = (await client.embed(texts, model=EMBED)).embeddings
            references = {
                text: np.asarray(vector, dtype=np.float32) for text, vector in zip(texts, vectors, strict=True)
            }
            callers = Callers(client, self._words, references)
            began = time.monotonic()
            while time.monotonic() - began < self._seconds:
                await self._one_bout(callers)
                await self._weigh(client, time.monotonic() - began)

    async def _one_bout(self, callers: Callers) -> None:
        ends_at = time.monotonic() + self._bout

        async def caller(kind: str, call: Callable[[], Awaitable[None]]) -> None:
            tally = self.tallies.setdefault(kind, Tally())
            while time.monotonic() < ends_at:
                tally.sent += 1
                try:
                    await call()
                    tally.right += 1
                except Wrong as wrong:
                    tally.wrong += 1
                    tally.problem(str(wrong))
                except TarsError as error:
                    tally.lost += 1
                    tally.problem(f"{error.kind}: {error.message}")
                    await asyncio.sleep(0.1)

        await asyncio.gather(
            *(caller(kind, call) for kind, (call, many) in callers.kinds().items() for _ in range(many))
        )

    async def _weigh(self, client: Client, at: float) -> None:
        latest = time.monotonic() + REST_SECONDS
        while True:
            description = await client.describe()
            counters = [each.counters.model_dump() for each in description.replicas if each.counters is not None]
            weighing = weigh(self._node, at, counters)
            if (weighing.running == 0 and weighing.kv_used == 0) or time.monotonic() > latest:
                break
            await asyncio.sleep(0.25)
        self.restarts = sum(each.restarts for each in description.replicas)
        self.weighings.append(weighing)
        memory = ", ".join(f"{name} {bytes_ / MIB:.0f}" for name, bytes_ in weighing.resident.items())
        self._console.print(
            f"{at / 60:5.1f} min: {sum(tally.sent for tally in self.tallies.values())} calls; MiB: {memory}; "
            f"descriptors {sum(weighing.descriptors.values())}, threads {sum(weighing.threads.values())}; KV used "
            f"{weighing.kv_used}, kept {weighing.kv_cached}",
            style="dim", markup=False,
        )  # fmt: skip


def findings(weighings: Sequence[Weighing], tallies: dict[str, Tally], restarts: int) -> tuple[list[Aim], list[str]]:
    """Verdicts, and the lines that explain them. Raises ValueError for fewer than two weighings after the warm-up."""
    settled = weighings[int(len(weighings) * WARM_SHARE) :]
    lines, aims = [], []

    def over_time(values: Sequence[float]) -> Trend:
        return trend([(weighing.at, value) for weighing, value in zip(settled, values, strict=True)])

    for name in weighings[-1].resident:
        if any(name not in weighing.resident for weighing in settled):
            lines.append(f"{name} was not there all the time: a worker was started anew")
            continue
        memory = over_time([weighing.resident[name] / MIB for weighing in settled])
        lines.append(f"{name}: {memory.first:.1f} MiB, {memory.growth:+.2f} MiB along the trend")
        most = max(memory.first * GROWTH_SHARE, GROWTH_LEAST_MIB)
        aims.append(Aim(f"MiB that {name} grew at rest", memory.growth, at_most=round(most, 2)))
        for what, counts in (("descriptors", "descriptors"), ("threads", "threads")):
            growth = over_time([getattr(weighing, counts)[name] for weighing in settled]).growth
            aims.append(Aim(f"{what} that {name} gained at rest", growth, at_most=0.5))
    aims += [
        Aim("KV cells of running sequences at rest, most", max(each.kv_used for each in weighings), at_most=0),
        Aim("calls running or waiting at rest, most", max(each.running for each in weighings), at_most=0),
        Aim("calls lost", sum(tally.lost for tally in tallies.values()), at_most=0),
        Aim("calls answered wrongly", sum(tally.wrong for tally in tallies.values()), at_most=0),
        Aim("worker restarts", restarts, at_most=0),
    ]
    for kind, tally in tallies.items():
        lines.append(f"{kind}: {tally.sent} sent, {tally.right} right, {tally.lost} lost, {tally.wrong} wrong")
        lines += [f"    {problem}" for problem in tally.problems]
    return aims, lines


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench soak", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=20.0, help="of load (default: 20)")
    parser.add_argument("--json", type=Path, help="also write everything measured to this file")
    parser.add_argument("--folder", type=Path, required=True, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.minutes < 0.5:
        parser.error("--minutes must be at least 0.5")
    end_on_signals()
    console = Console(width=150, highlight=False)
    model = random_model(options.folder.resolve() / "models", "small")
    with tars_node([Deployed(CHAT, model, slots=SLOTS, context=CONTEXT), Deployed(EMBED)]) as server:
        soak = Soak(server, english_words()[:COMMON_WORDS], options.minutes, console)
        asyncio.run(soak.run())
    aims, lines = findings(soak.weighings, soak.tallies, soak.restarts)
    for line in (*lines, *map(str, aims), verdict(aims)):
        console.print(line, markup=False)
    if options.json is not None:
        result = {
            "benchmark": "soak",
            "minutes": options.minutes,
            "aims": [aim.to_json() for aim in aims],
            "calls": {kind: asdict(tally) for kind, tally in soak.tallies.items()},
            "weighings": [asdict(weighing) for weighing in soak.weighings],
        }
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    raise SystemExit(0 if all(aim.reached for aim in aims) else 1)


if __name__ == "__main__":
    main()
