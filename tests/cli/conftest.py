"""A node that is none: it answers JSON-RPC with what a test put into it, on a real socket, in a thread of its own."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import orjson
import pytest
from aiohttp import web
from pydantic import BaseModel

from tars.errors import MethodNotFound, TarsError
from tars.messages.inference import ChatMessage, ChatResult, Delta, ServedBy, Timings, Usage
from tars.messages.mesh_state import MeshDescription, MeshNode, MeshReplica
from tars.messages.node import (
    CallCounters,
    DeviceDescription,
    LoadedInfo,
    LoadProgress,
    MeasuredSpeeds,
    ModelDescription,
    NodeDescription,
    ReplicaDescription,
)

SERVED_BY = ServedBy(node="n1", replica="help-desk@cpu#1", device="CPU")


@dataclass
class FakeNode:
    """`answers` by method: a message, an error, or a function of the params that gives either. A chat gives its pieces, then the result."""

    url: str = ""
    answers: dict[str, Any] = field(default_factory=dict)
    thoughts: list[str] = field(default_factory=list)
    """What a chat's answer thinks before its pieces."""
    pieces: list[str] = field(default_factory=lambda: ["Start ", "`tars-node ", "--join`."])
    calls: list[tuple[str, dict[str, Any], dict[str, str]]] = field(default_factory=list)
    hold_after: int | None = None
    """Of a stream: after so many pieces it stays open until the client goes away."""
    held: threading.Event = field(default_factory=threading.Event)
    hold: dict[str, threading.Event] = field(default_factory=dict)
    """Methods that are answered once their event is set."""
    left: threading.Event = field(default_factory=threading.Event)
    """Set when a held stream's client went away."""

    def params(self, method: str) -> dict[str, Any]:
        """Params of the last call of `method`, without `_meta`."""
        found = [params for name, params, _ in self.calls if name == method]
        assert found, f"{method} was never called; called were {[name for name, _, _ in self.calls]}"
        return {name: value for name, value in found[-1].items() if name != "_meta"}

    async def rpc(self, request: web.Request) -> web.StreamResponse:
        call = orjson.loads(await request.read())
        method, params = call["method"], call.get("params") or {}
        self.calls.append((method, params, dict(request.headers)))
        if method in self.hold:
            await asyncio.to_thread(self.hold[method].wait, 20)
        answer = self.answers.get(method)
        if callable(answer):
            answer = answer(params)
        if answer is None and method == "inference.chat":
            answer = chat_result("".join(self.pieces))
        if answer is None:
            answer = MethodNotFound(f"no method {method}")
        last: dict[str, Any] = {"jsonrpc": "2.0", "id": call["id"]}
        if isinstance(answer, TarsError):
            last["error"] = answer.to_json(node="n1", trace_id="t1")
        else:
            assert isinstance(answer, BaseModel)
            last["result"] = answer.model_dump(mode="json")
        if "text/event-stream" not in request.headers.get("Accept", "") or not method.startswith("inference.c"):
            return web.json_response(last)
        return await self._stream(request, call["id"], last)

    async def _stream(self, request: web.Request, call_id: object, last: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        if "error" not in last:
            for thought in self.thoughts:
                delta = Delta(text="", reasoning=thought).model_dump(mode="json")
                message = {"jsonrpc": "2.0", "method": "inference.delta", "params": {"id": call_id, **delta}}
                await response.write(b"data: " + orjson.dumps(message) + b"\n\n")
            for count, piece in enumerate(self.pieces, start=1):
                delta = Delta(text=piece).model_dump(mode="json")
                message = {"jsonrpc": "2.0", "method": "inference.delta", "params": {"id": call_id, **delta}}
                await response.write(b"data: " + orjson.dumps(message) + b"\n\n")
                if count == self.hold_after:
                    self.held.set()
                    try:
                        await asyncio.sleep(60)
                    finally:
                        self.left.set()
        await response.write(b"data: " + orjson.dumps(last) + b"\n\n")
        return response


@pytest.fixture
def node() -> Iterator[FakeNode]:
    """A running fake node."""
    fake = FakeNode()
    started, stop_holder = threading.Event(), []

    async def serve() -> None:
        application = web.Application()
        application.router.add_post("/rpc", fake.rpc)
        runner = web.AppRunner(application, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        fake.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        stop = asyncio.Event()
        stop_holder.append((asyncio.get_running_loop(), stop))
        started.set()
        await stop.wait()
        await runner.cleanup()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    assert started.wait(10)
    yield fake
    loop, stop = stop_holder[0]
    loop.call_soon_threadsafe(stop.set)
    thread.join(10)
    assert not thread.is_alive()


@dataclass
class Ran:
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def tars(node: FakeNode, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ran]:
    """Run `tars ...` in this process against the fake node."""
    from tars.cli import run

    monkeypatch.setenv("TARS_URL", node.url)
    for name in ("TARS_API_KEY", "TARS_DEBUG", "FORCE_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)

    def command(*arguments: str) -> Ran:
        capsys.readouterr()
        code = run(arguments)
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return command


def chat_result(text: str, finish_reason: str = "stop") -> ChatResult:
    return ChatResult(
        model="help-desk",
        message=ChatMessage(role="assistant", content=text),
        finish_reason=finish_reason,  # type: ignore[arg-type]  # a test's word
        usage=Usage(prompt_tokens=9, completion_tokens=7, total_tokens=16),
        timings=Timings(first_token_ms=12.0, total_ms=50.0, tokens_per_second=140.0),
        served_by=SERVED_BY,
    )


def device(name: str = "NVIDIA GeForce RTX 3060", **changes: Any) -> DeviceDescription:
    fields: dict[str, Any] = {
        "id": "n1/gpu-0",
        "kind": "cuda",
        "name": name,
        "simulated": False,
        "memory_total_bytes": 12 * 2**30,
        "memory_free_bytes": 6 * 2**30,
        "memory_held_bytes": 4 * 2**30,
        "memory_capacity_bytes": 10 * 2**30,
        "unified_memory": False,
        "compute_capability": "8.6",
        "precision": "bf16",
        "temperature_celsius": 47,
        "utilisation_percent": 12,
        "power_watts": 80.0,
        "driver": "550.54",
        "notes": [],
    }
    return DeviceDescription(**{**fields, **changes})


def replica(state: str = "ready", progress: LoadProgress | None = None, **changes: Any) -> ReplicaDescription:
    info = LoadedInfo(
        model_kind="chat",
        memory_bytes=5 * 2**30,
        load_seconds=3.0,
        speeds=MeasuredSpeeds(decode_tokens_per_second=52.4),
    )
    fields: dict[str, Any] = {
        "id": "mistral@gpu-0#1",
        "model": "mistral-7b-instruct",
        "model_kind": "chat",
        "variant": "Q4_K_M",
        "device": "n1/gpu-0",
        "device_name": "NVIDIA GeForce RTX 3060",
        "simulated": False,
        "state": state,
        "progress": progress,
        "estimated_bytes": 5 * 2**30,
        "info": info if state == "ready" else None,
        "restarts": 0,
        "active_calls": 0,
        "queued_calls": 0,
        "calls_total": 3,
        "last_error": None,
        "reason": "the only GPU with room",
    }
    return ReplicaDescription(**{**fields, **changes})


def description(*replicas: ReplicaDescription, **changes: Any) -> NodeDescription:
    fields: dict[str, Any] = {
        "node": "n1",
        "name": "pc1",
        "version": "0.1.0",
        "state": "ready",
        "started_at": 1_700_000_000.0,
        "uptime_seconds": 7500.0,
        "platform": "Linux x86_64",
        "wsl2": False,
        "devices": [device()],
        "replicas": list(replicas),
        "calls": CallCounters(total=5, failed=1),
        "recent_errors": [],
    }
    return NodeDescription(**{**fields, **changes})


def mesh_replica(**changes: Any) -> MeshReplica:
    """On pc2, ready."""
    fields: dict[str, Any] = {
        "id": "phi-2@gpu-0#1",
        "model": "phi-2",
        "model_kind": "chat",
        "variant": "Q8_0",
        "device": "n2/gpu-0",
        "device_name": "NVIDIA GeForce GTX 1660 SUPER",
        "simulated": False,
        "state": "ready",
        "progress": None,
        "memory_bytes": 3 * 2**30,
        "measured": True,
        "speed": 33.3,
        "last_error": None,
    }
    return MeshReplica(**{**fields, **changes})


def mesh_node(**changes: Any) -> MeshNode:
    """pc2, with a card and nothing on it."""
    fields: dict[str, Any] = {
        "node": "n1" if changes.get("this_node") else "n2",
        "name": "pc2",
        "this_node": False,
        "state": "ALIVE",
        "since": None,
        "coordinator": False,
        "version": "0.1.0",
        "client_url": None,
        "addresses": ["192.0.2.2:8001"],
        "devices": [device()],
        "replicas": [],
        "transfers": [],
    }
    return MeshNode(**{**fields, **changes})


def mesh(*nodes: MeshNode, **changes: Any) -> MeshDescription:
    states = [each.state for each in nodes]
    fields: dict[str, Any] = {
        "nodes": list(nodes),
        "nodes_left_out": 0,
        "nodes_by_state": {state: states.count(state) for state in states},
        "coordinator": None,
        "moves": [],
        "unserved": [],
    }
    return MeshDescription(**{**fields, **changes})


def model(name: str = "phi-2", **changes: Any) -> ModelDescription:
    fields: dict[str, Any] = {
        "name": name, "aliases": [], "model_kind": "chat", "variants": ["Q8_0", "Q4_K_M"], "description": "small",
        "licence": "MIT", "deployed": False, "replicas_wanted": 0, "replicas_ready": 0, "state": "available", "local": False,
    }  # fmt: skip
    return ModelDescription(**{**fields, **changes})


@pytest.fixture
def make() -> SimpleNamespace:
    """Builders of messages: test folders are no packages, so a test cannot import them from here."""
    return SimpleNamespace(
        chat_result=chat_result,
        device=device,
        replica=replica,
        description=description,
        served_by=SERVED_BY,
        mesh=mesh,
        mesh_node=mesh_node,
        mesh_replica=mesh_replica,
        model=model,
    )


@pytest.fixture
def free_port() -> int:
    """A port of 127.0.0.1 on which nothing listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
