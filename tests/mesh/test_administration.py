"""What administrators ask: tokens, keys, removing nodes; and gossip's packets, in nobody else's name."""

from __future__ import annotations

from pathlib import Path

import pytest
from mesh_bench import MeshNode, new_id

from tars.core.mesh_messages import Ack, Envelope, News
from tars.core.records import Member
from tars.core.types import NodeId
from tars.errors import InvalidParams, InvalidRequest, NotAMember, TarsError
from tars.mesh.administration import Administration
from tars.mesh.client_keys import ClientKeys
from tars.mesh.identity import Identity
from tars.mesh.join_tokens import Token
from tars.mesh.record_codec import decode_envelope, encode_envelope
from tars.mesh.replicated_store import MemoryStore
from tars.messages.admission import (
    JoinParams,
    KeyNewParams,
    KeyParams,
    NodeRemoveParams,
    TokenNewParams,
    TokenParams,
)
from tars.messages.mesh import GossipParams

PC1, PC2, PC3 = (NodeId(f"{number}0000000-0000-4000-8000-000000000000") for number in "123")


@pytest.fixture
def one(tmp_path: Path) -> MeshNode:
    (tmp_path / "one").mkdir()
    node = MeshNode(tmp_path / "one", "one", Identity.create(tmp_path / "one", new_id()))
    for other, name in ((PC1, "pc1"), (PC2, "pc2"), (PC3, "pc2")):
        node.store.put(f"member/{other}", Member(other, name, "0" * 64))
    # Its listener is not started here, so where it would be is said instead.
    node.administration._addresses = lambda: ["192.0.2.7:8001"]
    return node


def removed(node: MeshNode) -> set[NodeId]:
    return {value.node for _, value in node.store.map.items("member/") if isinstance(value, Member) and value.removed}


@pytest.mark.parametrize("given", [PC1, "pc1", PC1[:4], PC1[:8].upper()])
def test_a_node_is_removed_by_its_id_the_beginning_of_it_or_its_name(one: MeshNode, given: str) -> None:
    result = one.administration.remove_node(NodeRemoveParams(node=given))
    assert (result.node, result.name, result.removed) == (PC1, "pc1", True)
    assert removed(one) == {PC1}
    assert not one.administration.remove_node(NodeRemoveParams(node=given)).removed


def test_a_name_that_two_have_removes_neither_until_one_is_gone(one: MeshNode) -> None:
    with pytest.raises(InvalidParams, match=f"2 nodes.*{PC2}"):
        one.administration.remove_node(NodeRemoveParams(node="pc2"))
    assert removed(one) == set()
    one.administration.remove_node(NodeRemoveParams(node=PC2))
    assert one.administration.remove_node(NodeRemoveParams(node="pc2")).node == PC3


@pytest.mark.parametrize("given", ["nobody", "1", "100", "*", "member/x", "44444444-0000-4000-8000-000000000000"])
def test_a_node_that_is_not_known_says_where_to_look(one: MeshNode, given: str) -> None:
    with pytest.raises(InvalidParams, match="tars node list"):
        one.administration.remove_node(NodeRemoveParams(node=given))
    assert removed(one) == set()


def test_a_node_does_not_remove_itself(one: MeshNode) -> None:
    with pytest.raises(InvalidParams, match="another node"):
        one.administration.remove_node(NodeRemoveParams(node=one.id))
    assert removed(one) == set()


def test_a_token_is_shown_once_with_where_to_use_it(one: MeshNode) -> None:
    made = one.administration.new_token(TokenNewParams(ttl_seconds=60))
    assert made.addresses == ["192.0.2.7:8001"]
    assert Token.parse(made.token).names(one.identity.ca_hash)
    listed = one.administration.tokens().tokens
    assert [(each.id, each.state) for each in listed] == [(made.id, "open")]
    assert listed[0].expires_ms - listed[0].created_ms == 60_000
    assert made.token not in listed[0].model_dump_json()


def test_who_used_a_token_is_listed_by_name_and_a_revoked_one_is_revoked(one: MeshNode) -> None:
    made = one.administration.new_token(TokenNewParams())
    one.tokens.spend(Token.parse(made.token).secret, "x", PC1)
    other = one.administration.new_token(TokenNewParams())
    assert one.administration.revoke_token(TokenParams(id=other.id)).revoked
    assert not one.administration.revoke_token(TokenParams(id=made.id)).revoked
    listed = {each.id: each for each in one.administration.tokens().tokens}
    assert (listed[made.id].state, listed[made.id].used_by, listed[made.id].used_by_name) == ("used", PC1, "pc1")
    assert listed[other.id].state == "revoked"


def test_a_key_is_shown_once_listed_and_revoked(one: MeshNode) -> None:
    made = one.administration.new_key(KeyNewParams(name="laptop", admin=True))
    assert made.first
    assert one.keys.holder(made.key) is not None
    listed = one.administration.keys().keys
    assert [(each.name, each.admin, each.source) for each in listed] == [("laptop", True, "mesh")]
    assert made.key not in listed[0].model_dump_json()
    assert one.administration.revoke_key(KeyParams(name="laptop")).revoked
    assert one.administration.keys().keys == []
    assert one.keys.holder(made.key) is None


def test_keys_of_the_configuration_are_listed_as_such() -> None:
    keys = ClientKeys(MemoryStore(PC1), {"me": "correct-horse-battery"})
    administration = Administration(keys, MemoryStore(PC1))
    assert not administration.new_key(KeyNewParams(name="a")).first
    assert [(each.name, each.source) for each in administration.keys().keys] == [("a", "mesh"), ("me", "configuration")]


async def test_a_packet_is_heard_in_its_senders_name_only(one: MeshNode) -> None:
    sent = GossipParams(envelope=encode_envelope(Envelope(PC1, 3, News())))
    answer = await one.administration.gossip(sent, PC1)
    assert [decode_envelope(each) for each in answer.envelopes] == [Envelope(one.id, 1, Ack(0))]
    for sender in (PC2, "", one.id):
        with pytest.raises(NotAMember, match="another node's name"):
            await one.administration.gossip(sent, sender)
    assert one.heard == [(PC1, Envelope(PC1, 3, News()))]


@pytest.mark.parametrize(
    "envelope", [{}, {"sender": 5}, {"sender": PC1, "body": []}, {"sender": PC1, "body": {"is": "ping", "number": "x"}}]
)
async def test_a_packet_that_is_none_is_one_clear_error(one: MeshNode, envelope: dict[str, object]) -> None:
    with pytest.raises(InvalidParams):
        await one.administration.gossip(GossipParams(envelope=envelope), PC1)
    assert one.heard == []


async def test_a_bad_record_does_not_cut_its_sender_off(one: MeshNode, caplog: pytest.LogCaptureFixture) -> None:
    envelope = encode_envelope(Envelope(PC1, 3, News())) | {"records": [{"key": 5}]}
    await one.administration.gossip(GossipParams(envelope=envelope), PC1)
    assert len(one.heard) == 1
    assert "not taken" in caplog.text


async def test_a_node_alone_says_how_to_begin_a_mesh() -> None:
    alone = Administration(ClientKeys(MemoryStore(PC1)), MemoryStore(PC1))
    join = JoinParams(secret="s" * 22, node=PC2, name="pc2", certificate_request="x", addresses=[], clock_ms=0)
    for ask in (
        lambda: alone.new_token(TokenNewParams()),
        alone.tokens,
        lambda: alone.revoke_token(TokenParams(id="0a1b2c3d")),
        lambda: alone.remove_node(NodeRemoveParams(node="pc2")),
        lambda: alone.join(join, "192.0.2.7"),
    ):
        with pytest.raises(InvalidRequest, match=r"no mesh.*--listen 0\.0\.0\.0:8000"):
            ask()
    with pytest.raises(TarsError, match="no mesh"):
        await alone.gossip(GossipParams(envelope={}), PC2)
    # Keys it has all the same.
    assert alone.new_key(KeyNewParams(name="laptop")).key
