"""What the nodes of a mesh tell each other: values, each kept in the replicated map under the key that stands in its docstring.

Law of this file: frozen values only, no behaviour. How they spread is `replicated_map`'s business, how they are written as JSON
`mesh.record_codec`'s, what follows from them `coordination`'s and `routing`'s.
"""

from __future__ import annotations

from dataclasses import dataclass

from tars.core.types import (
    Assignment,
    Bytes,
    Deployment,
    KvType,
    ModelEntry,
    ModelKind,
    NodeId,
    NodeSnapshot,
    ReplicaState,
)


@dataclass(frozen=True, slots=True)
class HeldFile:
    """A model file (or folder) that a node has and can give to a peer. `sha256` is None until it was hashed; a peer asks only by it.

    A folder's `sha256` is that of its manifest: `<sha256 of file>  <relative path>` lines, sorted by path.
    """

    model: str
    variant: str
    size: Bytes
    sha256: str | None = None
    folder: bool = False


@dataclass(frozen=True, slots=True)
class ReplicaReport:
    """One replica as its node reports it. `taken` is what it really took on the device, None before it was measured."""

    assignment: Assignment
    kind: ModelKind
    state: ReplicaState
    slots: int = 1
    taken: Bytes | None = None
    file_sha256: str | None = None
    """Of all that it was loaded from (`mesh.loaded_files`): equal ones go on with each other's answers."""
    exact: bool = False
    """It computes so that a continued answer is identical to an unbroken one."""
    speed: float | None = None
    """Tokens (texts) a second of one call alone, as it measured itself after its load."""
    prefill_speed: float | None = None
    """Prompt tokens a second, likewise: what a prefix that is there already saves."""
    stage: str | None = None
    percent: float | None = None
    """How far the load is: `fetch` while the file is copied, then `messages.node.LoadProgress`'s stages."""
    error: str | None = None


@dataclass(frozen=True, slots=True)
class TransferReport:
    """A model file on its way to a node, for those who look; nothing is decided by it. See `messages.files.TransferDescription`."""

    model: str
    variant: str
    stage: str
    done: Bytes
    total: Bytes
    bytes_per_second: float = 0.0
    sources: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True, slots=True)
class NodeAdvert:
    """`node/<NodeId>`: a node as it describes itself; only that node writes it. Whether it is alive is `membership`'s to say."""

    node: NodeSnapshot
    version: str = ""
    replicas: tuple[ReplicaReport, ...] = ()
    files: tuple[HeldFile, ...] = ()
    models: tuple[ModelEntry, ...] = ()
    """Entries that are not in the catalogue that comes with TARS: this node's own files, by `[[model]]` or `--model`."""
    client_url: str | None = None
    """Where its clients reach it, for the status page's links."""
    transfers: tuple[TransferReport, ...] = ()


@dataclass(frozen=True, slots=True)
class Member:
    """`member/<NodeId>`: a node that was admitted, and the key that it must show. Never collected: a removed node stays removed."""

    node: NodeId
    name: str
    fingerprint: str
    """sha256 of its certificate's public key (SubjectPublicKeyInfo, DER), hex."""
    addresses: tuple[str, ...] = ()
    """`host:port` of its mesh listener, as it was admitted; fresher ones come with gossip."""
    admitted_by: NodeId | None = None
    removed: bool = False


@dataclass(frozen=True, slots=True)
class Wish:
    """`deployment/<model>`: what somebody wants. No value (a tombstone) is "wanted no longer"."""

    deployment: Deployment
    entry: ModelEntry | None = None
    """Of a model that is not in the catalogue that comes with TARS, so that every node can plan for it."""


@dataclass(frozen=True, slots=True)
class Orders:
    """`orders/<NodeId>`: what a node should hold now, by the word of a coordinator; obeyed only while that one coordinates."""

    node: NodeId
    coordinator: NodeId
    assignments: tuple[Assignment, ...] = ()


@dataclass(frozen=True, slots=True)
class MeasuredLoad:
    """`measured/<card>|<file>|...`: what a load really took on a kind of card (`card`: its name and total memory)."""

    card: str
    file: str
    context: int
    slots: int
    kv_tokens: int
    kv_type: KvType
    gpu_layers: int
    taken: Bytes


@dataclass(frozen=True, slots=True)
class ClientKey:
    """`key/<name>`: an API key, hashed; the key itself is shown once, when it is made."""

    name: str
    digest: str
    """sha256 of the key, hex: keys are random, 256 bits, so a slow hash would add nothing."""
    admin: bool = False
    """May also make tokens and keys and remove nodes."""
    created_ms: int = 0


Value = NodeAdvert | Member | Wish | Orders | MeasuredLoad | ClientKey
"""What a record holds; None in its place is a tombstone."""
