"""tars.devices.cpu on trees that stand for other machines' /proc and /sys, and once on this one."""

import os
import subprocess
import sys
from collections import namedtuple

import psutil
import pytest

from tars.core.types import Bytes, Precision
from tars.devices import cpu
from tars.devices.cpu import CpuUsage, anonymous_memory_of_children, cgroup_memory, read_cpu, read_memory

Memory = namedtuple("Memory", ["total", "available"])


def write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def processors(*pairs, flags="fpu avx2 fma f16c", name="Intel(R) Xeon(R) CPU"):
    """/proc/cpuinfo of an x86 machine; `pairs` are (physical id, core id) of each logical processor."""
    return "\n\n".join(
        f"processor\t: {number}\nmodel name\t: {name}\nphysical id\t: {socket}\ncore id\t\t: {core}\nflags\t\t: {flags}"
        for number, (socket, core) in enumerate(pairs)
    )


@pytest.fixture
def all_usable(monkeypatch):
    """The affinity mask allows every processor of the pretended machine."""
    monkeypatch.setattr(cpu, "_affinity", lambda known: set(range(known or 4)))


HYPERTHREADS = ((0, 0), (0, 1), (0, 0), (0, 1))


def test_hyperthreads_count_as_threads_and_not_as_cores(tmp_path, all_usable):
    write(tmp_path, {"proc/cpuinfo": processors(*HYPERTHREADS, name="AMD Ryzen 5 5600")})
    reading = read_cpu(tmp_path)
    assert (reading.name, reading.cores, reading.threads) == ("AMD Ryzen 5 5600", 2, 4)
    assert reading.flags == ("avx2", "fma", "f16c")
    assert reading.precision is Precision.FP32


def test_two_sockets_with_the_same_core_numbers_are_counted_apart(tmp_path, all_usable):
    write(tmp_path, {"proc/cpuinfo": processors((0, 0), (0, 1), (1, 0), (1, 1))})
    assert read_cpu(tmp_path).cores == 4


def test_the_affinity_mask_takes_cores_away(tmp_path, monkeypatch):
    write(tmp_path, {"proc/cpuinfo": processors(*HYPERTHREADS)})
    monkeypatch.setattr(cpu, "_affinity", lambda known: {0, 2})  # both threads of core 0
    reading = read_cpu(tmp_path)
    assert (reading.cores, reading.threads) == (1, 2)


@pytest.mark.parametrize(
    "files",
    [
        {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "250000 100000\n"},
        {
            "proc/self/cgroup": "4:cpu,cpuacct:/docker/abc\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "250000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
        {"proc/self/cgroup": "0::/outer/inner\n", "sys/fs/cgroup/outer/cpu.max": "250000 100000\n"},
    ],
    ids=["v2", "v1", "v2 above"],
)
def test_a_containers_share_of_two_and_a_half_processors_is_two(tmp_path, all_usable, files):
    write(tmp_path, {"proc/cpuinfo": processors(*[(0, core) for core in range(8)]), **files})
    reading = read_cpu(tmp_path)
    assert (reading.cores, reading.threads) == (2, 2)


@pytest.mark.parametrize("limit", ["max 100000\n", "-1 100000\n", "nonsense"])
def test_no_quota_leaves_every_processor(tmp_path, all_usable, limit):
    files = {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": limit}
    write(tmp_path, {"proc/cpuinfo": processors(*HYPERTHREADS), **files})
    assert read_cpu(tmp_path).threads == 4


def test_half_a_processor_is_still_one(tmp_path, all_usable):
    files = {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}
    write(tmp_path, {"proc/cpuinfo": processors(*HYPERTHREADS), **files})
    assert (read_cpu(tmp_path).cores, read_cpu(tmp_path).threads) == (1, 1)


@pytest.mark.parametrize("flag", ["amx_bf16", "avx512_bf16"])
def test_native_bf16_makes_it_the_precision(tmp_path, all_usable, flag):
    write(tmp_path, {"proc/cpuinfo": processors((0, 0), flags=f"fpu avx2 {flag}")})
    reading = read_cpu(tmp_path)
    assert reading.precision is Precision.BF16
    assert flag in reading.flags


def test_an_arm_board_is_named_by_its_model_line(tmp_path, all_usable):
    blocks = "\n\n".join(f"processor\t: {number}\nFeatures\t: fp asimd crc32" for number in range(4))
    write(tmp_path, {"proc/cpuinfo": f"{blocks}\n\nHardware\t: BCM2835\nModel\t\t: Raspberry Pi 4 Model B Rev 1.4\n"})
    reading = read_cpu(tmp_path)
    assert reading.name == "Raspberry Pi 4 Model B Rev 1.4"
    assert reading.flags == ("asimd",)
    assert reading.threads == 4


def test_without_cpuinfo_there_is_still_one_processor(tmp_path):
    reading = read_cpu(tmp_path)
    assert reading.name
    assert 1 <= reading.cores <= reading.threads


def test_this_machine_is_read():
    reading = read_cpu()
    assert reading.name
    assert 1 <= reading.cores <= reading.threads <= (os.cpu_count() or 1)
    memory = read_memory()
    assert 0 < memory.available <= memory.total <= psutil.virtual_memory().total


@pytest.mark.skipif(sys.platform != "linux", reason="affinity masks are Linux's")
def test_a_process_bound_to_one_processor_sees_one():
    one = min(os.sched_getaffinity(0))
    program = f"import os; os.sched_setaffinity(0, {{{one}}})\nfrom tars.devices.cpu import read_cpu; print(read_cpu().threads)"
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True)
    assert printed.stdout.strip() == "1"


# --- macOS ----------------------------------------------------------------------------------------------------------


def test_a_mac_counts_its_performance_cores(monkeypatch):
    told = {"machdep.cpu.brand_string": "Apple M2 Pro", "hw.perflevel0.physicalcpu": "6"}
    monkeypatch.setattr(cpu.sys, "platform", "darwin")
    monkeypatch.setattr(cpu, "_sysctl", lambda key: told.get(key, ""))
    monkeypatch.setattr(cpu.psutil, "cpu_count", lambda logical=True: 10)
    reading = read_cpu()
    assert (reading.name, reading.cores, reading.threads) == ("Apple M2 Pro", 6, 10)


def test_a_mac_without_sysctl_still_counts(monkeypatch):
    monkeypatch.setattr(cpu.sys, "platform", "darwin")
    monkeypatch.setattr(cpu.subprocess, "run", lambda *_, **__: (_ for _ in ()).throw(FileNotFoundError()))
    reading = read_cpu()
    assert reading.name
    assert reading.cores >= 1


# --- memory ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def sixteen_gib(monkeypatch):
    monkeypatch.setattr(cpu.psutil, "virtual_memory", lambda: Memory(16 * 2**30, 12 * 2**30))


def test_without_a_limit_the_machines_memory_counts(tmp_path, sixteen_gib):
    reading = read_memory(tmp_path)
    assert (reading.total, reading.available, reading.limited) == (Bytes.gib(16), Bytes.gib(12), False)


V2 = {
    "proc/self/cgroup": "0::/\n",
    "sys/fs/cgroup/memory.max": f"{4 * 2**30}\n",
    "sys/fs/cgroup/memory.current": f"{3 * 2**30}\n",
    "sys/fs/cgroup/memory.stat": f"anon {2**30}\nactive_file {2**30}\ninactive_file {2**29}\n",
}
V1 = {
    "proc/self/cgroup": "9:memory:/docker/abc\n5:cpu:/docker/abc\n",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{4 * 2**30}\n",
    "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{3 * 2**30}\n",
    "sys/fs/cgroup/memory/memory.stat": f"active_file 1\ntotal_active_file {2**30}\ntotal_inactive_file {2**29}\n",
}


@pytest.mark.parametrize("files", [V2, V1], ids=["v2", "v1"])
def test_a_containers_limit_counts_and_file_pages_count_as_free(tmp_path, sixteen_gib, files):
    write(tmp_path, files)
    reading = read_memory(tmp_path)
    assert reading.limited
    assert reading.total == Bytes.gib(4)
    assert reading.available == Bytes.gib(4 - (3 - 1.5))


def test_a_machine_that_is_full_has_no_more_than_it_has_whatever_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(cpu.psutil, "virtual_memory", lambda: Memory(16 * 2**30, 2**30))
    write(tmp_path, V2)
    assert read_memory(tmp_path).available == Bytes.gib(1)


@pytest.mark.parametrize(
    "files",
    [
        {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max\n"},
        {"proc/self/cgroup": "9:memory:/\n", "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"},
        {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": f"{64 * 2**30}\n"},
    ],
    ids=["v2 max", "v1 unlimited", "above the machine's own"],
)
def test_no_real_limit_is_no_limit(tmp_path, sixteen_gib, files):
    write(tmp_path, files)
    assert read_memory(tmp_path) == cpu.MemoryReading(Bytes.gib(16), Bytes.gib(12))


def test_the_tightest_limit_on_the_way_up_decides(tmp_path):
    write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/user/tars\n",
            "sys/fs/cgroup/user/memory.max": "1000\n",
            "sys/fs/cgroup/user/memory.current": "900\n",
            "sys/fs/cgroup/user/tars/memory.max": "500\n",
            "sys/fs/cgroup/user/tars/memory.current": "100\n",
        },
    )
    assert cgroup_memory(tmp_path) == (1000, 900)  # 100 left there, 400 in the inner one


def test_a_limit_below_what_is_used_leaves_nothing(tmp_path, sixteen_gib):
    write(tmp_path, V2 | {"sys/fs/cgroup/memory.max": f"{2**30}\n"})
    assert read_memory(tmp_path).available == 0


@pytest.mark.skipif(sys.platform != "linux", reason="RssAnon is Linux's")
def test_only_what_a_childs_end_would_free_is_its_anonymous_memory(tmp_path):
    mapped = tmp_path / "weights"
    mapped.write_bytes(b"\x01" * 64 * 2**20)
    program = (
        "import mmap, sys\n"
        "file = open(sys.argv[1], 'rb'); pages = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ); sum(pages[::4096])\n"
        "own = b'x' * (32 * 2**20)\n"
        "print('held', flush=True); sys.stdin.read()"
    )
    before = anonymous_memory_of_children()
    with subprocess.Popen(
        [sys.executable, "-c", program, str(mapped)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout.readline() == "held\n"
        grown = anonymous_memory_of_children() - before
        child.stdin.close()
    assert Bytes.mib(32) <= grown < Bytes.mib(64)  # the mapped 64 MiB are not in it


# --- usage ----------------------------------------------------------------------------------------------------------

Times = namedtuple("Times", ["user", "idle", "iowait", "guest"])


def test_usage_is_the_busy_share_between_two_readings(monkeypatch):
    readings = iter([Times(100, 100, 0, 10), Times(130, 160, 10, 10), Times(130, 160, 10, 10)])
    monkeypatch.setattr(cpu.psutil, "cpu_times", lambda: next(readings))
    usage = CpuUsage()
    assert usage.percent() is None  # nothing to compare with
    assert usage.percent() == 30  # 30 busy of 100
    assert usage.percent() is None  # no time passed


def test_the_package_temperature_is_rounded_degrees(monkeypatch):
    Sensor = namedtuple("Sensor", ["current"])
    monkeypatch.setattr(cpu.psutil, "sensors_temperatures", lambda: {"k10temp": [Sensor(54.6)]}, raising=False)
    assert cpu.temperature() == 55
    monkeypatch.setattr(cpu.psutil, "sensors_temperatures", dict, raising=False)
    assert cpu.temperature() is None
