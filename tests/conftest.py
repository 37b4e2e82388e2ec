"""Fixtures that tests of several layers share."""

from __future__ import annotations

from pathlib import Path

import pretend_card
import pytest
from hypothesis import HealthCheck, settings

# How long an example took says what else the machine did; a hang shows at the run's own bound.
settings.register_profile("full", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
# `scripts/test fast`: a quarter of the examples. Tests that want more than usual ask for a multiple of the profile's.
settings.register_profile("fast", settings.get_profile("full"), max_examples=25)
settings.load_profile("full")


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random-weights llama GGUF; treat it as read-only."""
    from tiny_gguf import write_tiny_gguf  # not at the top: most tests need no gguf and no numpy

    return write_tiny_gguf(tmp_path_factory.mktemp("models") / "tiny-random.Q8_0.gguf")


@pytest.fixture(scope="session")
def pretend_nvml(tmp_path_factory: pytest.TempPathFactory) -> pretend_card.PretendNvml:
    """Pretend NVIDIA cards for child processes; see pretend_card.py."""
    return pretend_card.build(tmp_path_factory.mktemp("nvml"))
