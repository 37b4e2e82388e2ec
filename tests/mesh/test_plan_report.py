"""Plans as messages, and a fleet made from the shipped configuration files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from fleets import MODELS, cpu, gpu, node

from tars.core.placement import plan
from tars.core.types import Bytes, Deployment, DeviceKind
from tars.errors import ConfigError
from tars.mesh.plan_report import describe_device, fleet_from_configs, plan_result

NODE_CONFIGS = Path(__file__).parents[2] / "node_configs"
PC1, PC2 = NODE_CONFIGS / "pc1-rtx3060.toml", NODE_CONFIGS / "pc2-gtx1660s.toml"


def placed_by_name(*files: Path) -> dict[str, tuple[str, str, str]]:
    nodes, deployments, catalogue = fleet_from_configs(files)
    result = plan_result(plan(nodes, catalogue.entries, deployments), nodes)
    assert not result.refusals
    return {each.model: (each.node_name, each.device_name, each.variant) for each in result.assignments}


@pytest.mark.parametrize("files", [(PC1, PC2), (PC2, PC1)], ids=["pc1 first", "pc2 first"])
def test_the_shipped_pcs_plan_the_seed_case(files: tuple[Path, ...]) -> None:
    assert placed_by_name(*files) == {
        "mistral-7b-instruct-v0.2": ("pc1", "NVIDIA GeForce RTX 3060", "Q4_K_M"),
        "all-minilm-l6-v2": ("pc2", "NVIDIA GeForce GTX 1660 SUPER", "fp32"),
        "phi-2": ("pc2", "NVIDIA GeForce GTX 1660 SUPER", "Q8_0"),
    }


def test_stablelm_fits_the_1660_super_where_the_file_proposes_it(tmp_path: Path) -> None:
    changed = tmp_path / "pc2.toml"
    text = PC2.read_text()
    assert 'model = "phi-2"' in text
    changed.write_text(text.replace('model = "phi-2"', 'model = "stablelm-zephyr-3b"'))
    placed = placed_by_name(PC1, changed)
    assert placed["stablelm-zephyr-3b"] == ("pc2", "NVIDIA GeForce GTX 1660 SUPER", "Q8_0")
    assert placed["mistral-7b-instruct-v0.2"][0] == "pc1"


@pytest.mark.parametrize(
    "file", sorted(set(NODE_CONFIGS.glob("*.toml")) - {NODE_CONFIGS / "demo.toml"}), ids=lambda f: f.stem
)
def test_every_shipped_pc_holds_alone_what_its_file_deploys(file: Path) -> None:
    assert placed_by_name(file)


def test_devices_of_a_file_have_the_memory_the_reserve_and_the_cap_that_it_declares(tmp_path: Path) -> None:
    file = tmp_path / "pc.toml"
    file.write_text(
        '[node]\nname = "pc"\n[devices]\nreserve_mib = 700\n'
        '[[devices.expected]]\nname = "NVIDIA GeForce RTX 3060"\nmemory_mib = 11909\nmemory_free_mib = 11000\n'
        '[[devices.expected]]\nkind = "cpu"\nname = "CPU"\nmemory_mib = 8192\n'
        '[[devices.simulated]]\nname = "Toy"\nmemory_mib = 4096\n'
        '[[devices.cap]]\ndevice = "RTX 3060"\nmemory_mib = 5000\n'
    )
    nodes, deployments, _ = fleet_from_configs([file])
    assert deployments == []
    card, processor, toy = nodes[0].devices
    assert (card.capacity, card.memory_free) == (Bytes.mib(5000), Bytes.mib(11000))
    assert card.compute_capability == (8, 6)
    assert processor.kind is DeviceKind.CPU
    assert processor.capacity == Bytes.mib(8192 - 2048)
    assert toy.simulated
    again, _, _ = fleet_from_configs([file])
    assert again == nodes


def test_two_files_of_one_node_and_a_file_without_devices_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a node called pc1"):
        fleet_from_configs([PC1, PC1])
    empty = tmp_path / "empty.toml"
    empty.write_text("")
    with pytest.raises(ConfigError, match=r"\[\[devices.expected\]\]"):
        fleet_from_configs([empty])


def test_the_environment_of_this_pc_does_not_change_a_fleet_of_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TARS_NODE_NAME", "elsewhere")
    nodes, _, _ = fleet_from_configs([PC1])
    assert nodes[0].name == "pc1"


def test_a_plan_becomes_messages_with_bytes_that_add_up() -> None:
    nodes = [node("pc1", gpu("pc1"), cpu("pc1"))]
    result = plan_result(plan(nodes, MODELS, [Deployment("mistral-7b"), Deployment("llama-3.1-70b")]), nodes)
    placed = result.assignments[0]
    parts = placed.weights_bytes + placed.kv_cache_bytes + placed.compute_bytes + placed.overhead_bytes
    assert placed.needed_bytes == parts
    assert (placed.node_name, placed.device_name, placed.measured, placed.gpu_layers) == ("pc1", "RTX 3060", False, -1)
    refused = result.refusals[0]
    assert refused.replicas_missing == 1
    assert {verdict.device: verdict.accepted for verdict in refused.verdicts} == {"pc1/cpu": False, "pc1/gpu-0": False}
    assert all(verdict.needed_bytes > verdict.free_bytes for verdict in refused.verdicts)
    assert [device.id for device in result.devices] == ["pc1/gpu-0", "pc1/cpu"]


def test_a_device_that_does_not_say_is_described_with_none() -> None:
    described = describe_device(cpu("pc1"))
    assert described.compute_capability is None
    assert described.temperature_celsius is None
    full = replace(gpu("pc1"), temperature_celsius=50, simulated=True, notes=("a note",))
    described = describe_device(full)
    assert (described.compute_capability, described.temperature_celsius) == ("8.6", 50)
    assert described.simulated
    assert described.notes == ["a note"]
    assert described.memory_capacity_bytes == full.capacity
