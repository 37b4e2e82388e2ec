"""What `scripts/bench soak` concludes from its weighings and tallies."""

from __future__ import annotations

import pytest
from soak import MIB, Tally, Weighing, findings


def weighings(
    count: int = 20, *, leak_mib: float = 0.0, descriptors: float = 0.0, kv_used: int = 0, from_name: str = "worker 1"
) -> list[Weighing]:
    return [
        Weighing(
            at=60.0 * number,
            # The first minutes grow in any case.
            resident={"node": 100 * MIB, from_name: int((300 + min(number, 4) * 20 + leak_mib * number) * MIB)},
            descriptors={"node": 20 + int(descriptors * number), from_name: 10},
            threads={"node": 5, from_name: 6},
            kv_used=kv_used,
        )
        for number in range(count)
    ]


def not_reached(found: list[Weighing], tallies: dict[str, Tally] | None = None, restarts: int = 0) -> list[str]:
    aims, _ = findings(found, tallies or {"chat": Tally(sent=5, right=5)}, restarts)
    return [aim.what for aim in aims if not aim.reached]


def test_a_node_that_only_warmed_up_is_flat() -> None:
    assert not_reached(weighings()) == []


def test_a_leak_is_found_and_named_by_its_process() -> None:
    assert not_reached(weighings(leak_mib=2.0)) == ["MiB that worker 1 grew at rest"]


def test_descriptors_that_grow_are_found() -> None:
    assert not_reached(weighings(descriptors=0.2)) == ["descriptors that node gained at rest"]


def test_kv_cells_lost_calls_wrong_answers_and_restarts_are_found() -> None:
    tallies = {"chat": Tally(sent=5, right=3, lost=1, wrong=1, problems=["overloaded: come back later"])}
    assert not_reached(weighings(kv_used=3), tallies, restarts=1) == [
        "KV cells of running sequences at rest, most",
        "calls lost",
        "calls answered wrongly",
        "worker restarts",
    ]
    _, lines = findings(weighings(), tallies, 0)
    assert any("come back later" in line for line in lines)


def test_a_worker_that_was_started_anew_is_said() -> None:
    found = [*weighings(10), *weighings(20, from_name="worker 2")[10:]]
    _, lines = findings(found, {}, 1)
    assert any("worker 2 was not there all the time" in line for line in lines)


def test_too_short_a_run_is_no_verdict() -> None:
    with pytest.raises(ValueError, match="two samples"):
        findings(weighings(1), {}, 0)
