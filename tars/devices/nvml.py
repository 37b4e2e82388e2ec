"""What NVIDIA's management library says of each card, read through pynvml.

Law of this file: every field is optional, and a field that is not answered is None, never a guess. Plain blocking calls, for a
thread; nothing here knows asyncio, the planner or the configuration. No card and no driver is a normal answer with its reason.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tars.core.types import Bytes

WSL2_LIBRARY = Path("/usr/lib/wsl/lib/libnvidia-ml.so.1")
"""Where Windows puts the library into WSL2; a distribution with its own ld.so configuration does not look there."""

UNIFIED_MEMORY_NOTE = "shares the host's memory (NVML reports none of its own)"


@dataclass(frozen=True, slots=True)
class GpuReading:
    """One card at one moment. `index` counts in PCI bus order, which is CUDA's own with CUDA_DEVICE_ORDER=PCI_BUS_ID (workers set it).

    Memory is None where NVML does not tell; `unified_memory` is True where it says that the card has none of its own.
    `process_memory` maps process ids to bytes, a value of None being 'not told' (WSL2, Windows); None where the list is not told.
    """

    index: int
    uuid: str | None = None
    name: str | None = None
    memory_total: Bytes | None = None
    memory_free: Bytes | None = None
    memory_reserved: Bytes = Bytes(0)
    """The driver's own part of the total, which nobody can have; 0 where an older driver does not tell it apart."""
    unified_memory: bool = False
    compute_capability: tuple[int, int] | None = None
    temperature_celsius: int | None = None
    utilisation_percent: int | None = None
    power_watts: float | None = None
    pci_bus_id: str | None = None
    process_memory: Mapping[int, Bytes | None] | None = None
    not_told: tuple[str, ...] = ()
    """Names of the fields that this card or driver did not answer."""


@dataclass(frozen=True, slots=True)
class NvmlReading:
    """All cards at one moment. `reason` says why there is none, or why one is missing, in words for people."""

    gpus: tuple[GpuReading, ...] = ()
    driver: str | None = None
    lost: tuple[str, ...] = ()
    """Names of cards that were seen before, or are counted, and do not answer now."""
    reason: str | None = None


@dataclass(slots=True)
class _Answers:
    """Asks one card's questions and remembers which were not answered, and the error that tells most."""

    nvml: Any
    missing: list[str] = field(default_factory=list)
    lost: bool = False

    def ask(self, name: str, *ways: Callable[[], Any]) -> Any:
        """The first way's answer that comes, None if none does. Later ways are for older drivers."""
        for way in ways:
            try:
                return way()
            except self.nvml.NVMLError as error:
                if error.value in _lost_codes(self.nvml):
                    self.lost = True
                    break
                if error.value == self.nvml.NVML_ERROR_UNINITIALIZED:
                    raise
            except UnicodeDecodeError:
                break
        self.missing.append(name)
        return None


class Nvml:
    """The library, opened when first read and again after a driver was reloaded. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._module: Any = None
        self._open = False
        self._was_open = False
        self._hopeless: str | None = None
        self._seen: dict[str, str] = {}

    def read(self) -> NvmlReading:
        """Every card that answers now. Never raises because of a card, a driver or a missing library."""
        with self._lock:
            for _attempt in range(2):
                reason = self._ensure_open()
                if reason is not None:
                    return NvmlReading(lost=tuple(self._seen.values()), reason=reason)
                try:
                    return self._read_all()
                except self._module.NVMLError as error:
                    # The driver was unloaded below us (an update, a reset): open again once, then say so.
                    reason = _explain(self._module, error)
                    self._shut()
            return NvmlReading(lost=tuple(self._seen.values()), reason=reason)

    def close(self) -> None:
        """Give the library back; a later `read` opens it again."""
        with self._lock:
            self._shut()

    def _ensure_open(self) -> str | None:
        if self._open:
            return None
        if self._hopeless is not None:
            return self._hopeless
        try:
            import pynvml
        except ImportError:
            self._hopeless = "the Python package nvidia-ml-py is not installed (pip install nvidia-ml-py)"
            return self._hopeless
        self._module = pynvml
        try:
            try:
                pynvml.nvmlInit()
            except pynvml.NVMLError_LibraryNotFound:
                if not WSL2_LIBRARY.exists():
                    raise
                # Loaded once by its path, it is found by its name from then on.
                ctypes.CDLL(os.fspath(WSL2_LIBRARY))
                pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            reason = _explain(pynvml, error)
            if error.value in (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH):
                # Neither changes while this process runs; a driver that is not loaded yet may come at boot.
                self._hopeless = reason
            return reason
        except OSError:
            self._hopeless = f"{WSL2_LIBRARY} is there but cannot be loaded (the Windows driver may be half updated)"
            return self._hopeless
        self._open = True
        return None

    def _shut(self) -> None:
        if self._open:
            self._open = False
            # The driver may have gone first; then there is nothing left to give back.
            with contextlib.suppress(self._module.NVMLError):
                self._module.nvmlShutdown()

    def _read_all(self) -> NvmlReading:
        nvml = self._module
        driver = _Answers(nvml).ask("driver", nvml.nvmlSystemGetDriverVersion)
        count = nvml.nvmlDeviceGetCount()
        gpus: list[GpuReading] = []
        silent: list[str] = []
        for index in range(count):
            reading = self._read_one(index)
            if reading is None:
                silent.append(f"GPU {index}")
            else:
                gpus.append(reading)
        answering = {
            reading.uuid or f"index {reading.index}": reading.name or f"GPU {reading.index}" for reading in gpus
        }
        # Indices shift when a card goes; only its uuid tells which one it was.
        lost = [name for key, name in self._seen.items() if key not in answering]
        lost += silent[len(lost) :]
        self._seen |= answering
        reason = None
        if lost:
            reason = (
                f"{', '.join(lost)} no longer answers the driver (fell off the bus, or needs a reset); "
                "look at `nvidia-smi` and `dmesg`, then restart this PC"
            )
        elif not gpus:
            reason = "the NVIDIA driver is loaded and sees no card"
        return NvmlReading(gpus=tuple(gpus), driver=driver, lost=tuple(lost), reason=reason)

    def _read_one(self, index: int) -> GpuReading | None:
        nvml = self._module
        answers = _Answers(nvml)
        handle = answers.ask("handle", lambda: nvml.nvmlDeviceGetHandleByIndex(index))
        if handle is None:
            return None
        memory, unified = self._memory(answers, handle)
        capability = answers.ask("compute capability", lambda: nvml.nvmlDeviceGetCudaComputeCapability(handle))
        utilisation = answers.ask("utilisation", lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu)
        milliwatts = answers.ask("power", lambda: nvml.nvmlDeviceGetPowerUsage(handle))
        processes = answers.ask(
            "per-process memory",
            lambda: nvml.nvmlDeviceGetComputeRunningProcesses_v3(handle),
            lambda: nvml.nvmlDeviceGetComputeRunningProcesses_v2(handle),
        )
        if processes and all(process.usedGpuMemory is None for process in processes):
            answers.missing.append("per-process memory")
        name = answers.ask("name", lambda: nvml.nvmlDeviceGetName(handle))
        uuid = answers.ask("uuid", lambda: nvml.nvmlDeviceGetUUID(handle))
        temperature = answers.ask(
            "temperature", lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)
        )
        bus_id = answers.ask("PCI bus id", lambda: _string(nvml.nvmlDeviceGetPciInfo_v3(handle).busId))
        if answers.lost:
            return None
        return GpuReading(
            index=index,
            uuid=uuid or None,
            name=name or None,
            memory_total=None if memory is None else Bytes(memory.total),
            memory_free=None if memory is None else Bytes(memory.free),
            memory_reserved=Bytes(getattr(memory, "reserved", 0)),
            unified_memory=unified,
            compute_capability=capability,
            temperature_celsius=temperature,
            utilisation_percent=utilisation,
            power_watts=None if milliwatts is None else milliwatts / 1000,
            pci_bus_id=bus_id or None,
            process_memory=_by_process(processes),
            not_told=tuple(answers.missing),
        )

    def _memory(self, answers: _Answers, handle: Any) -> tuple[Any, bool]:
        """(NVML's memory struct or None, unified). Only `free` means the same in every version: `used` may contain `reserved`."""
        nvml = self._module
        refused = False

        def read(version: int | None) -> Any:
            nonlocal refused
            try:
                return nvml.nvmlDeviceGetMemoryInfo(handle, version=version)
            except nvml.NVMLError_NotSupported:
                refused = True
                raise

        memory = answers.ask("memory", lambda: read(nvml.nvmlMemory_v2), lambda: read(None))
        if memory is not None and memory.total > 0:
            return memory, False
        # Some unified boards answer NotSupported, some a total of zero.
        return None, refused or memory is not None


def _by_process(processes: Any) -> dict[int, Bytes | None] | None:
    """One process may stand there more than once (one line a GPU instance): add them up."""
    if processes is None:
        return None
    held: dict[int, Bytes | None] = {}
    for process in processes:
        if process.usedGpuMemory is None:
            held.setdefault(process.pid, None)
        else:
            held[process.pid] = Bytes((held.get(process.pid) or 0) + process.usedGpuMemory)
    return held


def _string(value: Any) -> str:
    """Older releases of pynvml give a struct's text as bytes."""
    return value.decode("ascii", "replace") if isinstance(value, bytes) else str(value)


def _lost_codes(nvml: Any) -> tuple[int, ...]:
    return (nvml.NVML_ERROR_GPU_IS_LOST, nvml.NVML_ERROR_RESET_REQUIRED)


def _explain(nvml: Any, error: Any) -> str:
    """What an error of the whole library means for the person in front of this PC, and what to do."""
    reasons = {
        nvml.NVML_ERROR_LIBRARY_NOT_FOUND: "no NVIDIA driver is installed (libnvidia-ml.so.1 was not found)",
        nvml.NVML_ERROR_DRIVER_NOT_LOADED: "the NVIDIA driver is installed but not loaded; `sudo modprobe nvidia`, or restart "
        "this PC after a driver update",
        nvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: "the NVIDIA driver was updated while it ran; restart this PC",
        nvml.NVML_ERROR_NO_PERMISSION: "this user may not talk to the NVIDIA driver; look at the rights of /dev/nvidia*",
        nvml.NVML_ERROR_FUNCTION_NOT_FOUND: "the NVIDIA driver is too old for TARS (it has no nvmlInitWithFlags); update it",
        nvml.NVML_ERROR_UNINITIALIZED: "the NVIDIA driver was unloaded while TARS ran; it is asked again",
    }
    return reasons.get(
        error.value, f"the NVIDIA driver answered '{error}' (NVML error {error.value}); see `nvidia-smi`"
    )
