"""Every device of this node at one moment, in the planner's words.

Law of this file: puts together what the probes read with what the operator allows; the arithmetic of memory that two devices share
stands here and nowhere else. Blocking calls (milliseconds), made for a thread: never call `snapshot` on the event loop.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from tars.config import DevicesSection
from tars.core.tuning import precision_for
from tars.core.types import Bytes, DeviceId, DeviceKind, DeviceSnapshot, NodeId
from tars.devices.cpu import (
    CpuReading,
    CpuUsage,
    MemoryReading,
    anonymous_memory_of_children,
    read_cpu,
    read_memory,
    temperature,
)
from tars.devices.nvml import UNIFIED_MEMORY_NOTE, GpuReading, Nvml, NvmlReading
from tars.devices.simulated import capped, simulated_devices
from tars.devices.wsl2 import Wsl2
from tars.devices.wsl2 import probe as probe_wsl2

MEMORY_DIFFERS_BY = 0.1
"""A card whose memory is further than this from what was declared is another card: the driver's own share is below 3 %."""


class Inventory:
    """See the module's law. `nvml`, `root` and `environment` are for tests; by default the real ones."""

    def __init__(
        self,
        node: NodeId,
        section: DevicesSection,
        *,
        nvml: Nvml | None = None,
        root: Path = Path("/"),
        environment: Mapping[str, str] | None = None,
        children_memory: Callable[[], Bytes] = anonymous_memory_of_children,
    ):
        self.node = node
        self._section = section
        self._root = root
        self._environment = os.environ if environment is None else environment
        self._nvml = nvml if nvml is not None else (Nvml() if section.nvml else None)
        self._children_memory = children_memory
        self._usage = CpuUsage()
        self._lock = threading.Lock()
        self._reading = NvmlReading(reason=None if section.nvml else "[devices] nvml = false")
        self._hidden = False
        self._warnings: tuple[str, ...] = ()
        self.cpu: CpuReading = read_cpu(root)
        """This PC's processor, read once."""
        self.wsl2: Wsl2 | None = probe_wsl2(root, self._environment)
        """What is known of WSL2, None on anything else; read once."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the operator should know, of the latest snapshot: an expected card that is missing, one that fell off the bus..."""
        return self._warnings

    @property
    def no_gpu_reason(self) -> str | None:
        """Why the latest snapshot shows no card, or lacks one; None when all is well."""
        if self._hidden:
            return "CUDA_VISIBLE_DEVICES hides every card from TARS"
        return self._reading.reason

    def snapshot(self, held: Mapping[DeviceId, Bytes], cpu_share: float = 0.0) -> tuple[DeviceSnapshot, ...]:
        """Cards in PCI order, then simulated devices, then the CPU. `held` is what TARS's own replicas hold on each, in bytes.

        `cpu_share` is the CPU's part, 0 to 1, of a memory that it shares with a card, where the operator's cap sets none.
        A card that stopped answering is left out, so that nothing is planned on it. Never raises because of a device.
        """
        with self._lock:
            if self._nvml is not None:
                self._reading = self._nvml.read()
            memory = read_memory(self._root)
            visible = _visible(self._reading.gpus, self._environment.get("CUDA_VISIBLE_DEVICES"))
            self._hidden = bool(self._reading.gpus) and not visible
            unified = any(gpu.unified_memory for gpu in visible)
            cpu = self._cpu(memory, held) if self._section.cpu or unified else None
            devices = [self._gpu(gpu, cpu, held) for gpu in visible]
            devices += simulated_devices(self.node, self._section, held, self.cpu.cores)
            devices = [capped(device, self._section) for device in devices]
            if cpu is not None and self._section.cpu:
                cpu = capped(cpu, self._section)
                if unified:
                    devices, cpu = _share(devices, cpu, cpu_share)
                devices.append(cpu)
            self._warnings = (
                *self._lost(),
                *_missing(self._section, devices, self.no_gpu_reason),
                *_unknown_caps(self._section, devices),
            )
            return tuple(devices)

    def process_memory(self) -> dict[DeviceId, Mapping[int, Bytes | None]]:
        """Bytes that each process holds on each card, of the latest snapshot; without the cards that do not tell (WSL2)."""
        with self._lock:
            return {
                self._gpu_id(gpu): gpu.process_memory for gpu in self._reading.gpus if gpu.process_memory is not None
            }

    def close(self) -> None:
        """Give NVML back."""
        if self._nvml is not None:
            self._nvml.close()

    def _gpu_id(self, gpu: GpuReading) -> DeviceId:
        name = f"index-{gpu.index}" if gpu.uuid is None else gpu.uuid.removeprefix("GPU-")
        return DeviceId(f"{self.node}/gpu-{name}")

    def _gpu(self, gpu: GpuReading, cpu: DeviceSnapshot | None, held: Mapping[DeviceId, Bytes]) -> DeviceSnapshot:
        id = self._gpu_id(gpu)
        name = gpu.name or f"NVIDIA GPU {gpu.index}"
        notes: list[str] = []
        total, free = gpu.memory_total, gpu.memory_free
        # The operator's reserve is for the desktop; what the driver keeps for itself comes on top.
        reserve = Bytes(self._section.reserve + gpu.memory_reserved)
        if gpu.unified_memory and cpu is not None:
            # The host's RAM, by the host's rules: what its system needs is not the card's either.
            total, free, reserve = cpu.memory_total, cpu.memory_free, cpu.reserve
            notes.append(UNIFIED_MEMORY_NOTE)
        elif total is None or free is None:
            total, free = Bytes(0), Bytes(0)
            notes.append("the driver does not tell this card's memory, so nothing is placed on it; see `nvidia-smi`")
        silent = [what for what in gpu.not_told if not (what == "memory" and gpu.unified_memory)]
        if silent:
            notes.append(f"{'WSL2' if self.wsl2 else 'driver'}: not told: {', '.join(silent)}")
        return DeviceSnapshot(
            id=id,
            node=self.node,
            kind=DeviceKind.CUDA,
            name=name,
            memory_total=total,
            memory_free=free,
            memory_held=held.get(id, Bytes(0)),
            reserve=reserve,
            compute_capability=gpu.compute_capability,
            precision=precision_for(DeviceKind.CUDA, name, gpu.compute_capability),
            temperature_celsius=gpu.temperature_celsius,
            utilisation_percent=gpu.utilisation_percent,
            power_watts=gpu.power_watts,
            driver=self._reading.driver,
            index=gpu.index,
            unified_memory=gpu.unified_memory,
            cpu_threads=self.cpu.cores,
            notes=tuple(notes),
        )

    def _cpu(self, memory: MemoryReading, held: Mapping[DeviceId, Bytes]) -> DeviceSnapshot:
        """The CPU: what models may take is the available RAM less the reserve, plus what TARS's own models already took of it.

        The kernel counts a mapped model file as available, so only the anonymous part of what is held may be added back; adding all
        of `held` would count a mapped file's bytes twice and let the planner promise RAM that is not there.
        """
        id = DeviceId(f"{self.node}/cpu")
        taken = held.get(id, Bytes(0))
        ours = min(taken, self._children_memory()) if taken else 0
        reserve = self._section.host_memory_reserve
        usable = memory.available + ours - reserve
        notes = []
        if memory.limited:
            notes.append("memory is a container's limit, not all of this PC's RAM")
        if self.wsl2 is not None:
            notes.append("WSL2: half of this PC's RAM unless .wslconfig gives more")
        if self.cpu.flags:
            notes.append(f"{self.cpu.cores} cores, {self.cpu.threads} threads: {' '.join(self.cpu.flags)}")
        return DeviceSnapshot(
            id=id,
            node=self.node,
            kind=DeviceKind.CPU,
            name=self.cpu.name,
            memory_total=memory.total,
            memory_free=Bytes(max(0, usable - taken)),
            memory_held=taken,
            reserve=Bytes(min(reserve, memory.total)),
            precision=self.cpu.precision,
            temperature_celsius=temperature(),
            utilisation_percent=self._usage.percent(),
            cpu_threads=self.cpu.cores,
            notes=tuple(notes),
        )

    def _lost(self) -> tuple[str, ...]:
        return (self._reading.reason,) if self._reading.lost and self._reading.reason else ()


def _visible(gpus: Sequence[GpuReading], variable: str | None) -> tuple[GpuReading, ...]:
    """The cards that CUDA_VISIBLE_DEVICES leaves: all without it; numbers (PCI order) and uuids or their beginnings, as CUDA reads it."""
    if variable is None:
        return tuple(gpus)
    chosen: list[GpuReading] = []
    for word in (part.strip() for part in variable.split(",")):
        found = [
            gpu
            for gpu in gpus
            if (word.isdigit() and gpu.index == int(word))
            or (word.startswith("GPU-") and gpu.uuid is not None and gpu.uuid.startswith(word))
        ]
        if not found:
            break  # CUDA stops at the first entry that it does not know
        chosen += [gpu for gpu in found if gpu not in chosen]
    return tuple(sorted(chosen, key=lambda gpu: gpu.index))


def _share(
    devices: list[DeviceSnapshot], cpu: DeviceSnapshot, cpu_share: float
) -> tuple[list[DeviceSnapshot], DeviceSnapshot]:
    """One RAM, two devices: what the operator's cap or `cpu_share` sets aside is the CPU's, and the card may take the rest.

    Without this both would offer the same bytes, and a plan that fills each would not fit.
    """
    # All that TARS may hold in this RAM, on either device: what one of them holds must not shrink the other's part.
    held = sum(device.memory_held for device in devices if device.unified_memory)
    usable = cpu.memory_free + cpu.memory_held + held
    aside = cpu.cap if cpu.cap is not None else Bytes(int(usable * cpu_share))
    cpu = replace(
        cpu, cap=aside, notes=(*cpu.notes, "shares its memory with the card: a [[devices.cap]] gives it another part")
    )
    shared = [
        replace(device, memory_free=Bytes(max(0, device.memory_free + cpu.memory_held - aside)))
        if device.unified_memory
        else device
        for device in devices
    ]
    return shared, cpu


def _missing(section: DevicesSection, devices: Sequence[DeviceSnapshot], reason: str | None) -> list[str]:
    """A line for each [[devices.expected]] card that is not there, or is there with another memory. Each card answers for one."""
    left = [device for device in devices if device.kind is DeviceKind.CUDA and not device.simulated]
    lines = []
    for expected in section.expected:
        if expected.kind is not DeviceKind.CUDA:
            continue
        found = next((device for device in left if expected.name.casefold() in device.name.casefold()), None)
        if found is None:
            why = f": {reason}" if reason else ""
            lines.append(f"the configuration expects {expected.name} ({expected.memory}), which is not here{why}")
            continue
        left.remove(found)
        if abs(found.memory_total - expected.memory) > MEMORY_DIFFERS_BY * expected.memory and not found.unified_memory:
            lines.append(
                f"{found.name} has {found.memory_total}, the configuration expects {expected.memory}: "
                "plans made from the file differ from what this PC does"
            )
    return lines


def _unknown_caps(section: DevicesSection, devices: Sequence[DeviceSnapshot]) -> list[str]:
    known = ", ".join(f"{device.name} ({device.id.rpartition('/')[2]})" for device in devices)
    return [
        f"[[devices.cap]] names {cap.device}, and no such device is here; it caps nothing. Here are: {known or 'none'}"
        for cap in section.cap
        if not any(device.is_called(cap.device) for device in devices)
    ]
