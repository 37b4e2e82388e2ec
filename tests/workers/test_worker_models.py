"""Real engines in real worker processes: the whole way from the supervisor to llama.cpp and back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from tars.core.types import Deadline, ReplicaState
from tars.errors import BadGrammar, BadModelFile, WrongModelKind
from tars.messages.inference import ChatMessage, ChatParams, CompleteParams, Delta, EmbedParams, Generated
from tars.workers.engine import Event, LoadSpec, Work
from tars.workers.options import WorkerOptions
from tars.workers.supervisor import ReplicaWorker

pytestmark = pytest.mark.model

Make = Callable[..., Awaitable[ReplicaWorker]]


@pytest.fixture
async def make() -> AsyncIterator[Make]:
    workers: list[ReplicaWorker] = []

    async def start(path: Path, **changes: float) -> ReplicaWorker:
        spec = LoadSpec(replica="tiny@cpu#0", model="tiny", engine="llama", path=str(path), context=512)
        worker = ReplicaWorker(spec, WorkerOptions(**{"ping_interval_seconds": 0.2, **changes}), lambda worker: None)  # type: ignore[arg-type]  # numbers only
        workers.append(worker)
        await worker.start()
        return worker

    yield start
    for worker in workers:
        await worker.stop(0)


async def collect(worker: ReplicaWorker, work: Work) -> list[Event]:
    return [event async for event in worker.run(work, Deadline(time.monotonic() + 60))]


async def test_a_chat_call_streams_from_llama_cpp_through_the_pipe(make: Make, tiny_gguf: Path) -> None:
    worker = await make(tiny_gguf)
    info = await worker.wait_ready(60)
    assert info.architecture == "llama"
    message = ChatMessage(role="user", content="hello")
    events = await collect(worker, ChatParams(messages=[message], max_tokens=20, temperature=0.0, logprobs=2))
    assert isinstance(events[-1], Generated)
    assert "".join(event.text for event in events if isinstance(event, Delta)) == events[-1].text
    assert len(events) > 2
    assert events[-1].logprobs
    with pytest.raises(WrongModelKind):
        await collect(worker, EmbedParams(input="x"))
    # llama.cpp's words are in the log, not in the stream.
    assert worker.restarts == 0


async def test_a_truncated_file_fails_the_replica_and_not_the_node(make: Make, tiny_gguf: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(tiny_gguf.read_bytes()[:-60_000])  # noqa: ASYNC240  # 140 KB, and nothing else runs
    worker = await make(path)
    with pytest.raises(BadModelFile, match="truncated"):
        await worker.wait_ready(60)
    assert worker.state is ReplicaState.FAILED
    assert worker.restarts == 0


async def test_a_grammar_with_too_many_readings_ends_its_own_call_and_no_other(make: Make, tiny_gguf: Path) -> None:
    """In llama.cpp's grammar engine it held the worker until it was killed for hanging, and every caller's answer with it."""
    worker = await make(tiny_gguf, hang_seconds=5.0, backoff_initial_seconds=0.05)
    await worker.wait_ready(60)
    neighbour = CompleteParams(prompt="hello", max_tokens=40, seed=3)
    alone = (await collect(worker, neighbour))[-1]
    # Each rule doubles the one after it: 2**40 ways to read one "a".
    bomb = "root ::= a0\n" + "".join(f'a{n} ::= a{n + 1} a{n + 1} | "a"\n' for n in range(40)) + 'a40 ::= "a"'
    beside = asyncio.create_task(collect(worker, neighbour))
    with pytest.raises(BadGrammar, match="too ambiguous"):
        await collect(worker, CompleteParams(prompt="x", grammar=bomb, logit_bias={"2": -100.0, "4": -100.0}))
    async with asyncio.timeout(60):
        meanwhile = (await beside)[-1]
    assert isinstance(alone, Generated)
    assert isinstance(meanwhile, Generated)
    assert meanwhile.text == alone.text
    assert worker.restarts == 0
