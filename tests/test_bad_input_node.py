"""Bad input through a real node, as a caller meets it: one clear error each, while another answer goes on unharmed.

One node for all of them. Beside each case a long greedy-by-seed answer streams from the same replica; exact mode makes its text the same as
when it ran alone, so that a single changed token would be seen.
"""

from __future__ import annotations

import asyncio
import io
import json
import re
import signal
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import gguf
import pytest
import pytest_asyncio
from running_node import RunningNode, running_node
from tiny_gguf import write_tiny_adapter, write_tiny_gguf

pytestmark = [pytest.mark.model, pytest.mark.asyncio(loop_scope="module")]

CONTEXT = 1024
ON = {"2": -100, "4": -100}
"""Tokens 2 and 4 end the tiny model's text."""
LONG = {"model": "tiny", "prompt": "A long story:", "max_tokens": 900, "temperature": 1.0, "seed": 7, "logit_bias": ON}

CONFIG = f"""
[engines]
continuation = "exact"
[worker]
hang_seconds = 4
abort_seconds = 1.5
ping_interval_seconds = 0.2
backoff_initial_seconds = 0.1
[limits]
max_string_bytes = 65536
[[model]]
name = "tiny"
path = "tiny.gguf"
adapters = [{{name = "own", path = "own.gguf"}}]
[[model]]
name = "nan"
path = "nan.gguf"
[[model]]
name = "shapes"
path = "shapes.gguf"
[[model]]
name = "foreign-adapter"
path = "tiny.gguf"
adapters = [{{name = "other", path = "other.gguf"}}]
[[model]]
name = "foreign-draft"
path = "tiny.gguf"
draft = "other-vocabulary.gguf"
[[deploy]]
model = "tiny"
slots = 3
context = {CONTEXT}
"""


@dataclass
class Service:
    """A node, and the answer that runs beside each case."""

    node: RunningNode
    http: aiohttp.ClientSession
    alone: str = ""
    running: list[asyncio.Task[str]] = field(default_factory=list)

    async def post(self, path: str, body: object) -> tuple[int, dict[str, Any], str]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        async with self.http.post(self.node.url + path, data=io.BytesIO(data), headers=headers) as response:
            text = await response.text()
            return response.status, json.loads(text), text

    async def rpc(self, method: str, **params: Any) -> tuple[int, dict[str, Any], str]:
        return await self.post("/rpc", {"jsonrpc": "2.0", "id": 1, "method": method, "params": params})

    async def complete(self, **params: Any) -> dict[str, Any]:
        _, answer, _ = await self.rpc(
            "inference.complete", **{"model": "tiny", "prompt": "Hi", "max_tokens": 3, **params}
        )
        return answer

    async def stream(self, first: asyncio.Event | None = None) -> str:
        text = ""
        async with self.http.post(self.node.url + "/v1/completions", json={**LONG, "stream": True}) as response:
            assert response.status == 200, await response.text()
            async for line in response.content:
                if not line.startswith(b"data: {"):
                    continue
                frame = json.loads(line[6:])
                if "error" in frame:
                    raise ConnectionError(frame["error"]["code"])
                text += "".join(choice["text"] for choice in frame["choices"])
                if first is not None:
                    first.set()
        return text

    async def counters(self) -> tuple[float, float, float]:
        """Active calls, running and waiting sequences of the replica `tiny`."""
        async with self.http.get(self.node.url + "/metrics") as response:
            page = await response.text()
        names = ("tars_replica_active_calls", "tars_replica_sequences_running", "tars_replica_sequences_waiting")
        found = [re.search(name + r'{[^}]*model="tiny"} (\S+)', page) for name in names]
        active, running, waiting = (float(one[1]) if one else 0.0 for one in found)
        return active, running, waiting

    async def idle(self, seconds: float = 5) -> None:
        """Until nothing runs and nothing waits: no slot is lost."""
        ends = time.monotonic() + seconds
        while (counts := await self.counters()) != (0, 0, 0):
            assert time.monotonic() < ends, counts
            await asyncio.sleep(0.05)


def damaged(path: Path, name: str, data: bytes) -> None:
    """`tiny.gguf` beside `path` with the first bytes of one tensor, or of the value behind one key, replaced."""
    whole = bytearray((path.parent / "tiny.gguf").read_bytes())
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(str(path.parent / "tiny.gguf")).tensors}
    at = tensors[name].data_offset if name in tensors else whole.index(name.encode()) + len(name) + 4
    whole[at : at + len(data)] = data
    path.write_bytes(whole)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Service]:
    folder = tmp_path_factory.mktemp("bad-input")
    write_tiny_gguf(folder / "tiny.gguf")
    write_tiny_gguf(folder / "other-vocabulary.gguf", words=" ".join(f"w{n}" for n in range(300)))
    write_tiny_adapter(folder / "own.gguf")
    write_tiny_adapter(folder / "other.gguf", embedding=128)
    damaged(folder / "nan.gguf", "output_norm.weight", b"\xff\xff\xc0\x7f" * 64)
    damaged(folder / "shapes.gguf", "llama.embedding_length", (128).to_bytes(4, "little"))
    (folder / "node.toml").write_text(CONFIG)
    async with (
        running_node(folder / "state", "--config", folder / "node.toml") as node,
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120)) as http,
    ):
        await node.ready()
        service = Service(node, http)
        service.alone = await service.stream()
        assert len(service.alone) > 900
        yield service
        await service.idle()
        assert "Traceback" not in node.output


@pytest_asyncio.fixture(loop_scope="module")
async def beside(service: Service) -> AsyncIterator[asyncio.Task[str]]:
    """The long answer, running while the test does; afterwards its text is what it was alone, and every slot is free."""
    begun = asyncio.Event()
    running = asyncio.create_task(service.stream(begun))
    await asyncio.wait_for(begun.wait(), 10)
    yield running
    assert await running == service.alone
    await service.idle()
    assert "result" in await service.complete()


def nested(levels: int) -> bytes:
    start = (
        b'{"jsonrpc":"2.0","id":1,"method":"inference.complete","params":{"model":"tiny","prompt":"a","json_schema":'
    )
    return start + b'{"properties":{"a":' * levels + b"{}" + b"}}" * levels + b"}}"


CASES: list[tuple[str, dict[str, Any], str, str]] = [
    ("grammar", {"grammar": 'root ::= "a" ("b"'}, "bad_grammar", "closing"),
    ("no root", {"grammar": 'a ::= "b"'}, "bad_grammar", "no rule root"),
    ("left recursion", {"grammar": 'root ::= root "a" | "b"'}, "bad_grammar", "left recursion"),
    ("repetitions", {"grammar": 'root ::= "a"{1000000}'}, "bad_grammar", "repeat less"),
    ("brackets", {"grammar": "root ::= " + "(" * 5000 + '"a"' + ")" * 5000}, "bad_grammar", "200 deep"),
    ("cycle", {"json_schema": {"$ref": "#"}}, "bad_grammar", "back to itself"),
    ("endless", {"json_schema": {"properties": {"c": {"$ref": "#"}}, "required": ["c"]}}, "bad_grammar", ""),
    ("keyword", {"json_schema": {"type": "object", "frobnicate": 3}}, "bad_grammar", "frobnicate"),
    ("large schema", {"json_schema": {"enum": [f"{n:060}" for n in range(30000)]}}, "bad_grammar", "smaller"),
    ("many values", {"json_schema": {"enum": list(range(70000))}}, "limit_exceeded", "65,536"),
    ("prompt", {"prompt": "z" * 5000}, "prompt_too_long", "1024"),
    ("stops", {"stop": [f"s{n}" for n in range(10000)]}, "invalid_params", "at most 64"),
    ("empty stop", {"stop": ["a", ""]}, "invalid_params", "empty string"),
    ("long stop", {"stop": ["x" * 1_000_000]}, "limit_exceeded", "65,536 bytes"),
    ("adapter", {"model": "tiny:nobody"}, "unknown_model", "tiny:own"),
    ("model", {"model": "nobody"}, "unknown_model", "models.list"),
    ("no tokens", {"max_tokens": 0}, "invalid_params", "max_tokens"),
    ("tokens", {"max_tokens": 10**9}, "invalid_params", "1048576"),
    ("temperature", {"temperature": -1}, "invalid_params", "temperature"),
    ("top_k", {"top_k": -5}, "invalid_params", "top_k"),
    ("token id", {"logit_bias": {"99999": 1}}, "invalid_params", "logit_bias"),
    ("biases", {"logit_bias": {str(n): 1 for n in range(70000)}}, "limit_exceeded", "65,536"),
    ("seed", {"seed": 2**80}, "invalid_params", "seed"),
    ("answers", {"n": 1000}, "invalid_params", "16"),
    ("logprobs", {"logprobs": 10**6}, "invalid_params", "20"),
    ("deadline", {"max_tokens": 900, "logit_bias": ON, "_meta": {"timeout_ms": 1}}, "deadline_exceeded", "timeout_ms"),
]


async def test_what_is_wrong_with_a_call_is_one_clear_error(service: Service, beside: asyncio.Task[str]) -> None:
    assert not beside.done()
    for name, params, kind, said in CASES:
        answer = await service.complete(**params)
        assert set(answer) == {"jsonrpc", "id", "error"}, (name, answer)
        error = answer["error"]
        assert (error["data"]["kind"], error["data"]["retryable"]) == (kind, kind == "deadline_exceeded"), (name, error)
        assert said in error["message"], (name, error)
        assert "Traceback" not in json.dumps(answer), name
        assert len(error["message"]) < 500, name


async def test_json_that_is_none_or_too_deep_never_reaches_a_model(service: Service, beside: asyncio.Task[str]) -> None:
    body = b'{"jsonrpc":"2.0","id":1,"method":"inference.complete","params":{"prompt":"a","temperature":%s}}'
    for value in (b"NaN", b"Infinity", b"1e999"):
        status, answer, _ = await service.post("/rpc", body % value)
        assert (status, answer["error"]["data"]["kind"]) == (400, "parse_error")
    status, answer, _ = await service.post("/rpc", nested(500))
    assert (status, answer["error"]["data"]["kind"]) == (413, "limit_exceeded")


async def test_the_openai_api_answers_with_the_status_of_the_error(service: Service, beside: asyncio.Task[str]) -> None:
    function = {"type": "function", "function": {"name": "f"}}
    cases: list[tuple[dict[str, Any], int, str]] = [
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#"}}}},
            400,
            "itself",
        ),
        ({"tools": [{"type": "function"}]}, 400, "tools[0].function"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, 400, "tools[0].function.name"),
        ({"tools": [function], "tool_choice": {"type": "function", "function": {"name": "g"}}}, 400, "tool_choice"),
        ({"tool_choice": "required"}, 400, "there are no tools"),
        ({"model": "tiny:nobody"}, 404, "tiny:own"),
        ({"n": 0}, 400, "n:"),
        ({"stop": [""]}, 400, "empty string"),
        ({"messages": [{"role": "user", "content": "z" * 5000}]}, 400, "context"),
    ]
    for fields, expected, said in cases:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3, **fields}
        for stream in (False, True):
            status, answer, text = await service.post("/v1/chat/completions", {**body, "stream": stream})
            assert (status, set(answer)) == (expected, {"error"}), (fields, text)
            assert said in answer["error"]["message"], (fields, text)


async def test_a_prompt_fits_to_the_last_token_but_one(service: Service, beside: asyncio.Task[str]) -> None:
    _, counted, _ = await service.rpc("inference.tokenize", model="tiny", text="z")
    frame = len(counted["result"]["tokens"]) - 1
    assert (await service.complete(prompt="z" * (CONTEXT - frame)))["error"]["data"]["prompt_tokens"] == CONTEXT
    answer = await service.complete(prompt="z" * (CONTEXT - 1 - frame), max_tokens=9, logit_bias=ON)
    usage = answer["result"]["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (CONTEXT - 1, 1)
    assert answer["result"]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("nan", "not a number"),
        ("shapes", "refused the model file"),
        ("foreign-adapter", "for another model"),
        ("foreign-draft", "another vocabulary"),
    ],
)
async def test_a_damaged_or_foreign_file_is_said_and_serves_nobody(
    service: Service, beside: asyncio.Task[str], model: str, said: str
) -> None:
    _, answer, _ = await service.rpc("models.deploy", model=model, context=256)
    ends = time.monotonic() + 20
    while "error" not in answer or answer["error"]["data"]["kind"] == "still_loading":
        assert time.monotonic() < ends, answer
        await asyncio.sleep(0.1)
        answer = await service.complete(model=model)
        assert "result" not in answer
    assert (answer["error"]["data"]["kind"], answer["error"]["data"]["retryable"]) == ("bad_model_file", False)
    assert said in answer["error"]["message"]
    await service.rpc("models.remove", model=model)


async def test_callers_that_leave_give_their_slots_back(service: Service) -> None:
    long = {"model": "tiny", "prompt": "Hi", "max_tokens": 900, "logit_bias": ON}
    for stream in (True, True, True, False, False, False):
        call = service.http.post(service.node.url + "/v1/completions", json={**long, "stream": stream})
        task = asyncio.ensure_future(call)
        if stream:
            response = await task
            await response.content.readline()
            response.close()
        else:
            await asyncio.sleep(0.02)
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
    await service.idle(3)
    assert await service.stream() == service.alone


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_worker_that_dies_or_stands_still_is_replaced_and_its_answers_go_on_in_the_next_one(
    service: Service, number: int
) -> None:
    ends = time.monotonic() + 5
    while len(workers := service.node.workers()) > 1:  # those of removed models end a moment later
        assert time.monotonic() < ends, workers
        await asyncio.sleep(0.05)
    (worker,) = workers
    begun = asyncio.Event()
    streamed = asyncio.create_task(service.stream(begun))
    waiting = [asyncio.create_task(service.complete(max_tokens=900, logit_bias=ON)) for _ in range(4)]
    await asyncio.wait_for(begun.wait(), 10)
    worker.send_signal(number)
    assert await streamed == service.alone
    for call in waiting:
        answer = await call
        assert answer["result"]["usage"]["completion_tokens"] == 900, answer
    assert await service.stream() == service.alone
    assert not worker.is_running()
