from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pytest

from tars.workers.child import child_environment, end_of
from tars.workers.engine import LoadSpec
from tars.workers.stdio import MessageReader, frame

HERE = Path(__file__).parent


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


async def _spawn() -> asyncio.subprocess.Process:
    environment = child_environment(spec(), os.environ, {"PYTHONPATH": str(HERE)})
    return await asyncio.create_subprocess_exec(
        *[sys.executable, "-P", "-m", "tars.workers.process", "--engine", "fake_engine:FakeEngine"],
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=environment,
    )


async def test_a_worker_ends_by_itself_when_its_input_ends() -> None:
    process = await _spawn()
    async with asyncio.timeout(20):
        assert await process.communicate(b"") == (b"", b"")
    assert process.returncode == 0


async def test_a_worker_that_reads_garbage_says_so_and_ends() -> None:
    process = await _spawn()
    async with asyncio.timeout(20):
        output, errors = await process.communicate(b"GET / HTTP/1.1\r\n\r\n")
    assert (output, process.returncode) == (b"", 70)
    assert b"not a header" in errors


async def test_a_worker_answers_pings_and_refuses_work_before_it_loaded() -> None:
    process = await _spawn()
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(frame({"jsonrpc": "2.0", "id": 1, "method": "worker.ping", "params": {}}))
    work = {"work": {"prompt": "x"}, "timeout_ms": 1000}
    process.stdin.write(frame({"jsonrpc": "2.0", "id": 2, "method": "worker.complete", "params": work}))
    answers: list[dict[str, object]] = []
    reader = MessageReader(process.stdout)
    async with asyncio.timeout(20):
        while len(answers) < 2:
            answers += await reader.read() or []
        process.stdin.close()
        await process.wait()
    assert answers[0]["result"] == {"mark": 0, "in_flight": 0, "memory_bytes": 0}
    error = answers[1]["error"]
    assert isinstance(error, dict)
    assert error["data"]["kind"] == "invalid_request"
