"""The callers of `scripts/bench chaos`: what they hear through each face, and what they do where a gateway is gone or full."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, cast

import pytest
from chaos_answers import Heard, Text
from chaos_callers import Callers, Gateway, GatewayGone, undisturbed
from chaos_deck import Call, Kind
from fake_node import FakeNode, listening

from tars.errors import DeadlineExceeded, Draining, Overloaded, PeerUnreachable, TarsError, WorkerCrashed

QUESTION = {"model": "demo", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8, "temperature": 0.0}
CALLS = {
    kind: Call(
        0,
        kind,
        {"model": "demo", "input": ["a", "b"]}
        if kind is Kind.EMBEDDING
        else QUESTION
        if kind in (Kind.CHAT, Kind.CHAT_STREAM)
        else {"model": "demo", "prompt": "Hello", "max_tokens": 8, "temperature": 0.0},
    )
    for kind in Kind
}


@pytest.fixture
def node() -> FakeNode:
    return FakeNode()


@pytest.fixture
async def gateway(node: FakeNode) -> AsyncIterator[Gateway]:
    async with listening(node, every_face=True) as url, Gateway("a", url, None, None) as one:
        yield one


@pytest.mark.parametrize("kind", Kind)
async def test_both_faces_say_the_same(gateway: Gateway, kind: Kind) -> None:
    by_rpc, by_openai = [], []
    told, _ = await gateway.by_rpc(CALLS[kind], 10.0, "key", lambda: by_rpc.append(1))
    heard = await gateway.by_openai(CALLS[kind], 10.0, "key 2", lambda: by_openai.append(1))
    assert heard.vectors == told.vectors
    assert [(text.text, text.finish_reason) for text in heard.texts] == [
        (text.text, text.finish_reason) for text in told.texts
    ]
    assert bool(by_rpc) == bool(by_openai) == kind.streams
    assert all((text.pieces == text.text) is kind.streams for text in heard.texts)
    assert told.vectors or told.texts
    assert told.run


@pytest.mark.parametrize("kind", [Kind.CHAT, Kind.CHAT_STREAM])
@pytest.mark.parametrize("face", ["rpc", "openai"])
async def test_what_the_node_says_is_not_taken_for_its_death(
    gateway: Gateway, node: FakeNode, kind: Kind, face: str
) -> None:
    async def call() -> None:
        if face == "rpc":
            await gateway.by_rpc(CALLS[kind], 10.0, None, lambda: None)
        else:
            await gateway.by_openai(CALLS[kind], 10.0, None, lambda: None)

    for error in (
        Overloaded("full", retry_after_ms=1500),
        WorkerCrashed("gone"),
        PeerUnreachable("lost", details={"peer": "b"}),
    ):
        node.error = error
        with pytest.raises(type(error)):
            await call()
    node.error = Draining("leaving")
    with pytest.raises(GatewayGone, match="leaving"):
        await call()
    node.error, node.late_error = None, WorkerCrashed("in mid-stream")
    if kind.streams:
        with pytest.raises(WorkerCrashed):
            await call()


async def test_nobody_there_is_a_gateway_that_is_gone() -> None:
    async with Gateway("a", "http://127.0.0.1:9", None, None) as nobody:
        for call in (
            nobody.by_rpc(CALLS[Kind.CHAT], 5.0, None, lambda: None),
            nobody.by_openai(CALLS[Kind.CHAT], 5.0, None, lambda: None),
        ):
            with pytest.raises(GatewayGone):
                await cast("Awaitable[object]", call)


@pytest.mark.slow
@pytest.mark.parametrize("alone", [False, True])
async def test_a_silent_gateway_loses_its_calls_only_where_another_one_is_heard(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, alone: bool
) -> None:
    monkeypatch.setattr("chaos_callers.SILENT_SECONDS", 0.4)
    monkeypatch.setattr("chaos_callers.PING_SECONDS", 0.02)
    async with Gateway("a", "http://127.0.0.1:9", None, None) as nobody:
        stopped = asyncio.Event()
        if not alone:
            gateway.watch([nobody])

        async def work() -> None:
            try:
                await asyncio.sleep(60)
            finally:
                stopped.set()

        waiting = asyncio.create_task(nobody.while_up(work()))
        await asyncio.sleep(0)
        nobody.watch([nobody] if alone else [gateway])
        if alone:
            await asyncio.wait([waiting], timeout=0.7)
            assert not waiting.done()
            waiting.cancel()
            await asyncio.wait([waiting])
        else:
            with pytest.raises(GatewayGone):
                await asyncio.wait_for(waiting, 10)
        assert stopped.is_set()
        # New calls go elsewhere in any case.
        assert not nobody.up


async def test_an_undisturbed_run_waits_for_a_model_that_still_loads(gateway: Gateway, node: FakeNode) -> None:
    node.error = Overloaded("loading")
    asking = asyncio.create_task(undisturbed(gateway, CALLS[Kind.CHAT]))
    await asyncio.sleep(0.05)
    node.error = None
    assert (await asyncio.wait_for(asking, 10)).texts


# --- patience ---------------------------------------------------------------------------------------------------------

RIGHT = Heard((Text("yes", "stop"),), run="x 1")


class Scripted:
    """A gateway that answers as it was told, one after the other."""

    def __init__(self, name: str, *answers: Heard | Exception) -> None:
        self.name, self.up, self.heard_at = name, True, 0.0
        self.answers = list(answers)
        self.keys: list[str | None] = []

    async def by_rpc(
        self, call: Call, seconds: float, key: str | None, piece: Callable[[], None]
    ) -> tuple[Heard, list[dict[str, Any]]]:
        self.keys.append(key)
        piece()
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer, [{"outcome": "answered"}]

    @staticmethod
    async def while_up(work: Awaitable[Any]) -> Any:
        return await work


def callers(*gateways: Scripted) -> Callers:
    return Callers(
        cast("list[Gateway]", list(gateways)),
        lambda call, heard: ((), False) if heard == RIGHT else (("wrong",), False),
    )


async def made(gateway: Scripted, *others: Scripted) -> Any:
    asking = callers(gateway, *others)
    call = CALLS[Kind.CHAT_STREAM]
    return await asking.make(call, cast("Gateway", gateway), face="rpc", key="k", phase="chaos")


async def test_a_call_whose_gateway_is_gone_goes_to_the_other_one_under_the_same_key() -> None:
    first, other = Scripted("a", GatewayGone("no sign of life")), Scripted("b", RIGHT)
    record = await made(first, other)
    assert (record.outcome, [name for _, name in record.sent_again]) == ("right", ["a"])
    assert first.keys == other.keys == ["k"]


async def test_a_gateway_that_is_known_to_be_gone_gets_no_call() -> None:
    first, other = Scripted("a"), Scripted("b", RIGHT)
    first.up = False
    record = await made(first, other)
    assert (record.outcome, record.gateway, record.sent_again) == ("right", "b", [])


async def test_a_refused_call_comes_back_when_it_was_told_to() -> None:
    record = await made(Scripted("a", Overloaded("full", retry_after_ms=20), RIGHT))
    assert (record.outcome, record.refusals) == ("right", 1)
    assert record.seconds >= 0.02
    # There is no such time within its patience.
    assert (await made(Scripted("a", Overloaded("full", retry_after_ms=10**7)))).outcome == "refused"


async def test_a_call_that_was_let_in_after_a_refusal_and_then_ran_out_of_time_is_late() -> None:
    over = DeadlineExceeded("90 s are over")
    record = await made(Scripted("a", Overloaded("full", retry_after_ms=1), over))
    assert (record.outcome, record.problems) == ("late", ["deadline_exceeded: 90 s are over"])
    assert (await made(Scripted("a", over))).outcome == "lost", "nobody had told it that there is no room"


@pytest.mark.parametrize("error", [WorkerCrashed("gone"), PeerUnreachable("lost"), TarsError("odd")])
async def test_every_other_error_is_a_lost_call(error: TarsError) -> None:
    record = await made(Scripted("a", error), Scripted("b", RIGHT))
    assert record.outcome == "lost"
    assert error.kind in record.problems[-1]


async def test_a_wrong_answer_is_one() -> None:
    record = await made(Scripted("a", Heard((Text("no", "stop"),))))
    assert (record.outcome, record.problems) == ("wrong", ["wrong"])
