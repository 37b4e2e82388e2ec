"""A call's time budget, from every face into the engine, here and through a peer: real processes, a real engine, its own counters."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import aiohttp
import openai
import orjson
import pytest
from counted_engine import LONG_CALL, TOKENS, at_rest, counters, gateway_and_server
from mesh_processes import Pc, until

pytestmark = [pytest.mark.slow, pytest.mark.model]

ANSWERS = 8
WORK: dict[str, Any] = {**LONG_CALL, "n": ANSWERS}
"""Ten seconds and more of an idle machine."""
WHOLE = ANSWERS * TOKENS
BUDGET_MS = 700


async def post(pc: Pc, path: str, body: Mapping[str, Any], headers: Mapping[str, str]) -> Any:
    key = orjson.loads((pc.state / "operator.key").read_bytes())["key"]
    url = f"http://127.0.0.1:{pc.client_port}{path}"
    sent = {"Authorization": f"Bearer {key}", **headers}
    async with aiohttp.ClientSession() as http, http.post(url, json=body, headers=sent) as response:
        return await response.json()


async def over_rpc(pc: Pc) -> None:
    params = {**WORK, "_meta": {"timeout_ms": BUDGET_MS}}
    call = {"jsonrpc": "2.0", "id": 1, "method": "inference.complete", "params": params}
    answer = await post(pc, "/rpc", call, {"X-Request-Timeout-Ms": "60000"})
    assert answer["error"]["data"]["kind"] == "deadline_exceeded"


async def over_rpc_by_header(pc: Pc) -> None:
    call = {"jsonrpc": "2.0", "id": 1, "method": "inference.complete", "params": WORK}
    answer = await post(pc, "/rpc", call, {"X-Request-Timeout-Ms": str(BUDGET_MS)})
    assert answer["error"]["data"]["kind"] == "deadline_exceeded"


async def over_rest(pc: Pc) -> None:
    answer = await post(pc, "/inference", WORK, {"X-Request-Timeout-Ms": str(BUDGET_MS)})
    assert answer["error"]["data"]["kind"] == "deadline_exceeded"


async def over_openai_by_header(pc: Pc) -> None:
    answer = await post(pc, "/v1/completions", WORK, {"X-Request-Timeout-Ms": str(BUDGET_MS)})
    assert answer["error"]["type"] == "timeout_error"


async def over_the_openai_client_for_javascript(pc: Pc) -> None:
    answer = await post(pc, "/v1/completions", WORK, {"X-Stainless-Timeout": "0"})
    assert answer["error"]["type"] == "timeout_error"


async def over_the_openai_client(pc: Pc) -> None:
    key = orjson.loads((pc.state / "operator.key").read_bytes())["key"]
    url = f"http://127.0.0.1:{pc.client_port}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=0) as client:
        with pytest.raises((openai.APITimeoutError, openai.InternalServerError)):
            await client.completions.create(**WORK, timeout=BUDGET_MS / 1000)


FACES = [
    over_rpc,
    over_rpc_by_header,
    over_rest,
    over_openai_by_header,
    over_the_openai_client_for_javascript,
    over_the_openai_client,
]


async def test_the_budget_of_every_face_reaches_the_engine_which_stops_when_it_is_gone(tmp_path: Path) -> None:
    async with gateway_and_server(tmp_path, layers=6, embedding=256, feed_forward=1024) as (gateway, server):
        made = (await at_rest(server)).generated_tokens
        for asked in (server, gateway):
            for face in FACES:
                made = await runs_no_longer_than_its_budget(asked, server, face, made)
        assert (await server.client.describe()).calls_from_peers >= len(FACES)
        await the_engine_has_the_budget_itself(server, made)


async def runs_no_longer_than_its_budget(asked: Pc, server: Pc, face: Any, before: int) -> int:
    """`before`: tokens that the engine generated until now; gives back the same for afterwards."""
    began = time.monotonic()
    async with asyncio.timeout(20):
        await face(asked)
    took = time.monotonic() - began
    after = (await at_rest(server)).generated_tokens
    assert 0 < after - before < WHOLE / 2, f"{face.__name__} at {asked.name}: {after - before} of {WHOLE} tokens"
    assert took < 5
    return after


async def the_engine_has_the_budget_itself(server: Pc, before: int) -> None:
    """The node stands still from before the deadline until long after it: nobody can tell the engine to stop."""
    call = asyncio.create_task(over_rpc(server))
    await until(lambda: counters(server), lambda seen: seen.running > 0, 10, "the engine works")
    server.send(signal.SIGSTOP)
    await asyncio.sleep(4 * BUDGET_MS / 1000)
    server.send(signal.SIGCONT)
    # The first report after it is of what the engine did alone.
    made = (await at_rest(server)).generated_tokens - before
    assert 0 < made < WHOLE / 2
    async with asyncio.timeout(10):
        await call
