"""Keys, hosts and origins."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from tars.config_schema.security import SecuritySection


@pytest.mark.parametrize("key", ["", "short", "fifteen-chars-x", "0123456789abcde\n", "пароль-пароль-пароль"])
def test_a_weak_or_unsendable_key_is_refused_without_showing_it(key: str) -> None:
    with pytest.raises(ValidationError) as caught:
        SecuritySection.model_validate({"api_key": [{"name": "ops", "key": key}]})
    assert not key or all(key not in str(error["msg"]) for error in caught.value.errors())


def test_a_wildcard_origin_is_refused() -> None:
    with pytest.raises(ValidationError, match="compared exactly"):
        SecuritySection.model_validate({"allowed_origins": ["*"]})
