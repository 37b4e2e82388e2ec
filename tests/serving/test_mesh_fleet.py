"""The whole mesh's replicas as one node's router sees them."""

import asyncio

import pytest
from hand_clock import Clock
from mesh_nodes import ScriptedReplica, report_of

from tars.core.health import BreakerState
from tars.core.mesh_messages import MemberState, Record, Stamp
from tars.core.records import Member, NodeAdvert, Wish
from tars.core.replica_ledger import ReplicaLedger
from tars.core.replicated_map import ReplicatedMap
from tars.core.routing import Candidate
from tars.core.types import (
    Adapter,
    Bytes,
    Deployment,
    DeviceId,
    DeviceKind,
    DeviceSnapshot,
    ModelEntry,
    ModelKind,
    NodeId,
    NodeSnapshot,
    ReplicaId,
    ReplicaState,
)
from tars.errors import DoesNotFit, PeerUnreachable, ReplicaFailed, StillLoading, TarsError
from tars.serving.failures import worth_waiting
from tars.serving.mesh_fleet import RETURN_SECONDS, MappedPeers, MeshFleet
from tars.serving.peer_target import PeerTarget
from tars.serving.router import ServedModel, no_replica_error

HERE, BIG, SMALL = NodeId("here"), NodeId("big"), NodeId("small")


class Own:
    """What a `LocalFleet` would say."""

    def __init__(self, *candidates, models=(), error=None):
        self._candidates = candidates
        self._models = models
        self.error = error

    def models(self):
        return self._models

    def loadable(self):
        return ()

    def candidates(self, model):
        return [each for each in self._candidates if each.model == model]

    def target(self, replica):
        return {each.replica: each for each in self._candidates}[replica]

    async def wait_change(self):
        await asyncio.Event().wait()

    async def ask_to_load(self, model):
        raise self.not_ready(model)

    def not_ready(self, model) -> TarsError:
        return self.error or no_replica_error([each.state for each in self.candidates(model)], model)


class Known:
    """`Peers` that a test sets."""

    def __init__(self, *adverts, wishes=()):
        self.version = 1
        self.by_node = {advert.node.id: advert for advert in adverts}
        self.states = {}
        self.wanted = {wish.deployment.model: wish for wish in wishes}
        self.read = 0

    def adverts(self):
        self.read += 1
        return self.by_node

    def wishes(self):
        return self.wanted

    def state(self, node):
        return self.states.get(node, MemberState.ALIVE)

    def connection(self, node):
        if node not in self.by_node:
            raise PeerUnreachable("no address")
        return f"connection to {node}"


def advert(node, *replicas, draining=False, models=(), simulated=False):
    device = DeviceSnapshot(
        DeviceId(f"{node}/gpu-0"),
        node,
        DeviceKind.CUDA,
        f"card of {node}",
        Bytes.gib(8),
        Bytes.gib(8),
        simulated=simulated,
    )
    return NodeAdvert(
        NodeSnapshot(node, f"pc {node}", (device,), draining=draining),
        replicas=tuple(report_of(each, node) for each in replicas),
        models=models,
    )


def scripted(name, state=ReplicaState.READY, **report):
    return ScriptedReplica(name, "m", state=state, report=report)


def local(name, state=ReplicaState.READY, model="m"):
    return Candidate(ReplicaId(name), model, ModelKind.CHAT, state, node=HERE)


def fleet(own, peers, find=lambda name: None):
    return MeshFleet(HERE, own, peers, find)


# --- candidates -------------------------------------------------------------------------------------------------------


def test_candidates_are_this_nodes_and_those_of_peers_that_may_be_asked():
    peers = Known(
        advert(HERE, scripted("stale word of itself")),
        advert(BIG, scripted("b", speed=80.0, prefill_speed=900.0, slots=8, file_sha256="ab" * 32, exact=True)),
        advert(SMALL, scripted("s", ReplicaState.LOADING)),
    )
    found = fleet(Own(local("own")), peers).candidates("m")
    assert [(each.replica, each.local, each.node) for each in found] == [
        ("own", True, HERE),
        ("b", False, BIG),
        ("s", False, SMALL),
    ]
    remote = found[1]
    assert (remote.speed, remote.prefill_speed, remote.slots, remote.cache_tokens) == (80.0, 900.0, 8, 4096)
    assert (remote.file_sha256, remote.exact) == ("ab" * 32, True)
    assert found[2].state is ReplicaState.LOADING


@pytest.mark.parametrize(
    ("state", "standing"),
    [
        (MemberState.ALIVE, MemberState.ALIVE),
        (MemberState.SUSPECT, MemberState.SUSPECT),
        (MemberState.DRAINING, MemberState.DRAINING),
        (MemberState.DEAD, None),
        (MemberState.LEFT, None),
    ],
)
def test_who_may_be_asked_follows_from_membership(state, standing):
    peers = Known(advert(BIG, scripted("b")))
    peers.states[BIG] = state
    assert [each.standing for each in fleet(Own(), peers).candidates("m")] == ([] if standing is None else [standing])


def test_a_node_that_is_no_member_has_no_replicas():
    peers = Known(advert(BIG, scripted("b")))
    peers.state = lambda node: None
    assert fleet(Own(), peers).candidates("m") == []


def test_a_node_that_says_it_is_drained_is_drained():
    peers = Known(advert(BIG, scripted("b"), draining=True))
    mesh = fleet(Own(), peers)
    assert mesh.candidates("m")[0].standing is MemberState.DRAINING
    peers.states[BIG] = MemberState.SUSPECT
    assert mesh.candidates("m")[0].standing is MemberState.SUSPECT


def test_the_adverts_are_read_again_only_when_they_changed():
    peers = Known(advert(BIG, scripted("b")))
    mesh = fleet(Own(), peers)
    for _ in range(5):
        mesh.candidates("m")
    assert peers.read == 1
    peers.by_node[SMALL] = advert(SMALL, scripted("s"))
    peers.version = 2
    assert len(mesh.candidates("m")) == 2
    assert peers.read == 2


# --- targets ----------------------------------------------------------------------------------------------------------


def test_a_target_is_the_own_worker_or_the_peer():
    own = local("own")
    mesh = fleet(Own(own), Known(advert(BIG, scripted("b"), simulated=True)))
    assert mesh.target("own") is own
    there = mesh.target("b")
    assert isinstance(there, PeerTarget)
    served_by = there.served_by
    assert (served_by.node, served_by.device, served_by.simulated) == (BIG, "card of big", True)
    with pytest.raises(KeyError):
        mesh.target("nobody")


def test_a_replica_of_a_node_that_died_meanwhile_is_gone():
    peers = Known(advert(BIG, scripted("b")))
    mesh = fleet(Own(), peers)
    assert mesh.candidates("m")
    peers.states[BIG] = MemberState.DEAD
    with pytest.raises(KeyError):
        mesh.target("b")


def test_a_silent_peers_breaker_is_open_until_it_is_heard():
    mesh, ledger = fleet(Own(), Known(advert(BIG, scripted("b")))), ReplicaLedger()
    mesh.tell(ledger, lambda: 5.0)
    mesh.pulses.silent(BIG)
    assert ledger.breaker(BIG, 5.1) is BreakerState.OPEN
    mesh.pulses.heard(BIG)
    assert ledger.breaker(BIG, 5.2) is BreakerState.CLOSED


def test_a_call_leaves_a_silent_peer_only_for_a_replica_that_can_take_it(monkeypatch):
    def spare(*others, own=()):
        peers = Known(advert(BIG, scripted("b", file_sha256="ab" * 32)), *others)
        mesh = fleet(Own(*own), peers)
        mesh.tell(ledger, lambda: 0.0)
        monkeypatch.setattr(mesh.pulses, "is_silent", lambda node: node in silent)
        peers.states.update(states)
        return mesh.target("b")._spare()

    ledger, silent, states = ReplicaLedger(), {BIG}, {}
    same = advert(SMALL, scripted("s", file_sha256="ab" * 32))
    assert not spare()
    assert spare(same)
    assert spare(own=[local("own")])
    assert not spare(advert(BIG, scripted("b"), scripted("b2"))), "on the same node"
    assert not spare(advert(SMALL, scripted("s", file_sha256="cd" * 32))), "another file"
    assert not spare(advert(SMALL, scripted("s", ReplicaState.LOADING)))
    states[SMALL] = MemberState.SUSPECT
    assert not spare(same)
    states.clear()
    silent.add(SMALL)
    assert not spare(same)
    silent.remove(SMALL)
    ledger.failed(ReplicaId("s"), 1.0, 0.0)
    assert not spare(same)


# --- what is wanted anywhere is known everywhere ------------------------------------------------------------------------


def entry(name="m", **more):
    return ModelEntry(name, ModelKind.CHAT, (), **more)


def test_models_that_are_wanted_anywhere_are_served_everywhere_with_aliases_and_adapters():
    foreign = entry("theirs", aliases=("t",), adapters=(Adapter("legal", 1.0, Bytes(1)),))
    offered = entry("on-a-peer")
    wishes = [
        Wish(Deployment("known")),
        Wish(Deployment("theirs"), foreign),
        Wish(Deployment("on-a-peer")),
        Wish(Deployment("nobody-knows-it")),
        Wish(Deployment("m")),
    ]
    peers = Known(advert(BIG, models=(offered,)), wishes=wishes)
    own = ServedModel("m", ModelKind.CHAT, ("mine",))
    mesh = fleet(Own(models=(own,)), peers, {"known": entry("known")}.get)
    served = {model.name: model for model in mesh.models()}
    assert list(served) == ["m", "known", "theirs", "on-a-peer"]
    assert served["m"] is own
    assert (served["theirs"].aliases, served["theirs"].adapters) == (("t",), ("legal",))
    assert mesh.entries()["theirs"] is foreign


def test_a_model_that_does_not_fit_here_is_no_problem_where_a_peer_has_it():
    refused = ServedModel("m", ModelKind.CHAT, (), DoesNotFit("too big for this PC"))
    peers = Known(advert(BIG, scripted("b")))
    mesh = fleet(Own(models=(refused,)), peers)
    assert mesh.models()[0].unavailable is None
    peers.states[BIG] = MemberState.DEAD
    assert isinstance(mesh.models()[0].unavailable, DoesNotFit)


# --- the clearest error -----------------------------------------------------------------------------------------------


def test_loading_here_is_told_as_this_node_tells_it():
    own = StillLoading("m is still loading", details={"stage": "read", "percent": 5.0})
    peers = Known(advert(BIG, scripted("b", ReplicaState.LOADING, stage="load", percent=90.0)))
    assert fleet(Own(local("own", ReplicaState.LOADING), error=own), peers).not_ready("m") is own


@pytest.mark.parametrize(
    ("report", "said"),
    [
        ({"stage": "load", "percent": 70.4}, r"m is still loading on pc big \(card of big\): stage load, 70 %"),
        ({"stage": "fetch", "percent": 12.0}, "its file is being copied, 12 %"),
        ({}, "stage planned, 0 %"),
    ],
)
def test_loading_at_a_peer_says_where_and_how_far(report, said):
    peers = Known(advert(BIG, scripted("b", ReplicaState.LOADING, **report)))
    error = fleet(Own(), peers).not_ready("m")
    assert isinstance(error, StillLoading)
    with pytest.raises(StillLoading, match=said):
        raise error
    assert error.details["node"] == BIG
    assert error.retryable


def test_of_several_loads_the_furthest_is_told():
    peers = Known(
        advert(BIG, scripted("b", ReplicaState.LOADING, stage="load", percent=10.0)),
        advert(SMALL, scripted("s", ReplicaState.LOADING, stage="warm", percent=95.0)),
    )
    assert "pc small" in fleet(Own(), peers).not_ready("m").message


def test_a_failed_load_at_a_peer_says_why():
    peers = Known(advert(BIG, scripted("b", ReplicaState.FAILED, error="the file is corrupt")))
    error = fleet(Own(), peers).not_ready("m")
    assert isinstance(error, ReplicaFailed)
    assert error.message == "m could not be loaded on pc big: the file is corrupt"


def test_a_load_that_goes_on_elsewhere_counts_more_than_one_that_failed():
    peers = Known(
        advert(BIG, scripted("b", ReplicaState.FAILED, error="corrupt")),
        advert(SMALL, scripted("s", ReplicaState.RESTARTING)),
    )
    assert isinstance(fleet(Own(local("own", ReplicaState.FAILED)), peers).not_ready("m"), StillLoading)


def test_a_model_whose_node_died_says_which_and_is_worth_a_retry():
    peers = Known(advert(BIG, scripted("b")))
    peers.states[BIG] = MemberState.DEAD
    error = fleet(Own(), peers).not_ready("m")
    assert isinstance(error, PeerUnreachable)
    assert "pc big, which does not answer" in error.message
    assert error.retryable


@pytest.mark.parametrize("state", [MemberState.DEAD, MemberState.LEFT])
def test_a_model_that_fits_only_on_a_node_that_just_went_is_waited_for_and_then_refused(state):
    refused = DoesNotFit("m fits on no device here. Free 3 GiB on pc small.")
    peers = Known(advert(BIG, scripted("b")))
    own = Own(models=(ServedModel("m", ModelKind.CHAT, (), refused),), error=refused)
    mesh, clock = fleet(own, peers), Clock()
    mesh.tell(ReplicaLedger(), clock)
    peers.states[BIG] = state
    assert mesh.not_ready("m") is refused, "this node did not see it go"
    mesh.peer_went(BIG)
    clock.now += RETURN_SECONDS - 0.1
    error = mesh.not_ready("m")
    assert isinstance(error, PeerUnreachable)
    assert worth_waiting(error)
    assert "pc big (big), which went a moment ago" in error.message
    assert "Free 3 GiB on pc small. Try again, or" in error.message
    assert error.details == {"nodes": [BIG]}
    # Back with nothing loaded, and this node has not planned with it yet.
    peers.states[BIG] = MemberState.ALIVE
    peers.by_node[BIG] = advert(BIG)
    peers.version += 1
    assert isinstance(mesh.not_ready("m"), PeerUnreachable)
    assert mesh.models()[0].unavailable is None
    clock.now += 0.2
    assert mesh.not_ready("m") is refused
    assert mesh.models()[0].unavailable is refused


def test_nobody_waits_for_a_node_that_went_without_the_model():
    refused = DoesNotFit("m fits on no device here.")
    peers = Known(advert(BIG, scripted("b", ReplicaState.FAILED)), advert(SMALL))
    mesh = fleet(Own(error=refused), peers)
    for node in (BIG, SMALL):
        peers.states[node] = MemberState.DEAD
        mesh.peer_went(node)
    assert mesh.not_ready("m") is refused


def test_a_node_that_went_is_not_waited_for_where_another_one_says_why_it_cannot():
    peers = Known(advert(BIG, scripted("b")), advert(SMALL, scripted("s", ReplicaState.FAILED, error="corrupt")))
    mesh = fleet(Own(error=DoesNotFit("fits nowhere")), peers)
    peers.states[BIG] = MemberState.DEAD
    mesh.peer_went(BIG)
    assert isinstance(mesh.not_ready("m"), ReplicaFailed)


def test_else_it_is_this_nodes_own_word():
    refused = DoesNotFit("fits nowhere")
    assert fleet(Own(error=refused), Known()).not_ready("m") is refused


# --- over the real map ------------------------------------------------------------------------------------------------


def test_the_replicated_map_is_what_is_read():
    records = ReplicatedMap(HERE)
    told = advert(BIG, scripted("b"))
    wanted = Wish(Deployment("m"), entry("m"))
    connections = {BIG: "connection to big"}
    peers = MappedPeers(records, {BIG: MemberState.ALIVE}.get, connections.__getitem__)
    mesh = fleet(Own(), peers)
    assert mesh.models() == mesh.candidates("m") == []
    stamps = [Stamp(1_000_000, number, BIG) for number in range(3)]
    made = [
        Record(f"member/{BIG}", stamps[0], Member(BIG, "pc big", "0" * 64)),
        Record(f"node/{BIG}", stamps[1], told),
        Record("deployment/m", stamps[2], wanted),
    ]
    assert len(records.merge(made, 2_000_000)) == 3, records.last_refusal
    assert [model.name for model in mesh.models()] == ["m"]
    assert [each.replica for each in mesh.candidates("m")] == ["b"]
    assert isinstance(mesh.target("b"), PeerTarget)
