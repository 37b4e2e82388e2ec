"""tars.devices.simulated: declared devices as the planner sees them."""

import pytest

from tars.config import DevicesSection, ExpectedDevice, SimulatedDevice
from tars.core.types import Bytes, DeviceId, DeviceKind, NodeId, Precision
from tars.devices.simulated import expected_devices, simulated_devices

NODE = NodeId("n1")


def section(**settings):
    return DevicesSection(**settings)


def test_a_simulated_card_is_planned_like_a_card_and_always_says_what_it_is():
    declared = SimulatedDevice(name="RTX 3060", memory_mib=11_909)
    (device,) = simulated_devices(NODE, section(simulated=(declared,)), {}, cpu_threads=6)
    assert device.id == "n1/sim-0"
    assert device.kind is DeviceKind.CUDA
    assert device.simulated
    assert "simulated" in device.notes[0]
    assert device.index is None  # CUDA has no such device
    assert device.compute_capability == (8, 6)
    assert device.precision is Precision.BF16
    assert device.cpu_threads == 6
    assert device.capacity == Bytes.mib(11_909 - 512)


def test_what_is_held_is_not_free_and_leaves_the_capacity_as_it_is():
    sections = section(
        simulated=(SimulatedDevice(name="a", memory_mib=4096), SimulatedDevice(name="b", memory_mib=4096))
    )
    empty = simulated_devices(NODE, sections, {})
    first, second = simulated_devices(NODE, sections, {DeviceId("n1/sim-1"): Bytes.gib(1)})
    assert (first.memory_free, first.memory_held) == (Bytes.gib(4), 0)
    assert (second.memory_free, second.memory_held) == (Bytes.gib(3), Bytes.gib(1))
    assert second.capacity == empty[1].capacity


def test_more_held_than_declared_is_never_negative():
    declared = section(simulated=(SimulatedDevice(name="a", memory_mib=64),))
    (device,) = simulated_devices(NODE, declared, {DeviceId("n1/sim-0"): Bytes.gib(1)})
    assert device.memory_free == 0


def test_a_small_simulated_device_keeps_most_of_its_memory_under_the_usual_reserve():
    (device,) = simulated_devices(NODE, section(simulated=(SimulatedDevice(name="toy", memory_mib=320),)), {})
    assert device.capacity == Bytes.mib(280)


def test_a_simulated_1660_super_computes_in_fp32():
    declared = SimulatedDevice(name="GTX 1660 Super", memory_mib=6144, compute_capability="7.5")
    (device,) = simulated_devices(NODE, section(simulated=(declared,)), {})
    assert device.precision is Precision.FP32


@pytest.mark.parametrize(("free", "capacity"), [(None, 11_909 - 512), (9000, 9000)])
def test_an_expected_card_is_planned_as_if_it_were_there(free, capacity):
    declared = ExpectedDevice(name="RTX 3060", memory_mib=11_909, memory_free_mib=free)
    (device,) = expected_devices(NODE, section(expected=(declared,)))
    assert device.capacity == Bytes.mib(capacity)
    assert not device.simulated
    assert device.id == "n1/gpu-expected-0"


def test_an_expected_cpu_keeps_the_hosts_reserve():
    cpu = ExpectedDevice(name="Ryzen 5 5600", kind="cpu", memory_mib=16_384, memory_free_mib=12_288, cpu_threads=6)
    card = ExpectedDevice(name="RTX 3060", memory_mib=11_909)
    first, second = expected_devices(NODE, section(expected=(cpu, card, cpu)))
    assert (first.id, first.kind, first.cpu_threads) == ("n1/cpu", DeviceKind.CPU, 6)
    assert first.capacity == Bytes.mib(12_288 - 2048)
    assert second.kind is DeviceKind.CUDA
