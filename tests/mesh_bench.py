"""Members of a real mesh on loopback: identity, records, keys, dispatcher and mesh listener as the composition root puts them together."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import orjson
from cryptography.hazmat.primitives.asymmetric import ec
from fake_node import FakeNode

from tars.core.mesh_messages import Ack, Envelope, Ping
from tars.core.types import NodeId
from tars.mesh.administration import Administration
from tars.mesh.client_keys import ClientKeys
from tars.mesh.identity import Identity
from tars.mesh.join_tokens import JoinTokens
from tars.mesh.joining import Admitting
from tars.mesh.member_check import MemberCheck
from tars.mesh.replicated_store import MemoryStore
from tars.rpc.dispatcher import Dispatcher
from tars.rpc.mesh_listener import MeshListener
from tars.rpc.methods import handlers_of
from tars.rpc.options import RpcOptions
from tars.rpc.peer_connections import PeerConnections
from tars.state_folder import StateFolder


class MeshNode:
    """One member. Its service is a `FakeNode`; whatever is about the mesh is real. A ping is acknowledged, whoever sends it."""

    def __init__(self, folder: Path, name: str, identity: Identity) -> None:
        self.name = name
        self.folder = StateFolder(folder)
        self.identity = identity
        self.store = MemoryStore(identity.node)
        self.store.put(f"member/{identity.node}", identity.member(name))
        self.tokens = JoinTokens(self.folder, identity.ca_hash)
        self.keys = ClientKeys(self.store)
        self.check = MemberCheck(self.store.map)
        self.heard: list[tuple[NodeId, Envelope]] = []
        self.answer_as: NodeId | None = None
        self.node = FakeNode()
        self.node.node_id = identity.node
        self.admitting = Admitting(identity, self.tokens, self.store)
        self.administration = Administration(
            self.keys,
            self.store,
            admitting=self.admitting,
            tokens=self.tokens,
            hear=self.hear,
            addresses=lambda: [self.address],
        )
        self.node.mesh = self.administration  # type: ignore[assignment]  # the real one in the fake's place
        options = RpcOptions()
        self.listener = MeshListener(
            identity, self.check, Dispatcher(handlers_of(self.node), self.node, options), options
        )
        self.addresses: dict[NodeId, list[str]] = {}
        self.peers = PeerConnections(identity, self.check, lambda node: self.addresses.get(node, []))

    def hear(self, sender: NodeId, envelope: Envelope) -> list[Envelope]:
        self.heard.append((sender, envelope))
        number = envelope.body.number if isinstance(envelope.body, Ping) else 0
        return [Envelope(self.answer_as or self.identity.node, 1, Ack(number))]

    @property
    def id(self) -> NodeId:
        return self.identity.node

    @property
    def listening(self) -> bool:
        return self.listener._listener is not None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.listener.port}"

    def knows(self, *others: MeshNode) -> None:
        """The records of the others, as gossip would bring them."""
        for other in others:
            self.store.map.merge(list(other.store.map.records()), 2**41)
            if other.listening:
                self.addresses[other.id] = [other.address]

    def ping(self, number: int = 1) -> Envelope:
        return Envelope(self.id, 1, Ping(number))


def new_id() -> NodeId:
    return NodeId(str(uuid.uuid4()))


def certified(by: Identity, folder: Path, node: NodeId | None = None) -> Identity:
    """Another node's identity under the same CA, as a join gives it."""
    folder.mkdir(parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = by.issue(node or new_id(), key.public_key())
    identity = Identity.accept(folder, key, certificate, by.ca_certificate_pem, by.ca_key_pem)
    identity.save()
    return identity


@asynccontextmanager
async def running_mesh(folder: Path, *names: str) -> AsyncIterator[list[MeshNode]]:
    """Members that know each other, each listening on loopback."""
    nodes: list[MeshNode] = []
    try:
        for name in names:
            own = folder / name
            own.mkdir(parents=True)
            identity = certified(nodes[0].identity, own) if nodes else Identity.create(own, new_id())
            (own / "node.json").write_bytes(orjson.dumps({"id": identity.node}))
            node = MeshNode(own, name, identity)
            nodes.append(node)
            await node.listener.start("127.0.0.1", 0)
        for node in nodes:
            node.knows(*(other for other in nodes if other is not node))
        yield nodes
    finally:
        for node in nodes:
            await node.peers.close()
            await node.listener.close()
