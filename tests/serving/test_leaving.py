"""Which answers leave: only where somebody can go on with them."""

from types import SimpleNamespace

import pytest

from tars.core.mesh_messages import MemberState
from tars.core.routing import Candidate
from tars.core.types import ModelKind, NodeId, ReplicaId, ReplicaState
from tars.serving.leaving import Leaving
from tars.serving.running_answers import RunningAnswer

SHA = "a" * 64
OWN = ReplicaId("m@here#0")


def answer(replica=OWN, from_peer=True):
    return RunningAnswer(replica, SimpleNamespace(spec=SimpleNamespace(model="m")), None, from_peer)


def candidate(replica="m@there#0", local=False, **more):
    told = {"state": ReplicaState.READY, "node": NodeId("here" if local else "there"), "file_sha256": SHA, **more}
    return Candidate(ReplicaId(replica), "m", ModelKind.CHAT, local=local, **told)


MINE = candidate(OWN, local=True)


class Answers:
    """Remembers who was asked to leave."""

    def __init__(self, *running):
        self.running = running
        self.left = []

    async def hand_over(self, leaves):
        self.hand_over_soon(leaves)
        return len(self.left)

    def hand_over_soon(self, leaves):
        self.left += [each for each in self.running if leaves(each)]


def leaving(*candidates, running):
    answers = Answers(*running)
    return Leaving(answers, {"m": candidates}.__getitem__), answers


async def test_a_node_that_stops_hands_over_what_other_nodes_callers_wait_for():
    own, theirs = answer(from_peer=False), answer()
    goes, answers = leaving(MINE, candidate(), running=[own, theirs])
    assert await goes.stopping() == 1
    assert answers.left == [theirs]


async def test_a_node_that_is_drained_hands_over_everything():
    running = [answer(from_peer=False), answer()]
    goes, _ = leaving(MINE, candidate(), running=running)
    assert await goes.drained() == 2


@pytest.mark.parametrize(
    "other",
    [
        candidate(state=ReplicaState.LOADING),
        candidate(file_sha256="b" * 64),
        candidate(file_sha256=None),
        candidate(standing=MemberState.DRAINING),
        candidate(standing=MemberState.SUSPECT),
        candidate("m@here#1", local=True),
    ],
)
async def test_without_a_ready_replica_of_the_same_file_elsewhere_they_are_finished_here(other):
    goes, answers = leaving(MINE, other, running=[answer()])
    assert await goes.drained() == await goes.stopping() == 0
    assert answers.left == []


async def test_a_file_that_nobody_knows_has_no_like():
    goes, _ = leaving(candidate(OWN, local=True, file_sha256=None), candidate(file_sha256=None), running=[answer()])
    assert await goes.drained() == 0


def test_a_replica_that_is_unloaded_gives_its_own_answers_also_to_another_one_here():
    mine, others = answer(from_peer=False), answer("m@here#1")
    goes, answers = leaving(MINE, candidate("m@here#1", local=True), running=[mine, others])
    goes.unloaded(OWN, "m")
    assert answers.left == [mine]


def test_a_replica_that_is_unloaded_without_another_one_keeps_its_answers():
    goes, answers = leaving(MINE, running=[answer()])
    goes.unloaded(OWN, "m")
    assert answers.left == []
