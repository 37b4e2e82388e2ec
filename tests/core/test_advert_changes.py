"""Which changes of a node its peers hear of."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fleets import MODELS, gpu, node

from tars.core.advert_changes import differs
from tars.core.placement import plan
from tars.core.records import HeldFile, NodeAdvert, ReplicaReport, TransferReport
from tars.core.types import Bytes, Deployment, ModelKind, NodeSnapshot, ReplicaState

CARD = gpu("a", "RTX 4090")
PC = node("a", CARD)
(ASSIGNMENT,) = plan([PC], MODELS, [Deployment("phi-2")]).assignments
LOADING = ReplicaReport(ASSIGNMENT, ModelKind.CHAT, ReplicaState.LOADING, stage="load", percent=20.0)
FETCH = TransferReport("phi-2", "Q8_0", "fetch", Bytes(1000), Bytes(10_000), 5.0, ("b",))
TOLD = NodeAdvert(PC, replicas=(LOADING,))


def with_card(**changes: object) -> NodeSnapshot:
    return replace(PC, devices=(replace(CARD, **changes),))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("now", "news"),
    [
        (TOLD, False),
        (replace(TOLD, node=with_card(memory_free=Bytes(CARD.memory_free - Bytes.mib(300)))), False),
        (replace(TOLD, node=with_card(memory_free=Bytes(CARD.memory_free - Bytes.mib(500)))), True),
        (replace(TOLD, node=with_card(memory_held=Bytes(1))), True),
        (replace(TOLD, node=with_card(cap=Bytes.gib(4))), True),
        (replace(TOLD, node=with_card(temperature_celsius=80, utilisation_percent=99, power_watts=300.0)), False),
        (replace(TOLD, node=replace(PC, draining=True)), True),
        (replace(TOLD, node=replace(PC, devices=())), True),
        (replace(TOLD, replicas=(replace(LOADING, percent=25.0),)), False),
        (replace(TOLD, replicas=(replace(LOADING, percent=30.0),)), True),
        (replace(TOLD, replicas=(replace(LOADING, state=ReplicaState.READY),)), True),
        (replace(TOLD, replicas=()), True),
        (replace(TOLD, files=(HeldFile("phi-2", "Q8_0", Bytes(1)),)), True),
        (replace(TOLD, models=(MODELS["phi-2"],)), True),
        (replace(TOLD, transfers=(FETCH,)), True),
    ],
)
def test_what_decides_something_is_news(now: NodeAdvert, news: bool) -> None:
    assert differs(TOLD, now) is news


def test_of_a_small_card_256_mib_are_news() -> None:
    small = gpu("a", "GTX 1660 SUPER")
    told = NodeAdvert(node("a", small))
    for mib, news in ((200, False), (256, True)):
        now = NodeAdvert(node("a", replace(small, memory_free=Bytes(small.memory_free - Bytes.mib(mib)))))
        assert differs(told, now) is news


def test_the_first_advert_is_news() -> None:
    assert differs(None, TOLD)


@pytest.mark.parametrize(
    ("now", "news"),
    [
        (FETCH, False),
        (replace(FETCH, done=Bytes(1900), bytes_per_second=900.0, sources=("b", "c")), False),
        (replace(FETCH, done=Bytes(2000)), True),
        (replace(FETCH, stage="verify"), True),
        (replace(FETCH, note="b gave wrong bytes"), True),
        (replace(FETCH, model="phi-3-mini"), True),
    ],
)
def test_of_a_transfer_steps_are_news_and_its_rate_is_not(now: TransferReport, news: bool) -> None:
    assert differs(replace(TOLD, transfers=(FETCH,)), replace(TOLD, transfers=(now,))) is news


def test_a_transfer_of_unknown_size_does_not_divide_by_it() -> None:
    unknown = replace(FETCH, stage="look", done=Bytes(0), total=Bytes(0))
    assert not differs(replace(TOLD, transfers=(unknown,)), replace(TOLD, transfers=(unknown,)))
