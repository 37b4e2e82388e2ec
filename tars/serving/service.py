"""What every face (JSON-RPC, OpenAI, REST, status page) may ask of a node. The composition root implements it; tests fake it.

Law of this file: messages in, messages out; no HTTP, no JSON. Every method raises `TarsError`s and nothing else on purpose.
Streams yield any number of `Delta` and end with exactly one result; closing one (`aclose`) cancels the work.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

from tars.errors import TarsError
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
    ModelsResult,
    NodeDescription,
    PeersResult,
    PingResult,
    PlanResult,
    RemoveResult,
)


class MeshService(Protocol):
    """What administrators and other nodes ask: who is in, and with which keys. `mesh.administration` does it."""

    def join(self, params: JoinParams, source: str) -> JoinResult:
        """Let a node in that came from the address `source`."""
        ...

    async def gossip(self, params: GossipParams, sender: str) -> GossipResult:
        """A packet from the node `sender`, which its certificate proved to be."""
        ...

    def new_token(self, params: TokenNewParams) -> TokenNewResult:
        """A token for one more PC."""
        ...

    def tokens(self) -> TokensResult:
        """This node's tokens."""
        ...

    def revoke_token(self, params: TokenParams) -> TokenRevokeResult:
        """End one early."""
        ...

    def new_key(self, params: KeyNewParams) -> KeyNewResult:
        """An API key for every node."""
        ...

    def keys(self) -> KeysResult:
        """Who has one."""
        ...

    def revoke_key(self, params: KeyParams) -> KeyRevokeResult:
        """End one everywhere."""
        ...

    def remove_node(self, params: NodeRemoveParams) -> NodeRemoveResult:
        """Throw a node out."""
        ...


class KeyService(Protocol):
    """What other nodes ask of idempotency keys. `serving.idempotency` does it."""

    async def asked(self, params: ClaimKeyParams | SettleKeyParams | AwaitAnswerParams, sender: str) -> KeyResult:
        """What this node knows of a key now. `sender`: the node that asks. Raises `InvalidParams` for a claim in another one's name."""
        ...


class NodeService(Protocol):
    """See the module's law."""

    @property
    def node_id(self) -> str:
        """This node's id, for error data."""
        ...

    @property
    def mesh(self) -> MeshService:
        """Members, tokens and keys."""
        ...

    @property
    def keys(self) -> KeyService:
        """Idempotency keys, as peers ask of them."""
        ...

    def ping(self) -> PingResult:
        """Cheap: no probe, no await."""
        ...

    async def describe(self) -> NodeDescription:
        """Devices (fresh within a second), replicas, counters."""
        ...

    def config(self) -> dict[str, object]:
        """The configuration in force, as plain JSON, every secret replaced by `***`."""
        ...

    async def drain(self) -> DrainResult:
        """Give this node's memory back: replicas go elsewhere where they fit; running calls go on. Outlives restarts. Idempotent."""
        ...

    async def resume(self) -> DrainResult:
        """Undo `drain`."""
        ...

    def peers(self) -> PeersResult:
        """The nodes that this node sees, itself included."""
        ...

    def describe_mesh(self, params: MeshParams) -> MeshDescription:
        """Every node with its devices and replicas, as told last. Raises `InvalidParams` for a node that nobody knows."""
        ...

    async def plan(self) -> PlanResult:
        """The plan in force and what it refused."""
        ...

    async def explain(self, model: str) -> ExplainResult:
        """Why here, why not there, what would make it fit."""
        ...

    def models(self) -> ModelsResult:
        """Deployed models first, then what the catalogue knows."""
        ...

    async def deploy(self, params: DeployParams) -> DeployResult:
        """Want a model; raises `DoesNotFit` (and wants nothing) where it fits nowhere."""
        ...

    async def pull(self, params: PullParams) -> PullResult:
        """Fetch a model's file, from peers, else from the hub; returns when it is there."""
        ...

    async def add_file(self, params: AddFileParams) -> PullResult:
        """Take a model file that lies on this PC."""
        ...

    async def transfers(self) -> TransfersResult:
        """Model files on their way to this node."""
        ...

    async def remove(self, model: str) -> RemoveResult:
        """Want it no longer; frees its memory."""
        ...

    def chat(self, params: ChatParams, call: CallContext) -> AsyncIterator[Delta | Progress | ChatResult]:
        """Stream a chat answer. `Progress` comes while the model is being loaded."""
        ...

    def complete(self, params: CompleteParams, call: CallContext) -> AsyncIterator[Delta | Progress | CompleteResult]:
        """Stream a completion."""
        ...

    async def embed(self, params: EmbedParams, call: CallContext) -> EmbedResult:
        """Embed texts."""
        ...

    async def rerank(self, params: RerankParams, call: CallContext) -> RerankResult:
        """Score documents against a query."""
        ...

    async def tokenize(self, params: TokenizeParams, call: CallContext) -> TokenizeResult:
        """Token ids of a text."""
        ...

    async def explain_call(self, params: ExplainCallParams, call: CallContext) -> ExplainCallResult:
        """What became of a call, here or at a peer. Raises `UnknownCall`."""
        ...

    def call_started(self, method: str) -> None:
        """Count a call (faces call this once per call)."""
        ...

    def call_ended(self, method: str, error: TarsError | None, trace_id: str) -> None:
        """Count its end; an error goes to the status page's list."""
        ...
