"""`calls.explain`: here, and through the mesh."""

import asyncio

import pytest

from tars.core.call_effects import AttemptRecord
from tars.core.routing import Candidate, rank
from tars.core.types import Deadline, ModelKind, NodeId, ReplicaId, ReplicaState
from tars.errors import PeerUnreachable, UnknownCall
from tars.messages.base import CallContext
from tars.messages.calls import MOST_CALLS, ExplainCallParams
from tars.serving import call_explaining
from tars.serving.call_explaining import CallExplainer, Names
from tars.serving.call_record import CallRecords

ID = "0af7651916cd43dd8448eb211c80319c"
NAMES = Names({NodeId("n1"): "pc1", NodeId("n2"): "pc2"}, {"m@pc2#0": "RTX 4090"})


def call(**more):
    return CallContext(Deadline(1e9), ID, method="inference.chat", **more)


def asked(**more):
    """A question about a call, by an administrator."""
    return CallContext(Deadline(1e9), "another", method="calls.explain", **{"administrator": True, **more})


class Mesh:
    """Nodes with records that explain through each other; `down` ones refuse, `frozen` ones say nothing."""

    def __init__(self, *nodes):
        self.down, self.frozen = set(), set()
        self.records = {node: CallRecords(lambda: 5.0, lambda: 1e9) for node in nodes}
        self.explainers = {
            node: CallExplainer(
                node,
                records,
                lambda: NAMES,
                lambda node=node: [NodeId(each) for each in nodes if each != node],
                self.connection,
            )
            for node, records in self.records.items()
        }

    def connection(self, node):
        if node in self.down:
            raise PeerUnreachable("gone")
        return Wire(self, node)

    async def explain(self, node, **more):
        return await self.explainers[node].explain(ExplainCallParams(id=ID), asked(**more))


class Wire:
    def __init__(self, mesh, node):
        self.mesh, self.node = mesh, node

    async def call(self, method, params=None, *, timeout=None, hops=0):
        assert method == "calls.explain"
        if self.node in self.mesh.frozen:
            await asyncio.Event().wait()
        found = await self.mesh.explainers[self.node].explain(
            ExplainCallParams.model_validate(params), asked(hops=hops)
        )
        return found.model_dump(mode="json")


@pytest.fixture
def mesh():
    return Mesh("n1", "n2", "n3")


def attempts():
    """Two replicas that were asked; the first one broke after 34 tokens."""
    candidates = [
        Candidate(
            ReplicaId(f"m@pc{number}#0"), "m", ModelKind.CHAT, ReplicaState.READY, NodeId(f"n{number}"), local=False
        )
        for number in (2, 3)
    ]
    ranked = rank(candidates, "k")
    first = AttemptRecord(ReplicaId("m@pc2#0"), NodeId("n2"), 5.1, "first choice", ranked)
    first.outcome, first.ended, first.tokens = "peer_unreachable", 6.0, 34
    second = AttemptRecord(
        ReplicaId("m@pc3#0"), NodeId("n3"), 6.1, "continued after peer_unreachable", ranked, continued=True
    )
    return [first, second]


async def test_a_call_is_told_with_its_attempts_and_why_each_was_chosen(mesh):
    record = mesh.records["n1"].open(call(caller="alice", face="openai"), "m")
    record.attempts = attempts()
    (found,) = (await mesh.explain("n1")).calls
    assert (found.node_name, found.caller, found.outcome, found.seconds) == ("pc1", "alice", "running", None)
    first, second = found.attempts
    assert (first.node_name, first.device_name, first.why, first.tokens) == ("pc2", "RTX 4090", "first", 34)
    assert (first.after_seconds, first.seconds) == (pytest.approx(0.1), pytest.approx(0.9))
    assert first.reason.startswith("first choice; rank ")
    assert [each.partition(":")[0] for each in first.passed_over] == ["m@pc3#0"]
    # A node that is no member any more keeps its id.
    assert (second.node_name, second.device_name, second.why, second.seconds) == ("n3", "", "continuation", None)


async def test_any_node_can_be_asked(mesh):
    mesh.records["n2"].open(call(), "m").answered()
    found = await mesh.explain("n1")
    assert [(each.node, each.outcome) for each in found.calls] == [("n2", "answered")]
    assert "answered" in found.text


async def test_who_only_served_an_attempt_asks_for_the_whole(mesh):
    mesh.records["n1"].open(call(hops=1, peer="n2"), "m").answered()
    mesh.records["n3"].open(call(hops=1, peer="n2"), "m").answered()
    mesh.records["n2"].open(call(), "m").answered()
    assert [each.node for each in (await mesh.explain("n1")).calls] == ["n2"]
    # The gateway is gone: what is left of it.
    mesh.down = {"n2"}
    assert {each.node for each in (await mesh.explain("n1")).calls} <= {"n1", "n3"}


async def test_a_frozen_peer_takes_a_moment_only(mesh, monkeypatch):
    monkeypatch.setattr(call_explaining, "ASK_SECONDS", 0.02)
    mesh.frozen = {"n2"}
    mesh.records["n3"].open(call(), "m").answered()
    assert [each.node for each in (await mesh.explain("n1")).calls] == ["n3"]


async def test_a_call_that_nobody_knows_is_said_so_and_peers_do_not_ask_on(mesh):
    with pytest.raises(UnknownCall):
        await mesh.explain("n1")


async def test_an_api_key_sees_its_own_calls_only_wherever_they_were(mesh):
    for node in ("n1", "n2"):
        mesh.records[node].open(call(caller="alice"), "m").answered()
        with pytest.raises(UnknownCall):
            await mesh.explain("n1", caller="bob", administrator=False)
        assert len((await mesh.explain("n1", caller="alice", administrator=False)).calls) == 1
        assert len((await mesh.explain("n1", caller="root")).calls) == 1
        mesh.records[node].__init__(lambda: 5.0, lambda: 1e9)


async def test_saying_that_one_is_forwarded_shows_nobody_elses_calls(mesh):
    mesh.records["n1"].open(call(caller="alice"), "m").answered()
    with pytest.raises(UnknownCall):
        await mesh.explain("n1", caller="bob", administrator=False, hops=1)


async def test_of_a_trace_with_many_calls_the_last_ones_are_told(mesh):
    for _ in range(MOST_CALLS + 5):
        mesh.records["n1"].open(call(), "m").answered()
    assert len((await mesh.explain("n1")).calls) == MOST_CALLS


async def test_a_node_without_a_mesh_explains_its_own():
    records = CallRecords()
    explainer = CallExplainer("n1", records, lambda: NAMES)
    records.open(call(), "m").answered()
    assert len((await explainer.explain(ExplainCallParams(id=f" {ID.upper()}"), asked())).calls) == 1
    with pytest.raises(UnknownCall):
        await explainer.explain(ExplainCallParams(id="0b"), asked())
