"""The measurement at load, on random BERTs and on back ends that a test bends."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import random_bert

from tars.errors import BadModelFile, ReplicaFailed
from tars.messages.node import TunedSettings

np = pytest.importorskip("numpy")
from tars.workers import embedding_choice  # noqa: E402
from tars.workers.embedding_choice import Choice, Chooser  # noqa: E402
from tars.workers.embedding_model import LoadedModel  # noqa: E402
from tars.workers.engine import LoadSpec  # noqa: E402

pytestmark = [pytest.mark.model, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_bert.embedder(tmp_path_factory.mktemp("embedder"))


def choose(folder: Path, **changes: object) -> tuple[Choice, list[str]]:
    spec = {"replica": "r", "model": "m", "engine": "sentence-transformers", "path": str(folder), "threads": 2}
    lines: list[str] = []
    model = LoadedModel(str(folder), "embedding")
    chooser = Chooser(model, model.tokenizer(), LoadSpec.model_validate({**spec, **changes}), lines.append)
    return chooser.choose(), lines


def test_every_candidate_is_timed_and_the_fastest_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding_choice, "installed", lambda _: False)
    speeds = {"torch-fp32-packed": 100.0, "torch-fp32": 200.0}
    monkeypatch.setattr(Chooser, "_speed", lambda _, backend, best: speeds[backend.name])
    choice, lines = choose(folder)
    assert choice.backend.name == choice.tuned.backend == "torch-fp32"
    assert lines[:2] == ["torch-fp32-packed: 100 tokens/s", "torch-fp32: 200 tokens/s"]
    assert choice.tuned.batch_tokens in (512, 1024, 2048, 4096)
    assert choice.tuned.speeds.texts_per_second
    speeds["torch-fp32"] = 101.0  # not worth a change
    assert choose(folder)[0].backend.name == "torch-fp32-packed"


def test_an_unfaithful_back_end_is_no_candidate(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding_choice, "installed", lambda _: False)
    forward = embedding_choice.TorchPacked.forward
    # As int8 does: near, but not near enough.
    monkeypatch.setattr(
        embedding_choice.TorchPacked, "forward", lambda self, rows: forward(self, rows) * np.float32(0.99)
    )
    choice, lines = choose(folder)
    assert choice.backend.name == "torch-fp32"
    assert lines[0] == "torch-fp32-packed: worst cosine to float32 is 0.9900"


def test_a_clearly_slower_back_end_is_timed_once_and_never_checked(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding_choice, "installed", lambda _: False)
    monkeypatch.setattr(embedding_choice, "BACKEND_SECONDS", 60.0)
    forward = embedding_choice.TorchPadded.forward
    passes = 0

    def slow(self: embedding_choice.TorchPadded, rows: list[embedding_choice.Row]) -> object:
        nonlocal passes
        if len(rows) > 1:  # the reference is computed text by text
            passes += 1
            time.sleep(1.0)
        return forward(self, rows)

    monkeypatch.setattr(embedding_choice.TorchPadded, "forward", slow)
    assert choose(folder)[0].backend.name == "torch-fp32-packed"
    assert passes == 2  # one that is not timed, for a new shape; one that is


def test_what_was_measured_before_is_not_measured_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Chooser, "_speed", lambda *_: pytest.fail("measured"))
    monkeypatch.setattr(Chooser, "_choose_budget", lambda *_: pytest.fail("measured"))
    tuned = TunedSettings(backend="torch-fp32", batch_tokens=777)
    choice, _ = choose(folder, tuned=tuned)
    assert (choice.backend.name, choice.tuned, choice.dimensions) == ("torch-fp32", tuned, 64)


def test_what_was_measured_before_and_is_gone_is_measured_anew(folder: Path) -> None:
    choice, lines = choose(folder, tuned=TunedSettings(backend="onnx-bf16", batch_tokens=777), backend=None)
    assert choice.tuned.backend != "onnx-bf16"
    assert "not to be had now" in lines[0]


def test_half_precision_stands_beside_float32_and_the_weights_come_back(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding_choice, "installed", lambda _: False)
    monkeypatch.setattr(embedding_choice, "FAITHFUL_COSINE", 0.9)  # random weights are no model that rounds well
    monkeypatch.setattr(Chooser, "_speed", lambda _, backend, best: 2.0 if "bf16" in backend.name else 9.0)
    choice, lines = choose(folder, precision="bf16")
    assert choice.backend.name == "torch-fp32-packed"
    assert "torch-bf16: 2 tokens/s" in lines
    reference, _ = choose(folder, backend="torch-fp32")
    ids = np.arange(1000, 1020)
    row = embedding_choice.Row(ids, np.zeros_like(ids))
    assert np.abs(choice.backend.forward([row]) - reference.backend.forward([row])).max() < 1e-5


@pytest.mark.parametrize(
    ("name", "says"), [("bogus", "no back end of that name"), ("torch-fp64", "no back end"), ("onnx", "tars-node")]
)
def test_a_forced_back_end_that_is_not_to_be_had_is_a_clear_error(
    folder: Path, name: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding_choice, "installed", lambda _: False)
    with pytest.raises(ReplicaFailed, match=says) as caught:
        choose(folder, backend=name)
    assert "torch-fp32-packed" in caught.value.message


def test_running_out_of_memory_ends_the_search_for_a_budget(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = embedding_choice.TorchPadded.forward

    def small(self: embedding_choice.TorchPadded, rows: list[embedding_choice.Row]) -> object:
        if sum(map(len, rows)) > 600:
            raise MemoryError
        return forward(self, rows)

    monkeypatch.setattr(embedding_choice.TorchPadded, "forward", small)
    assert choose(folder, backend="torch-fp32")[0].tuned.batch_tokens == 512


def test_weights_that_are_no_numbers_are_a_bad_file(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    broken = random_bert.embedder(tmp_path)
    weights = load_file(broken / "model.safetensors")
    weights["encoder.layer.0.attention.self.query.bias"].fill_(float("nan"))
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadModelFile, match="weights are damaged"):
        choose(broken)
