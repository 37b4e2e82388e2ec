"""How workers are watched and compute."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from tars.config_schema.workers import EnginesSection


@pytest.mark.parametrize(
    "wrong",
    [
        {"inter_token_ms": 0.0},
        {"embedding_backend": "torch-int8"},
        {"continuation": "yes"},
        {"exact": True},
        {"slots": 4},
    ],
)
def test_an_engines_table_has_bounds_and_known_back_ends(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        EnginesSection(**wrong)
    assert EnginesSection(embedding_backend="openvino-bf16").inter_token_ms == 50.0
