"""A batch of chats on two nodes of which one is frozen midway, against the same batch on one node alone.

Law of this file: the two nodes get a processor core each, as two PCs would have, where there are two; the same calls each time, so many of
them at once as both nodes have slots. PAIR took 155.6 s with a frozen node and 72.8 s alone (its issue 6): a frozen helper must not cost
more than none.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from chaos_callers import PATIENCE_SECONDS, Gateway, GatewayGone
from chaos_deck import CHAT_MODEL, Call
from chaos_mesh import ChaosMesh, running_mesh
from engine_results import Aim
from running_node import send_all

from tars.errors import TarsError

SLOTS = 4
FROZEN_AFTER = 0.25
"""Of the batch: then the second node is stopped, for good."""


@dataclass(frozen=True, slots=True)
class BatchTimes:
    """Seconds of the whole batch, each way. `lost`: calls without an answer in any of them."""

    calls: int
    both: float
    frozen: float
    alone: float
    lost: int
    cores_each: int

    @property
    def aims(self) -> list[Aim]:
        """The issue's."""
        return [
            Aim("time of a batch with one of two nodes frozen, to one node alone", self.frozen / self.alone, at_most=1.0),
            Aim("calls of the batches lost", self.lost, at_most=0),
        ]  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "aims": [aim.to_json() for aim in self.aims]}


async def frozen_batch(
    folder: Path, mode: str, chats: Sequence[Call], count: int, say: Callable[[str], None], *, loopback: bool = False
) -> BatchTimes:
    """`count` calls, made of `chats`. Raises ValueError without any."""
    if not chats:
        raise ValueError("a batch needs calls")
    calls = [chats[number % len(chats)] for number in range(count)]
    available = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    half = len(available) // 2
    cores = {"b": set(available[:half]), "c": set(available[half:])} if half else {}
    if not cores:
        say("one core only: the two nodes of the batch share it")
    async with running_mesh(
        folder, mode, SLOTS, names=("b", "c"), models=(CHAT_MODEL,), cores=cores, loopback=loopback
    ) as mesh:
        gateway = mesh.gateways[0]
        other = mesh.pcs["c"]
        await _batch(gateway, calls[: 2 * SLOTS], None, 1.0)  # what is slow only once
        both, lost_both = await _batch(gateway, calls, None, 1.0)
        stopped = mesh.processes("c")
        mesh.harmed.add("c")
        frozen, lost_frozen = await _batch(gateway, calls, lambda: send_all(stopped, signal.SIGSTOP), FROZEN_AFTER)
        send_all(stopped, signal.SIGCONT)
        await other.stop(signal.SIGTERM)
        await _known_gone(mesh)
        alone, lost_alone = await _batch(gateway, calls, None, 1.0)
    times = BatchTimes(count, both, frozen, alone, lost_both + lost_frozen + lost_alone, half)
    say(
        f"a batch of {count} chats: {both:.1f} s on two nodes, {frozen:.1f} s with one of them frozen midway, {alone:.1f} s on one alone"
    )
    return times


async def _batch(
    gateway: Gateway, calls: Sequence[Call], strike: Callable[[], None] | None, after: float
) -> tuple[float, int]:
    """Seconds, and how many were not answered."""
    waiting = list(reversed(calls))
    answered = lost = 0
    began = time.monotonic()

    async def caller() -> None:
        nonlocal answered, lost, strike
        while waiting:
            call = waiting.pop()
            try:
                await gateway.by_rpc(call, PATIENCE_SECONDS, None, lambda: None)
            except (TarsError, GatewayGone):
                lost += 1
            answered += 1
            if strike is not None and answered >= after * len(calls):
                strike()
                strike = None

    await asyncio.gather(*(caller() for _ in range(2 * SLOTS)))
    return time.monotonic() - began, lost


async def _known_gone(mesh: ChaosMesh) -> None:
    async with asyncio.timeout(30):
        while True:
            peers = (await mesh.gateways[0].client.peers()).peers
            if all(peer.state in ("LEFT", "DEAD") for peer in peers if peer.name == "c"):
                return
            await asyncio.sleep(0.1)
