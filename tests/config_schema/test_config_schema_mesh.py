"""Addresses of peers."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from tars.config_schema.mesh import MeshSection


def test_addresses_of_peers_are_written_in_one_spelling() -> None:
    mesh = MeshSection(seeds=("Box.LAN:8001", "[FD00::05]:8001"), advertise=("100.64.1.2:8001",))
    assert mesh.seeds == ("box.lan:8001", "[fd00::5]:8001")
    assert mesh.advertise == ("100.64.1.2:8001",)


@pytest.mark.parametrize("address", ["box.lan", "box.lan:0", "10.0.0:8001", "http://box.lan:8001", "fd00::5:8001"])
@pytest.mark.parametrize("key", ["seeds", "advertise"])
def test_what_is_no_peers_address_is_refused(key: str, address: str) -> None:
    with pytest.raises(ValidationError, match=r"is not host:port, such as"):
        MeshSection.model_validate({key: (address,)})
