"""What loads measured and chose by themselves."""

import errno
from dataclasses import replace

import pytest

from tars import state_folder
from tars.core.types import Bytes, DeviceId, DeviceKind, DeviceSnapshot, NodeId
from tars.mesh import tuned_settings
from tars.mesh.tuned_settings import FILE, TunedSettingsStore, installed_versions
from tars.messages.node import MeasuredSpeeds, TunedSettings
from tars.state_folder import StateFolder
from tars.workers.engine import AdapterSpec, LoadSpec

CARD = DeviceSnapshot(DeviceId("n/gpu-1"), NodeId("n"), DeviceKind.CUDA, "RTX 3060", Bytes.gib(12), Bytes.gib(12))
CPU = DeviceSnapshot(DeviceId("n/cpu"), NodeId("n"), DeviceKind.CPU, "CPU", Bytes.gib(16), Bytes.gib(16))
FOUND = TunedSettings(flash_attention=False, chunk=96, speeds=MeasuredSpeeds(decode_tokens_per_second=58.5))


@pytest.fixture
def spec(tmp_path) -> LoadSpec:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    return LoadSpec(replica="m@1#0", model="m", engine="llama", path=str(path), context=2048, slots=4, kv_tokens=2048)


@pytest.fixture
def store(tmp_path) -> TunedSettingsStore:
    return TunedSettingsStore(StateFolder(tmp_path))


def test_what_a_load_found_outlives_a_restart(tmp_path, store, spec):
    assert store.known(spec, CPU) is None
    store.learn(spec, CPU, FOUND)
    assert TunedSettingsStore(StateFolder(tmp_path)).known(spec, CPU) == FOUND


def test_another_replica_of_the_same_need_not_measure_and_what_was_known_changes_no_key(store, spec):
    store.learn(spec.model_copy(update={"tuned": TunedSettings(chunk=1)}), CPU, FOUND)
    assert store.known(spec.model_copy(update={"replica": "m@1#1", "sha256": "ab"}), CPU) == FOUND


@pytest.mark.parametrize(
    "changed",
    [
        {"context": 4096},
        {"slots": 8},
        {"kv_tokens": 4096},
        {"threads": 2},
        {"flash_attention": True},
        {"kv_type": "q8_0"},
        {"exact": True},
        {"inter_token_ms": 75.0},
        {"gpu_layers": 3},
        {"backend": "onnx"},
        {"cuda_device": "0"},
        {"adapters": [AdapterSpec(name="a", path="a.gguf")]},
        {"draft_path": "d.gguf"},
    ],
)
def test_another_setting_is_another_load(store, spec, changed):
    store.learn(spec, CPU, FOUND)
    assert store.known(spec.model_copy(update=changed), CPU) is None


def test_a_replaced_file_is_measured_anew(tmp_path, store, spec):
    store.learn(spec, CPU, FOUND)
    (tmp_path / "model.gguf").write_bytes(b"GGUF another")
    assert store.known(spec, CPU) is None


def test_a_folders_weights_tell_that_it_was_replaced(tmp_path, store, spec):
    folder = tmp_path / "encoder"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(bytes(100))
    spec = spec.model_copy(update={"path": str(folder), "engine": "sentence-transformers"})
    store.learn(spec, CPU, FOUND)
    assert store.known(spec, CPU) == FOUND
    (folder / "model.safetensors").write_bytes(bytes(101))
    assert store.known(spec, CPU) is None


def test_an_upgraded_engine_is_measured_anew(tmp_path, spec):
    before = TunedSettingsStore(StateFolder(tmp_path), lambda engine: {"llama-cpp-python": "1"})
    before.learn(spec, CPU, FOUND)
    assert TunedSettingsStore(StateFolder(tmp_path), lambda engine: {"llama-cpp-python": "1"}).known(spec, CPU)
    assert TunedSettingsStore(StateFolder(tmp_path), lambda engine: {"llama-cpp-python": "2"}).known(spec, CPU) is None


def test_versions_are_those_of_the_engines_own_packages():
    assert "tars" in installed_versions("llama")
    assert "torch" not in installed_versions("llama")
    assert set(installed_versions("nobody")) == {"tars"}


def test_a_simulated_card_computes_like_the_cpu_and_cards_are_kept_apart(store, spec):
    store.learn(spec, replace(CARD, simulated=True), FOUND)
    assert store.known(spec, CPU) == FOUND
    on_card = spec.model_copy(update={"cuda_device": "0"})
    store.learn(on_card, CARD, FOUND)
    assert store.known(on_card, replace(CARD, id=DeviceId("n/gpu-2"))) is None
    assert store.known(on_card, replace(CARD, driver="580.2")) is None


def test_a_load_that_measured_nothing_teaches_nothing(tmp_path, store, spec):
    store.learn(spec, CPU, TunedSettings())
    assert store.known(spec, CPU) is None
    assert not (tmp_path / FILE).exists()


def test_the_oldest_leave_first(monkeypatch, tmp_path, store, spec):
    monkeypatch.setattr(tuned_settings, "MOST", 2)
    specs = [spec.model_copy(update={"context": context}) for context in (1, 2, 3)]
    store.learn(specs[0], CPU, FOUND)
    store.learn(specs[1], CPU, FOUND)
    store.learn(specs[0], CPU, FOUND)  # used again, so it stays
    store.learn(specs[2], CPU, FOUND)
    again = TunedSettingsStore(StateFolder(tmp_path))
    assert [again.known(each, CPU) is not None for each in specs] == [True, False, True]


def test_a_full_disk_keeps_it_in_memory(store, spec, monkeypatch, caplog):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(state_folder.os, "fsync", full)
    store.learn(spec, CPU, FOUND)
    assert store.known(spec, CPU) == FOUND
    assert "not saved" in caplog.text


@pytest.mark.parametrize(
    "content", [b"[]", b'{"tuned": [{"load": {}, "tuned": {"nope": 1}}, 3]}', b'{"tuned": 3}', b"{"]
)
def test_a_damaged_file_is_measured_anew(tmp_path, spec, content):
    (tmp_path / FILE).write_bytes(content)
    assert TunedSettingsStore(StateFolder(tmp_path)).known(spec, CPU) is None
