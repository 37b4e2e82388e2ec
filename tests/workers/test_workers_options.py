from __future__ import annotations

import importlib

from tars.workers.options import ENGINES, WorkerOptions


def test_a_step_gets_two_tries_before_its_worker_counts_as_hung() -> None:
    assert WorkerOptions().step_patience() == 20
    assert WorkerOptions(abort_seconds=90, hang_seconds=120).step_patience() == 40
    # A worker's own patience is three pings at least, and so the step's grows with it.
    assert WorkerOptions(hang_seconds=1, ping_interval_seconds=10).step_patience() == 10


def test_every_engine_can_be_found_without_its_package() -> None:
    for name in ENGINES.values():
        module, _, attribute = name.partition(":")
        assert hasattr(importlib.import_module(module), attribute)


def test_hung_is_never_judged_by_fewer_than_three_pings() -> None:
    assert WorkerOptions(hang_seconds=1, ping_interval_seconds=2).limits().hang == 6
