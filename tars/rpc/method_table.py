"""The one place where a method of the JSON-RPC surface is declared.

Law of this file: a method is a row; a row is data. Validation (`validation.py`), OpenRPC (`openrpc.py`), README's list (below), the
dispatcher and the Python client are made from the rows, so that none of them can disagree. Nothing here runs a method.
`python -m tars.rpc.method_table` prints the list that stands in README between the `<!-- methods -->` markers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from tars.errors import (
    BadGrammar,
    BadModelFile,
    Cancelled,
    DeadlineExceeded,
    DiskFull,
    DoesNotFit,
    Draining,
    IdempotencyConflict,
    InternalError,
    InvalidParams,
    InvalidRequest,
    JoinRefused,
    LimitExceeded,
    MethodNotFound,
    ModelFileMissing,
    NotAMember,
    Overloaded,
    ParseError,
    PeerUnreachable,
    PromptTooLong,
    ReplicaFailed,
    StaleRoute,
    StillLoading,
    TarsError,
    TransferFailed,
    Unauthorized,
    UnknownCall,
    UnknownModel,
    WorkerCrashed,
    WrongModelKind,
)
from tars.errors import Forbidden as ForbiddenError
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
from tars.messages.base import Message, NoParams
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
    ModelParams,
    ModelsResult,
    NodeDescription,
    PeersResult,
    PingResult,
    PlanResult,
    RemoveResult,
)


class Role(StrEnum):
    """What a caller has proved to be."""

    STRANGER = "stranger"
    """On the mesh listener, without a certificate."""
    PEER = "peer"
    """A node of this mesh, by its certificate."""
    CLIENT = "client"
    """By its API key."""
    ADMINISTRATOR = "administrator"
    """By an admin key, a key of the configuration, this PC's operator key; on loopback without any key, everybody."""


CALLERS = frozenset({Role.PEER, Role.CLIENT, Role.ADMINISTRATOR})
"""Who may call most methods."""
_PEERS = frozenset({Role.PEER})
_ADMINISTRATORS = frozenset({Role.ADMINISTRATOR})


@dataclass(frozen=True, slots=True)
class MethodSpec:
    """One method: its name, what it takes and gives, how it fails, and whether it may be repeated or streamed.

    `result` None is "any JSON" (the OpenRPC document). A method with a `delta` streams: each delta travels as a notification
    named `delta_notification`, with the call's id beside the delta's own fields. `positional` names the params in order where
    a method also takes them by position (`"*rest"` collects what is left); TARS's own methods take named params only, the
    specification's examples need both.
    """

    name: str
    summary: str
    params: type[Message] = NoParams
    result: type[Message] | None = None
    errors: tuple[type[TarsError], ...] = ()
    idempotent: bool = True
    """True where a repetition changes nothing more: a client may retry it without an idempotency key."""
    delta: type[Message] | None = None
    delta_notification: str | None = None
    progress: type[Message] | None = None
    """How far something is that the call waits for: such notifications, `progress_notification`, may come before the first delta."""
    progress_notification: str | None = None
    positional: tuple[str, ...] = ()
    roles: frozenset[Role] = CALLERS
    """Who may call it."""

    @property
    def streams(self) -> bool:
        """True where `Accept: text/event-stream` is answered by deltas and then the response."""
        return self.delta is not None

    @property
    def is_inference(self) -> bool:
        """True where a call occupies a replica: such calls are counted against `max_concurrent_calls`."""
        return self.name.startswith("inference.")

    @property
    def is_background(self) -> bool:
        """True for what nodes ask each other all the time. It is not counted among the calls and never refused for want of a place: a busy
        node must not look dead."""
        return self.name in _BACKGROUND


_BACKGROUND = frozenset({"mesh.gossip", "mesh.claim", "mesh.settle", "mesh.await_answer"})

EVERY_CALL: tuple[type[TarsError], ...] = (
    ParseError,
    InvalidRequest,
    MethodNotFound,
    InvalidParams,
    InternalError,
    LimitExceeded,
    Unauthorized,
    ForbiddenError,
    Overloaded,
    DeadlineExceeded,
    Cancelled,
)
"""What any call can meet before, or whatever, its method does; not repeated in the rows."""

_ON_A_REPLICA: tuple[type[TarsError], ...] = (
    UnknownModel,
    WrongModelKind,
    StillLoading,
    ReplicaFailed,
    WorkerCrashed,
    PeerUnreachable,
    StaleRoute,
    Draining,
)
_GENERATING: tuple[type[TarsError], ...] = (*_ON_A_REPLICA, PromptTooLong, BadGrammar, IdempotencyConflict)

_ROWS = (
    MethodSpec("rpc.discover", "The OpenRPC 1.3 document of this node, made from the method table."),
    MethodSpec("node.ping", "Is the node there, and ready? Costs nothing.", result=PingResult),
    MethodSpec("node.describe", "Devices, replicas, measured speeds, counters.", result=NodeDescription),
    MethodSpec(
        "node.drain",
        "Give this node's memory back: replicas go elsewhere where they fit; running calls go on.",
        result=DrainResult,
    ),
    MethodSpec("node.resume", "Undo `node.drain`: the plan decides what is loaded here again.", result=DrainResult),
    MethodSpec("mesh.peers", "The nodes that this node sees, itself included.", result=PeersResult),
    MethodSpec(
        "mesh.describe",
        "Every node of the mesh with its devices, replicas and transfers; what moves, what is served nowhere.",
        MeshParams,
        MeshDescription,
    ),
    MethodSpec("mesh.plan", "Which replica goes on which device and why; what was refused.", result=PlanResult),
    MethodSpec(
        "mesh.explain",
        "One model: why there, why not elsewhere, what would make it fit.",
        ModelParams,
        ExplainResult,
        (UnknownModel,),
    ),
    MethodSpec(
        "mesh.join",
        "Let a node in; only on the mesh listener, the only one without a certificate.",
        JoinParams,
        JoinResult,
        (JoinRefused, DiskFull),
        idempotent=False,
        roles=frozenset({Role.STRANGER}),
    ),
    MethodSpec(
        "mesh.gossip",
        "One packet of what nodes tell each other; only on the mesh listener.",
        GossipParams,
        GossipResult,
        (NotAMember,),
        roles=_PEERS,
    ),
    MethodSpec(
        "mesh.claim",
        "May the sender run the call of an idempotency key? Only on the mesh listener, as the next two.",
        ClaimKeyParams,
        KeyResult,
        roles=_PEERS,
    ),
    MethodSpec("mesh.settle", "What came of such a call.", SettleKeyParams, KeyResult, roles=_PEERS),
    MethodSpec(
        "mesh.await_answer",
        "The answer of such a call from the node that runs it, which keeps the question for a while.",
        AwaitAnswerParams,
        KeyResult,
        roles=_PEERS,
    ),
    MethodSpec(
        "mesh.token_new",
        "Make a token that lets one more PC in. Needs an admin key, as all below up to `mesh.remove`.",
        TokenNewParams,
        TokenNewResult,
        (DiskFull,),
        idempotent=False,
        roles=_ADMINISTRATORS,
    ),
    MethodSpec("mesh.token_list", "The tokens that this node made.", result=TokensResult, roles=_ADMINISTRATORS),
    MethodSpec(
        "mesh.token_revoke",
        "End a token early.",
        TokenParams,
        TokenRevokeResult,
        (DiskFull,),
        roles=_ADMINISTRATORS,
    ),
    MethodSpec(
        "mesh.key_new",
        "Make an API key that works on every node; it is shown once.",
        KeyNewParams,
        KeyNewResult,
        (DiskFull,),
        idempotent=False,
        roles=_ADMINISTRATORS,
    ),
    MethodSpec("mesh.key_list", "Who has a key.", result=KeysResult, roles=_ADMINISTRATORS),
    MethodSpec(
        "mesh.key_revoke",
        "End a key on every node.",
        KeyParams,
        KeyRevokeResult,
        (DiskFull,),
        idempotent=False,
        roles=_ADMINISTRATORS,
    ),
    MethodSpec(
        "mesh.remove",
        "Throw a node out for ever: its certificate stops working everywhere.",
        NodeRemoveParams,
        NodeRemoveResult,
        (DiskFull,),
        roles=_ADMINISTRATORS,
    ),
    MethodSpec("models.list", "Deployed models first, then what the catalogue knows.", result=ModelsResult),
    MethodSpec(
        "models.deploy",
        "Want a model loaded; loading goes on after the answer.",
        DeployParams,
        DeployResult,
        (UnknownModel, DoesNotFit, DiskFull),
    ),
    MethodSpec(
        "models.pull",
        "Have the node fetch a model's file, from its peers, else from Hugging Face; answers when it is there.",
        PullParams,
        PullResult,
        (UnknownModel, ModelFileMissing, TransferFailed, DiskFull, BadModelFile),
    ),
    MethodSpec(
        "models.add_file",
        "Have the node take a model file that lies on its own PC.",
        AddFileParams,
        PullResult,
        (UnknownModel, ModelFileMissing, DiskFull, BadModelFile),
        # Names a file of the node's PC, so that not every service that may chat may ask which ones there are.
        roles=_ADMINISTRATORS,
    ),
    MethodSpec("models.transfers", "The model files that are on their way to this node now.", result=TransfersResult),
    MethodSpec(
        "models.remove", "Want a model no longer; frees its memory.", ModelParams, RemoveResult, (UnknownModel,)
    ),
    MethodSpec(
        "calls.explain",
        "One of the last calls: which replicas were asked, when and why, how each ended, what was waited for.",
        ExplainCallParams,
        ExplainCallResult,
        (UnknownCall,),
    ),
    MethodSpec(
        "inference.chat",
        "Answer a chat.",
        ChatParams,
        ChatResult,
        _GENERATING,
        idempotent=False,
        delta=Delta,
        delta_notification="inference.delta",
        progress=Progress,
        progress_notification="inference.progress",
    ),
    MethodSpec(
        "inference.complete",
        "Continue a text.",
        CompleteParams,
        CompleteResult,
        _GENERATING,
        idempotent=False,
        delta=Delta,
        delta_notification="inference.delta",
        progress=Progress,
        progress_notification="inference.progress",
    ),
    MethodSpec(
        "inference.embed",
        "Unit-length vectors of texts.",
        EmbedParams,
        EmbedResult,
        (*_ON_A_REPLICA, PromptTooLong, IdempotencyConflict),
    ),
    MethodSpec(
        "inference.rerank",
        "How relevant each document is to a query; best first.",
        RerankParams,
        RerankResult,
        (*_ON_A_REPLICA, PromptTooLong, IdempotencyConflict),
    ),
    MethodSpec("inference.tokenize", "Token ids of a text.", TokenizeParams, TokenizeResult, _ON_A_REPLICA),
)

METHODS: Mapping[str, MethodSpec] = {row.name: row for row in _ROWS}
"""The table, in the order in which people read it."""


def method_list_markdown(methods: Mapping[str, MethodSpec] = METHODS) -> str:
    """README's table of methods: name, params (optional ones in brackets), whether it streams, what it does. Ends with a newline."""
    lines = ["| method | params | streams | what it does |", "| --- | --- | --- | --- |"]
    for spec in methods.values():
        fields = spec.params.model_fields.items()
        needed = [f"`{name}`" for name, field in fields if field.is_required()]
        # Twenty optional sampling parameters would bury the one that matters; `rpc.discover` lists them all.
        optional = [name for name, field in fields if not field.is_required()]
        listed = [f"[{len(optional)} optional]"] if len(optional) > 6 else [f"[`{name}`]" for name in optional]
        shown = [*needed, *listed]
        lines.append(
            f"| `{spec.name}` | {', '.join(shown) or 'none'} | {'yes' if spec.streams else ''} | {spec.summary} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(method_list_markdown(), end="")
