"""Every node of a mesh of three is restarted, one after the other, under load through the two that stay: no call is lost."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

import aiohttp
import pytest
from mesh_processes import HELP_DESK, LOAD_SECONDS, MINILM, Pc, stopping, until

from tars.client import Client
from tars.errors import TarsError

pytestmark = [pytest.mark.model, pytest.mark.slow]

GRACE_SECONDS = 30
"""Six answers on two busy cores."""
CALL_SECONDS = 120.0
TOKENS = 150
TEXT = "a GPU that nobody uses"
SAME_VECTORS = '[engines]\nembedding_backend = "torch-fp32"\n'
"""Otherwise each node takes what it measures to be fastest, and their vectors may differ by more than is asserted here."""


class Load:
    """Callers that do not rest between `go` and `rest`. A call that fails, or is not whole, is a loss."""

    def __init__(self) -> None:
        self._through: list[Pc] = []
        self._going = asyncio.Event()
        self.done: Counter[str] = Counter()
        self.lost: list[str] = []
        self.moved: Counter[str] = Counter()
        """Calls that began on one node and went on on another, by why."""
        self.vector: list[float] | None = None
        self.longest_gap = 0.0
        self._numbers = itertools.count()
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Load:
        for caller in (
            self.chat_stream,
            self.chat_stream,
            self.completion_stream,
            self.completion_stream,
            self.completion,
        ):
            self._tasks.append(asyncio.create_task(self._repeat(caller)))
        self._tasks.append(asyncio.create_task(self._repeat(self.embedding)))
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)

    def go(self, through: list[Pc]) -> None:
        """Call, through these nodes from now on."""
        self._through = through
        self._going.set()

    def rest(self) -> None:
        """Begin no further call: while a model is loaded, two cores have enough to do."""
        self._going.clear()

    async def some(self, calls: int, seconds: float) -> None:
        """Wait for so many more."""
        wanted = self.done.total() + calls

        async def count() -> int:
            return self.done.total()

        await until(count, lambda seen: seen >= wanted or bool(self.lost), seconds, "calls under load")

    async def _repeat(self, caller: Callable[[Client, int], Awaitable[None]]) -> None:
        while True:
            await self._going.wait()
            number = next(self._numbers)
            pc = self._through[number % len(self._through)]
            try:
                await caller(pc.client, number)
                self.done[caller.__name__] += 1
            except Exception as error:  # noqa: BLE001  # whatever it was, it is a loss, and the test shows it
                what = error.to_json() if isinstance(error, TarsError) else repr(error)
                self.lost.append(f"{caller.__name__} {number} through {pc.name}: {what}")
                await asyncio.sleep(0.2)

    async def chat_stream(self, client: Client, number: int) -> None:
        await self._read(client.chat_stream("What is TARS?", model=HELP_DESK, max_tokens=60, timeout=CALL_SECONDS))

    async def completion_stream(self, client: Client, number: int) -> None:
        await self._read(
            client.complete_stream(
                "TARS", model=HELP_DESK, max_tokens=TOKENS, temperature=5.0, seed=number, timeout=CALL_SECONDS
            )
        )

    async def completion(self, client: Client, number: int) -> None:
        result = await client.complete("A node is", model=HELP_DESK, max_tokens=30, timeout=CALL_SECONDS)
        assert result.text
        self._note(result.served_by.attempts)

    async def embedding(self, client: Client, number: int) -> None:
        result = await client.embed(TEXT, model=MINILM, timeout=CALL_SECONDS)
        (vector,) = result.embeddings
        if self.vector is None:
            self.vector = list(vector)
        assert max(abs(one - other) for one, other in zip(vector, self.vector, strict=True)) < 1e-5
        self._note(result.served_by.attempts)
        await asyncio.sleep(0.1)

    async def _read(self, stream) -> None:
        text, tokens = "", 0
        heard = time.monotonic()
        async with stream:
            async for delta in stream:
                text += delta.text
                tokens += len(delta.token_ids)
                now = time.monotonic()
                if text:
                    self.longest_gap = max(self.longest_gap, now - heard)
                heard = now
        result = stream.result
        whole = result.text if hasattr(result, "text") else result.message.content
        assert text == whole, "a piece is missing or came twice"
        # The end of a turn is a token, too, and none of its text.
        assert tokens in (result.usage.completion_tokens, result.usage.completion_tokens - 1)
        self._note(result.served_by.attempts)

    def _note(self, attempts) -> None:
        for attempt in attempts:
            if attempt.outcome != "answered":
                self.moved[f"{attempt.outcome} after {'some' if attempt.tokens else 'no'} tokens"] += 1


async def ready_elsewhere(pc: Pc, others: list[Pc]) -> None:
    """Wait until each model has a ready replica on another node, so that at least one is alive at all times."""

    async def models() -> set[str]:
        return {model for other in others for model in await other.ready_replicas()}

    await until(models, lambda seen: seen >= {HELP_DESK, MINILM}, 4 * LOAD_SECONDS, f"ready beside {pc.name}", gap=0.2)
    # And that those who ask know it.
    await until(
        lambda: known_at(others), lambda seen: seen, LOAD_SECONDS, f"who has what, at those beside {pc.name}", gap=0.2
    )


async def known_at(pcs: list[Pc]) -> bool:
    for pc in pcs:
        ready = {each.name: each.replicas_ready for each in (await pc.client.models()).models}
        if not (ready.get(HELP_DESK, 0) and ready.get(MINILM, 0)):
            return False
    return True


async def refused(pc: Pc, key: str) -> tuple[int, str | None, str | None]:
    """How a node that stops answers a new call of its own client's: status, Connection, Retry-After."""
    body = {"model": HELP_DESK, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
    async with (
        aiohttp.ClientSession(headers={"Authorization": f"Bearer {key}"}) as session,
        session.post(f"http://127.0.0.1:{pc.client_port}/v1/chat/completions", json=body) as answer,
    ):
        return answer.status, answer.headers.get("Connection"), answer.headers.get("Retry-After")


async def restart(pc: Pc) -> None:
    """SIGTERM while a caller of its own reads a stream, and the start again."""
    own = Client(f"http://127.0.0.1:{pc.client_port}", api_key=pc.client._connection._headers["Authorization"][7:])
    async with own:
        stream = own.complete_stream("TARS", model=HELP_DESK, max_tokens=TOKENS, temperature=5.0, seed=1, timeout=60.0)
        await anext(stream)
        stopping_it = asyncio.create_task(pc.stop(seconds=GRACE_SECONDS + 60))
        # Its own caller's stream is finished, whatever the others do.
        async for _ in stream:
            pass
        assert stream.result.usage.completion_tokens > 0
        await stream.aclose()
    assert await stopping_it == 0
    await pc.start()
    # It takes calls at once, and answers them as soon as it knows somebody who can.
    assert (await pc.asks(timeout=60.0)).message.content


async def test_a_rolling_restart_under_load_loses_no_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TARS_NODE_GRACE_SECONDS", str(GRACE_SECONDS))
    pcs = [Pc(tmp_path, name, priority=10 - number, more=SAME_VECTORS) for number, name in enumerate("abc")]
    first, *rest = pcs
    async with stopping(pcs):
        await first.start()
        for pc in rest:
            await pc.start(await first.invitation())
        await first.plans_with(*(pc.name for pc in pcs))
        await first.client.deploy(HELP_DESK, replicas=3)
        await first.client.deploy(MINILM, replicas=2)
        for pc in pcs:
            await ready_elsewhere(pc, [other for other in pcs if other is not pc])
        async with Load() as load:
            for pc in [*rest, first]:
                others = [other for other in pcs if other is not pc]
                await ready_elsewhere(pc, others)
                load.go(others)
                await load.some(12, 3 * CALL_SECONDS)
                await restart(pc)
                await others[0].sees(pc, "ALIVE")
                await load.some(12, 3 * CALL_SECONDS)
                load.rest()
                assert load.lost == []
            load.go(pcs)
            await load.some(12, 3 * CALL_SECONDS)
        assert load.lost == []
        states = sum(pc.output.count("goes on at") for pc in pcs)
        print(f"{dict(load.done)} {dict(load.moved)} {states} with their states; longest gap {load.longest_gap:.2f} s")
        assert all(load.done[each] for each in ("chat_stream", "completion_stream", "completion", "embedding"))
        assert load.moved["draining after some tokens"], (
            "no answer was in the middle on any of the three: the test proves nothing"
        )
