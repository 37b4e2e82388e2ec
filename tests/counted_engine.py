"""A gateway that has no room for a model, a PC that answers its calls, and that PC's engine as it counts itself. Real processes.

For tests of what an engine is spared: what it computed in all is compared with what somebody still wanted.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from mesh_processes import Pc, assemble, stopping, until
from tiny_gguf import write_tiny_gguf

from tars.messages.node import EngineCounters

TOKENS = 900
LONG_CALL: dict[str, Any] = {
    "model": "tiny",
    "prompt": "Once upon a time",
    "max_tokens": TOKENS,
    # Tokens 2 and 4 end the tiny model's text.
    "logit_bias": {"2": -100.0, "4": -100.0},
}
REPORTS_OFTEN = "[worker]\nping_interval_seconds = 0.1\n"
"""How often an engine tells its node what it counted."""


@asynccontextmanager
async def gateway_and_server(folder: Path, **shape: int) -> AsyncIterator[tuple[Pc, Pc]]:
    """Two PCs of one mesh, of which the second one has `tiny` ready, in this shape and with four slots; the first one knows it."""
    model = write_tiny_gguf(folder / "tiny.gguf", **shape)
    gateway = Pc(folder, "gateway", priority=10, memory_mib=64, more=REPORTS_OFTEN)
    server = Pc(folder, "server", more=f'{REPORTS_OFTEN}[[model]]\nname = "tiny"\npath = "{model}"\n')
    async with stopping([gateway, server]):
        await assemble([gateway, server])
        await gateway.client.deploy("tiny", slots=4, context=1024)
        await server.holds("tiny")
        await gateway.asks("Hello", model="tiny")
        yield gateway, server


async def counters(pc: Pc, model: str = "tiny") -> EngineCounters:
    """Of this PC's only replica of the model, once it has reported any: one that was loaded a moment ago has not."""

    async def look() -> EngineCounters | None:
        (replica,) = (each for each in (await pc.client.describe()).replicas if each.model == model)
        return replica.counters

    found = await until(look, lambda seen: seen is not None, 15, "the engine has reported", gap=0.1)
    assert found is not None
    return found


async def at_rest(pc: Pc, model: str = "tiny") -> EngineCounters:
    """Wait until the engine computes nothing, over three of its reports."""
    seen: list[EngineCounters] = []

    async def look() -> list[EngineCounters]:
        seen.append(await counters(pc, model))
        return seen[-3:]

    def still(last: list[EngineCounters]) -> bool:
        return len(last) == 3 and all(each == last[0] and not each.running and not each.waiting for each in last)

    return (await until(look, still, 15, "the engine is at rest", gap=0.25))[-1]
