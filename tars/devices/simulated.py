"""Devices that a configuration declares instead of a probe finding them: simulated ones that serve, expected ones to plan with.

Law of this file: no probing. A simulated device is planned like a card, computes on this machine's CPU and always says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from tars.config import DevicesSection, ExpectedDevice, SimulatedDevice
from tars.core.tuning import precision_for
from tars.core.types import Bytes, DeviceId, DeviceKind, DeviceSnapshot, NodeId, Precision

SIMULATED_NOTE = "simulated: a declared memory that computes on this machine's CPU"

RESERVE_SHARE_MOST = 8
"""At most an eighth of a small declared memory is reserved: a toy of 300 MiB under a 512 MiB reserve would hold nothing at all."""


def simulated_devices(
    node: NodeId, section: DevicesSection, held: Mapping[DeviceId, Bytes], cpu_threads: int | None = None
) -> tuple[DeviceSnapshot, ...]:
    """One snapshot for each [[devices.simulated]], in the file's order; `cpu_threads` are those that really compute."""
    return tuple(
        _simulated(DeviceId(f"{node}/sim-{index}"), node, device, section.reserve, held, cpu_threads)
        for index, device in enumerate(section.simulated)
    )


def _simulated(
    id: DeviceId,
    node: NodeId,
    device: SimulatedDevice,
    reserve: Bytes,
    held: Mapping[DeviceId, Bytes],
    cpu_threads: int | None,
) -> DeviceSnapshot:
    taken = held.get(id, Bytes(0))
    return DeviceSnapshot(
        id=id,
        node=node,
        kind=DeviceKind.CUDA,
        name=device.name,
        memory_total=device.memory,
        # Nobody but TARS lives there: what it does not hold is free.
        memory_free=Bytes(max(0, device.memory - taken)),
        memory_held=taken,
        reserve=Bytes(min(reserve, device.memory // RESERVE_SHARE_MOST)),
        compute_capability=device.capability,
        precision=precision_for(DeviceKind.CUDA, device.name, device.capability),
        simulated=True,
        cpu_threads=cpu_threads,
        notes=(SIMULATED_NOTE,),
    )


def expected_devices(node: NodeId, section: DevicesSection) -> tuple[DeviceSnapshot, ...]:
    """Snapshots of [[devices.expected]], as if each were there: for `tars plan --node FILE`, where no PC has to be switched on.

    Ids are `<node>/gpu-expected-<index>` and `<node>/cpu`; a second cpu entry would be the same device and is left out.
    """
    devices: list[DeviceSnapshot] = []
    for index, device in enumerate(section.expected):
        if device.kind is DeviceKind.CPU:
            if all(each.kind is not DeviceKind.CPU for each in devices):
                devices.append(_expected_cpu(node, device, section))
        else:
            devices.append(_expected_gpu(node, index, device, section))
    return tuple(devices)


def _expected_gpu(node: NodeId, index: int, device: ExpectedDevice, section: DevicesSection) -> DeviceSnapshot:
    return DeviceSnapshot(
        id=DeviceId(f"{node}/gpu-expected-{index}"),
        node=node,
        kind=DeviceKind.CUDA,
        name=device.name,
        memory_total=device.memory,
        memory_free=device.memory_free,
        reserve=section.reserve,
        compute_capability=device.capability,
        precision=precision_for(DeviceKind.CUDA, device.name, device.capability),
        index=index,
        notes=("declared in the configuration, not probed",),
    )


def _expected_cpu(node: NodeId, device: ExpectedDevice, section: DevicesSection) -> DeviceSnapshot:
    reserve = section.host_memory_reserve
    return DeviceSnapshot(
        id=DeviceId(f"{node}/cpu"),
        node=node,
        kind=DeviceKind.CPU,
        name=device.name,
        memory_total=device.memory,
        memory_free=Bytes(max(0, device.memory_free - reserve)),
        reserve=reserve,
        precision=Precision.FP32,
        cpu_threads=device.cpu_threads,
        notes=("declared in the configuration, not probed",),
    )


def capped(device: DeviceSnapshot, section: DevicesSection) -> DeviceSnapshot:
    """The device with the smallest of the caps that [[devices.cap]] names it for."""
    caps = [cap.memory for cap in section.cap if device.is_called(cap.device)]
    return replace(device, cap=min(caps)) if caps else device
