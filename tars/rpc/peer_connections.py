"""This node's connections to its peers: mutual TLS, kept open, one set for gossip, forwarded calls and model files.

Law of this file: an address is only where somebody said that a node may be. Each handshake proves who is there before a byte of a call is
sent: the node that was asked for, a member, with the key that it was admitted with. A node that is removed loses its connections at once.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

from tars.core.mesh_messages import Envelope
from tars.core.replicated_map import MEMBER
from tars.core.types import NodeId
from tars.errors import BadPeerAnswer, DeadlineExceeded, InvalidParams, NotAMember, PeerUnreachable, TarsError
from tars.mesh.certificates import PeerCertificate
from tars.mesh.identity import Identity
from tars.mesh.member_check import REMOVED, MemberCheck
from tars.mesh.record_codec import decode_envelope, encode_envelope
from tars.messages.mesh import MOST_ANSWERS
from tars.rpc.http_client import NodeNotReachable, RpcConnection

log = logging.getLogger(__name__)

CONNECT_SECONDS = 1.0
"""TCP. On a LAN 1 ms, over a tailnet's relay 100; a peer that takes longer is asked at its next address meanwhile."""
HANDSHAKE_SECONDS = 3.0
"""TCP and TLS. A peer that drowns in calls shakes hands late; one that is frozen is known by its pulse, and a packet has its own time."""
EXCHANGE_SECONDS = 2.0
"""For a packet and its answers; membership's own time-outs are shorter."""
KEEP_SECONDS = 70.0
"""Just under the listener's 75 s, so that this side closes first and no call meets a closing connection."""
SILENT_SECONDS = 5.0
"""As long as a dead node may go unnoticed. It is for what membership cannot see: a path between two nodes that others still bridge."""
MOST_UNKNOWN = 64
"""Connections to addresses of which it is not known who is there: seeds, and what multicast DNS suggests."""


class _Peer:
    """One address, and the one node that answers there."""

    def __init__(self, address: str, expected: NodeId | None, identity: Identity, check: MemberCheck) -> None:
        self.node = expected
        self.certificate: PeerCertificate | None = None
        self.problem = ""
        """What was last wrong with its records: said once, for they come again with every comparison."""
        self._check = check
        self._own = identity.node
        self.rpc = RpcConnection(
            f"https://{address}",
            tls=identity.client_context(self._judge),
            connect_seconds=CONNECT_SECONDS,
            handshake_seconds=HANDSHAKE_SECONDS,
            keep_seconds=KEEP_SECONDS,
            silent_seconds=SILENT_SECONDS,
        )

    def _judge(self, peer: PeerCertificate) -> None:
        if self.node is not None and peer.node != self.node:
            raise OtherNode(f"Node {peer.node} answers there, and not {self.node}.")
        if peer.node == self._own:
            raise OtherNode("This node itself answers there.")
        try:
            self._check(peer)
        except NotAMember as error:
            # Of the other one; what a peer says of this node comes as its answer.
            raise NotAMember(error.message) from None
        # Every connection of this address belongs to the same node from now on, so an answer is its answer.
        self.node, self.certificate = peer.node, peer


class OtherNode(NotAMember):
    """A node of the mesh, but not the one that was looked for: addresses move."""

    kind = "other_node"


class PeerConnections:
    """One per node. `addresses`: host:port of a node, best first. `thrown_out` is called when a member says that this node was removed:
    nobody sends it the record of that any more."""

    def __init__(
        self,
        identity: Identity,
        check: MemberCheck,
        addresses: Callable[[NodeId], Sequence[str]],
        *,
        exchange_seconds: float = EXCHANGE_SECONDS,
        thrown_out: Callable[[], None] = lambda: None,
    ) -> None:
        self._identity = identity
        self._check = check
        self._addresses = addresses
        self._exchange_seconds = exchange_seconds
        self._thrown_out = thrown_out
        self._open: dict[tuple[str, NodeId | None], _Peer] = {}
        self._closing: set[asyncio.Task[None]] = set()

    async def exchange(
        self, address: str, expected: NodeId | None, envelope: Envelope
    ) -> tuple[NodeId, list[Envelope]]:
        """Send a packet to whoever is at `address` (`expected`, where given): who it was, and what it says. For `mesh.gossip.Transport`.

        Raises `PeerUnreachable`, `NotAMember`, `DeadlineExceeded`, `BadPeerAnswer` or another `TarsError` of the peer.
        """
        params = {"envelope": encode_envelope(envelope)}
        try:
            async with asyncio.timeout(self._exchange_seconds):
                peer, answer = await self._call(address, expected, params)
        except TimeoutError:
            raise DeadlineExceeded(f"No answer came from {address} within {self._exchange_seconds:g} s.") from None
        assert peer.node is not None  # it has answered
        envelopes = answer.get("envelopes") if isinstance(answer, dict) else None
        if not isinstance(envelopes, list) or len(envelopes) > MOST_ANSWERS:
            raise BadPeerAnswer(f"What node {peer.node} answered to a packet is none. Update the older of the two.")
        problems: list[InvalidParams] = []
        answers = [decode_envelope(each, problems) for each in envelopes]
        if problems and peer.problem != problems[0].message:
            peer.problem = problems[0].message
            log.warning(
                "node %s sent %d records that were not taken: %s", peer.node, len(problems), problems[0].message
            )
        if any(each.sender != peer.node for each in answers):
            raise BadPeerAnswer(f"Node {peer.node} answered in another's name, so it was not believed.")
        return peer.node, answers

    def connection(self, node: NodeId, address: str | None = None) -> RpcConnection:
        """The kept connection to a node, at its best address or the given one; nothing is sent yet. Do not close it.

        Raises `PeerUnreachable` where no address of it is known.
        """
        if address is None:
            known = self._addresses(node)
            if not known:
                raise PeerUnreachable(f"No address of node {node} is known, so it cannot be asked.")
            address = known[0]
        return self._peer(address, node).rpc

    def members_changed(self, keys: Iterable[str] | None = None) -> None:
        """Close the connections to whoever is no member any more. `keys`: which records changed, None for any."""
        if keys is not None and not any(key.startswith(MEMBER) for key in keys):
            return
        for place, peer in list(self._open.items()):
            if peer.certificate is None:
                continue
            try:
                self._check(peer.certificate)
            except NotAMember:
                self._drop(place)

    async def close(self) -> None:
        """Close all; running calls end with `PeerUnreachable`."""
        for place in list(self._open):
            self._drop(place)
        while self._closing:
            await asyncio.wait(self._closing)

    async def _call(self, address: str, expected: NodeId | None, params: dict[str, Any]) -> tuple[_Peer, Any]:
        for last in (False, True):
            peer = self._peer(address, expected)
            try:
                return peer, await peer.rpc.call("mesh.gossip", params, timeout=self._exchange_seconds)
            except NodeNotReachable:
                raise
            except OtherNode:
                # The address has moved to another node since; where nobody special was looked for, that one will do.
                self._drop((address, expected))
                if last or expected is not None:
                    raise
            except NotAMember as refusal:
                if refusal.details.get("reason") == REMOVED:
                    self._thrown_out()
                raise
            except PeerUnreachable:
                # A kept connection that the peer closed, as after its restart: a packet may come twice, so once more on a new one.
                if last:
                    raise
        raise AssertionError("one of the two returned or raised")

    def _peer(self, address: str, expected: NodeId | None) -> _Peer:
        place = (address, expected)
        peer = self._open.pop(place, None)
        if peer is None:
            peer = _Peer(address, expected, self._identity, self._check)
            unknown = [each for each in self._open if each[1] is None]
            if expected is None and len(unknown) >= MOST_UNKNOWN:
                self._drop(unknown[0])
        # Last in the order: what was used longest ago goes first.
        self._open[place] = peer
        return peer

    def _drop(self, place: tuple[str, NodeId | None]) -> None:
        peer = self._open.pop(place, None)
        if peer is not None:
            task = asyncio.get_running_loop().create_task(_closed(peer.rpc))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)


async def _closed(connection: RpcConnection) -> None:
    with suppress(TarsError, OSError):
        await connection.close()
