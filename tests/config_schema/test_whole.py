"""Exposure, secrets, and the rules between the tables."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from tars.config_schema.models import DeploySection
from tars.config_schema.node import NodeSection
from tars.config_schema.security import SecuritySection
from tars.config_schema.whole import Config
from tars.core.types import Deployment

KEY = "0123456789abcdef"


@pytest.mark.parametrize(
    ("listen", "exposed"),
    [
        ("127.0.0.1:8000", False),
        ("localhost:1", False),
        ("[::1]:2", False),
        ("0.0.0.0:8000", True),
        ("[::]:8000", True),
        ("192.0.2.7:8000", True),
        ("box:8000", True),
    ],
)
def test_a_node_that_others_can_reach_is_exposed_and_needs_no_key_to_start(listen: str, exposed: bool) -> None:
    assert Config(node=NodeSection(listen=listen)).exposed is exposed


def test_a_key_is_never_printed() -> None:
    config = Config(security=SecuritySection.model_validate({"api_key": [f"ops:{KEY}"]}))
    assert config.security.api_key[0].key.get_secret_value() == KEY
    for shown in (repr(config), str(config), str(config.redacted()), config.model_dump_json()):
        assert KEY not in shown
    assert config.redacted()["security"]["api_key"] == [{"name": "ops", "key": "***"}]
    assert str(config.node.state_dir.parent) not in str(config.redacted())


def test_the_demo_models_are_left_out_as_soon_as_something_is_deployed() -> None:
    assert Config().demo_models
    deployed = Config(deploy=(DeploySection(model="m"),))
    assert not deployed.demo_models
    assert deployed.deployments == (Deployment("m"),)
    assert Config.model_validate({"deploy": [{"model": "m"}], "demo": {"models": True}}).demo_models


def test_a_model_deployed_twice_is_refused_with_the_number_of_replicas_to_write() -> None:
    with pytest.raises(ValidationError, match="replicas = 2"):
        Config.model_validate({"deploy": [{"model": "m"}, {"model": "m"}]})
