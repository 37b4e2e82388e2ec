"""Whether the holder of a certificate is a member of this mesh.

Law of this file: the CA's signature alone gives nothing, for every member holds its key: a certificate counts only where
`member/<NodeId>` in the replicated map names its public key.
"""

from __future__ import annotations

import hmac
import logging
import time
from collections.abc import Callable
from typing import Protocol

from tars.core.records import Member, Value
from tars.core.replicated_map import MEMBER
from tars.core.types import NodeId
from tars.errors import NotAMember
from tars.mesh.certificates import PeerCertificate

log = logging.getLogger(__name__)

REMOVED = "removed"
"""`details["reason"]` of `NotAMember` and of `JoinRefused` where the NodeId was thrown out of the mesh: that is for ever."""
FORGIVING_SECONDS = 600.0


class MemberRecords(Protocol):
    """The part of the replicated map that says who belongs to the mesh."""

    def get(self, key: str) -> Value | None:
        """The live value of `member/<NodeId>`."""
        ...

    def items(self, prefix: str) -> list[tuple[str, Value]]:
        """The live records whose keys begin so."""
        ...


def check_member(records: MemberRecords, peer: PeerCertificate) -> Member:
    """The member that the certificate belongs to. Raises `NotAMember` that says why it is none."""
    member = records.get(MEMBER + peer.node)
    if not isinstance(member, Member):
        raise NotAMember(
            f"Node {peer.node} is not known as a member of this mesh (not yet, where it has just joined elsewhere; otherwise join with a "
            "token: `tars token new` on a node of the mesh)."
        )
    if member.removed:
        raise NotAMember(
            "This node was removed from the mesh; join again with a new token: `tars token new` on a node of the mesh, then "
            "`tars-node --join TOKEN@HOST:PORT` here.",
            details={"reason": REMOVED},
        )
    if not hmac.compare_digest(member.fingerprint, peer.fingerprint):
        raise NotAMember(
            f"The mesh knows node {peer.node} under another key: it joined again since, or its state folder was copied. Join this one with "
            "a new token and a state folder of its own."
        )
    return member


class MemberCheck:
    """`check_member` for as long as a node runs, on every connection and request.

    `lost` (`Records.lost`) is a node whose records were missing or damaged at this start: where it knows no other member, for its first
    `FORGIVING_SECONDS` the CA's signature is enough, so that its peers can send everything back. All it risks is a removed node that kept
    the CA's key and comes within these minutes.
    """

    def __init__(
        self, records: MemberRecords, *, lost: bool = False, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._records = records
        self._now = now
        # Who knows another member has lost nothing: it has just joined, and was given everything.
        self._forgiving_until = now() + FORGIVING_SECONDS if lost and len(records.items(MEMBER)) <= 1 else None
        self._let_in: set[NodeId] = set()

    def __call__(self, peer: PeerCertificate) -> None:
        """Raises `NotAMember`."""
        if self._forgiving_until is not None:
            if self._now() >= self._forgiving_until:
                self._forgiving_until = None
            elif self._records.get(MEMBER + peer.node) is None:
                if peer.node not in self._let_in:
                    log.warning("node %s is let in by its certificate alone: this node has lost its records", peer.node)
                    self._let_in.add(peer.node)
                return
        check_member(self._records, peer)
