"""What a node is called and where it listens."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from tars.config_schema.node import NodeSection
from tars.config_schema.whole import Config


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("pc1.lan", "pc1"),
        ("Jürgens PC", "J-rgens-PC"),
        ("_odd", "odd"),
        ("", "node"),
        ("--", "node"),
        ("x" * 90, "x" * 63),
    ],
)
def test_a_node_is_called_after_its_host_however_that_is_called(
    monkeypatch: pytest.MonkeyPatch, host: str, name: str
) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: host)
    assert Config().node.name == name


def test_a_wrong_listen_address_is_refused_with_the_right_form() -> None:
    with pytest.raises(ValidationError, match=r"127\.0\.0\.1:8000"):
        NodeSection(listen="8000")
    assert NodeSection(listen="[::1]:1").address.port == 1
