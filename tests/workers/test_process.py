"""The child process by itself, over its pipe."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from tars.workers.child import child_environment
from tars.workers.engine import LoadSpec
from tars.workers.stdio import MessageReader, frame

HERE = Path(__file__).parent

SPEC = LoadSpec(replica="r", model="m", engine="fake", path="ok")


async def _spawn() -> asyncio.subprocess.Process:
    environment = child_environment(SPEC, os.environ, {"PYTHONPATH": str(HERE)})
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
    assert answers[0]["result"] == {"mark": 0, "in_flight": 0, "memory_bytes": 0, "counters": None}
    error = answers[1]["error"]
    assert isinstance(error, dict)
    assert error["data"]["kind"] == "invalid_request"
