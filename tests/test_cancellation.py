"""A call that nobody waits for any more frees its slot within one decoding step: real processes, real engines, the engines' own counters.

What the engine generated in all is compared with what its node had heard of when it cancelled (`calls.explain`): the difference is what was
computed for nobody. That is the step under way, and what came through the pipe meanwhile.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any, cast

import psutil
import pytest
from mesh_processes import MINILM, Pc, assemble, stopping, until
from tiny_gguf import write_tiny_gguf

from tars.messages.calls import AttemptDescription
from tars.messages.node import EngineCounters

pytestmark = [pytest.mark.slow, pytest.mark.model]

TOKENS = 900
"""Of an answer that is left to end: more than ten seconds."""
FOR_NOBODY = 8
"""Tokens at most: one of the step under way, the others for a busy machine, on which the node itself hears of them late."""
WORK: dict[str, Any] = {
    "model": "tiny",
    "prompt": "Once upon a time",
    "max_tokens": TOKENS,
    # Tokens 2 and 4 end the tiny model's text.
    "logit_bias": {"2": -100.0, "4": -100.0},
}
WORKER = "[worker]\nping_interval_seconds = 0.1\n"


async def counters(pc: Pc, model: str = "tiny") -> EngineCounters:
    found = [each for each in (await pc.client.describe()).replicas if each.model == model]
    assert found[0].counters is not None
    return found[0].counters


async def at_rest(pc: Pc, model: str = "tiny") -> EngineCounters:
    """Wait until the engine computes nothing, over three of its reports."""
    seen: list[EngineCounters] = []

    async def look() -> list[EngineCounters]:
        seen.append(await counters(pc, model))
        return seen[-3:]

    def still(last: list[EngineCounters]) -> bool:
        return len(last) == 3 and all(each == last[0] and not each.running and not each.waiting for each in last)

    return (await until(look, still, 15, "the engine is at rest", gap=0.25))[-1]


async def heard_of(pc: Pc, trace: str) -> int:
    """Tokens that came to the node which had the caller, or to the one that ran the call for it, once the call has ended."""

    async def look() -> list[AttemptDescription]:
        return [attempt for call in (await pc.client.explain_call(trace)).calls for attempt in call.attempts]

    def ended(seen: list[AttemptDescription]) -> bool:
        return bool(seen) and all(each.outcome != "running" for each in seen)

    return sum(each.tokens for each in await until(look, ended, 10, "the call has ended"))


async def left(pc: Pc, trace: str) -> None:
    """A client that reads some tokens and closes its connection."""
    assert pc._connection is not None
    meta = {"traceparent": f"00-{trace}-b7ad6b7169203331-01"}
    stream = pc._connection.stream("inference.complete", WORK, timeout=60, **meta)
    async with aclosing(cast("AsyncGenerator[Any]", stream)) as events:
        for _ in range(5):
            await anext(events)


async def timed_out(pc: Pc, trace: str) -> None:
    """A client whose time is over."""
    assert pc._connection is not None
    meta = {"traceparent": f"00-{trace}-b7ad6b7169203331-01"}
    with pytest.raises(Exception, match="time budget") as met:
        await pc._connection.call("inference.complete", WORK, timeout=3.0, **meta)
    assert met.value.kind == "deadline_exceeded"


async def test_a_client_that_leaves_and_a_deadline_that_passes_stop_the_engine_here_and_at_a_peer(
    tmp_path: Path,
) -> None:
    model = write_tiny_gguf(tmp_path / "tiny.gguf", layers=4, embedding=1024, feed_forward=4096)
    gateway = Pc(tmp_path, "gateway", priority=10, memory_mib=64, more=WORKER)
    server = Pc(tmp_path, "server", more=f'{WORKER}[[model]]\nname = "tiny"\npath = "{model}"\n')
    async with stopping([gateway, server]):
        await assemble([gateway, server])
        await gateway.client.deploy("tiny", slots=4, context=1024)
        await server.holds("tiny")
        await gateway.asks("Hello", model="tiny")
        ends: list[Callable[[Pc, str], Any]] = [left, timed_out]
        for number, (asked, end) in enumerate((asked, end) for asked in (server, gateway) for end in ends):
            trace = f"{number + 1:032x}"
            before = await at_rest(server)
            await end(asked, trace)
            after = await at_rest(server)
            heard = await heard_of(asked, trace)
            made = after.generated_tokens - before.generated_tokens
            print(f"{end.__name__} at {asked.name}: {made} tokens, {made - heard} of them for nobody")
            assert 0 < made < TOKENS
            assert made - heard <= FOR_NOBODY
            assert after.kv_used == 0


async def test_the_loser_of_a_hedge_is_cancelled_in_its_engine(tmp_path: Path) -> None:
    """The replica that is asked first stands still; the second one answers; the first one finds its call cancelled."""
    first = Pc(tmp_path, "first", priority=10, more=WORKER)
    second = Pc(tmp_path, "second", more=WORKER)
    async with stopping([first, second]):
        await assemble([first, second])
        await first.client.deploy(MINILM, replicas=2)
        await first.holds(MINILM, seconds=240)
        await second.holds(MINILM, seconds=240)
        texts = ["word " * 20] * 4
        for _ in range(30):
            usual = await first.client.embed(texts, model=MINILM)
        # One text of twenty may be computed twice, and a busy machine may have done so already: enough for some more.
        await first.client.embed(["a"] * 800, model=MINILM)
        # Whichever of the two is asked first as a rule, here or at the peer.
        frozen, other = (first, second) if usual.served_by.node == first.node_id() else (second, first)
        before = await at_rest(frozen, MINILM)
        assert frozen.node is not None
        (worker,) = (each for each in frozen.node.workers() if each.status() != psutil.STATUS_ZOMBIE)
        worker.send_signal(signal.SIGSTOP)
        lost = None
        try:
            async with asyncio.timeout(60):
                while lost is None:
                    answer = await first.client.embed(texts, model=MINILM)
                    outcomes = {each.outcome: each.node for each in answer.served_by.attempts}
                    lost = outcomes.get("hedge_lost")
        finally:
            worker.send_signal(signal.SIGCONT)
        assert lost == frozen.node_id()
        assert answer.served_by.node == other.node_id()
        after = await at_rest(frozen, MINILM)
        # Its pass may have been under way; what waited behind it was never begun.
        assert after.texts - before.texts <= len(texts)
        described = await first.client.describe()
        seen = {(each.why, each.outcome) for each in described.attempts}
        assert seen >= {("first", "hedge_lost"), ("hedge", "answered")}
        assert described.hedged_units >= len(texts)
