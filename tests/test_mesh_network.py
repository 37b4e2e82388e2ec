"""Three PCs on a network, each a real `tars-node` in a namespace of its own: what a mesh promises, tried with cables that are cut."""

from __future__ import annotations

import asyncio
import re
import signal
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from mesh_processes import HELP_DESK, Pc, assemble, converge, fleet, said, stopping, told, until
from network_namespaces import network, why_not

pytestmark = [
    pytest.mark.slow,
    pytest.mark.model,
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]

DEAD_WITHIN = 5.0
"""Seconds, by default on a LAN: what `core.membership` promises."""


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


async def test_a_dead_pc_is_known_within_five_seconds_every_time_and_one_that_is_back_at_once(tmp_path: Path) -> None:
    with network(3) as lan:
        pcs = a, b, c = fleet(tmp_path, lan)
        async with stopping(pcs):
            await assemble(pcs)
            dead, alive = (re.escape(f"node c ({c.node_id()}) is {state} now") for state in ("DEAD", "ALIVE"))
            lost, back = [], []
            ways = [
                (c.host.silence, c.host.speak),
                (c.host.unplug, c.host.plug),
                # Its kernel still takes connections; nobody answers on them.
                (lambda: c.send(signal.SIGSTOP), lambda: c.send(signal.SIGCONT)),
            ]
            for cut, heal in ways * 2:
                began = time.time()
                await asyncio.to_thread(cut)
                lost += [await told(pc, dead, began, 30) for pc in (a, b)]
                began = time.time()
                await asyncio.to_thread(heal)
                back += [await told(pc, alive, began, 30) for pc in (a, b)]
                await converge(pcs)
            for _ in range(2):
                began = time.time()
                await c.stop(signal.SIGKILL)
                lost += [await told(pc, dead, began, 30) for pc in (a, b)]
                await c.start()
                await converge(pcs)
            for name, times in (("DEAD", lost), ("ALIVE", back)):
                print(f"{name}: {len(times)} times, p50 {sorted(times)[len(times) // 2]:.2f} s, max {max(times):.2f} s")
            assert max(lost) < DEAD_WITHIN
            for pc in (a, b):
                assert said(pc, r"node [ab] \(\S+\) is DEAD") is None


async def test_pcs_that_all_moved_find_each_other_by_multicast_dns_alone(tmp_path: Path) -> None:
    """Every port is another one than when they last met, no seed is configured, and nobody says where anybody is."""
    with network(2) as lan:
        pcs = a, b = fleet(tmp_path, lan)
        async with stopping(pcs):
            await assemble(pcs)
            await asyncio.gather(*(pc.stop() for pc in pcs))
            for number, pc in enumerate(pcs):
                text = pc.config.read_text()
                pc.config.write_text(text.replace(f":{pc.mesh_port}", f":{pc.mesh_port + 100 + number}"))
            await asyncio.gather(*(pc.start() for pc in pcs))
            print(f"found after {await converge(pcs):.2f} s")
            peer = await a.peer(b)
            assert peer is not None
            assert f"{b.host.address}:{b.mesh_port + 101}" in peer.addresses


async def test_a_pc_that_one_other_cannot_reach_is_nobodys_dead_and_costs_no_answer(tmp_path: Path) -> None:
    """Half a broken link: what `a` sends to `c` vanishes; all else arrives."""
    with network(3) as lan:
        pcs = a, b, c = fleet(tmp_path, lan)
        async with stopping(pcs):
            await assemble(pcs)
            await a.client.deploy(HELP_DESK, replicas=2)
            await c.holds(HELP_DESK)
            await until(lambda: replicas([a, b]), lambda seen: sum(map(len, seen.values())) == 1, 60, "the second one")
            for pc in pcs:
                await pc.answered_by(c)
                await pc.asks()
            began = time.time()
            await asyncio.to_thread(a.host.deafen, c.host)
            async with asked_all_the_while(a) as answers, asked_all_the_while(b):
                await asyncio.sleep(12)  # twice as long as a death takes
            assert answers
            for pc in pcs:
                assert said(pc, r"is DEAD now", began) is None
            assert {state for pc in pcs for other in pcs if (state := await pc.state_of(other))} <= {"ALIVE", "SUSPECT"}
            await asyncio.to_thread(a.host.hear, c.host)
            await converge(pcs)
            print(f"{len(answers)} answers at a meanwhile")


async def test_a_drain_moves_what_runs_before_it_stops_and_resume_takes_the_pc_back(tmp_path: Path) -> None:
    with network(2) as lan:
        pcs = a, b = fleet(tmp_path, lan, largest=1)
        async with stopping(pcs):
            await assemble(pcs)
            await a.client.deploy(HELP_DESK)
            await b.holds(HELP_DESK)
            await a.answered_by(b)
            async with asked_all_the_while(a) as answers, asked_all_the_while(b):
                await b.cli("drain")
                await a.holds(HELP_DESK)
                await b.holds()
                await a.sees(b, "DRAINING")
            assert {answer.served_by.node for answer in answers} <= {a.node_id(), b.node_id()}
            await b.answered_by(a)
            # It is remembered over a restart.
            await b.stop()
            await b.start()
            await a.sees(b, "DRAINING")
            await b.cli("resume")
            await a.sees(b, "ALIVE")
            assert await a.ready_replicas() == [HELP_DESK]
