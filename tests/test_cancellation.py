"""A call that nobody waits for any more frees its slot within one decoding step: real processes, real engines, the engines' own counters.

What the engine generated in all is compared with what its node had heard of when it cancelled (`calls.explain`): the difference is what was
computed for nobody. That is the step under way, and what came through the pipe meanwhile.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any, cast

import pytest
from counted_engine import LONG_CALL, TOKENS, at_rest, gateway_and_server
from mesh_processes import Pc, until

from tars.messages.calls import AttemptDescription

pytestmark = [pytest.mark.slow, pytest.mark.model]

FOR_NOBODY = 8
"""Tokens at most: one of the step under way, the others for a busy machine, on which the node itself hears of them late."""


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
    stream = pc._connection.stream("inference.complete", LONG_CALL, timeout=60, **meta)
    async with aclosing(cast("AsyncGenerator[Any]", stream)) as events:
        for _ in range(5):
            await anext(events)


async def timed_out(pc: Pc, trace: str) -> None:
    """A client whose time is over."""
    assert pc._connection is not None
    meta = {"traceparent": f"00-{trace}-b7ad6b7169203331-01"}
    with pytest.raises(Exception, match="time budget") as met:
        await pc._connection.call("inference.complete", LONG_CALL, timeout=3.0, **meta)
    assert met.value.kind == "deadline_exceeded"


async def test_a_client_that_leaves_and_a_deadline_that_passes_stop_the_engine_here_and_at_a_peer(
    tmp_path: Path,
) -> None:
    # An answer that is left to end takes more than ten seconds.
    shape = {"layers": 4, "embedding": 1024, "feed_forward": 4096}
    async with gateway_and_server(tmp_path, **shape) as (gateway, server):
        before = await at_rest(server)
        ends: list[Callable[[Pc, str], Any]] = [left, timed_out]
        for number, (asked, end) in enumerate((asked, end) for asked in (server, gateway) for end in ends):
            trace = f"{number + 1:032x}"
            await end(asked, trace)
            after = await at_rest(server)
            heard = await heard_of(asked, trace)
            made = after.generated_tokens - before.generated_tokens
            print(f"{end.__name__} at {asked.name}: {made} tokens, {made - heard} of them for nobody")
            assert 0 < made < TOKENS
            assert made - heard <= FOR_NOBODY
            assert after.kv_used == 0
            before = after
