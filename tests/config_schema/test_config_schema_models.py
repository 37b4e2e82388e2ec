"""The words of [[model]] and [[deploy]]."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from tars.config_schema.models import AdapterSource, DeploySection, ModelSource
from tars.core.types import Deployment, KvType, ModelKind
from tars.messages.node import DeployParams


def test_a_deploy_table_becomes_a_deployment() -> None:
    table = DeploySection(
        model="m", replicas=2, context=2048, slots=3, kv_type="q8_0", variant="Q8_0", device="cpu", priority=4
    )
    assert table.to_deployment() == Deployment(
        "m", 2, 2048, 3, kv_type=KvType.Q8_0, variant="Q8_0", device="cpu", priority=4
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"replicas": 0},
        {"replicas": 65},
        {"replicas": True},
        {"context": 63},
        {"context": 1_048_577},
        {"slots": 0},
        {"slots": 257},
        {"kv_type": "f8"},
        {"replicas": 64, "context": 64, "slots": 256, "kv_type": "q4_0"},
    ],
)
def test_a_deploy_table_has_the_rules_of_models_deploy(fields: dict[str, object]) -> None:
    def accepts(model: type[DeploySection] | type[DeployParams]) -> bool:
        try:
            model.model_validate({"model": "m", **fields})
        except ValidationError:
            return False
        return True

    assert accepts(DeploySection) == accepts(DeployParams)


def test_slots_share_one_context_unless_a_deploy_table_says_more() -> None:
    plain = DeploySection(model="m").to_deployment()
    assert (plain.slots, plain.kv_tokens, plain.gpu_layers) == (None, None, None)
    given = DeploySection(model="m", context=512, kv_tokens=1024, gpu_layers=20).to_deployment()
    assert (given.kv_tokens, given.gpu_layers) == (1024, 20)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"context": 512, "kv_tokens": 511}, r"must be from 512 \(the context\) to 2048 \(4 slots"),
        ({"context": 512, "slots": 2, "kv_tokens": 1025}, r"to 1024 \(2 slots"),
        ({"slots": 0}, "slots"),
        ({"gpu_layers": 0}, "gpu_layers"),
    ],
)
def test_a_deploy_table_that_contradicts_itself_is_refused(wrong: dict[str, int], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        DeploySection(model="m", **wrong)


@pytest.mark.parametrize("name", ["a:b", "", "a/b", "-a", "a b"])
def test_an_adapters_name_can_follow_a_colon(name: str) -> None:
    with pytest.raises(ValidationError):
        AdapterSource(name=name, path=Path("a.gguf"))


def test_adapters_belong_to_chat_models_and_have_a_name_each() -> None:
    one = AdapterSource(name="a", path=Path("a.gguf"))
    with pytest.raises(ValidationError, match="two adapters are called a"):
        ModelSource(name="m", path=Path("m.gguf"), adapters=(one, one))
    with pytest.raises(ValidationError, match="for chat models"):
        ModelSource(name="m", path=Path("m"), kind=ModelKind.EMBEDDING, adapters=(one,))
