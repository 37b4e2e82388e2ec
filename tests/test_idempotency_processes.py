"""One idempotency key at several PCs, each a real `tars-node`: computed once, as the engine itself counts, whoever dies or freezes."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import Any

import pytest
from counted_engine import counters
from mesh_processes import ENDLESS, HELP_DESK, Pc, assemble, converge, stopping, until
from network_namespaces import network, why_not

from tars.errors import IdempotencyConflict, TarsError

pytestmark = [pytest.mark.slow, pytest.mark.model]

OFTEN = "[worker]\nping_interval_seconds = 0.2\n"
"""How often an engine tells what it counted."""
LONG = 900
"""Tokens: seconds in which something can happen to a node."""


def options(key: str, tokens: int = 24, **more: Any) -> dict[str, Any]:
    return {
        "model": HELP_DESK,
        "max_tokens": tokens,
        "logit_bias": ENDLESS,
        "idempotency_key": key,
        "timeout": 60.0,
        **more,
    }


async def asks(pc: Pc, key: str, tokens: int = 24, text: str = "What is TARS?") -> Any:
    """Not greedy: a second computation with another seed would say something else."""
    return await pc.client.chat(text, **options(key, tokens, temperature=1.0))


async def computed(pc: Pc) -> tuple[int, int]:
    """Calls that its only replica's worker got, and tokens that its engine made."""
    made = (await counters(pc, HELP_DESK)).generated_tokens
    (replica,) = (await pc.client.describe()).replicas
    return replica.calls_total, made


async def settled(pc: Pc, calls: int) -> tuple[int, int]:
    """The same once the worker got so many calls and its engine has counted nothing new for three of its reports."""
    seen: list[tuple[int, int]] = []

    async def look() -> list[tuple[int, int]]:
        seen.append(await computed(pc))
        return seen

    await until(
        look, lambda seen: len(seen) > 3 and seen[-1][0] >= calls and len(set(seen[-4:])) == 1, 60, "at rest", gap=0.3
    )
    return seen[-1]


async def running_at(pc: Pc, calls: int) -> None:
    async def look() -> int:
        (replica,) = (await pc.client.describe()).replicas
        return 0 if replica.counters is None else replica.counters.running

    await until(look, lambda seen: seen >= calls, 30, f"{calls} calls run at {pc.name}")


async def test_a_key_is_computed_once_wherever_it_is_repeated_and_whoever_dies_or_freezes(tmp_path: Path) -> None:
    pcs = a, b, c = (
        Pc(tmp_path, "a", priority=10, memory_mib=300),
        Pc(tmp_path, "b", priority=5, memory_mib=300),
        Pc(tmp_path, "c", priority=0, memory_mib=4000, more=OFTEN),
    )
    async with stopping(pcs):
        await assemble(pcs)
        await a.client.deploy(HELP_DESK)
        await c.holds(HELP_DESK)
        for pc in (a, b):
            await pc.answered_by(c)
        calls, tokens = await settled(c, 1)

        # The same key at two nodes at once, and then at the third one, a few times.
        for number in range(5):
            first, second = await asyncio.gather(asks(a, f"k{number}"), asks(b, f"k{number}"))
            third = await asks(c, f"k{number}")
            assert first == second == third
            assert first.usage.completion_tokens == 24
        assert await settled(c, calls + 5) == (calls + 5, tokens + 5 * 24)

        # Another body under the key, wherever it is asked.
        for pc in pcs:
            with pytest.raises(IdempotencyConflict):
                await asks(pc, "k0", text="What is a replica?")
        assert (await computed(c))[0] == calls + 5

        # The node that has the caller is killed; the caller asks another one.
        abandoned = asyncio.create_task(asks(a, "killed", LONG))
        await running_at(c, 1)
        await a.stop(signal.SIGKILL)
        with pytest.raises(TarsError):
            await abandoned
        again = await asks(b, "killed", LONG)
        assert again.usage.completion_tokens == LONG
        # Whoever asks a third time gets that one.
        assert await asks(c, "killed", LONG) == again
        assert (await settled(c, calls + 7))[0] == calls + 7
        # Any node explains it, as the one that had its caller tells of it.
        for pc in (b, c):
            told = await pc.cli("explain", "call", again.served_by.call)
            assert "at b; answered after" in told
            assert f"asked c, Card of c ({again.served_by.replica}): first choice" in told
            assert "TARS" not in told, "nothing of what was asked"

        # It freezes; another one runs the call and answers. Thawed, it gives its caller that answer and not its own.
        waiting = asyncio.create_task(asks(b, "frozen", LONG))
        await running_at(c, 1)
        b.send(signal.SIGSTOP)
        try:
            successors = await asks(c, "frozen", LONG)
            assert not waiting.done()
        finally:
            b.send(signal.SIGCONT)
        late = await waiting
        assert late.served_by.call == successors.served_by.call
        assert late == successors
        assert (await settled(c, calls + 9))[0] == calls + 9


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
async def test_a_mesh_in_two_parts_computes_a_key_once_in_each_and_never_again(tmp_path: Path) -> None:
    with network(2) as lan:
        pcs = a, b = [
            Pc(tmp_path, name, host=host, priority=10 - number, memory_mib=4000, more=OFTEN)
            for number, (name, host) in enumerate(zip("ab", lan.hosts, strict=True))
        ]
        async with stopping(pcs):
            await assemble(pcs)
            await a.client.deploy(HELP_DESK, replicas=2)
            await asyncio.gather(*(pc.holds(HELP_DESK) for pc in pcs))
            await asyncio.to_thread(b.host.silence)
            # Each has a replica: nobody needs to have heard yet that the other one is gone.
            before = await asyncio.gather(*(settled(pc, 0) for pc in pcs))
            parted = await asyncio.gather(*(asks(pc, "parted") for pc in pcs))
            assert [each.served_by.node for each in parted] == [pc.node_id() for pc in pcs]
            for pc in pcs:
                with pytest.raises(IdempotencyConflict):
                    await asks(pc, "parted", text="What is a replica?")
            await asyncio.to_thread(b.host.speak)
            await converge(pcs)
            assert await asyncio.gather(*(asks(pc, "parted") for pc in pcs)) == parted
            for pc in pcs:
                with pytest.raises(IdempotencyConflict):
                    await asks(pc, "parted", text="What is a replica?")
            # And together they are one again.
            first, second = await asyncio.gather(*(asks(pc, "together") for pc in pcs))
            assert first == second
            after = await asyncio.gather(*(settled(pc, 0) for pc in pcs))
            assert sum(calls for calls, _ in after) - sum(calls for calls, _ in before) == 3
