"""Streams through a gateway whose serving node is killed: the caller's text is that of an unbroken call. Real processes, real engines."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from mesh_processes import Pc, assemble, stopping, until
from tiny_gguf import write_tiny_gguf

from tars.messages.inference import CompleteResult, Delta

pytestmark = [pytest.mark.slow, pytest.mark.model]

ON = {"2": -100.0, "4": -100.0}
"""Tokens 2 and 4 end the tiny model's text."""
LONG: dict[str, Any] = {"model": "tiny", "max_tokens": 600, "seed": 5, "logit_bias": ON, "timeout": 240.0}
"""About two seconds of an idle machine."""
KILLED_AFTER = 40
"""Pieces of the stream."""


@dataclass
class Heard:
    """What the caller has of each answer."""

    text: dict[int, str] = field(default_factory=dict)
    tokens: dict[int, list[int]] = field(default_factory=dict)

    def take(self, delta: Delta) -> None:
        self.text[delta.index] = self.text.get(delta.index, "") + delta.text
        self.tokens.setdefault(delta.index, []).extend(delta.token_ids)


def three(folder: Path, mode: str) -> list[Pc]:
    """A gateway that has no room for the model, and two PCs that have the same file of it."""
    model = write_tiny_gguf(folder / "tiny.gguf", layers=6, embedding=256, feed_forward=1024)
    engines = f'[engines]\ncontinuation = "{mode}"\n'
    table = f'{engines}[[model]]\nname = "tiny"\npath = "{model}"\n'
    return [
        Pc(folder, "gateway", priority=10, memory_mib=64, more=engines),
        Pc(folder, "b", more=table),
        Pc(folder, "c", more=table),
    ]


async def served(pcs: Sequence[Pc]) -> None:
    """Both have the model ready, and the gateway knows of which file."""
    gateway, *others = pcs
    await assemble(pcs)
    await gateway.client.deploy("tiny", replicas=len(others), slots=2, context=1024)
    for pc in others:
        await pc.holds("tiny")

    async def known() -> list[str | None]:
        adverts = [await other.record_at(gateway, f"node/{other.node_id()}") for other in others]
        replicas = [each for advert in adverts if advert is not None for each in advert["value"].get("replicas", ())]
        return [each.get("file_sha256") for each in replicas if each.get("state") == "ready"]

    await until(known, lambda seen: len(seen) == len(others) and None not in seen, 30, "the gateway knows the files")


async def who_serves(pcs: Sequence[Pc]) -> Pc | None:
    """None: the stream is over already."""
    for pc in pcs:
        if any(each.active_calls for each in (await pc.client.describe()).replicas):
            return pc
    return None


async def broken_once(gateway: Pc, others: Sequence[Pc], **params: Any) -> tuple[Heard, CompleteResult, Pc]:
    """A stream whose serving node is killed in the middle; who that was. On a very fast machine it takes several."""
    for _ in range(20):
        heard, killed, pieces = Heard(), None, 0
        stream = gateway.client.complete_stream("Once upon a time", **{**LONG, **params})
        async with stream:
            async for delta in stream:
                heard.take(delta)
                pieces += 1
                if pieces == KILLED_AFTER and (killed := await who_serves(others)) is not None:
                    await killed.stop(signal.SIGKILL)
        if killed is not None and len(stream.result.served_by.attempts) > 1:
            return heard, stream.result, killed
        assert killed is None, "it was serving the stream, and nobody went on with it"
    raise AssertionError("every stream was over too soon")


def workers_of(pc: Pc) -> list[psutil.Process]:
    assert pc.node is not None
    found: list[psutil.Process] = pc.node.workers()
    return found


def tokens_so_far(result: CompleteResult) -> list[int]:
    return [each.tokens for each in result.served_by.attempts]


async def test_an_exact_stream_is_an_unbroken_one_when_its_node_is_killed_and_then_the_last_worker(
    tmp_path: Path,
) -> None:
    pcs = three(tmp_path, "exact")
    async with stopping(pcs):
        await served(pcs)
        await exact_streams(*pcs)


async def exact_streams(gateway: Pc, *others: Pc) -> None:
    params: dict[str, Any] = {"temperature": 1.0, "n": 2, "logprobs": 1}
    wanted = await gateway.client.complete("Once upon a time", **{**LONG, **params})
    heard, result, killed = await broken_once(gateway, others, **params)
    (other,) = [pc for pc in others if pc is not killed]
    assert result.served_by.node == other.node_id()
    assert [each.node for each in result.served_by.attempts] == [killed.node_id(), other.node_id()]
    assert tokens_so_far(result)[0] >= KILLED_AFTER // 2
    assert [one.text for one in result.choices()] == [one.text for one in wanted.choices()]
    assert [heard.text[index] for index in range(2)] == [one.text for one in wanted.choices()]
    assert [len(heard.tokens[index]) for index in range(2)] == [600, 600]
    assert [one.logprobs for one in result.choices()] == [one.logprobs for one in wanted.choices()]
    assert result.usage.completion_tokens == wanted.usage.completion_tokens == 1200
    assert result.finish_reason == wanted.finish_reason == "length"

    # The only worker is killed now: the stream waits until it runs again, and goes on there.
    await gateway.client.deploy("tiny", replicas=1, slots=2, context=1024)
    await other.holds("tiny")

    # It may have begun to load the killed one's replica, and the worker of an unloaded one takes a moment to end.
    async def workers() -> list[psutil.Process]:
        return workers_of(other)

    await until(workers, lambda seen: len(seen) == 1, 30, "one worker")
    greedy: dict[str, Any] = {**LONG, "temperature": 0.0}
    calm = await gateway.client.complete("Once upon a time", **greedy)
    heard, pieces = Heard(), 0
    stream = gateway.client.complete_stream("Once upon a time", **greedy)
    async with stream:
        async for delta in stream:
            heard.take(delta)
            pieces += 1
            if pieces == KILLED_AFTER:
                (worker,) = workers_of(other)
                worker.kill()
    assert heard.text[0] == stream.result.text == calm.text
    assert len(heard.tokens[0]) == 600


async def test_a_fast_stream_keeps_what_its_caller_had_when_its_node_is_killed(tmp_path: Path) -> None:
    pcs = gateway, *others = three(tmp_path, "fast")
    async with stopping(pcs):
        await served(pcs)
        heard, result, killed = await broken_once(gateway, others, temperature=0.0)
        assert result.served_by.node != killed.node_id()
        assert heard.text[0] == result.text
        assert len(heard.tokens[0]) == result.usage.completion_tokens == 600
        assert result.finish_reason == "length"
