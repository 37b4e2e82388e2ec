"""A node's service that does what a test says, and a real server on loopback in front of it."""

from __future__ import annotations

import asyncio
import base64
import shutil
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from types import SimpleNamespace

import aiohttp
import pytest
from aiohttp import web

from tars.errors import TarsError, UnknownModel
from tars.messages.base import CallContext
from tars.messages.inference import (
    ChatMessage,
    ChatParams,
    ChatResult,
    Choice,
    CompleteParams,
    CompleteResult,
    Delta,
    EmbedParams,
    EmbedResult,
    Progress,
    RerankParams,
    RerankResult,
    Scored,
    ServedBy,
    Timings,
    TokenLogprob,
    ToolCall,
    ToolCallDelta,
    Usage,
)
from tars.messages.mesh_state import MeshDescription, MeshNode, MeshParams, MeshReplica
from tars.messages.node import (
    CallCounters,
    DeviceDescription,
    LoadedInfo,
    LoadProgress,
    MeasuredSpeeds,
    ModelDescription,
    ModelsResult,
    NodeDescription,
    PeerDescription,
    PeersResult,
    PingResult,
    RecentError,
    ReplicaDescription,
)
from tars.rpc.access import Access, access_middleware
from tars.rpc.listener import Listener, listen
from tars.rpc.options import AccessOptions, RpcOptions
from tars.serving.vectors import written
from tars.web.routes import PUBLIC_PATHS, add_web_routes, render_refusal
from tars.web.status_feed import StatusFeed

GIB = 2**30


class FakeService:
    """Part of `NodeService`: what the faces use. Texts to say, errors to raise and a gate to wait at are set by the test."""

    node_id = "node-1"

    def __init__(self) -> None:
        self.pieces = ["Hello", ", ", "wörld"]
        self.logprobs = False
        self.reasoning: str | None = None
        """What each chat answer thinks first."""
        self.tool_call: ToolCall | None = None
        """What each chat answer calls last; it comes in two pieces."""
        self.finish_reason = "stop"
        self.error: TarsError | Exception | None = None
        """Raised before the first piece."""
        self.late_error: TarsError | Exception | None = None
        self.loads: list[Progress] = []
        """How far the model is, told before its first piece."""
        """Raised after the last piece, instead of the result."""
        self.gate: asyncio.Event | None = None
        """Waited for after the first piece."""
        self.waiting = asyncio.Event()
        """Set while a stream waits at the gate, or in `embed`."""
        self.closed = asyncio.Event()
        """Set when a stream was closed before its end."""
        self.all_ended = asyncio.Event()
        """Set while no call is under way, after one was."""
        self.unsayable = False
        """The second piece holds a lone surrogate, as no engine should give."""
        self.streams: list[AsyncIterator[object]] = []
        self.params: list[ChatParams | CompleteParams | EmbedParams | RerankParams] = []
        self.calls: list[CallContext] = []
        self.started: list[str] = []
        self.ended: list[tuple[str, TarsError | None, str]] = []
        self.description = describe_node()
        self.known_models = [
            model_entry("help-desk", "chat", aliases=["demo"]),
            model_entry("all-MiniLM-L6-v2", "embedding"),
            model_entry("mistral-7b", "chat", deployed=False),
        ]
        self.state = "ready"
        self.described = 0
        self.mesh_description = describe_mesh(mesh_node(node="node-1", name="living-room", this_node=True))
        """A node alone, unless the test says otherwise."""
        self.mesh_described = 0

    def ping(self) -> PingResult:
        return PingResult(node=self.node_id, version="0.1", state=self.state)

    async def describe(self) -> NodeDescription:
        self.described += 1
        return self.description

    def config(self) -> dict[str, object]:
        return {"security": {"api_key": "***"}}

    def peers(self) -> PeersResult:
        return PeersResult(
            peers=[
                PeerDescription(
                    node=each.node,
                    name=each.name,
                    state=each.state,
                    addresses=each.addresses,
                    coordinator=each.coordinator,
                    version=each.version,
                    client_url=each.client_url,
                    since=each.since,
                )
                for each in self.mesh_description.nodes
            ]
        )

    def describe_mesh(self, params: MeshParams) -> MeshDescription:
        self.mesh_described += 1
        return self.mesh_description

    def models(self) -> ModelsResult:
        return ModelsResult(models=self.known_models)

    def call_started(self, method: str) -> None:
        self.started.append(method)

    def call_ended(self, method: str, error: TarsError | None, trace_id: str) -> None:
        self.ended.append((method, error, trace_id))
        if len(self.ended) == len(self.started):
            self.all_ended.set()

    def chat(self, params: ChatParams, call: CallContext) -> AsyncIterator[Delta | ChatResult]:
        return self._kept(self._chat(params, call))

    def complete(self, params: CompleteParams, call: CallContext) -> AsyncIterator[Delta | CompleteResult]:
        return self._kept(self._complete(params, call))

    def _kept(self, stream):
        """Held until the test ends: a stream that a face forgets to close is not closed by the garbage collector instead."""
        self.streams.append(stream)
        return stream

    async def _chat(self, params: ChatParams, call: CallContext) -> AsyncIterator[Delta | ChatResult]:
        async with aclosing(self._generate(params, call)) as items:
            async for item in items:
                if isinstance(item, Delta | Progress):
                    yield item
                else:
                    said = ChatMessage(
                        role="assistant",
                        content="".join(self.pieces),
                        reasoning=self.reasoning,
                        tool_calls=[] if self.tool_call is None else [self.tool_call],
                    )
                    yield ChatResult(model="help-desk", message=said, **item)

    async def _complete(self, params: CompleteParams, call: CallContext) -> AsyncIterator[Delta | CompleteResult]:
        async with aclosing(self._generate(params, call)) as items:
            async for item in items:
                if isinstance(item, Delta | Progress):
                    yield item
                else:
                    yield CompleteResult(model="help-desk", text="".join(self.pieces), **item)

    async def _generate(self, params, call):
        self.params.append(params)
        self.calls.append(call)
        if self.error is not None:
            raise self.error
        if params.model not in (None, "help-desk", "demo"):
            raise UnknownModel("no such model", details={"known": ["help-desk"]})
        try:
            for progress in self.loads:
                yield progress
            if self.reasoning is not None:
                for answer in range(params.n):
                    yield Delta(text="", index=answer, reasoning=self.reasoning)
            for index, piece in enumerate(self.pieces):
                for answer in range(params.n):
                    logprobs = [logprob(piece)] if self.logprobs else None
                    delta = Delta(text=piece, token_ids=[index], logprobs=logprobs, index=answer)
                    if self.unsayable and index == 1:
                        delta = delta.model_copy(update={"text": "\ud800"})
                    yield delta
                if self.gate is not None:
                    self.waiting.set()
                    await self.gate.wait()
        except (GeneratorExit, asyncio.CancelledError):
            self.closed.set()
            raise
        if self.late_error is not None:
            raise self.late_error
        if self.tool_call is not None:
            called = self.tool_call
            for answer in range(params.n):
                for piece in (
                    ToolCallDelta(index=0, id=called.id, name=called.name),
                    ToolCallDelta(index=0, arguments=called.arguments),
                ):
                    yield Delta(text="", index=answer, tool_calls=[piece])
        yield {
            "finish_reason": self.finish_reason,
            "usage": Usage(
                prompt_tokens=7, completion_tokens=len(self.pieces), total_tokens=7 + len(self.pieces), cached_tokens=5
            ),
            "timings": Timings(),
            "served_by": ServedBy(node=self.node_id, replica="help-desk@cpu#0", device="cpu"),
            "logprobs": [logprob(piece) for piece in self.pieces] if self.logprobs else None,
            "further": [
                Choice(
                    index=index,
                    text="".join(self.pieces),
                    finish_reason="length",
                    reasoning=self.reasoning,
                    tool_calls=[] if self.tool_call is None else [self.tool_call],
                )
                for index in range(1, params.n)
            ],
        }

    async def embed(self, params: EmbedParams, call: CallContext) -> EmbedResult:
        self.params.append(params)
        self.calls.append(call)
        if self.error is not None:
            raise self.error
        if self.gate is not None:
            self.waiting.set()
            try:
                await self.gate.wait()
            except asyncio.CancelledError:
                self.closed.set()
                raise
        count = 1 if isinstance(params.input, str) else len(params.input)
        vectors = [[0.6, 0.8, float(index)][: params.dimensions] for index in range(count)]
        form = "<{}f" if params.output_type == "float" else "<{}b"
        packed = [
            base64.b64encode(
                struct.pack(form.format(len(vector)), *(map(int, vector) if form == "<{}b" else vector))
            ).decode()
            for vector in vectors
        ]
        return EmbedResult.model_construct(
            model="all-MiniLM-L6-v2",
            embeddings=packed if params.encoding_format == "base64" else (await written(packed, params.output_type))[0],
            dimensions=len(vectors[0]),
            truncated=[],
            usage=Usage(prompt_tokens=4, total_tokens=4),
            timings=Timings(),
            served_by=ServedBy(node=self.node_id, replica="all-MiniLM-L6-v2@cpu#0", device="cpu"),
        )

    async def rerank(self, params: RerankParams, call: CallContext) -> RerankResult:
        self.params.append(params)
        self.calls.append(call)
        if self.error is not None:
            raise self.error
        order = list(range(len(params.documents)))[::-1][: params.top_n]
        return RerankResult(
            model="reranker",
            results=[
                Scored(
                    index=index,
                    score=(index + 1) / len(params.documents),
                    document=params.documents[index] if params.return_documents else None,
                )
                for index in order
            ],
            truncated=[],
            usage=Usage(prompt_tokens=4, total_tokens=4),
            timings=Timings(),
            served_by=ServedBy(node=self.node_id, replica="reranker@cpu#0", device="cpu"),
        )


def logprob(token: str) -> TokenLogprob:
    return TokenLogprob(token=token, token_id=1, logprob=-0.25, top=[(token, -0.25), ("other", -1.5)])


def model_entry(name: str, kind: str, *, aliases: list[str] | None = None, deployed: bool = True) -> ModelDescription:
    return ModelDescription(
        name=name,
        aliases=aliases or [],
        model_kind=kind,
        variants=["Q4_K_M"],
        description="",
        licence="",
        deployed=deployed,
        replicas_wanted=int(deployed),
        replicas_ready=int(deployed),
        state="ready" if deployed else "available",
        local=True,
    )


def describe_device(**changes: object) -> DeviceDescription:
    said: dict[str, object] = {
        "id": "node-1/gpu-1",
        "kind": "cuda",
        "name": "NVIDIA GeForce RTX 3060",
        "simulated": False,
        "memory_total_bytes": 12 * GIB,
        "memory_free_bytes": 6 * GIB,
        "memory_held_bytes": 5 * GIB,
        "memory_capacity_bytes": 11 * GIB,
        "unified_memory": False,
        "compute_capability": "8.6",
        "precision": "bf16",
        "temperature_celsius": 61,
        "utilisation_percent": 87,
        "power_watts": 142.5,
        "driver": "550.54",
        "notes": [],
    }
    return DeviceDescription.model_validate(said | changes)


def describe_replica(**changes: object) -> ReplicaDescription:
    info = LoadedInfo(
        model_kind="chat",
        memory_bytes=4_900_000_000,
        load_seconds=3.2,
        context=4096,
        slots=4,
        backend="llama.cpp cuda",
        speeds=MeasuredSpeeds(decode_tokens_per_second=52.6),
    )
    said: dict[str, object] = {
        "id": "help-desk@gpu-1#0",
        "model": "help-desk",
        "model_kind": "chat",
        "variant": "Q4_K_M",
        "device": "node-1/gpu-1",
        "device_name": "NVIDIA GeForce RTX 3060",
        "simulated": False,
        "state": "ready",
        "progress": None,
        "estimated_bytes": 5 * GIB,
        "info": info,
        "restarts": 0,
        "active_calls": 1,
        "queued_calls": 0,
        "calls_total": 311,
        "last_error": None,
        "reason": "best fit",
    }
    return ReplicaDescription.model_validate(said | changes)


def describe_node(**changes: object) -> NodeDescription:
    loading = describe_replica(
        id="all-MiniLM-L6-v2@sim-0#0",
        model="all-MiniLM-L6-v2",
        model_kind="embedding",
        variant="fp32",
        device="node-1/sim-0",
        device_name="GTX 1660 Super",
        simulated=True,
        state="loading",
        progress=LoadProgress(stage="read", percent=40),
        info=None,
        estimated_bytes=91_000_000,
        active_calls=0,
        calls_total=0,
    )
    simulated = describe_device(
        id="node-1/sim-0",
        kind="cpu",
        name="GTX 1660 Super",
        simulated=True,
        memory_total_bytes=6 * GIB,
        memory_free_bytes=6 * GIB,
        memory_held_bytes=0,
        memory_capacity_bytes=5 * GIB,
        compute_capability="7.5",
        precision="fp32",
        temperature_celsius=None,
        utilisation_percent=None,
        power_watts=None,
        driver=None,
        notes=["Declared in the configuration; it computes on this node's CPU."],
    )
    said: dict[str, object] = {
        "node": "node-1",
        "name": "living-room",
        "version": "0.1.0",
        "state": "ready",
        "started_at": 1_760_000_000.0,
        "uptime_seconds": 8_100.0,
        "platform": "Linux x86_64",
        "wsl2": False,
        "devices": [describe_device(), simulated],
        "replicas": [describe_replica(), loading],
        "calls": CallCounters(
            total=312,
            failed=3,
            active=1,
            by_method={"inference.chat": 300, "inference.embed": 12},
            with_key={"run": 7, "repeated": 2},
        ),
        "recent_errors": [
            RecentError(
                at=1_760_008_000.0,
                method="inference.embed",
                error_kind="still_loading",
                message="all-MiniLM-L6-v2 is loading (read, 40 %); try again in 2 s",
                trace_id="4bf92f3577b34da6a3ce929d0e0e4736",
            )
        ],
    }
    return NodeDescription.model_validate(said | changes)


def mesh_node(**changes: object) -> MeshNode:
    """A peer: alive, with one device and nothing on it."""
    said: dict[str, object] = {
        "node": "node-2",
        "name": "attic",
        "this_node": False,
        "state": "ALIVE",
        "since": 1_760_000_000.0,
        "coordinator": bool(changes.get("this_node")),
        "version": "0.1.0",
        "client_url": None,
        "addresses": ["192.0.2.7:8001"],
        "devices": [describe_device(id=f"{changes.get('node', 'node-2')}/gpu-1", name="NVIDIA GeForce RTX 4090")],
        "replicas": [],
        "transfers": [],
    }
    return MeshNode.model_validate(said | changes)


def mesh_replica(**changes: object) -> MeshReplica:
    said: dict[str, object] = {
        "id": "mistral-7b@gpu-1#0",
        "model": "mistral-7b",
        "model_kind": "chat",
        "variant": "Q4_K_M",
        "device": "node-2/gpu-1",
        "device_name": "NVIDIA GeForce RTX 4090",
        "simulated": False,
        "state": "ready",
        "progress": None,
        "memory_bytes": 5 * GIB,
        "measured": True,
        "speed": 120.0,
        "last_error": None,
    }
    return MeshReplica.model_validate(said | changes)


def describe_mesh(*nodes: MeshNode, **changes: object) -> MeshDescription:
    """Of these nodes, the first one this node itself."""
    states = [each.state for each in nodes]
    said: dict[str, object] = {
        "nodes": list(nodes),
        "nodes_left_out": 0,
        "nodes_by_state": {state: states.count(state) for state in states},
        "coordinator": next((each.name for each in nodes if each.coordinator), None),
        "moves": [],
        "unserved": [],
    }
    return MeshDescription.model_validate(said | changes)


@pytest.fixture
def make() -> SimpleNamespace:
    """Builders of messages: test folders are no packages, so a test cannot import them from here."""
    return SimpleNamespace(
        mesh=describe_mesh, node=mesh_node, mesh_replica=mesh_replica, device=describe_device, replica=describe_replica
    )


@dataclass
class Node:
    """A server under way, and an HTTP client for it."""

    url: str
    http: aiohttp.ClientSession
    listener: Listener
    feed: StatusFeed
    access: Access = field(repr=False)


Serve = Callable[..., Awaitable[Node]]


@pytest.fixture
def service() -> FakeService:
    return FakeService()


@pytest.fixture
async def serve(service: FakeService) -> AsyncIterator[Serve]:
    """`await serve(options)`: the web faces behind the real access checks and the real listener."""
    async with aiohttp.ClientSession() as http:
        listeners: list[Listener] = []

        async def start(options: RpcOptions | None = None, *, watchers: int = 32, port: int = 0) -> Node:
            options = options or RpcOptions()
            access = Access(options.access)
            feed = StatusFeed(service, interval_seconds=0.05, watchers=watchers)
            app = web.Application(middlewares=[access_middleware(access, render_refusal, PUBLIC_PATHS)])
            add_web_routes(app, service, options, feed=feed)
            listener = await listen(app, "127.0.0.1", port, access)
            listeners.append(listener)
            return Node(listener.url, http, listener, feed, access)

        yield start
        for listener in listeners:
            await listener.close()


@pytest.fixture
async def node(serve: Serve) -> Node:
    return await serve()


@pytest.fixture
def keyed_options() -> RpcOptions:
    """A node that asks for the key `sesame`."""
    return RpcOptions(access=AccessOptions(api_keys={"laptop": "sesame"}))


# --- in a browser -------------------------------------------------------------------------------------------------------

BROWSER_SECONDS = 10.0
"""For anything on the page; it takes a fraction of one. Chromium on a busy machine is the slowest."""
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture
async def browser() -> AsyncIterator[object]:
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("no Chromium on this machine: the status page is not tried in a browser")
    playwright = pytest.importorskip("playwright.async_api", reason="playwright is not installed")
    async with playwright.async_playwright() as driver:
        launched = await driver.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        yield launched
        await launched.close()


@pytest.fixture
async def page(browser) -> AsyncIterator[object]:
    """A page that fails the test when its scripts fail, and that keeps the addresses it asked."""
    opened = await browser.new_page(viewport={"width": 1280, "height": 900})
    opened.set_default_timeout(BROWSER_SECONDS * 1000)
    faults: list[str] = []
    opened.asked = []
    opened.on("pageerror", lambda fault: faults.append(str(fault)))
    opened.on("request", lambda request: opened.asked.append(request.url))
    yield opened
    assert faults == []


LOW_CONTRAST = """() => {
  const parse = (colour) => (colour.match(/[\\d.]+/g) ?? []).map(Number);
  const luminance = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map((part) => (part /= 255) <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = parse(getComputedStyle(at).backgroundColor);
      if (colour.length === 3 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  const low = [];
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const element = texts.currentNode.parentElement;
    if (!texts.currentNode.data.trim() || !element.checkVisibility() || element.closest('.skip, button:disabled')) continue;
    const [a, b] = [luminance(parse(getComputedStyle(element).color)), luminance(behind(element))];
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (contrast < 4.5) low.push(`${texts.currentNode.data.trim()}: ${contrast.toFixed(2)}`);
  }
  return low;
}"""
"""WCAG 2's contrast ratio of every visible text against the nearest opaque background (4.5 is its level AA)."""


@pytest.fixture
def low_contrast() -> str:
    """A script that gives the texts of a page that are hard to read."""
    return LOW_CONTRAST
