from __future__ import annotations

import asyncio

import pytest

from tars.workers.child import Child, child_environment, end_of
from tars.workers.engine import LoadSpec


def spec(**changes: object) -> LoadSpec:
    return LoadSpec.model_validate({"replica": "r", "model": "m", "engine": "llama", "path": "/x", **changes})


@pytest.mark.parametrize(
    "name",
    ["TARS_API_KEY", "TARS_STATE_DIR", "OPENAI_API_KEY", "hf_token", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD"],
)
def test_secrets_and_tarss_own_variables_do_not_reach_the_worker(name: str) -> None:
    assert name not in child_environment(spec(), {name: "x", "HOME": "/h"}, {})


def test_device_and_thread_limits_win_over_what_was_inherited() -> None:
    base = {"CUDA_VISIBLE_DEVICES": "0,1", "OMP_NUM_THREADS": "64", "HF_HUB_OFFLINE": "0", "HOME": "/h"}
    cpu = child_environment(spec(threads=3), base, {})
    assert (cpu["CUDA_VISIBLE_DEVICES"], cpu["OMP_NUM_THREADS"], cpu["HF_HUB_OFFLINE"], cpu["HOME"]) == (
        "",
        "3",
        "1",
        "/h",
    )
    gpu = child_environment(spec(cuda_device="GPU-1234"), base, {})
    assert (gpu["CUDA_VISIBLE_DEVICES"], gpu["CUDA_DEVICE_ORDER"]) == ("GPU-1234", "PCI_BUS_ID")
    assert gpu["TOKENIZERS_PARALLELISM"] == "false"


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (0, "exit code 0"),
        (70, "exit code 70"),
        (-11, "signal SIGSEGV"),
        (-9, "signal SIGKILL: often the system ran out of memory"),
        (-99, "signal 99"),
    ],
)
def test_an_end_is_told_in_words(code: int, text: str) -> None:
    assert end_of(code) == text


def test_waiting_threads_sleep_unless_the_operator_says_otherwise() -> None:
    embedder = spec().model_copy(update={"engine": "sentence-transformers"})
    assert child_environment(embedder, {}, {})["GOMP_SPINCOUNT"] == "10000"
    llama = spec().model_copy(update={"engine": "llama"})
    assert child_environment(llama, {}, {})["GOMP_SPINCOUNT"] == "300000"
    for each in (embedder, llama):
        assert child_environment(each, {"GOMP_SPINCOUNT": "7"}, {})["GOMP_SPINCOUNT"] == "7"


def test_memory_that_threads_free_is_everybodys_unless_the_operator_says_otherwise() -> None:
    assert child_environment(spec(), {}, {})["MALLOC_ARENA_MAX"] == "1"
    assert child_environment(spec(), {"MALLOC_ARENA_MAX": "4"}, {})["MALLOC_ARENA_MAX"] == "4"


async def test_a_fault_in_watching_a_worker_is_its_end_and_not_an_endless_wait(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ends: list[str] = []
    # The system refuses a zero byte in an environment, with an error that is no OSError.
    child = Child(spec(), "engine", {"BROKEN": "a\0b"}, lambda message: None, ends.append)
    await child.wait()
    assert ends == ["the node lost sight of it"]
    assert "embedded null byte" in caplog.text


async def test_people_see_the_lines_that_say_why_and_a_collector_all_of_them(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="tars.worker")
    child = Child(spec(), "engine", {"BROKEN": "a\0b"}, lambda message: None, lambda cause: None)
    await child.wait()
    caplog.clear()
    stream = asyncio.StreamReader()
    stream.feed_data(
        b"llama_context: the full capacity of the model will not be utilized\nllama_model_load: error loading model\n"
        b'Traceback (most recent call last):\n  File "x.py", line 3, in run\n    boom()\nKeyError: 3\nloaded\n'
    )
    stream.feed_eof()
    await child._read_lines(stream)
    told = [record.getMessage().partition(": ")[2] for record in caplog.records if record.levelname == "WARNING"]
    assert told == [
        "llama_model_load: error loading model",
        "Traceback (most recent call last):",
        '  File "x.py", line 3, in run',
        "    boom()",
        "KeyError: 3",
    ]
    assert len(caplog.records) == 7
