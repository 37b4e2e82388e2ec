"""Fixtures that tests of several layers share."""

from __future__ import annotations

from pathlib import Path

import pretend_card
import pytest


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random-weights llama GGUF; treat it as read-only."""
    from tiny_gguf import write_tiny_gguf  # not at the top: most tests need no gguf and no numpy

    return write_tiny_gguf(tmp_path_factory.mktemp("models") / "tiny-random.Q8_0.gguf")


@pytest.fixture(scope="session")
def pretend_nvml(tmp_path_factory: pytest.TempPathFactory) -> pretend_card.PretendNvml:
    """Pretend NVIDIA cards for child processes; see pretend_card.py."""
    return pretend_card.build(tmp_path_factory.mktemp("nvml"))
