"""How long a load that failed is not tried again, and what ends that."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fleets import MODELS, gpu, node

from tars.core.load_bars import LoadBars
from tars.core.placement import plan
from tars.core.records import HeldFile, NodeAdvert, ReplicaReport
from tars.core.types import Bytes, Deployment, ModelKind, ReplicaId, ReplicaState

PC = node("pc1", gpu("pc1"))
(ASSIGNMENT,) = plan([PC], MODELS, [Deployment("phi-2")]).assignments
LOAD = ("phi-2", "Q8_0", ASSIGNMENT.device)


def advert(state: ReplicaState | None, size: int = 1, sha256: str | None = None) -> NodeAdvert:
    reports = () if state is None else (ReplicaReport(ASSIGNMENT, ModelKind.CHAT, state, error="bad magic."),)
    return NodeAdvert(PC, replicas=reports, files=(HeldFile("phi-2", "Q8_0", Bytes(size), sha256),))


def test_a_failure_bars_the_load_there_and_says_why_until_its_time_is_over() -> None:
    bars = LoadBars(60, 3600)
    bars.note([advert(ReplicaState.FAILED)], 100.0)
    assert bars.in_force(159.9) == {LOAD: "a load of Q8_0 failed: bad magic"}
    assert bars.next_end(100.0) == 160.0
    assert bars.in_force(160.0) == {}
    assert bars.next_end(160.0) is None


def test_the_same_failure_counts_once_and_a_new_one_doubles_the_pause_up_to_the_most() -> None:
    bars, now, pauses = LoadBars(60, 200), 0.0, []
    for _ in range(4):
        bars.note([advert(ReplicaState.FAILED)], now)
        bars.note([advert(ReplicaState.FAILED)], now + 5)
        pauses.append(bars.next_end(now) - now)
        now += 1000
        bars.note([advert(ReplicaState.LOADING)], now)
    assert pauses == [60, 120, 200, 200]


@pytest.mark.parametrize(
    ("then", "forgotten"),
    [
        (advert(ReplicaState.READY), True),
        (advert(None, size=2), True),
        (advert(None, sha256="another"), True),
        (advert(None, sha256="one"), False),
        (advert(None), False),
        (advert(ReplicaState.LOADING), False),
    ],
)
def test_success_and_a_new_file_end_it(then: NodeAdvert, forgotten: bool) -> None:
    bars = LoadBars(60, 3600)
    bars.note([advert(ReplicaState.FAILED, sha256="one")], 0.0)
    bars.note([then], 1.0)
    assert (not bars.in_force(1.0)) is forgotten


def test_whoever_deploys_again_ends_it_for_that_model_alone() -> None:
    bars = LoadBars(60, 3600)
    bars.note([advert(ReplicaState.FAILED)], 0.0)
    bars.forget("mistral-7b")
    assert bars.in_force(1.0)
    bars.forget("phi-2")
    assert not bars.in_force(1.0)


def test_another_replica_that_was_ready_there_before_is_no_success() -> None:
    bars = LoadBars(60, 3600)
    sibling = ReplicaReport(
        replace(ASSIGNMENT, replica=ReplicaId("phi-2@pc1-gpu-0#1")), ModelKind.CHAT, ReplicaState.READY
    )
    failed = advert(ReplicaState.FAILED)
    both = replace(failed, replicas=(*failed.replicas, sibling))
    bars.note([both], 0.0)
    bars.note([replace(both, replicas=(sibling,))], 1.0)
    assert bars.in_force(1.0)
    bars.note([replace(both, replicas=(*advert(ReplicaState.READY).replicas, sibling))], 2.0)
    assert not bars.in_force(2.0)


def test_how_lately_it_failed_counts_where_it_need_not_be_loaded() -> None:
    bars = LoadBars(60, 3600)
    bars.note([advert(ReplicaState.FAILED)], 100.0)
    assert bars.failed_within(1000, 1099.9) == {LOAD: "a load of Q8_0 failed: bad magic"}
    assert bars.next_forgiven(1000, 200.0) == 1100.0
    assert bars.failed_within(1000, 1100.0) == {}
    assert bars.next_forgiven(1000, 1100.0) is None
    bars.note([advert(ReplicaState.READY)], 1101.0)
    assert bars.failed_within(10_000, 1101.0) == {}
