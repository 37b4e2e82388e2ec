"""tars.devices.inventory: the whole PC through the real pynvml and a pretend driver, and its arithmetic on made-up readings."""

import json
import os
import subprocess
import sys
from collections import namedtuple

import pytest
from pretend_card import GTX_1660S, RTX_3060

from tars.config import DeviceCap, DevicesSection, ExpectedDevice, SimulatedDevice
from tars.core.types import Bytes, DeviceId, DeviceKind, NodeId, Precision
from tars.devices import cpu
from tars.devices.inventory import Inventory
from tars.devices.nvml import GpuReading, NvmlReading

NODE = NodeId("n1")
CPU = DeviceId("n1/cpu")
Memory = namedtuple("Memory", ["total", "available"])

# --- through the real pynvml ----------------------------------------------------------------------------------------

PRINT_SNAPSHOT = """
import dataclasses, json, sys
from tars.config import DevicesSection
from tars.core.types import Bytes
from tars.devices.inventory import Inventory

settings, held = json.loads(sys.argv[1])
inventory = Inventory("n1", DevicesSection(**settings))
devices = inventory.snapshot({id: Bytes(size) for id, size in held.items()})
print(json.dumps({
    "devices": [dataclasses.asdict(device) | {"capacity": device.capacity} for device in devices],
    "processes": inventory.process_memory(),
    "reason": inventory.no_gpu_reason,
    "warnings": inventory.warnings,
}))
inventory.close()
"""


def snapshot(environment, held=None, **settings):
    printed = subprocess.run(
        [sys.executable, "-W", "error", "-c", PRINT_SNAPSHOT, json.dumps([settings, held or {}])],
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert printed.returncode == 0, printed.stderr
    return json.loads(printed.stdout)


@pytest.mark.slow
def test_an_rtx_3060_is_advertised_in_full(pretend_nvml):
    found = snapshot(pretend_nvml.environment("rtx3060"))
    gpu, host = found["devices"]
    assert gpu["id"] == f"n1/gpu-{RTX_3060.removeprefix('GPU-')}"
    assert gpu["name"] == "NVIDIA GeForce RTX 3060"
    assert (gpu["kind"], gpu["precision"], gpu["compute_capability"]) == ("cuda", "bf16", [8, 6])
    assert gpu["memory_total"] == Bytes.mib(12288)
    assert gpu["memory_free"] == Bytes.mib(12288 - 379 - 300)
    # The desktop's 300 MiB lie within the 512 that are reserved for it; the driver's 379 come on top.
    assert gpu["capacity"] == Bytes.mib(12288 - 379 - 512)
    assert (gpu["temperature_celsius"], gpu["utilisation_percent"], gpu["power_watts"]) == (41, 7, 15.25)
    assert (gpu["driver"], gpu["index"]) == ("550.144.03", 0)
    assert not gpu["simulated"]
    assert not gpu["unified_memory"]
    assert gpu["notes"] == []
    assert host["id"] == "n1/cpu"
    assert found["processes"] == {gpu["id"]: {"4242": Bytes.mib(128)}}
    assert (found["reason"], found["warnings"]) == (None, [])


@pytest.mark.slow
def test_a_1660_super_is_advertised_with_full_precision(pretend_nvml):
    gpu, _ = snapshot(pretend_nvml.environment("gtx1660s"))["devices"]
    assert (gpu["precision"], gpu["compute_capability"]) == ("fp32", [7, 5])


@pytest.mark.slow
def test_a_4090_under_wsl2_says_what_it_does_not_tell(pretend_nvml):
    gpu, _ = snapshot(pretend_nvml.environment("rtx4090-wsl2"))["devices"]
    assert gpu["utilisation_percent"] is None
    assert "not told: utilisation, per-process memory" in gpu["notes"][0]
    assert gpu["capacity"] == Bytes.mib(24564 - 484 - 1500)


@pytest.mark.slow
def test_a_unified_board_offers_the_hosts_memory_once(pretend_nvml):
    gpu, host = snapshot(pretend_nvml.environment("unified"), host_memory_reserve_mib=64)["devices"]
    assert gpu["unified_memory"]
    assert gpu["memory_total"] == host["memory_total"]
    assert 0 < gpu["capacity"] <= host["memory_total"] - Bytes.mib(64)
    assert host["capacity"] == 0
    assert "shares the host's memory" in gpu["notes"][0]


@pytest.mark.slow
def test_a_card_that_tells_nothing_gets_no_model(pretend_nvml):
    found = snapshot(pretend_nvml.environment("mute"))
    gpu = found["devices"][0]
    assert (gpu["id"], gpu["name"]) == ("n1/gpu-index-0", "NVIDIA GPU 0")
    assert gpu["capacity"] == 0
    assert gpu["precision"] == "fp32"
    assert any("nothing is placed on it" in note for note in gpu["notes"])
    assert gpu["index"] == 0


@pytest.mark.slow
def test_a_driver_that_is_not_loaded_leaves_the_cpu_and_a_reason(pretend_nvml):
    environment = pretend_nvml.environment("driver-not-loaded")
    found = snapshot(environment, expected=[{"name": "RTX 3060", "memory_mib": 11909}])
    assert [device["id"] for device in found["devices"]] == ["n1/cpu"]
    assert "not loaded" in found["reason"]
    (warning,) = found["warnings"]
    assert "expects RTX 3060" in warning
    assert "modprobe" in warning


@pytest.mark.slow
def test_what_tars_holds_counts_as_its_own(pretend_nvml):
    id = f"n1/gpu-{RTX_3060.removeprefix('GPU-')}"
    gpu, _ = snapshot(pretend_nvml.environment("rtx3060"), held={id: Bytes.mib(200)}, reserve_mib=0)["devices"]
    assert gpu["memory_held"] == Bytes.mib(200)
    assert gpu["capacity"] == Bytes.mib(12288 - 379 - 300 + 200)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variable", "uuids"),
    [
        ("1", [GTX_1660S]),
        ("0,1", [RTX_3060, GTX_1660S]),
        (RTX_3060[:10], [RTX_3060]),
        ("1,7,0", [GTX_1660S]),  # CUDA stops at the first it does not know
        ("-1", []),
        ("", []),
    ],
)
def test_cuda_visible_devices_hides_cards_from_tars_too(pretend_nvml, variable, uuids):
    found = snapshot(pretend_nvml.environment("two-cards") | {"CUDA_VISIBLE_DEVICES": variable}, cpu=False)
    assert [device["id"] for device in found["devices"]] == [f"n1/gpu-{uuid.removeprefix('GPU-')}" for uuid in uuids]
    assert (found["reason"] is None) == bool(uuids)
    if not uuids:
        assert "CUDA_VISIBLE_DEVICES" in found["reason"]


# --- on made-up readings --------------------------------------------------------------------------------------------


class FakeNvml:
    """Answers what a test sets."""

    def __init__(self, *gpus, **fields):
        self.reading = NvmlReading(gpus=gpus, **fields)
        self.closed = False

    def read(self):
        return self.reading

    def close(self):
        self.closed = True


CARD = GpuReading(
    index=0,
    uuid="GPU-aa",
    name="NVIDIA GeForce RTX 3060",
    memory_total=Bytes.gib(12),
    memory_free=Bytes.gib(11),
    compute_capability=(8, 6),
)
BOARD = GpuReading(index=0, uuid="GPU-bb", name="NVIDIA GB10", unified_memory=True, compute_capability=(12, 1))


@pytest.fixture
def host(tmp_path, monkeypatch):
    """A PC of 16 GiB with 10 available; the test may change `available` and `children`."""

    class Host:
        total = Bytes.gib(16)
        available = Bytes.gib(10)
        children = Bytes(0)

        def inventory(self, *gpus, environment=None, lost=(), reason=None, **settings):
            return Inventory(
                NODE,
                DevicesSection(**settings),
                nvml=FakeNvml(*gpus, lost=lost, reason=reason),
                root=tmp_path,
                environment=environment or {},
                children_memory=lambda: self.children,
            )

    host = Host()
    monkeypatch.setattr(cpu.psutil, "virtual_memory", lambda: Memory(host.total, host.available))
    return host


def test_a_cpu_offers_the_available_memory_less_the_reserve(host):
    (device,) = host.inventory(host_memory_reserve_mib=2048).snapshot({})
    assert device.kind is DeviceKind.CPU
    assert device.capacity == Bytes.gib(8)
    assert device.memory_total == Bytes.gib(16)


def test_a_pc_that_swaps_offers_nothing(host):
    host.available = Bytes.gib(1)
    (device,) = host.inventory(host_memory_reserve_mib=2048).snapshot({})
    assert device.capacity == 0


def test_a_mapped_model_file_is_not_counted_twice(host):
    # 4 GiB of weights are mapped: the kernel still calls all of it available.
    before = host.inventory().snapshot({})[0].capacity
    host.children = Bytes.mib(200)
    host.available = Bytes(Bytes.gib(10) - host.children)
    (device,) = host.inventory().snapshot({CPU: Bytes(Bytes.gib(4) + host.children)})
    assert device.capacity == before


def test_memory_that_a_worker_really_took_is_its_own(host):
    before = host.inventory().snapshot({})[0].capacity
    host.children = Bytes.gib(4)
    host.available = Bytes.gib(6)
    (device,) = host.inventory().snapshot({CPU: Bytes.gib(4)})
    assert device.capacity == before
    assert device.memory_free == Bytes(before - Bytes.gib(4))


def test_a_replica_is_not_pushed_out_when_others_fill_the_memory(host):
    host.children = Bytes.gib(4)
    host.available = Bytes.mib(100)
    (device,) = host.inventory().snapshot({CPU: Bytes.gib(4)})
    assert (device.memory_free, device.capacity) == (0, Bytes.gib(4))


def test_the_children_of_other_devices_do_not_enlarge_the_cpu(host):
    host.children = Bytes.gib(5)
    host.available = Bytes.gib(5)
    (device,) = host.inventory().snapshot({CPU: Bytes.gib(1)})
    assert device.capacity == Bytes.gib(5 + 1 - 2)


def test_cards_come_first_then_simulated_devices_then_the_cpu(host):
    inventory = host.inventory(CARD, simulated=(SimulatedDevice(name="toy", memory_mib=512),))
    devices = inventory.snapshot({})
    assert [device.id for device in devices] == ["n1/gpu-aa", "n1/sim-0", "n1/cpu"]
    assert [device.simulated for device in devices] == [False, True, False]
    assert [device.index for device in devices] == [0, None, None]


def test_switched_off_probes_offer_nothing(host):
    inventory = Inventory(NODE, DevicesSection(nvml=False, cpu=False), environment={})
    assert inventory.snapshot({}) == ()
    assert "nvml = false" in inventory.no_gpu_reason
    inventory.close()


def test_on_a_unified_board_a_cap_gives_the_cpu_its_part_of_the_one_memory(host):
    inventory = host.inventory(BOARD, cap=(DeviceCap(device="cpu", memory_mib=1024),))
    card, processor = inventory.snapshot({})
    assert processor.capacity == Bytes.gib(1)
    assert card.capacity == Bytes.gib(10 - 2 - 1)
    # The CPU used its part: the card's does not shrink once more.
    host.children = Bytes.gib(1)
    host.available = Bytes.gib(9)
    card, processor = inventory.snapshot({CPU: Bytes.gib(1)})
    assert (card.capacity, processor.capacity) == (Bytes.gib(7), Bytes.gib(1))


@pytest.mark.parametrize(("share", "parts"), [(0.0, (8, 0)), (0.5, (4, 4)), (1.0, (0, 8))])
def test_on_a_unified_board_the_cpu_has_the_part_that_the_engines_leave_it(host, share, parts):
    card, processor = host.inventory(BOARD).snapshot({}, share)
    assert (card.capacity, processor.capacity) == tuple(map(Bytes.gib, parts))


def test_on_a_unified_board_what_the_card_holds_takes_nothing_from_the_cpus_part(host):
    host.available = Bytes.gib(7)  # 3 GiB less, which the card's models hold
    card, processor = host.inventory(BOARD).snapshot({DeviceId("n1/gpu-bb"): Bytes.gib(3)}, 0.5)
    assert (card.capacity, processor.capacity) == (Bytes.gib(4), Bytes.gib(4))


def test_on_a_unified_board_the_operators_cap_beats_the_engines_part(host):
    card, processor = host.inventory(BOARD, cap=(DeviceCap(device="cpu", memory_mib=1024),)).snapshot({}, 1.0)
    assert (card.capacity, processor.capacity) == (Bytes.gib(7), Bytes.gib(1))


def test_on_a_unified_board_without_the_cpu_the_card_has_all_of_it(host):
    (card,) = host.inventory(BOARD, cpu=False).snapshot({})
    assert card.capacity == Bytes.gib(8)
    assert card.precision is Precision.BF16


@pytest.mark.parametrize("words", ["n1/gpu-aa", "gpu-aa", "NVIDIA GeForce RTX 3060", "rtx 3060", "GeForce RTX 3060"])
def test_a_cap_finds_its_device_by_id_and_by_name(host, words):
    inventory = host.inventory(CARD, cap=(DeviceCap(device=words, memory_mib=2048),))
    card, processor = inventory.snapshot({})
    assert card.capacity == Bytes.gib(2)
    assert processor.cap is None
    assert inventory.warnings == ()


def test_a_cap_for_no_device_is_warned_about_with_those_that_are_here(host):
    inventory = host.inventory(CARD, cap=(DeviceCap(device="RTX 3080", memory_mib=2048),))
    inventory.snapshot({})
    (warning,) = inventory.warnings
    assert "RTX 3080" in warning
    assert "NVIDIA GeForce RTX 3060 (gpu-aa)" in warning


def test_two_expected_cards_need_two_cards(host):
    expected = ExpectedDevice(name="RTX 3060", memory_mib=11_909)
    inventory = host.inventory(CARD, expected=(expected, expected))
    inventory.snapshot({})
    (warning,) = inventory.warnings
    assert "expects RTX 3060" in warning
    both = host.inventory(
        CARD, GpuReading(1, "GPU-cc", CARD.name, CARD.memory_total, CARD.memory_free), expected=(expected,) * 2
    )
    both.snapshot({})
    assert both.warnings == ()


def test_an_expected_card_with_another_memory_is_warned_about(host):
    inventory = host.inventory(CARD, expected=(ExpectedDevice(name="RTX 3060", memory_mib=8192),))
    inventory.snapshot({})
    (warning,) = inventory.warnings
    assert "has 12.0 GiB, the configuration expects 8.0 GiB" in warning


def test_an_expected_cpu_is_never_missing(host):
    inventory = host.inventory(expected=(ExpectedDevice(name="Ryzen", kind="cpu", memory_mib=16_384),))
    inventory.snapshot({})
    assert inventory.warnings == ()


def test_a_lost_card_is_a_warning_and_no_device(host):
    inventory = host.inventory(lost=("RTX 3060",), reason="RTX 3060 no longer answers the driver")
    assert [device.id for device in inventory.snapshot({})] == ["n1/cpu"]
    assert inventory.warnings == ("RTX 3060 no longer answers the driver",)


def test_a_card_whose_processes_are_not_told_is_left_out_of_them(host):
    inventory = host.inventory(CARD)
    inventory.snapshot({})
    assert inventory.process_memory() == {}


def test_closing_gives_nvml_back(host):
    nvml = FakeNvml()
    Inventory(NODE, DevicesSection(), nvml=nvml, environment={}).close()
    assert nvml.closed
