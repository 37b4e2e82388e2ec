"""[devices]: what may be used of this PC, what is left for others, and what is declared instead of probed.

Law of this file: declarations; no device is looked at.
"""

from __future__ import annotations

from pydantic import Field, model_validator

from tars.config_schema.section import Section
from tars.core.types import Bytes, DeviceKind


class DeclaredDevice(Section):
    """What [[devices.simulated]] and [[devices.expected]] share."""

    name: str = Field(min_length=1, max_length=100)
    memory_mib: int = Field(
        ge=64, le=2**24, description="What CUDA shows, not what the box says: a 12 GB 3060 shows 11,909."
    )
    compute_capability: str = Field(
        "8.6",
        pattern=r"^\d{1,2}\.\d$",
        description="Decides the precision: bf16 from 8.0, fp16 from 7.0. 8.6 is the RTX 30 series.",
    )

    @property
    def capability(self) -> tuple[int, int]:
        """`compute_capability` as (major, minor)."""
        major, _, minor = self.compute_capability.partition(".")
        return int(major), int(minor)

    @property
    def memory(self) -> Bytes:
        """`memory_mib` in bytes."""
        return Bytes.mib(self.memory_mib)


class SimulatedDevice(DeclaredDevice):
    """[[devices.simulated]]: a declared memory that computes on the CPU; labelled simulated wherever it is shown."""


class ExpectedDevice(DeclaredDevice):
    """[[devices.expected]]: what this PC has. `tars plan --node FILE` plans with it; at start a missing one is warned about."""

    kind: DeviceKind = Field(DeviceKind.CUDA, strict=False, description="cuda, or cpu for a box's processor and RAM.")
    memory_free_mib: int | None = Field(
        None, ge=0, le=2**24, description="What is usually free there beside the desktop; default: all of it."
    )
    cpu_threads: int | None = Field(None, ge=1, le=4096, description="For kind = cpu.")

    @model_validator(mode="after")
    def _free_within_total(self) -> ExpectedDevice:
        if self.memory_free_mib is not None and self.memory_free_mib > self.memory_mib:
            raise ValueError("memory_free_mib is more than memory_mib")
        return self

    @property
    def memory_free(self) -> Bytes:
        """Free bytes, all of them where the file does not say."""
        return self.memory if self.memory_free_mib is None else Bytes.mib(self.memory_free_mib)


class DeviceCap(Section):
    """[[devices.cap]]: TARS holds at most so much there, whatever is free."""

    device: str = Field(min_length=1, description="A device id, a device's name, or `cpu`.")
    memory_mib: int = Field(ge=0, le=2**24, description="0: leave this device alone.")

    @property
    def memory(self) -> Bytes:
        """`memory_mib` in bytes."""
        return Bytes.mib(self.memory_mib)


class DevicesSection(Section):
    """[devices]: what may be used, and what is left for others."""

    nvml: bool = Field(True, description="Look for NVIDIA GPUs.")
    cpu: bool = Field(True, description="Offer this PC's processor and RAM.")
    reserve_mib: int = Field(
        512,
        ge=0,
        le=2**20,
        description="Kept free on every GPU for the desktop and fragmentation. Half of what llama.cpp's --fit keeps (1,024): "
        "the planner counts buffers and the CUDA context itself.",
    )
    host_memory_reserve_mib: int = Field(
        2048, ge=0, le=2**24, description="RAM kept for the system and the file cache: a PC that swaps answers nobody."
    )
    simulated: tuple[SimulatedDevice, ...] = Field((), strict=False)
    expected: tuple[ExpectedDevice, ...] = Field((), strict=False)
    cap: tuple[DeviceCap, ...] = Field((), strict=False)

    @property
    def reserve(self) -> Bytes:
        """`reserve_mib` in bytes."""
        return Bytes.mib(self.reserve_mib)

    @property
    def host_memory_reserve(self) -> Bytes:
        """`host_memory_reserve_mib` in bytes."""
        return Bytes.mib(self.host_memory_reserve_mib)
