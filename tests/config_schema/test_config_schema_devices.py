"""What is declared of a device."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from tars.config_schema.devices import ExpectedDevice
from tars.core.types import Bytes


def test_an_expected_device_is_free_unless_the_file_says_otherwise() -> None:
    assert ExpectedDevice(name="x", memory_mib=1000).memory_free == Bytes.mib(1000)
    assert ExpectedDevice(name="x", memory_mib=1000, memory_free_mib=900).memory_free == Bytes.mib(900)
    assert ExpectedDevice(name="x", memory_mib=1000, compute_capability="12.0").capability == (12, 0)
    with pytest.raises(ValidationError, match="more than memory_mib"):
        ExpectedDevice(name="x", memory_mib=1000, memory_free_mib=1001)
