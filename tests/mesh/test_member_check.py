"""Who is a member, by the records and the key of a certificate; what a node believes that has lost its records."""

from __future__ import annotations

import uuid

import pytest

from tars.core.records import Member, Value
from tars.core.types import NodeId
from tars.errors import NotAMember
from tars.mesh.certificates import PeerCertificate
from tars.mesh.member_check import FORGIVING_SECONDS, MemberCheck, check_member

KEY = "a1" * 32
"""A fingerprint."""


def new_id() -> NodeId:
    return NodeId(str(uuid.uuid4()))


@pytest.fixture
def peer() -> PeerCertificate:
    return PeerCertificate(new_id(), KEY)


class Records(dict[str, Value]):
    """Member records as the replicated map gives them."""

    def items(self, prefix: str) -> list[tuple[str, Value]]:  # type: ignore[override]  # the map's, not a dict's
        return [(key, self[key]) for key in sorted(self) if key.startswith(prefix)]


def test_a_node_that_lost_its_records_believes_the_ca_for_some_minutes_and_one_that_has_just_joined_never(
    peer: PeerCertificate, caplog: pytest.LogCaptureFixture
) -> None:
    own = new_id()
    now = [0.0]
    records = Records({f"member/{own}": Member(own, "own", "b2" * 32)})
    lost = MemberCheck(records, lost=True, now=lambda: now[0])
    lost(peer)
    lost(peer)
    assert caplog.text.count("let in by its certificate alone") == 1
    records[f"member/{peer.node}"] = Member(peer.node, "first", peer.fingerprint, removed=True)
    with pytest.raises(NotAMember, match="removed"):
        lost(peer)
    del records[f"member/{peer.node}"]
    now[0] = FORGIVING_SECONDS
    for _ in range(2):
        with pytest.raises(NotAMember, match="not known"):
            lost(peer)
        now[0] = 0.0  # once over, it stays over
    other = new_id()
    joined = MemberCheck(Records({**records, f"member/{other}": Member(other, "other", "0" * 64)}), lost=True)
    for strict in (joined, MemberCheck(records)):
        with pytest.raises(NotAMember, match="not known"):
            strict(peer)


def test_a_member_is_whoever_the_map_says_with_that_very_key(peer: PeerCertificate) -> None:
    key = f"member/{peer.node}"
    member = Member(peer.node, "box", peer.fingerprint, ("192.0.2.1:8001",))
    assert check_member(Records({key: member}), peer) == member
    for records, reason in (
        ({}, "not known as a member"),
        ({key: Member(peer.node, "box", peer.fingerprint, removed=True)}, "removed from the mesh; join again"),
        ({key: Member(peer.node, "box", "0" * 64)}, "under another key"),
        ({key: Member(peer.node, "box", "")}, "under another key"),
    ):
        with pytest.raises(NotAMember, match=reason):
            check_member(Records(records), peer)
