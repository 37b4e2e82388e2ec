"""Which part of the node answers which row of the method table.

Law of this file: one line a method, no logic. A plain function is for what never waits; what streams is an async iterator.
"""

from __future__ import annotations

from functools import cache

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
from tars.messages.base import CallContext, NoParams
from tars.messages.calls import ExplainCallParams, ExplainCallResult
from tars.messages.files import AddFileParams, PullParams, PullResult, TransfersResult
from tars.messages.inference import (
    EmbedParams,
    EmbedResult,
    RerankParams,
    RerankResult,
    TokenizeParams,
    TokenizeResult,
)
from tars.messages.key_claims import AwaitAnswerParams, ClaimKeyParams, KeyResult, SettleKeyParams
from tars.messages.mesh import GossipParams, GossipResult
from tars.messages.mesh_state import MeshDescription, MeshParams
from tars.messages.node import (
    DeployParams,
    DeployResult,
    DrainResult,
    ExplainResult,
    ModelParams,
    ModelsResult,
    NodeDescription,
    PeersResult,
    PingResult,
    PlanResult,
    RemoveResult,
)
from tars.rpc.dispatcher import Handler
from tars.rpc.openrpc import openrpc_document
from tars.serving.service import NodeService

_document = cache(openrpc_document)
"""Made once: it takes a tenth of a second."""


def handlers_of(service: NodeService) -> dict[str, Handler]:
    """The table's handlers, bound to one node."""
    document = _document()

    def discover(params: NoParams) -> dict[str, object]:
        return document

    def ping(params: NoParams) -> PingResult:
        return service.ping()

    async def describe(params: NoParams, context: CallContext) -> NodeDescription:
        return await service.describe()

    async def drain(params: NoParams, context: CallContext) -> DrainResult:
        return await service.drain()

    async def resume(params: NoParams, context: CallContext) -> DrainResult:
        return await service.resume()

    def peers(params: NoParams) -> PeersResult:
        return service.peers()

    def describe_mesh(params: MeshParams) -> MeshDescription:
        return service.describe_mesh(params)

    async def plan(params: NoParams, context: CallContext) -> PlanResult:
        return await service.plan()

    async def explain(params: ModelParams, context: CallContext) -> ExplainResult:
        return await service.explain(params.model)

    async def explain_call(params: ExplainCallParams, context: CallContext) -> ExplainCallResult:
        return await service.explain_call(params, context)

    async def join(params: JoinParams, context: CallContext) -> JoinResult:
        return service.mesh.join(params, context.source)

    async def gossip(params: GossipParams, context: CallContext) -> GossipResult:
        return await service.mesh.gossip(params, context.peer or "")

    async def about_key(
        params: ClaimKeyParams | SettleKeyParams | AwaitAnswerParams, context: CallContext
    ) -> KeyResult:
        return await service.keys.asked(params, context.peer or "")

    def token_new(params: TokenNewParams) -> TokenNewResult:
        return service.mesh.new_token(params)

    def token_list(params: NoParams) -> TokensResult:
        return service.mesh.tokens()

    def token_revoke(params: TokenParams) -> TokenRevokeResult:
        return service.mesh.revoke_token(params)

    def key_new(params: KeyNewParams) -> KeyNewResult:
        return service.mesh.new_key(params)

    def key_list(params: NoParams) -> KeysResult:
        return service.mesh.keys()

    def key_revoke(params: KeyParams) -> KeyRevokeResult:
        return service.mesh.revoke_key(params)

    def remove_node(params: NodeRemoveParams) -> NodeRemoveResult:
        return service.mesh.remove_node(params)

    def models(params: NoParams) -> ModelsResult:
        return service.models()

    async def deploy(params: DeployParams, context: CallContext) -> DeployResult:
        return await service.deploy(params)

    async def pull(params: PullParams, context: CallContext) -> PullResult:
        return await service.pull(params)

    async def add_file(params: AddFileParams, context: CallContext) -> PullResult:
        return await service.add_file(params)

    async def transfers(params: NoParams, context: CallContext) -> TransfersResult:
        return await service.transfers()

    async def remove(params: ModelParams, context: CallContext) -> RemoveResult:
        return await service.remove(params.model)

    async def embed(params: EmbedParams, context: CallContext) -> EmbedResult:
        return await service.embed(params, context)

    async def rerank(params: RerankParams, context: CallContext) -> RerankResult:
        return await service.rerank(params, context)

    async def tokenize(params: TokenizeParams, context: CallContext) -> TokenizeResult:
        return await service.tokenize(params, context)

    return {
        "rpc.discover": discover,
        "node.ping": ping,
        "node.describe": describe,
        "node.drain": drain,
        "node.resume": resume,
        "mesh.peers": peers,
        "mesh.describe": describe_mesh,
        "mesh.plan": plan,
        "mesh.explain": explain,
        "mesh.join": join,
        "mesh.gossip": gossip,
        "calls.explain": explain_call,
        "mesh.claim": about_key,
        "mesh.settle": about_key,
        "mesh.await_answer": about_key,
        "mesh.token_new": token_new,
        "mesh.token_list": token_list,
        "mesh.token_revoke": token_revoke,
        "mesh.key_new": key_new,
        "mesh.key_list": key_list,
        "mesh.key_revoke": key_revoke,
        "mesh.remove": remove_node,
        "models.list": models,
        "models.deploy": deploy,
        "models.pull": pull,
        "models.add_file": add_file,
        "models.transfers": transfers,
        "models.remove": remove,
        "inference.chat": service.chat,
        "inference.complete": service.complete,
        "inference.embed": embed,
        "inference.rerank": rerank,
        "inference.tokenize": tokenize,
    }
