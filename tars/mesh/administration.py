"""What administrators and other nodes ask of the mesh, as messages: let a node in, throw one out, tokens, keys, and gossip's packets.

Law of this file: messages in, messages out; what is checked and kept is the business of the parts that it calls. It runs on a node without
a mesh too, where there is nothing to join and nobody to remove.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

from tars.core.mesh_messages import Envelope
from tars.core.records import Member
from tars.core.replicated_map import MEMBER, members
from tars.core.types import NodeId
from tars.errors import InvalidParams, InvalidRequest, NotAMember
from tars.mesh.client_keys import ClientKeys
from tars.mesh.join_tokens import JoinTokens
from tars.mesh.joining import Admitting
from tars.mesh.record_codec import decode_envelope, encode_envelope
from tars.mesh.replicated_store import Records
from tars.messages.admission import (
    JoinParams,
    JoinResult,
    KeyDescription,
    KeyNewParams,
    KeyNewResult,
    KeyParams,
    KeyRevokeResult,
    KeysResult,
    NodeRemoveParams,
    NodeRemoveResult,
    TokenDescription,
    TokenNewParams,
    TokenNewResult,
    TokenParams,
    TokenRevokeResult,
    TokensResult,
)
from tars.messages.mesh import GossipParams, GossipResult

log = logging.getLogger(__name__)

Hear = Callable[[NodeId, Envelope], list[Envelope]]
"""What the gossip's driver does with a packet of a peer: the answers."""

SHORTEST_PREFIX = 4
"""Of a NodeId that is not written whole."""


class Administration:
    """See the module's law. `addresses`: host:port of this node's mesh listener as others reach it, best first."""

    def __init__(
        self,
        keys: ClientKeys,
        store: Records | None = None,
        *,
        admitting: Admitting | None = None,
        tokens: JoinTokens | None = None,
        hear: Hear | None = None,
        addresses: Callable[[], Sequence[str]] = tuple,
    ) -> None:
        self._keys = keys
        self._store = store
        self._admitting = admitting
        self._tokens = tokens
        self._hear = hear
        self._addresses = addresses
        self._told: dict[str, str] = {}
        """By member: what was last wrong with its records."""

    # --- nodes ----------------------------------------------------------------------------------------------------------

    def join(self, params: JoinParams, source: str) -> JoinResult:
        """Let a node in. Raises as `Admitting.admit`."""
        if self._admitting is None:
            raise no_mesh()
        return self._admitting.admit(params, source)

    async def gossip(self, params: GossipParams, sender: str) -> GossipResult:
        """Hear a packet of the node `sender`. Raises `NotAMember` where it is in another's name, `InvalidParams` where it is none."""
        if self._hear is None:
            raise no_mesh()
        problems: list[InvalidParams] = []
        envelope = decode_envelope(params.envelope, problems)
        if envelope.sender != sender:
            raise NotAMember("This packet was sent in another node's name, so it was not taken.")
        # Once: the same record comes again with every comparison.
        if problems and self._told.get(sender) != problems[0].message:
            self._told[sender] = problems[0].message
            log.warning("node %s sent %d records that were not taken: %s", sender, len(problems), problems[0].message)
        return GossipResult(envelopes=[encode_envelope(each) for each in self._hear(envelope.sender, envelope)])

    def remove_node(self, params: NodeRemoveParams) -> NodeRemoveResult:
        """Mark it as removed for ever. Raises `InvalidParams` where it is not known, or is this one."""
        if self._store is None or self._admitting is None:
            raise no_mesh()
        member = self._member(params.node)
        if member.node == self._store.map.node:
            raise InvalidParams(
                "A node does not remove itself: nobody would hear of it. Ask another node of the mesh (tars --url http://OTHER:8000 node "
                "remove ...), or stop this one and move its state folder away."
            )
        if not member.removed:
            self._store.put(MEMBER + member.node, replace(member, removed=True))
            log.warning("node %s (%s) was removed from the mesh", member.name, member.node)
        return NodeRemoveResult(node=member.node, name=member.name, removed=not member.removed)

    def _member(self, given: str) -> Member:
        """By id, by the beginning of one, or by name."""
        assert self._store is not None
        known = members(self._store.map)
        if (exact := known.get(NodeId(given))) is not None:
            return exact
        wanted = given.lower()
        # A removed node that has the name of a live one is not meant.
        for among in ([each for each in known.values() if not each.removed], list(known.values())):
            named = [each for each in among if each.name == given]
            begun = [each for each in among if len(wanted) >= SHORTEST_PREFIX and each.node.startswith(wanted)]
            found = named or begun
            if len(found) == 1:
                return found[0]
            if found:
                listed = ", ".join(f"{each.node} ({each.name})" for each in found[:5])
                raise InvalidParams(
                    f"{len(found)} nodes answer to that: {listed}. Name the one that is meant by its id."
                )
        raise InvalidParams(
            "The mesh has no node with that id or name. `tars node list` shows them (an id may be cut to its first "
            f"{SHORTEST_PREFIX} characters or more)."
        )

    # --- tokens ---------------------------------------------------------------------------------------------------------

    def new_token(self, params: TokenNewParams) -> TokenNewResult:
        """A token; it is shown this once."""
        token, entry = self._own_tokens().new(params.ttl_seconds)
        return TokenNewResult(
            id=entry.id, token=str(token), expires_ms=entry.expires_ms, addresses=list(self._addresses())
        )

    def tokens(self) -> TokensResult:
        """This node's, newest first."""
        own = self._own_tokens()
        known = {} if self._store is None else members(self._store.map)
        described = []
        for entry in own.entries():
            member = known.get(NodeId(entry.used_by)) if entry.used_by is not None else None
            described.append(
                TokenDescription(
                    id=entry.id,
                    state=own.state(entry),
                    created_ms=entry.created_ms,
                    expires_ms=entry.expires_ms,
                    used_by=entry.used_by,
                    used_by_name=None if member is None else member.name,
                )
            )
        return TokensResult(tokens=described)

    def revoke_token(self, params: TokenParams) -> TokenRevokeResult:
        """End one early."""
        return TokenRevokeResult(id=params.id.lower(), revoked=self._own_tokens().revoke(params.id))

    def _own_tokens(self) -> JoinTokens:
        if self._tokens is None:
            raise no_mesh()
        return self._tokens

    # --- keys -----------------------------------------------------------------------------------------------------------

    def new_key(self, params: KeyNewParams) -> KeyNewResult:
        """A key; it is shown this once."""
        first = not self._keys.exist
        key = self._keys.new(params.name, admin=params.admin)
        return KeyNewResult(name=params.name, key=key, admin=params.admin, first=first)

    def keys(self) -> KeysResult:
        """By name."""
        configured, mesh = self._keys.listed()
        described = [KeyDescription(name=name, admin=True, source="configuration") for name in configured]
        described += [
            KeyDescription(name=each.name, admin=each.admin, source="mesh", created_ms=each.created_ms) for each in mesh
        ]
        return KeysResult(keys=sorted(described, key=lambda each: each.name))

    def revoke_key(self, params: KeyParams) -> KeyRevokeResult:
        """It works nowhere any more."""
        self._keys.revoke(params.name)
        return KeyRevokeResult(name=params.name, revoked=True)


def no_mesh() -> InvalidRequest:
    """What a node says that is alone."""
    return InvalidRequest(
        "This node is in no mesh: it listens on this PC only. Start it so that others reach it (tars-node --listen 0.0.0.0:8000), then "
        "make a token for the next PC with `tars token new`."
    )
