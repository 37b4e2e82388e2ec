"""`tars pull`: the file's way to the node is shown, and how it ended."""

from __future__ import annotations

import io
import json
import threading

import pytest
from rich.console import Console

from tars.cli import pull as module
from tars.cli.output import transfer_progress
from tars.errors import ModelFileMissing, TransferFailed
from tars.messages.files import PullResult, TransferDescription, TransfersResult
from tars.messages.node import ModelsResult

RESULT = PullResult(
    model="mistral-7b", variant="Q4_K_M", size_bytes=4 * 2**30, sha256="ab" * 32, sources=["pc2", "pc3"], seconds=41.0
)


def transfer(**changes):
    fields = {
        "model": "mistral-7b",
        "variant": "Q4_K_M",
        "stage": "fetch",
        "bytes_done": 2**30,
        "bytes_total": 4 * 2**30,
        "bytes_per_second": 100.0 * 2**20,
        "sources": ["pc2"],
    }
    return TransferDescription(**{**fields, **changes})


def test_the_result_is_one_line(tars, node):
    node.answers["models.pull"] = RESULT
    ran = tars("pull", "mistral-7b", "--variant", "Q4_K_M")
    assert (ran.code, ran.out) == (
        0,
        "mistral-7b Q4_K_M (4.0 GiB) is on the node: from pc2, pc3, in 41.0 s, verified (sha256 abababababab...)\n",
    )
    assert node.params("models.pull") == {"model": "mistral-7b", "variant": "Q4_K_M"}


def test_a_file_that_is_there_already(tars, node):
    node.answers["models.pull"] = RESULT.model_copy(update={"sources": []})
    assert "is on the node already" in tars("pull", "mistral-7b").out


def test_json_is_the_message_alone(tars, node):
    node.answers["models.pull"] = RESULT
    assert json.loads(tars("pull", "mistral-7b", "--json").out)["sha256"] == "ab" * 32


def test_a_file_of_this_pc_is_named_from_the_root(tars, node, tmp_path, monkeypatch):
    (tmp_path / "m.gguf").write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    node.answers["models.add_file"] = RESULT
    assert tars("pull", "mine", "--from-file", "m.gguf").code == 0
    assert node.params("models.add_file") == {"model": "mine", "path": str(tmp_path / "m.gguf")}
    missing = tars("pull", "mine", "--from-file", "other.gguf")
    assert missing.code == 2
    assert "does not exist" in missing.err


def test_the_call_may_take_as_long_as_the_file_needs(tars, node):
    node.answers["models.pull"] = RESULT
    tars("pull", "mistral-7b")
    assert node.calls[-1][1]["_meta"]["timeout_ms"] == 86_400_000
    tars("pull", "mistral-7b", "--timeout", "5")
    assert node.calls[-1][1]["_meta"]["timeout_ms"] == 5000


def test_progress_goes_to_standard_error_a_line_for_each_tenth(tars, node, monkeypatch):
    monkeypatch.setattr(module, "POLL_SECONDS", 0.01)
    shown = threading.Event()
    told = [
        transfer(stage="look", bytes_done=0, note="pc2 has it and is still hashing it"),
        transfer(),
        transfer(bytes_done=2**30 + 1),
        transfer(bytes_done=3 * 2**30, note="fetching from pc3 alone"),
        transfer(stage="verify"),
    ]

    def transfers(params):
        rows = [told.pop(0)] if told else []
        if not told:
            shown.set()
        return TransfersResult(transfers=rows)

    node.answers["models.transfers"] = transfers
    node.answers["models.pull"] = RESULT
    node.hold = {"models.pull": shown}
    ran = tars("pull", "mistral-7b")
    assert ran.err.splitlines() == [
        "mistral-7b Q4_K_M: pc2 has it and is still hashing it",
        "mistral-7b Q4_K_M: 1.0 GiB of 4.0 GiB, 100 MiB/s from pc2",
        "mistral-7b Q4_K_M: 3.0 GiB of 4.0 GiB, 100 MiB/s from pc2 (fetching from pc3 alone)",
        "mistral-7b Q4_K_M: verifying",
    ]
    assert ran.code == 0


def test_on_a_terminal_it_is_a_bar():
    with module._progress(Console(force_terminal=True, width=120, file=io.StringIO())) as progress:
        show = module._bars(progress)
        show(transfer(bytes_total=0))
        show(transfer())
        (task,) = progress.tasks
        assert (task.completed, task.total, task.percentage) == (2**30, 4 * 2**30, 25.0)
        assert "100 MiB/s" in task.fields["state"]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (TransferFailed("pc2 gave wrong bytes"), "goes on where it was"),
        (ModelFileMissing("someone/x on Hugging Face is gated. Accept its terms."), "is gated"),
    ],
)
def test_a_failure_is_said_with_what_to_do(tars, node, error, words):
    node.answers["models.pull"] = error
    ran = tars("pull", "mistral-7b")
    assert ran.code == 1
    assert words in ran.err
    assert ran.out == ""


def test_what_is_on_its_way_stands_in_the_status(tars, node, make):
    node.answers["node.describe"] = make.description(transfers=[transfer()])
    node.answers["models.list"] = ModelsResult(models=[])
    assert "mistral-7b Q4_K_M: 1.0 GiB of 4.0 GiB" in tars("status").out


def test_the_words_for_each_stage():
    assert transfer_progress(transfer(stage="look")) == "looking for it"
    assert transfer_progress(transfer(stage="verify")) == "verifying"
    assert transfer_progress(transfer(sources=[])) == "1.0 GiB of 4.0 GiB, 100 MiB/s"
