"""The processor and the memory that this process may really use: Linux (containers and affinity included) and macOS.

Law of this file: what a container or an affinity mask takes away is not there. Reads /proc, /sys and psutil; plain blocking calls.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

from tars.core.types import Bytes, Precision

NOTABLE_FLAGS = (
    "amx_tile",
    "amx_bf16",
    "amx_int8",
    "avx512f",
    "avx512_bf16",
    "avx512_vnni",
    "avx_vnni",
    "avx2",
    "fma",
    "f16c",
    "asimd",
    "i8mm",
    "sve",
)
"""What llama.cpp's and torch's CPU kernels are chosen by; the rest of /proc/cpuinfo's flags change nothing here."""

BF16_FLAGS = frozenset({"amx_bf16", "avx512_bf16"})
"""Native bf16 products: embeddings run 2.7 times as fast (field notes, Engines). Without them bf16 is emulated, and slower."""

UNLIMITED_CGROUP1 = 2**60
"""cgroup v1 says 'no limit' as the largest page-aligned signed number (about 2**63); no PC has an exbibyte."""

SYSCTL_TIMEOUT_SECONDS = 2.0
"""macOS answers in milliseconds; a node must start even if it does not."""


@dataclass(frozen=True, slots=True)
class CpuReading:
    """The processor. `cores` are physical and `threads` logical ones, within affinity and the container's share, at least 1."""

    name: str
    cores: int
    threads: int
    flags: tuple[str, ...] = ()
    precision: Precision = Precision.FP32


@dataclass(frozen=True, slots=True)
class MemoryReading:
    """RAM within the container's limit. `available` is what a program can take without swapping, page cache counted as free."""

    total: Bytes
    available: Bytes
    limited: bool = False
    """True where a container's limit, not the machine's RAM, decides."""


def read_cpu(root: Path = Path("/")) -> CpuReading:
    """The processor; `root` stands for `/` on Linux (tests give their own tree)."""
    if sys.platform == "darwin":
        return _read_mac()
    blocks = _cpuinfo_blocks(_text(root / "proc/cpuinfo"))
    usable = _affinity(len(blocks))
    threads = max(1, min(len(usable), _cgroup_cpus(root)))
    first = blocks[0] if blocks else {}
    flags = set((first.get("flags") or first.get("Features") or "").split())
    cores = _physical_cores(blocks, usable) or psutil.cpu_count(logical=False) or threads
    return CpuReading(
        name=first.get("model name") or first.get("Model") or platform.processor() or platform.machine() or "CPU",
        cores=max(1, min(cores, threads)),
        threads=threads,
        flags=tuple(flag for flag in NOTABLE_FLAGS if flag in flags),
        precision=Precision.BF16 if flags & BF16_FLAGS else Precision.FP32,
    )


def read_memory(root: Path = Path("/")) -> MemoryReading:
    """RAM now, within cgroup v2 or v1 limits; `root` stands for `/` (tests give their own tree; psutil reads the real one)."""
    memory = psutil.virtual_memory()
    total, available = memory.total, memory.available
    limit, used = cgroup_memory(root)
    if limit is None or limit >= total:
        return MemoryReading(Bytes(total), Bytes(available))
    return MemoryReading(Bytes(limit), Bytes(max(0, min(available, limit - used))), limited=True)


def cgroup_memory(root: Path = Path("/")) -> tuple[int | None, int]:
    """(limit, used) in bytes of the tightest cgroup around this process; (None, 0) without one.

    `used` leaves out file pages, as MemAvailable does: the kernel drops them when a program asks for memory.
    """
    tightest: tuple[int | None, int] = (None, 0)
    for folder in _cgroup_folders(root, "memory"):
        limit = _number(folder / "memory.max")
        used = _number(folder / "memory.current")
        if limit is None:
            limit, used = _number(folder / "memory.limit_in_bytes"), _number(folder / "memory.usage_in_bytes")
        if limit is None or limit >= UNLIMITED_CGROUP1:
            continue
        counters = dict(line.split(maxsplit=1) for line in _text(folder / "memory.stat").splitlines() if " " in line)
        cached = 0
        for counter in ("active_file", "inactive_file"):
            # v1 counts the whole subtree only under total_.
            cached += int(counters.get(f"total_{counter}") or counters.get(counter) or 0)
        left = limit - max(0, (used or 0) - cached)
        if tightest[0] is None or left < tightest[0] - tightest[1]:
            tightest = (limit, max(0, (used or 0) - cached))
    return tightest


def anonymous_memory_of_children() -> Bytes:
    """Bytes of this process's descendants that only their end frees (a mapped model file is page cache, which counts as available).

    Linux tells it per process as RssAnon; elsewhere the resident size stands for it, since there active file pages are not available.
    """
    total = 0
    try:
        children = psutil.Process().children(recursive=True)
    except psutil.Error:
        return Bytes(0)
    for child in children:
        try:
            if sys.platform == "linux":
                total += _anonymous(Path(f"/proc/{child.pid}/status"))
            else:
                total += child.memory_info().rss
        except psutil.Error:
            continue  # it ended while we looked
    return Bytes(total)


class CpuUsage:
    """Busy share of the machine's processor between two calls, in percent; the first call has nothing to compare with."""

    def __init__(self) -> None:
        self._last: tuple[float, float] | None = None

    def percent(self) -> int | None:
        """0..100 since the call before, None the first time or when no time passed."""
        times = psutil.cpu_times()
        total = sum(times)
        # Linux counts guest time within user time as well.
        total -= getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)
        idle = times.idle + getattr(times, "iowait", 0.0)
        last, self._last = self._last, (total, idle)
        if last is None or total <= last[0]:
            return None
        busy = 1 - (idle - last[1]) / (total - last[0])
        return round(100 * min(1.0, max(0.0, busy)))


def temperature() -> int | None:
    """The package's temperature in °C where the system tells it (not in WSL2, containers and macOS)."""
    try:
        sensors = psutil.sensors_temperatures()
    except (AttributeError, OSError):
        return None
    for chip in ("coretemp", "k10temp", "zenpower", "cpu_thermal"):
        readings = sensors.get(chip)
        if readings and readings[0].current:
            return round(readings[0].current)
    return None


# --- Linux ----------------------------------------------------------------------------------------------------------


def _cpuinfo_blocks(text: str) -> list[dict[str, str]]:
    """One dictionary a logical processor; what stands in a block of its own (a Raspberry Pi's `Model`) goes to the first."""
    blocks: list[dict[str, str]] = []
    shared: dict[str, str] = {}
    for paragraph in text.split("\n\n"):
        pairs = (line.partition(":") for line in paragraph.splitlines())
        block = {key.strip(): value.strip() for key, colon, value in pairs if colon}
        if "processor" in block:
            blocks.append(block)
        else:
            shared |= block
    if blocks:
        blocks[0] = shared | blocks[0]
    return blocks


def _affinity(known: int) -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(known or os.cpu_count() or 1))


def _physical_cores(blocks: Iterable[dict[str, str]], usable: set[int]) -> int:
    """Distinct (socket, core) pairs among the usable processors; 0 where /proc/cpuinfo does not tell (ARM)."""
    pairs = {
        (block["physical id"], block["core id"])
        for block in blocks
        if "core id" in block and "physical id" in block and int(block["processor"]) in usable
    }
    return len(pairs)


def _cgroup_cpus(root: Path) -> int:
    """Whole processors that the container's quota pays for, at least 1; a very large number without a quota."""
    share = float("inf")
    for folder in _cgroup_folders(root, "cpu"):
        fields = _text(folder / "cpu.max").split()
        if len(fields) == 2 and fields[0].isdigit():
            share = min(share, int(fields[0]) / int(fields[1]))
        quota, period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
        if quota is not None and quota > 0 and period:
            share = min(share, quota / period)
    # A thread that the quota does not pay for only makes the others wait at every barrier: round down.
    return 2**31 if share == float("inf") else max(1, int(share))


def _cgroup_folders(root: Path, controller: str) -> list[Path]:
    """This process's cgroup and every one above it, for v2 and for v1's `controller`: a limit anywhere above holds."""
    folders: list[Path] = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        fields = line.split(":", 2)
        if len(fields) != 3:
            continue
        if fields[1] == "":
            mount = root / "sys/fs/cgroup"
        elif controller in fields[1].split(","):
            mount = root / "sys/fs/cgroup" / controller
        else:
            continue
        # In a container the path is the host's and not visible here; the mount itself is then this cgroup.
        inner = mount / fields[2].lstrip("/")
        while inner != mount and mount in inner.parents:
            folders.append(inner)
            inner = inner.parent
        folders.append(mount)
    return folders


def _anonymous(status: Path) -> int:
    for line in _text(status).splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def _number(path: Path) -> int | None:
    """The number in a file; None where there is none (`max`, or no such file)."""
    try:
        return int(_text(path).strip())
    except ValueError:
        return None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


# --- macOS ----------------------------------------------------------------------------------------------------------


def _read_mac() -> CpuReading:
    threads = psutil.cpu_count(logical=True) or 1
    # Performance cores only: an efficiency core is the one that every barrier would wait for.
    cores = _sysctl_number("hw.perflevel0.physicalcpu") or psutil.cpu_count(logical=False) or threads
    return CpuReading(
        name=_sysctl("machdep.cpu.brand_string") or platform.machine() or "CPU", cores=max(1, cores), threads=threads
    )


def _sysctl(key: str) -> str:
    try:
        answer = subprocess.run(
            ["/usr/sbin/sysctl", "-n", key],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=SYSCTL_TIMEOUT_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return answer.stdout.decode("utf-8", "replace").strip()


def _sysctl_number(key: str) -> int | None:
    text = _sysctl(key)
    return int(text) if text.isdigit() else None
