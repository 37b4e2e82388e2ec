"""tars.devices.nvml through the real pynvml, against a C library that answers as NVML does."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager

import pytest
from pretend_card import GB10, GTX_1660S, LIBRARY, RTX_3060, RTX_4090

from tars.core.types import Bytes
from tars.devices import nvml as nvml_module
from tars.devices.nvml import Nvml

READ_ON_EACH_LINE = """
import dataclasses, json, sys
from tars.devices.nvml import Nvml

nvml = Nvml()
for line in sys.stdin:
    if line.strip() == "close":
        nvml.close()
    print(json.dumps(dataclasses.asdict(nvml.read())), flush=True)
nvml.close()
"""


class Reader:
    """A process that reads all cards whenever it is asked."""

    def __init__(self, process):
        self.process = process

    def read(self, word=""):
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


@contextmanager
def reading(environment):
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", READ_ON_EACH_LINE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | environment,
        text=True,
    )
    with process:
        yield Reader(process)
        process.stdin.close()
        # Closing down must not fail either: a library that is gone, a card that is lost.
        assert process.wait(timeout=20) == 0


def read_once(environment):
    with reading(environment) as reader:
        return reader.read()


def test_every_field_of_an_rtx_3060_is_read(pretend_nvml):
    reading = read_once(pretend_nvml.environment("rtx3060"))
    assert reading["driver"] == "550.144.03"
    assert reading["reason"] is None
    assert reading["lost"] == []
    (gpu,) = reading["gpus"]
    assert gpu == {
        "index": 0,
        "uuid": RTX_3060,
        "name": "NVIDIA GeForce RTX 3060",
        "memory_total": Bytes.mib(12288),
        "memory_free": Bytes.mib(12288 - 379 - 300),
        "memory_reserved": Bytes.mib(379),
        "unified_memory": False,
        "compute_capability": [8, 6],
        "temperature_celsius": 41,
        "utilisation_percent": 7,
        "power_watts": 15.25,
        "pci_bus_id": "00000000:01:00.0",
        "process_memory": {"4242": Bytes.mib(128)},
        "not_told": [],
    }


def test_a_gtx_1660_super_is_read(pretend_nvml):
    (gpu,) = read_once(pretend_nvml.environment("gtx1660s"))["gpus"]
    assert gpu["name"] == "NVIDIA GeForce GTX 1660 SUPER"
    assert gpu["uuid"] == GTX_1660S
    assert gpu["compute_capability"] == [7, 5]
    assert gpu["memory_free"] == Bytes.mib(6144 - 213 - 150)


def test_two_cards_keep_their_order(pretend_nvml):
    gpus = read_once(pretend_nvml.environment("two-cards"))["gpus"]
    assert [(gpu["index"], gpu["uuid"]) for gpu in gpus] == [(0, RTX_3060), (1, GTX_1660S)]


def test_wsl2_leaves_out_what_it_does_not_tell(pretend_nvml):
    (gpu,) = read_once(pretend_nvml.environment("rtx4090-wsl2"))["gpus"]
    assert gpu["uuid"] == RTX_4090
    assert gpu["utilisation_percent"] is None
    assert gpu["process_memory"] == {"4242": None}
    assert gpu["not_told"] == ["utilisation", "per-process memory"]
    assert gpu["memory_free"] == Bytes.mib(24564 - 484 - 1500)
    assert gpu["temperature_celsius"] == 45


@pytest.mark.parametrize(("scenario", "name"), [("unified", "NVIDIA GB10"), ("unified-zero", "Orin (nvgpu)")])
def test_a_unified_memory_board_has_no_memory_of_its_own(pretend_nvml, scenario, name):
    (gpu,) = read_once(pretend_nvml.environment(scenario))["gpus"]
    assert gpu["name"] == name
    assert gpu["unified_memory"] is True
    assert (gpu["memory_total"], gpu["memory_free"]) == (None, None)
    assert gpu["compute_capability"] is not None


def test_a_card_that_answers_nothing_is_still_listed(pretend_nvml):
    reading = read_once(pretend_nvml.environment("mute"))
    (gpu,) = reading["gpus"]
    assert gpu["unified_memory"] is False  # an unknown error is not 'no memory of its own'
    assert {key for key, value in gpu.items() if value is None} == {
        "uuid",
        "name",
        "memory_total",
        "memory_free",
        "compute_capability",
        "temperature_celsius",
        "utilisation_percent",
        "power_watts",
        "pci_bus_id",
        "process_memory",
    }
    assert sorted(gpu["not_told"]) == sorted(
        [
            "memory",
            "compute capability",
            "utilisation",
            "power",
            "per-process memory",
            "name",
            "uuid",
            "temperature",
            "PCI bus id",
        ]
    )


def test_an_old_driver_without_the_newer_functions_is_read_the_old_way(pretend_nvml):
    (gpu,) = read_once(pretend_nvml.environment("rtx3060", old_driver=True))["gpus"]
    assert gpu["memory_total"] == Bytes.mib(12288)
    assert gpu["memory_free"] == Bytes.mib(12288 - 379 - 300)  # the same in both versions
    assert gpu["memory_reserved"] == 0
    assert gpu["process_memory"] == {"4242": Bytes.mib(128)}
    assert gpu["not_told"] == []


@pytest.mark.parametrize(
    ("scenario", "words"),
    [
        ("driver-not-loaded", "modprobe nvidia"),
        ("version-mismatch", "updated while it ran; restart"),
        ("no-cards", "sees no card"),
    ],
)
def test_no_card_comes_with_a_reason_that_says_what_to_do(pretend_nvml, scenario, words):
    reading = read_once(pretend_nvml.environment(scenario))
    assert reading["gpus"] == []
    assert words in reading["reason"]


def test_no_driver_at_all_is_a_reason_too(tmp_path):
    (tmp_path / LIBRARY).write_bytes(
        b"not a library"
    )  # found first, and cannot be loaded, also where a real one is installed
    reading = read_once({"LD_LIBRARY_PATH": str(tmp_path)})
    assert reading["gpus"] == []
    assert "no NVIDIA driver is installed" in reading["reason"]


def test_a_card_lost_while_running_is_named_and_comes_back(pretend_nvml, tmp_path):
    control = tmp_path / "control"
    with reading(pretend_nvml.environment("two-cards", control=control)) as reader:
        assert len(reader.read()["gpus"]) == 2
        control.write_text("lost 0\n")
        lost = reader.read()
        assert [gpu["uuid"] for gpu in lost["gpus"]] == [GTX_1660S]
        assert lost["lost"] == ["NVIDIA GeForce RTX 3060"]
        assert "NVIDIA GeForce RTX 3060 no longer answers" in lost["reason"]
        control.write_text("")
        back = reader.read()
        assert len(back["gpus"]) == 2
        assert (back["lost"], back["reason"]) == ([], None)


def test_a_card_that_never_answered_is_named_by_its_number(pretend_nvml, tmp_path):
    control = tmp_path / "control"
    control.write_text("lost 1\n")
    reading = read_once(pretend_nvml.environment("two-cards", control=control))
    assert reading["lost"] == ["GPU 1"]


def test_free_memory_follows_what_others_take(pretend_nvml, tmp_path):
    control = tmp_path / "control"
    with reading(pretend_nvml.environment("rtx3060", control=control)) as reader:
        before = reader.read()["gpus"][0]["memory_free"]
        control.write_text("used 0 9000\n")
        after = reader.read()["gpus"][0]["memory_free"]
    assert before - after == Bytes.mib(9000 - 300)


def test_a_driver_that_was_reloaded_is_opened_again(pretend_nvml, tmp_path):
    control = tmp_path / "control"
    with reading(pretend_nvml.environment("rtx3060", control=control)) as reader:
        reader.read()
        control.write_text("uninitialised\n")
        assert [gpu["uuid"] for gpu in reader.read()["gpus"]] == [RTX_3060]


def test_a_driver_that_was_unloaded_is_asked_again_until_it_is_back(pretend_nvml, tmp_path):
    control = tmp_path / "control"
    with reading(pretend_nvml.environment("rtx3060", control=control)) as reader:
        reader.read()
        control.write_text("gone\n")
        gone = reader.read()
        assert gone["gpus"] == []
        assert gone["lost"] == ["NVIDIA GeForce RTX 3060"]
        assert "not loaded" in gone["reason"]
        control.write_text("")
        assert len(reader.read()["gpus"]) == 1


def test_a_closed_reader_opens_again(pretend_nvml):
    with reading(pretend_nvml.environment("unified")) as reader:
        assert reader.read()["gpus"][0]["uuid"] == GB10
        assert reader.read("close")["gpus"][0]["uuid"] == GB10


def test_the_library_of_wsl2_is_found_where_the_loader_does_not_look(pretend_nvml):
    program = (
        "import sys; from pathlib import Path; from tars.devices import nvml\n"
        "nvml.WSL2_LIBRARY = Path(sys.argv[1])\n"
        "print([gpu.name for gpu in nvml.Nvml().read().gpus])"
    )
    environment = {key: value for key, value in os.environ.items() if key != "LD_LIBRARY_PATH"}
    environment["TARS_PRETEND_NVML"] = "rtx4090-wsl2"
    printed = subprocess.run(
        [sys.executable, "-c", program, str(pretend_nvml.current / LIBRARY)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    ).stdout
    if "GeForce RTX 4090" not in printed and printed.strip() != "[]":
        pytest.skip("a real NVIDIA driver is installed here and is found first")
    assert printed.strip() == "['NVIDIA GeForce RTX 4090']"


def test_a_wsl2_library_that_cannot_be_loaded_is_a_reason(tmp_path):
    broken = tmp_path / "broken" / LIBRARY
    broken.parent.mkdir()
    broken.write_bytes(b"half of a driver update")
    program = (
        "import sys; from pathlib import Path; from tars.devices import nvml\n"
        "nvml.WSL2_LIBRARY = Path(sys.argv[1])\n"
        "print(nvml.Nvml().read().reason)"
    )
    (tmp_path / LIBRARY).write_bytes(b"not a library")
    printed = subprocess.run(
        [sys.executable, "-c", program, str(broken)],
        env=os.environ | {"LD_LIBRARY_PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    ).stdout
    assert "cannot be loaded" in printed


def test_without_the_python_package_the_reason_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    reading = Nvml().read()
    assert reading.gpus == ()
    assert "pip install nvidia-ml-py" in reading.reason


def test_a_process_on_several_gpu_instances_is_added_up():
    class Line:
        def __init__(self, pid, used):
            self.pid = pid
            self.usedGpuMemory = used

    assert nvml_module._by_process([Line(7, 100), Line(7, 50), Line(8, None)]) == {7: 150, 8: None}
