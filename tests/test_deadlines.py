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
from mesh_processes import Pc, assemble, stopping, until
from tiny_gguf import write_tiny_gguf

from tars.messages.node import EngineCounters

pytestmark = [pytest.mark.slow, pytest.mark.model]

ANSWERS, TOKENS = 8, 900
WORK: dict[str, Any] = {
    "model": "tiny",
    "prompt": "Once upon a time",
    "max_tokens": TOKENS,
    "n": ANSWERS,
    # Tokens 2 and 4 end the tiny model's text.
    "logit_bias": {"2": -100.0, "4": -100.0},
}
"""Ten seconds and more of an idle machine."""
WHOLE = ANSWERS * TOKENS
BUDGET_MS = 700


async def counters(pc: Pc) -> EngineCounters:
    (replica,) = (await pc.client.describe()).replicas
    assert replica.counters is not None
    return replica.counters


async def at_rest(pc: Pc) -> int:
    """Wait until the engine computes nothing and stays so over three of its reports; tokens that it generated until now."""
    seen: list[EngineCounters] = []

    async def look() -> list[EngineCounters]:
        seen.append(await counters(pc))
        return seen[-3:]

    def still(last: list[EngineCounters]) -> bool:
        return len({(each.generated_tokens, each.steps, each.running, each.waiting) for each in last}) == 1 and (
            len(last) == 3 and not last[0].running and not last[0].waiting
        )

    await until(look, still, 10, "the engine is at rest", gap=0.25)
    return seen[-1].generated_tokens


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
    model = write_tiny_gguf(tmp_path / "tiny.gguf", layers=6, embedding=256, feed_forward=1024)
    worker = "[worker]\nping_interval_seconds = 0.1\n"
    gateway = Pc(tmp_path, "gateway", priority=10, memory_mib=64, more=worker)
    server = Pc(tmp_path, "server", more=f'{worker}[[model]]\nname = "tiny"\npath = "{model}"\n')
    async with stopping([gateway, server]):
        await assemble([gateway, server])
        await gateway.client.deploy("tiny", slots=4, context=1024)
        await server.holds("tiny")
        await gateway.asks("Hello", model="tiny")
        for asked in (server, gateway):
            for face in FACES:
                await runs_no_longer_than_its_budget(asked, server, face)
        assert (await server.client.describe()).calls_from_peers >= len(FACES)
        await the_engine_has_the_budget_itself(server)


async def runs_no_longer_than_its_budget(asked: Pc, server: Pc, face: Any) -> None:
    before = await at_rest(server)
    began = time.monotonic()
    async with asyncio.timeout(20):
        await face(asked)
    took = time.monotonic() - began
    made = await at_rest(server) - before
    assert 0 < made < WHOLE / 2, f"{face.__name__} at {asked.name}: {made} of {WHOLE} tokens"
    assert took < 5


async def the_engine_has_the_budget_itself(server: Pc) -> None:
    """The node stands still from before the deadline until long after it: nobody can tell the engine to stop."""
    before = await at_rest(server)
    call = asyncio.create_task(over_rpc(server))
    await until(lambda: counters(server), lambda seen: seen.running > 0, 10, "the engine works")
    server.send(signal.SIGSTOP)
    await asyncio.sleep(4 * BUDGET_MS / 1000)
    server.send(signal.SIGCONT)
    # The first report after it is of what the engine did alone.
    made = (await at_rest(server)) - before
    assert 0 < made < WHOLE / 2
    async with asyncio.timeout(10):
        await call
