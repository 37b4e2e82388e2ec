"""Three PCs on a network, each a real `tars-node` in a namespace of its own: what a mesh promises, tried with cables that are cut."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from mesh_processes import HELP_DESK, Pc, stopping, until
from network_namespaces import Network, network, why_not

pytestmark = [
    pytest.mark.slow,
    pytest.mark.model,
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]

DEAD_WITHIN = 5.0
"""Seconds, by default on a LAN: what `core.membership` promises."""


def fleet(folder: Path, lan: Network, *, largest: int = 2) -> list[Pc]:
    """`a` coordinates, after it `b`; a chat model goes to the PC with the largest card."""
    return [
        Pc(folder, name, host=host, priority=10 - 5 * number, memory_mib=4000 if number == largest else 2000)
        for number, (name, host) in enumerate(zip("abc", lan.hosts, strict=False))
    ]


async def assemble(pcs: Sequence[Pc]) -> None:
    """The first one begins the mesh; the others join at once, each with a token of its own."""
    first, *others = pcs
    await first.start()
    lines = [await first.invitation() for _ in others]
    await asyncio.gather(*(pc.start(line) for pc, line in zip(others, lines, strict=True)))
    await converge(pcs)


async def converge(pcs: Sequence[Pc], seconds: float = 40.0) -> float:
    """Wait until each sees each alive, plans with all, and the same one coordinates; seconds that it took."""
    began = time.monotonic()
    for pc in pcs:
        for other in pcs:
            if other is not pc:
                await pc.sees(other, "ALIVE", seconds)
        await pc.plans_with(*(each.name for each in pcs), seconds=seconds)
        await until(pc.coordinator, lambda seen: seen == pcs[0].name, seconds, f"{pc.name}'s coordinator")
    return time.monotonic() - began


def said(pc: Pc, pattern: str, after: float = 0.0) -> float | None:
    """When the node logged such a line for the first time since `after`, Unix time in seconds; None: not yet."""
    for line in pc.output.splitlines():
        if not line.startswith("{"):
            continue
        told: dict[str, Any] = json.loads(line)
        if told["time"] >= after and re.search(pattern, told["message"]):
            return float(told["time"])
    return None


async def told(pc: Pc, pattern: str, after: float, seconds: float) -> float:
    """Wait until the node has logged such a line; how long after `after` that was."""

    async def look() -> float | None:
        return said(pc, pattern, after)

    at = await until(look, lambda seen: seen is not None, seconds, f"{pc.name} says {pattern!r}")
    assert at is not None
    return at - after


@asynccontextmanager
async def asked_all_the_while(pc: Pc) -> AsyncIterator[list[Any]]:
    """One chat after another at this PC until the end of the block; the answers. A call that fails fails the test."""
    answers: list[Any] = []
    ended = False

    async def ask() -> None:
        while not ended:
            answers.append(await pc.asks())
            await asyncio.sleep(0.05)

    asking = asyncio.create_task(ask())
    try:
        yield answers
        ended = True
        await asking
    finally:
        asking.cancel()
        await asyncio.wait({asking})


async def replicas(pcs: Sequence[Pc]) -> dict[str, list[str]]:
    """What each holds and is ready."""
    return {pc.name: await pc.ready_replicas() for pc in pcs}


async def test_a_cut_cable_costs_no_answer_and_its_healing_no_change(tmp_path: Path) -> None:
    with network(3) as lan:
        pcs = a, b, c = fleet(tmp_path, lan)
        async with stopping(pcs):
            await assemble(pcs)
            await b.client.deploy(HELP_DESK)
            await c.holds(HELP_DESK)
            for pc in pcs:
                await pc.answered_by(c)

            cut = time.time()
            await asyncio.to_thread(c.host.silence)
            gone = re.escape(f"node c ({c.node_id()}) is DEAD now")
            found = [await told(pc, gone, cut, 30) for pc in (a, b)]
            # Who sees everybody vanish suspects itself, says so, and keeps what it has.
            alone = await told(c, "this node is isolated", cut, 30)
            assert (await c.asks()).served_by.node == c.node_id()
            # The others put the model elsewhere; each side goes on deciding and writing.
            await until(
                lambda: replicas([a, b]), lambda seen: sorted([*seen["a"], *seen["b"]]) == [HELP_DESK], 90, "a and b"
            )
            for pc in (a, b):
                await pc.answered_by(a, b)
            await a.client.new_key("majority")
            await c.client.new_key("minority")
            assert await c.ready_replicas() == [HELP_DESK]

            healed = time.time()
            await asyncio.to_thread(c.host.speak)
            together = await converge(pcs)
            assert said(c, "this node reaches its mesh again", healed) is not None
            for pc in pcs:
                await until(
                    lambda pc=pc: keys_of(pc),
                    lambda seen: {"majority", "minority"} <= set(seen),
                    20,
                    f"{pc.name}'s keys",
                )
                assert [each.name for each in (await pc.client.models()).models if each.deployed] == [HELP_DESK]
            # One replica was asked for: the surplus goes, and every PC still gets its answers.
            async with asked_all_the_while(b) as answers:
                await until(
                    lambda: replicas(pcs), lambda seen: sum(map(len, seen.values())) == 1, 60, "the surplus goes"
                )
            assert answers
            for pc in pcs:
                assert (await pc.asks()).message.content
            print(f"cut: DEAD after {found}, isolated after {alone:.2f} s; healed: together after {together:.2f} s")
            assert max(found) < DEAD_WITHIN


async def keys_of(pc: Pc) -> list[str]:
    """Names of the API keys that it knows."""
    return sorted(each.name for each in (await pc.client.keys()).keys)


async def test_when_the_coordinator_is_killed_the_next_one_takes_over_and_no_answer_is_lost(tmp_path: Path) -> None:
    with network(3) as lan:
        pcs = a, b, c = fleet(tmp_path, lan)
        async with stopping(pcs):
            await assemble(pcs)
            await a.client.deploy(HELP_DESK)
            await c.holds(HELP_DESK)
            await b.answered_by(c)
            async with asked_all_the_while(b) as answers:
                killed = time.time()
                await a.stop(signal.SIGKILL)
                found = [await told(pc, re.escape(f"node a ({a.node_id()}) is DEAD now"), killed, 30) for pc in (b, c)]
                took_over = [await told(pc, r"^b \(\S+\) coordinates the mesh now", killed, 30) for pc in (b, c)]
                # It decides: one more replica, and what the first one had stays where it is.
                await c.client.deploy(HELP_DESK, replicas=2)
                await b.holds(HELP_DESK)
            assert {answer.served_by.node for answer in answers} <= {b.node_id(), c.node_id()}
            assert len(answers) > 3
            assert await c.ready_replicas() == [HELP_DESK]
            # Back, the first one coordinates again, and moves nothing.
            back = time.time()
            await a.start()
            await converge(pcs)
            for pc in (b, c):
                await told(pc, r"^a \(\S+\) coordinates the mesh now", back, 30)
            assert await replicas(pcs) == {"a": [], "b": [HELP_DESK], "c": [HELP_DESK]}
            assert (await a.asks()).served_by.node in (b.node_id(), c.node_id())
            print(f"killed: DEAD after {found}, taken over after {took_over}; {len(answers)} answers meanwhile")
            assert max(found) < DEAD_WITHIN
