"""Real nodes in one process that know each other: the real HTTP stack, router and mesh fleet; only the workers are scripted.

Each has a listener of its own on loopback. What they know of each other (adverts, wishes, who is alive) is set by the test.
"""

import asyncio
import base64
import struct
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

from aiohttp import web
from fake_node import FakeNode

from tars.core.mesh_messages import MemberState
from tars.core.records import NodeAdvert, ReplicaReport, Wish
from tars.core.routing import Candidate
from tars.core.types import (
    Assignment,
    Bytes,
    Deployment,
    DeviceId,
    DeviceKind,
    DeviceSnapshot,
    MemoryEstimate,
    ModelEntry,
    ModelKind,
    NodeId,
    NodeSnapshot,
    ReplicaId,
    ReplicaState,
    RuntimeSettings,
)
from tars.errors import StillLoading
from tars.messages.inference import (
    CompleteParams,
    Delta,
    Embedded,
    EmbedParams,
    Generated,
    Reranked,
    RerankParams,
    ServedBy,
    Timings,
    Tokenized,
    TokenizeParams,
    Usage,
)
from tars.rpc.access import CALLER, ROLE, Access, access_middleware
from tars.rpc.http_client import RpcConnection
from tars.rpc.http_server import PEER, add_rpc_routes, refusal_renderer
from tars.rpc.listener import listen
from tars.rpc.method_table import Role
from tars.rpc.options import RpcOptions
from tars.serving.inference import Inference
from tars.serving.mesh_fleet import MeshFleet
from tars.serving.router import Router, ServedModel


@dataclass
class ScriptedReplica:
    """Answers as it is told: `pieces` for a generation, an error from `failures` while there is one, `gate` after the first piece."""

    id: str
    model: str
    kind: ModelKind = ModelKind.CHAT
    state: ReplicaState = ReplicaState.READY
    speed: float | None = 50.0
    slots: int = 4
    pieces: tuple[Delta, ...] = (Delta(text="Hel", token_ids=[1]), Delta(text="lo", token_ids=[2]))
    end: Generated | None = None
    failures: list = field(default_factory=list)
    gate: asyncio.Event | None = None
    report: dict = field(default_factory=dict)
    """More of what its node advertises of it."""
    started: asyncio.Event = field(default_factory=asyncio.Event)
    closed: asyncio.Event = field(default_factory=asyncio.Event)
    works: list = field(default_factory=list)
    calls: list = field(default_factory=list)
    running: int = 0

    async def run(self, work, call, resume=None):
        self.works.append(work)
        self.calls.append(call)
        self.running += 1
        self.started.set()
        try:
            if self.failures:
                raise self.failures.pop(0)
            match work:
                case EmbedParams():
                    await self._wait()
                    texts = [work.input] if isinstance(work.input, str) else work.input
                    vectors = [base64.b64encode(struct.pack("<2f", len(text), 0.5)).decode() for text in texts]
                    yield Embedded(
                        vectors=vectors, dimensions=2, truncated=[0], prompt_tokens=len(texts), timings=Timings()
                    )
                case RerankParams():
                    scores = [float(len(document)) for document in work.documents]
                    yield Reranked(scores=scores, truncated=[1], prompt_tokens=7, timings=Timings())
                case TokenizeParams():
                    yield Tokenized(tokens=[ord(letter) for letter in work.text])
                case _:
                    for index, piece in enumerate(self.pieces):
                        yield piece
                        if index == 0:
                            await self._wait()
                    yield self.end or generated("".join(piece.text for piece in self.pieces))
        finally:
            self.running -= 1
            self.closed.set()

    async def _wait(self):
        if self.gate is not None:
            await self.gate.wait()


def generated(text, **more):
    usage = Usage(prompt_tokens=3, completion_tokens=2, total_tokens=5)
    return Generated(text=text, finish_reason="stop", usage=usage, timings=Timings(), **more)


@dataclass
class _Target:
    replica: ScriptedReplica
    served_by: ServedBy

    def run(self, work, call, resume=None):
        return self.replica.run(work, call, resume)


class OwnFleet:
    """A node's own scripted replicas, as `LocalFleet` shows real ones."""

    def __init__(self, node):
        self.node = node

    def models(self):
        return [each for each in self.node.wanted if not isinstance(each, Wish)]

    def loadable(self):
        return ()

    def candidates(self, model):
        return [
            Candidate(
                ReplicaId(each.id),
                model,
                each.kind,
                each.state,
                node=self.node.id,
                active=each.running,
                slots=each.slots,
                speed=each.speed,
                file_sha256=f"file of {each.model}",
            )
            for each in self.node.replicas
            if each.model == model
        ]

    def target(self, replica):
        found = {each.id: each for each in self.node.replicas}[replica]
        return _Target(found, ServedBy(node=self.node.id, replica=replica, device=f"Card of {self.node.name}"))

    async def wait_change(self):
        await self.node.peers.mesh.news.wait()

    async def ask_to_load(self, model):
        """Whoever tests a load makes it ready."""

    def not_ready(self, model):
        return StillLoading(f"{model} is planned", retry_after_ms=1000)


class PretendPeers:
    """`mesh_fleet.Peers` as one node has it."""

    def __init__(self, node, mesh):
        self.node = node
        self.mesh = mesh
        self.states = {}
        self.extra = {}
        """Adverts that stand for what is not (any longer) true."""

    @property
    def version(self):
        return self.mesh.version

    def adverts(self):
        return {**{each.id: each.advert() for each in self.mesh.nodes}, **self.extra}

    def wishes(self):
        return {each.deployment.model: each for each in self.mesh.wishes}

    def state(self, node):
        return self.states.get(node, MemberState.ALIVE)

    def connection(self, node):
        return self.node.connections[node]


@web.middleware
async def _peers_are_known(request, handler):
    """What a certificate proves between real nodes stands in place of a key here."""
    node = request.headers.get("Authorization", "").removeprefix("Bearer ")
    if node:
        request[CALLER], request[ROLE], request[PEER] = "mesh", Role.PEER, node
    return await handler(request)


class MeshNode(FakeNode):
    """A node whose inference is real down to the target."""

    def __init__(self, mesh, name, id=None):
        super().__init__()
        self.name = name
        self.id = self.node_id = id or NodeId(f"id-of-{name}")
        self.replicas = []
        self.wanted = []
        self.draining = False
        self.peers = PretendPeers(self, mesh)
        self.router = Router(MeshFleet(self.id, OwnFleet(self), self.peers))
        self.inference = Inference(self.router)
        self.chat = self.inference.chat
        self.complete = self.inference.complete
        self.embed = self.inference.embed
        self.rerank = self.inference.rerank
        self.tokenize = self.inference.tokenize
        self.connections = {}
        self.listener = None
        self.client = None

    def advert(self):
        """What it says of itself."""
        device = DeviceSnapshot(
            DeviceId(f"{self.id}/gpu-0"), self.id, DeviceKind.CUDA, f"Card of {self.name}", Bytes.gib(12), Bytes.gib(8)
        )
        return NodeAdvert(
            NodeSnapshot(self.id, self.name, (device,), draining=self.draining),
            replicas=tuple(report_of(each, self.id) for each in self.replicas),
        )

    async def start(self):
        options = RpcOptions()
        access = Access(options.access)
        app = web.Application()
        dispatcher = add_rpc_routes(app, self, options)
        app.middlewares.append(access_middleware(access, refusal_renderer(dispatcher), frozenset()))
        app.middlewares.append(_peers_are_known)
        self.listener = await listen(app, "127.0.0.1", 0, access, shutdown_seconds=0.1)
        self.client = RpcConnection(self.listener.url, timeout=20.0)

    async def die(self):
        """The process is gone: its port closes, and what runs there is cut."""
        if self.listener is not None:
            for connection in list(self.listener._runner.server.connections):
                connection.force_close()
                if connection.transport is not None:
                    connection.transport.abort()
            await self.listener.close()
            self.listener = None

    async def close(self):
        for connection in self.connections.values():
            await connection.close()
        if self.client is not None:
            await self.client.close()
        if self.listener is not None:
            await self.listener.close()


def report_of(replica, node):
    """A scripted replica as its node advertises it."""
    assignment = Assignment(
        ReplicaId(replica.id),
        replica.model,
        "Q4_K_M",
        DeviceId(f"{node}/gpu-0"),
        node,
        MemoryEstimate(Bytes(1), Bytes(0), Bytes(0), Bytes(0)),
        RuntimeSettings(4096, slots=replica.slots, kv_tokens=4096),
        "",
    )
    return replace(
        ReplicaReport(
            assignment,
            replica.kind,
            replica.state,
            slots=replica.slots,
            file_sha256=f"file of {replica.model}",
            speed=replica.speed,
        ),
        **replica.report,
    )


@dataclass
class PretendMesh:
    """All nodes, and what is wanted."""

    nodes: list = field(default_factory=list)
    wishes: list = field(default_factory=list)
    version: int = 0
    news: asyncio.Event = field(default_factory=asyncio.Event)

    def want(self, model, kind=ModelKind.CHAT, aliases=()):
        """As `models.deploy` on any node would."""
        self.wishes.append(Wish(Deployment(model), ModelEntry(model, kind, (), aliases)))
        self.changed()

    def changed(self):
        """Adverts or wishes did."""
        self.version += 1
        self.news.set()
        self.news = asyncio.Event()


@asynccontextmanager
async def mesh_of(*names):
    """Nodes that listen and know each other; yields the mesh. Every one of them ends, and no reservation is left."""
    mesh = PretendMesh()
    mesh.nodes = [MeshNode(mesh, name) for name in names]
    try:
        for node in mesh.nodes:
            await node.start()
        for node in mesh.nodes:
            node.connections = {
                each.id: RpcConnection(each.listener.url, api_key=node.id) for each in mesh.nodes if each is not node
            }
        yield mesh
    finally:
        for node in mesh.nodes:
            await node.close()
    for node in mesh.nodes:
        for other in mesh.nodes:
            for replica in other.replicas:
                assert node.router.state.ledger.in_flight(replica.id) == 0, (node.name, replica.id)
                assert replica.running == 0, replica.id


def served(model, kind=ModelKind.CHAT):
    """A model that a node's own fleet knows."""
    return ServedModel(model, kind, ())


PROMPT = CompleteParams(prompt="once upon a time", model="m")
