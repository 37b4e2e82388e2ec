"""Which engines can use which device."""

import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from tars.core.types import Bytes, DeviceId, DeviceKind, DeviceSnapshot, ModelKind, NodeId
from tars.workers import engines_installed
from tars.workers.engines_installed import EnginesInstalled, look, probe_engines

CARD = DeviceSnapshot(DeviceId("n/gpu"), NodeId("n"), DeviceKind.CUDA, "RTX 3060", Bytes.gib(12), Bytes.gib(12))
CPU = replace(CARD, kind=DeviceKind.CPU, name="CPU")
BOTH = EnginesInstalled(llama=True, llama_cuda=True, torch=True, torch_cuda=True)


def kinds(engines, device):
    return {kind for kind, _ in engines.cannot_run(device)}


@pytest.mark.parametrize("device", [CARD, CPU, replace(CARD, simulated=True)])
def test_full_builds_run_everything_everywhere(device):
    assert kinds(BOTH, device) == set()


def test_a_build_without_cuda_leaves_the_card_to_nobody_and_says_how_to_rebuild():
    engines = replace(BOTH, llama_cuda=False)
    assert kinds(engines, CARD) == {ModelKind.CHAT}
    assert "-DGGML_CUDA=on" in engines.cannot_run(CARD)[0][1]
    assert kinds(engines, CPU) == kinds(engines, replace(CARD, simulated=True)) == set()


def test_a_cpu_torch_cannot_embed_or_rerank_on_a_card():
    assert kinds(replace(BOTH, torch_cuda=False), CARD) == {ModelKind.EMBEDDING, ModelKind.RERANK}


def test_an_engine_that_is_not_installed_runs_nowhere():
    assert kinds(replace(BOTH, llama=False, llama_cuda=False), CPU) == {ModelKind.CHAT}
    assert kinds(replace(BOTH, torch=False), CPU) == {ModelKind.EMBEDDING, ModelKind.RERANK}


def test_what_is_not_known_rules_nothing_out():
    assert kinds(EnginesInstalled(), CARD) == set()


@pytest.mark.parametrize(
    ("llama_cuda", "torch_cuda", "share"),
    [(True, True, 0.0), (False, True, 0.5), (True, False, 0.5), (False, False, 1.0)],
)
def test_a_memory_shared_with_a_card_is_the_cpus_as_far_as_no_engine_can_use_the_card(llama_cuda, torch_cuda, share):
    assert replace(BOTH, llama_cuda=llama_cuda, torch_cuda=torch_cuda).cpu_share == share
    assert EnginesInstalled().cpu_share == 0.0


def test_every_reason_names_a_section_that_the_readme_has():
    headings = re.findall(r"^#+ (.+)$", (Path(__file__).parents[2] / "README.md").read_text(), re.MULTILINE)
    named = re.findall(r'README, "([^"]+)"', Path(engines_installed.__file__).read_text())
    assert named
    assert set(named) <= set(headings)


def test_annotated_devices_tell_each_reason_once():
    (device,) = replace(BOTH, torch_cuda=False).annotate([CARD])
    assert device.why_not(ModelKind.EMBEDDING) == device.notes[-1]
    assert len(device.notes) == 1


def test_the_probe_in_its_own_process_agrees_with_this_python():
    assert probe_engines() == look()


def test_a_probe_that_crashes_rules_nothing_out(monkeypatch, caplog):
    def crash(*arguments, **keywords):
        raise subprocess.CalledProcessError(-11, "probe")

    monkeypatch.setattr(engines_installed.subprocess, "run", crash)
    assert probe_engines() == EnginesInstalled()
    assert "workers will tell" in caplog.text


@pytest.mark.parametrize(
    ("line", "built"),
    [
        ("cuda: Optional[str] = None", False),
        ("cuda: Optional[str] = '12.8'", True),
        ("cuda = '13.0'", True),
        ("", None),
    ],
)
def test_a_torch_build_is_told_by_its_version_file(tmp_path, line, built):
    (tmp_path / "version.py").write_text(f"__version__ = '2.13'\n{line}\nhip: Optional[str] = None\n")
    assert engines_installed._built_for_cuda(tmp_path) is built
