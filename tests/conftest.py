"""Fixtures that tests of several layers share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random-weights llama GGUF; treat it as read-only."""
    from tiny_gguf import write_tiny_gguf  # not at the top: most tests need no gguf and no numpy

    return write_tiny_gguf(tmp_path_factory.mktemp("models") / "tiny-random.Q8_0.gguf")
