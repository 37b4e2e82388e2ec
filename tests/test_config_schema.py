"""Listen addresses, exposure, secrets and the words of [[deploy]]."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from tars.config_schema import (
    AdapterSource,
    Config,
    DeploySection,
    EnginesSection,
    ExpectedDevice,
    ListenAddress,
    MeshSection,
    ModelSource,
    NodeSection,
    SecuritySection,
)
from tars.core.types import Bytes, Deployment, KvType, ModelKind
from tars.messages.node import DeployParams

KEY = "0123456789abcdef"


@pytest.mark.parametrize(
    ("text", "host", "port", "loopback"),
    [
        ("127.0.0.1:8000", "127.0.0.1", 8000, True),
        ("127.8.9.1:0", "127.8.9.1", 0, True),
        ("localhost:65535", "localhost", 65535, True),
        ("[::1]:8000", "::1", 8000, True),
        ("[::]:8000", "::", 8000, False),
        ("[fe80::1%eth0]:1", "fe80::1%eth0", 1, False),
        ("0.0.0.0:8000", "0.0.0.0", 8000, False),
        ("192.168.1.5:8000", "192.168.1.5", 8000, False),
        ("pc1.tail.net:8000", "pc1.tail.net", 8000, False),
        ("localhost.example.org:1", "localhost.example.org", 1, False),
    ],
)
def test_a_listen_address_is_read_and_written_back(text: str, host: str, port: int, loopback: bool) -> None:
    address = ListenAddress.parse(text)
    assert (address.host, address.port, address.is_loopback) == (host, port, loopback)
    assert str(address) == text


@pytest.mark.parametrize(
    "text",
    [
        "8000",
        ":8000",
        "127.0.0.1",
        "127.0.0.1:",
        "a:b",
        "a:65536",
        "a:-1",
        "a:٣",
        "::1:8000",
        "[nonsense]:1",
        "http://a:1",
        "a b:1",
        "[::1:1",
    ],
)
def test_a_wrong_listen_address_is_refused_with_the_right_form(text: str) -> None:
    with pytest.raises(ValidationError, match=r"127\.0\.0\.1:8000|\[::1\]:8000"):
        NodeSection(listen=text)


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


@pytest.mark.parametrize("key", ["", "short", "fifteen-chars-x", "0123456789abcde\n", "пароль-пароль-пароль"])
def test_a_weak_or_unsendable_key_is_refused_without_showing_it(key: str) -> None:
    with pytest.raises(ValidationError) as caught:
        SecuritySection.model_validate({"api_key": [{"name": "ops", "key": key}]})
    assert not key or all(key not in str(error["msg"]) for error in caught.value.errors())


def test_a_wildcard_origin_is_refused() -> None:
    with pytest.raises(ValidationError, match="compared exactly"):
        SecuritySection.model_validate({"allowed_origins": ["*"]})


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


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        Config().node.name = "other"  # type: ignore[misc]  # that it is frozen is the point


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


def test_the_demo_models_are_left_out_as_soon_as_something_is_deployed() -> None:
    assert Config().demo_models
    deployed = Config(deploy=(DeploySection(model="m"),))
    assert not deployed.demo_models
    assert deployed.deployments == (Deployment("m"),)
    assert Config.model_validate({"deploy": [{"model": "m"}], "demo": {"models": True}}).demo_models


def test_a_model_deployed_twice_is_refused_with_the_number_of_replicas_to_write() -> None:
    with pytest.raises(ValidationError, match="replicas = 2"):
        Config.model_validate({"deploy": [{"model": "m"}, {"model": "m"}]})


def test_an_expected_device_is_free_unless_the_file_says_otherwise() -> None:
    assert ExpectedDevice(name="x", memory_mib=1000).memory_free == Bytes.mib(1000)
    assert ExpectedDevice(name="x", memory_mib=1000, memory_free_mib=900).memory_free == Bytes.mib(900)
    assert ExpectedDevice(name="x", memory_mib=1000, compute_capability="12.0").capability == (12, 0)
    with pytest.raises(ValidationError, match="more than memory_mib"):
        ExpectedDevice(name="x", memory_mib=1000, memory_free_mib=1001)


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


def test_addresses_of_peers_are_written_in_one_spelling() -> None:
    mesh = MeshSection(seeds=("Box.LAN:8001", "[FD00::05]:8001"), advertise=("100.64.1.2:8001",))
    assert mesh.seeds == ("box.lan:8001", "[fd00::5]:8001")
    assert mesh.advertise == ("100.64.1.2:8001",)


@pytest.mark.parametrize("address", ["box.lan", "box.lan:0", "10.0.0:8001", "http://box.lan:8001", "fd00::5:8001"])
@pytest.mark.parametrize("key", ["seeds", "advertise"])
def test_what_is_no_peers_address_is_refused(key: str, address: str) -> None:
    with pytest.raises(ValidationError, match=r"is not host:port, such as"):
        MeshSection.model_validate({key: (address,)})
