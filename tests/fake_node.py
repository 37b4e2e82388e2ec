"""A node's service that does what a test says, whole enough for every row of the method table."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web

from tars.errors import TarsError, UnknownModel
from tars.messages.admission import (
    JoinParams,
    JoinResult,
    KeyNewParams,
    KeyNewResult,
    KeyParams,
    KeyRevokeResult,
    KeysResult,
    NodeRemoveParams,
    NodeRemoveResult,
    TokenNewParams,
    TokenNewResult,
    TokenParams,
    TokenRevokeResult,
    TokensResult,
)
from tars.messages.base import CallContext
from tars.messages.calls import ExplainCallParams, ExplainCallResult
from tars.messages.files import AddFileParams, PullParams, PullResult, TransfersResult
from tars.messages.inference import (
    ChatMessage,
    ChatParams,
    ChatResult,
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
    TokenizeParams,
    TokenizeResult,
    Usage,
)
from tars.messages.key_claims import AwaitAnswerParams, ClaimKeyParams, KeyResult, SettleKeyParams
from tars.messages.mesh import GossipParams, GossipResult
from tars.messages.mesh_state import MeshDescription, MeshParams
from tars.messages.node import (
    CallCounters,
    DeployParams,
    DeployResult,
    DrainResult,
    ExplainResult,
    ModelsResult,
    NodeDescription,
    PeerDescription,
    PeersResult,
    PingResult,
    PlanResult,
    RemoveResult,
)
from tars.rpc.access import Access, access_middleware
from tars.rpc.http_server import add_rpc_routes, refusal_renderer
from tars.rpc.listener import listen
from tars.rpc.options import RpcOptions
from tars.web.routes import add_web_routes

_SERVED = {
    "finish_reason": "stop",
    "usage": Usage(prompt_tokens=3, completion_tokens=2, total_tokens=5),
    "timings": Timings(),
    "served_by": ServedBy(node="node-1", replica="demo@cpu#0", device="cpu"),
}


class FakeMesh:
    """Members, tokens and keys of a mesh that is none; remembers what it was asked."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, object]] = []

    def join(self, params: JoinParams, source: str) -> JoinResult:
        self.heard.append((source, params))
        return JoinResult(node="node-1", certificate="c", ca_certificate="ca", ca_key="k", records=[])

    async def gossip(self, params: GossipParams, sender: str) -> GossipResult:
        self.heard.append((sender, params))
        return GossipResult(envelopes=[params.envelope])

    def new_token(self, params: TokenNewParams) -> TokenNewResult:
        return TokenNewResult(id="0a1b2c3d", token="t" * 43, expires_ms=params.ttl_seconds * 1000, addresses=[])

    def tokens(self) -> TokensResult:
        return TokensResult(tokens=[])

    def revoke_token(self, params: TokenParams) -> TokenRevokeResult:
        return TokenRevokeResult(id=params.id, revoked=True)

    def new_key(self, params: KeyNewParams) -> KeyNewResult:
        return KeyNewResult(name=params.name, key="tars-key", admin=params.admin)

    def keys(self) -> KeysResult:
        return KeysResult(keys=[])

    def revoke_key(self, params: KeyParams) -> KeyRevokeResult:
        return KeyRevokeResult(name=params.name, revoked=True)

    def remove_node(self, params: NodeRemoveParams) -> NodeRemoveResult:
        return NodeRemoveResult(node=params.node, name="box", removed=True)


class FakeKeys:
    """Knows no idempotency key."""

    async def asked(self, params: ClaimKeyParams | SettleKeyParams | AwaitAnswerParams, sender: str) -> KeyResult:
        return KeyResult(state="unknown")


class FakeNode:
    """Every method answers at once, unless the test sets an error to raise, or a gate to wait at after the first piece."""

    node_id = "node-1"

    def __init__(self) -> None:
        self.mesh = FakeMesh()
        self.keys = FakeKeys()
        self.loads: list[Progress] = []
        """Told before the first piece."""
        self.pieces = ["Hel", "lo"]
        self.error: Exception | None = None
        self.late_error: Exception | None = None
        self.gate: asyncio.Event | None = None
        self.waiting = asyncio.Event()
        self.closed = asyncio.Event()
        self.ended_one = asyncio.Event()
        self.params: list[object] = []
        self.contexts: list[CallContext] = []
        self.started: list[str] = []
        self.ended: list[tuple[str, TarsError | None, str]] = []

    def _met(self, params: object = None, context: CallContext | None = None) -> None:
        self.params.append(params)
        if context is not None:
            self.contexts.append(context)
        if self.error is not None:
            raise self.error

    async def _waited(self) -> None:
        if self.gate is None:
            return
        self.waiting.set()
        try:
            await self.gate.wait()
        except (asyncio.CancelledError, GeneratorExit):
            self.closed.set()
            raise

    async def explain_call(self, params: ExplainCallParams, context: CallContext) -> ExplainCallResult:
        self._met(params, context)
        return ExplainCallResult(calls=[], text=f"Call {params.id}")

    def ping(self) -> PingResult:
        self._met()
        return PingResult(node=self.node_id, version="0.1", state="ready")

    async def describe(self) -> NodeDescription:
        self._met()
        await self._waited()
        return NodeDescription(
            node=self.node_id,
            name="box",
            version="0.1",
            state="ready",
            started_at=1.0,
            uptime_seconds=2.0,
            platform="test",
            wsl2=False,
            devices=[],
            replicas=[],
            calls=CallCounters(),
            recent_errors=[],
        )

    def config(self) -> dict[str, object]:
        return {}

    async def drain(self) -> DrainResult:
        self._met()
        return DrainResult(state="draining", active_calls=0)

    async def resume(self) -> DrainResult:
        self._met()
        return DrainResult(state="ready", active_calls=0)

    def peers(self) -> PeersResult:
        self._met()
        peer = PeerDescription(node=self.node_id, name="box", state="ALIVE", addresses=[], coordinator=True)
        return PeersResult(peers=[peer])

    def describe_mesh(self, params: MeshParams) -> MeshDescription:
        self.params.append(params)
        return MeshDescription(nodes=[], nodes_left_out=0, nodes_by_state={}, coordinator=None, moves=[], unserved=[])

    async def plan(self) -> PlanResult:
        self._met()
        return PlanResult(assignments=[], refusals=[], devices=[])

    async def explain(self, model: str) -> ExplainResult:
        self._met(model)
        return ExplainResult(
            model=model, deployed=False, assignments=[], verdicts=[], remedy=None, replicas=[], text="not here"
        )

    def models(self) -> ModelsResult:
        self._met()
        return ModelsResult(models=[])

    async def deploy(self, params: DeployParams) -> DeployResult:
        self._met(params)
        return DeployResult(model=params.model, accepted=True, assignments=[])

    async def pull(self, params: PullParams) -> PullResult:
        self._met(params)
        return PullResult(
            model=params.model, variant="Q8_0", size_bytes=1, sha256="0" * 64, sources=["box"], seconds=0.1
        )

    async def add_file(self, params: AddFileParams) -> PullResult:
        self._met(params)
        return PullResult(
            model=params.model, variant="Q8_0", size_bytes=1, sha256="0" * 64, sources=["this PC"], seconds=0.1
        )

    async def transfers(self) -> TransfersResult:
        self._met(None)
        return TransfersResult(transfers=[])

    async def remove(self, model: str) -> RemoveResult:
        self._met(model)
        if model == "nobody":
            raise UnknownModel("no such model", details={"known": ["demo"]})
        return RemoveResult(model=model, removed=True)

    async def chat(self, params: ChatParams, call: CallContext) -> AsyncIterator[Delta | Progress | ChatResult]:
        for progress in self.loads:
            yield progress
        async for delta in self._pieces(params, call):
            yield delta
        message = ChatMessage(role="assistant", content="".join(self.pieces))
        yield ChatResult(model="demo", message=message, **_SERVED)

    async def complete(self, params: CompleteParams, call: CallContext) -> AsyncIterator[Delta | CompleteResult]:
        async for delta in self._pieces(params, call):
            yield delta
        yield CompleteResult(model="demo", text="".join(self.pieces), **_SERVED)

    async def _pieces(self, params: object, call: CallContext) -> AsyncIterator[Delta]:
        self._met(params, call)
        for index, piece in enumerate(self.pieces):
            yield Delta(text=piece, token_ids=[index])
            if index == 0:
                await self._waited()
        if self.late_error is not None:
            raise self.late_error

    async def embed(self, params: EmbedParams, call: CallContext) -> EmbedResult:
        self._met(params, call)
        await self._waited()
        texts = [params.input] if isinstance(params.input, str) else params.input
        return EmbedResult(
            model="minilm",
            embeddings=[[1.0, 0.0] for _ in texts],
            dimensions=2,
            truncated=[],
            usage=Usage(prompt_tokens=len(texts), total_tokens=len(texts)),
            timings=Timings(),
            served_by=ServedBy(node=self.node_id, replica="minilm@cpu#0", device="cpu"),
        )

    async def rerank(self, params: RerankParams, call: CallContext) -> RerankResult:
        self._met(params, call)
        await self._waited()
        return RerankResult(
            model="reranker",
            results=[Scored(index=index, score=0.5) for index in range(len(params.documents))],
            truncated=[],
            usage=Usage(prompt_tokens=4, total_tokens=4),
            timings=Timings(),
            served_by=ServedBy(node=self.node_id, replica="reranker@cpu#0", device="cpu"),
        )

    async def tokenize(self, params: TokenizeParams, call: CallContext) -> TokenizeResult:
        self._met(params, call)
        return TokenizeResult(model="demo", tokens=[1, 2], count=2)

    def call_started(self, method: str) -> None:
        self.started.append(method)

    def call_ended(self, method: str, error: TarsError | None, trace_id: str) -> None:
        self.ended.append((method, error, trace_id))
        self.ended_one.set()


@asynccontextmanager
async def listening(node: FakeNode, *, every_face: bool = False) -> AsyncIterator[str]:
    """The node behind a real port, open to this PC; its URL. `every_face`: the web's routes too, and not JSON-RPC's alone."""
    options = RpcOptions()
    access = Access(options.access)
    app = web.Application()
    app.middlewares.append(access_middleware(access, refusal_renderer(add_rpc_routes(app, node, options))))
    if every_face:
        add_web_routes(app, node, options)
    listener = await listen(app, "127.0.0.1", 0, access, shutdown_seconds=1.0)
    try:
        yield listener.url
    finally:
        await listener.close()
