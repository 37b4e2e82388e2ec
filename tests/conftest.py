"""Fixtures that tests of several layers share."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pretend_card
import pytest
from hypothesis import HealthCheck, settings

# How long an example took says what else the machine did; a hang shows at the run's own bound.
settings.register_profile("full", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
# `scripts/test fast`: a quarter of the examples. Tests that want more than usual ask for a multiple of the profile's.
settings.register_profile("fast", settings.get_profile("full"), max_examples=25)
settings.load_profile("full")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In one of several processes: the files that take long come first, so that at the end no process waits for another one's.

    By their number of tests, which is xdist's own order, those would be the last: a mesh of real nodes is often a file of one test. So of
    the files that take long those with the fewest tests are the first.
    """
    if not hasattr(config, "workerinput"):
        return
    long = {item.path for item in items for mark in ("slow", "model") if item.get_closest_marker(mark)}
    counts = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path not in long, counts[item.path] if item.path in long else -counts[item.path]))


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random-weights llama GGUF; treat it as read-only."""
    from tiny_gguf import write_tiny_gguf  # not at the top: most tests need no gguf and no numpy

    return write_tiny_gguf(tmp_path_factory.mktemp("models") / "tiny-random.Q8_0.gguf")


@pytest.fixture(scope="session")
def pretend_nvml(tmp_path_factory: pytest.TempPathFactory) -> pretend_card.PretendNvml:
    """Pretend NVIDIA cards for child processes; see pretend_card.py."""
    return pretend_card.build(tmp_path_factory.mktemp("nvml"))
