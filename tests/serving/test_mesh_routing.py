"""Two and three real nodes over loopback HTTP: any node answers any call."""

import asyncio
import statistics
import time

import pytest
from mesh_nodes import ScriptedReplica, generated, mesh_of

from tars.core.mesh_messages import MemberState
from tars.core.types import Deadline, ModelKind, ReplicaState
from tars.errors import (
    DeadlineExceeded,
    Draining,
    Overloaded,
    PeerUnreachable,
    PromptTooLong,
    StaleRoute,
    StillLoading,
    UnknownModel,
    WorkerCrashed,
)
from tars.messages.base import CallContext
from tars.messages.inference import ChatParams, Choice, Delta, TokenLogprob, ToolCall, ToolCallDelta
from tars.rpc.http_client import RpcConnection

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
SECONDS = 5.0
"""Bound of every wait: what is waited for takes milliseconds."""


def chat(model="m", **more):
    return {**CHAT, "model": model, **more}


async def asked(node, seconds=0.5):
    """A chat with so much time, before any face, whose own clock would be in a race with the call's."""
    call = CallContext(Deadline(time.monotonic() + seconds), "0af7651916cd43dd8448eb211c80319c")
    return [item async for item in node.inference.chat(ChatParams.model_validate(chat(), strict=False), call)]


def without_call(result):
    """An answer without what is every call's own."""
    return {**result, "served_by": {**result["served_by"], "call": "", "attempts": []}}


async def running(calls, *replicas):
    """Wait until so many calls run on these replicas, which share one `started` event."""
    async with asyncio.timeout(SECONDS):
        while sum(each.running for each in replicas) < calls:
            replicas[0].started.clear()
            await replicas[0].started.wait()


async def streamed(connection, params, **meta):
    deltas, result = [], None
    async for name, body in connection.stream("inference.chat", params, **meta):
        if name is None:
            result = body
        else:
            deltas.append(body)
    return deltas, result


@pytest.fixture
async def two():
    """`small` has nothing; `big` has a chat model `m`."""
    async with mesh_of("small", "big") as mesh:
        mesh.want("m", aliases=("alias",))
        mesh.nodes[1].replicas.append(ScriptedReplica("m@big#0", "m"))
        mesh.changed()
        yield mesh


async def test_a_node_streams_a_chat_of_a_model_that_only_its_peer_holds(two):
    small, big = two.nodes
    for connection in (small.client, big.client):
        deltas, result = await streamed(connection, chat())
        assert [each["text"] for each in deltas] == ["Hel", "lo"]
        assert [each["token_ids"] for each in deltas] == [[1], [2]]
        assert result["message"]["content"] == "Hello"
        assert result["usage"]["total_tokens"] == 5
        assert (result["served_by"]["node"], result["served_by"]["device"]) == (big.id, "Card of big")
        (attempt,) = result["served_by"]["attempts"]
        assert (attempt["replica"], attempt["node"], attempt["outcome"]) == ("m@big#0", big.id, "answered")
        assert (attempt["tokens"], attempt["reason"]) == (2, "first choice")
        assert "calls_left" not in result["served_by"], "that is between nodes"


async def test_each_of_two_nodes_answers_for_the_other(two):
    small, big = two.nodes
    two.want("e", ModelKind.EMBEDDING)
    small.replicas.append(ScriptedReplica("e@small#0", "e", ModelKind.EMBEDDING))
    two.changed()
    for node in two.nodes:
        assert (await node.client.call("inference.chat", chat()))["served_by"]["node"] == big.id
        assert (await node.client.call("inference.embed", {"input": ["a"]}))["served_by"]["node"] == small.id


async def test_everything_that_an_answer_can_hold_comes_through(two):
    small, big = two.nodes
    logprob = TokenLogprob(token="a", token_id=7, logprob=-0.5, top=[("a", -0.5), ("b", -1.5)])
    piece = ToolCallDelta(index=0, id="c1", name="weather", arguments='{"city"')
    big.replicas[0].pieces = (
        Delta(text="", token_ids=[1], reasoning="hm", index=0),
        Delta(text="a", token_ids=[7], logprobs=[logprob], tool_calls=[piece], index=1),
    )
    big.replicas[0].end = generated(
        "text",
        reasoning="hm",
        seed=11,
        logprobs=[logprob],
        tool_calls=[ToolCall(id="c1", name="weather", arguments="{}")],
        further=[Choice(index=1, text="other", finish_reason="length", reasoning="or")],
    )
    through = await streamed(small.client, chat(n=2))
    direct = await streamed(big.client, chat(n=2))
    assert (through[0], without_call(through[1])) == (direct[0], without_call(direct[1]))
    assert through[0][0]["reasoning"] == "hm"
    assert through[0][1]["tool_calls"][0]["arguments"] == '{"city"'
    assert (through[1]["seed"], through[1]["message"]["tool_calls"][0]["name"]) == (11, "weather")
    assert through[1]["further"][0]["text"] == "other"


async def test_the_peer_is_asked_with_one_hop_more_less_time_and_the_same_trace(two):
    small, big = two.nodes
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    await small.client.call("inference.chat", chat(), timeout=30.0, traceparent=trace, idempotency_key="k")
    (arrived,) = big.replicas[0].calls
    assert arrived.hops == 1
    assert arrived.trace_id == "0af7651916cd43dd8448eb211c80319c"
    assert 28.0 < arrived.deadline.remaining(time.monotonic()) < 30.0
    assert arrived.idempotency_key is None
    await small.client.call("inference.chat", chat(), idempotency_key="k")
    assert len(big.replicas[0].calls) == 1
    await small.client.call("inference.chat", chat(), idempotency_key="k2")
    assert len(big.replicas[0].calls) == 2


async def test_a_name_is_resolved_before_the_call_leaves(two):
    small, big = two.nodes
    two.want("e", ModelKind.EMBEDDING)
    big.replicas.append(ScriptedReplica("e@big#0", "e", ModelKind.EMBEDDING))
    two.changed()
    await small.client.call("inference.chat", chat("alias"))
    await small.client.call("inference.embed", {"input": "x"})
    assert big.replicas[0].works[0].model == "m"
    assert big.replicas[1].works[0].model == "e"


@pytest.mark.parametrize("output_type", ["float", "int8"])
async def test_vectors_are_the_same_through_a_peer_in_every_form(two, output_type):
    small, big = two.nodes
    two.want("e", ModelKind.EMBEDDING)
    big.replicas.append(ScriptedReplica("e@big#0", "e", ModelKind.EMBEDDING))
    two.changed()
    for form in ("float", "base64"):
        params = {"input": ["one", "three"], "encoding_format": form, "output_type": output_type}
        through = await small.client.call("inference.embed", params)
        assert without_call(through) == without_call(await big.client.call("inference.embed", params))
        assert (through["truncated"], through["dimensions"], through["usage"]["prompt_tokens"]) == ([0], 2, 2)
    assert all(work.encoding_format == "base64" for work in big.replicas[1].works[::2])


async def test_a_reranking_is_the_same_through_a_peer(two):
    small, big = two.nodes
    two.want("r", ModelKind.RERANK)
    big.replicas.append(ScriptedReplica("r@big#0", "r", ModelKind.RERANK))
    two.changed()
    params = {"query": "q", "documents": ["a", "ccc", "bb"], "top_n": 2, "return_documents": True}
    through = await small.client.call("inference.rerank", params)
    assert [(each["index"], each["score"], each["document"]) for each in through["results"]] == [
        (1, 3.0, "ccc"),
        (2, 2.0, "bb"),
    ]
    assert without_call(through) == without_call(await big.client.call("inference.rerank", params))
    assert through["truncated"] == [1]


async def test_tokens_are_counted_by_the_peer(two):
    small, _ = two.nodes
    assert (await small.client.call("inference.tokenize", {"text": "ab"}))["tokens"] == [97, 98]


async def test_the_peers_own_error_reaches_the_caller(two):
    small, big = two.nodes
    big.replicas[0].failures = [PromptTooLong("900 tokens, 512 fit", details={"prompt_tokens": 900, "context": 512})]
    with pytest.raises(PromptTooLong, match="900 tokens") as met:
        await small.client.call("inference.chat", chat())
    assert met.value.details["context"] == 512
    assert small.router.calls_at_peers() == {}


async def test_closing_the_stream_stops_the_work_at_the_peer(two):
    small, big = two.nodes
    replica = big.replicas[0]
    replica.gate = asyncio.Event()
    stream = small.client.stream("inference.chat", chat())
    await anext(stream)
    assert replica.running == 1
    await stream.aclose()
    await asyncio.wait_for(replica.closed.wait(), SECONDS)
    assert replica.running == 0


async def test_a_caller_who_leaves_stops_an_embedding_at_the_peer(two):
    small, big = two.nodes
    two.want("e", ModelKind.EMBEDDING)
    replica = ScriptedReplica("e@big#0", "e", ModelKind.EMBEDDING, gate=asyncio.Event())
    big.replicas.append(replica)
    two.changed()
    calling = asyncio.create_task(small.client.call("inference.embed", {"input": "x"}))
    await asyncio.wait_for(replica.started.wait(), SECONDS)
    calling.cancel()
    await asyncio.wait({calling})
    await asyncio.wait_for(replica.closed.wait(), SECONDS)


async def test_a_forwarded_call_is_run_there_or_nowhere(two):
    small, big = two.nodes
    with pytest.raises(StaleRoute, match="another one may") as met:
        await small.client.call("inference.chat", chat(), hops=1)
    assert met.value.retryable
    assert big.replicas[0].works == []
    assert (await big.client.call("inference.chat", chat(), hops=1))["served_by"]["node"] == big.id


async def test_a_forwarded_call_of_a_model_that_the_peer_does_not_know_is_a_stale_route(two):
    small, _ = two.nodes
    with pytest.raises(StaleRoute):
        await small.client.call("inference.chat", chat("nobody"), hops=1)
    with pytest.raises(UnknownModel):
        await small.client.call("inference.chat", chat("nobody"))


async def test_an_advert_that_is_no_longer_true_costs_a_retry_and_not_the_call():
    async with mesh_of("entry", "stale", "good") as mesh:
        entry, stale, good = mesh.nodes
        mesh.want("m")
        gone = ScriptedReplica("m@stale#0", "m", speed=1000.0)
        stale.replicas.append(gone)
        good.replicas.append(ScriptedReplica("m@good#0", "m", speed=10.0))
        mesh.changed()
        entry.peers.extra[stale.id] = stale.advert()
        stale.replicas.clear()
        result = await entry.client.call("inference.chat", chat())
        assert result["served_by"]["node"] == good.id
        assert [each["outcome"] for each in result["served_by"]["attempts"]] == ["stale_route", "answered"]
        # And for some seconds nobody is sent there.
        result = await entry.client.call("inference.chat", chat())
        assert [each["outcome"] for each in result["served_by"]["attempts"]] == ["answered"]
        assert dict(entry.router.calls_at_peers()) == {(stale.id, "stale_route"): 1, (good.id, "answered"): 2}
        assert good.router.calls_from_peers == 2


@pytest.fixture
async def three():
    """`entry` has nothing; `fast` and `slow` hold `m` and the embedder `e`."""
    async with mesh_of("entry", "fast", "slow") as mesh:
        mesh.want("m")
        mesh.want("e", ModelKind.EMBEDDING)
        for node, speed in zip(mesh.nodes[1:], (100.0, 10.0), strict=True):
            node.replicas.append(ScriptedReplica(f"m@{node.name}#0", "m", speed=speed))
            node.replicas.append(ScriptedReplica(f"e@{node.name}#0", "e", ModelKind.EMBEDDING, speed=speed))
        mesh.changed()
        yield mesh


async def test_a_dead_peers_call_is_retried_once_elsewhere(three):
    entry, fast, slow = three.nodes
    await fast.die()
    result = await entry.client.call("inference.chat", chat())
    assert result["served_by"]["node"] == slow.id
    assert [(each["node"], each["outcome"]) for each in result["served_by"]["attempts"]] == [
        (fast.id, "peer_unreachable"),
        (slow.id, "answered"),
    ]
    result = await entry.client.call("inference.embed", {"input": "x"})
    assert [each["node"] for each in result["served_by"]["attempts"]] == [slow.id], "the node is avoided for a while"


async def test_a_peer_that_dies_over_an_embedding_costs_a_retry_and_not_the_call(three):
    entry, fast, slow = three.nodes
    replica = fast.replicas[1]
    replica.gate = asyncio.Event()
    calling = asyncio.create_task(entry.client.call("inference.embed", {"input": ["x", "yy"]}))
    await asyncio.wait_for(replica.started.wait(), SECONDS)
    await fast.die()
    result = await asyncio.wait_for(calling, SECONDS)
    assert result["embeddings"] == [[1.0, 0.5], [2.0, 0.5]]
    assert result["served_by"]["node"] == slow.id


async def test_a_call_at_a_peer_that_lost_its_power_is_answered_elsewhere_once_membership_knows(three):
    """Nothing closes its connections: only membership can tell."""
    entry, fast, slow = three.nodes
    fast.replicas[1].gate = asyncio.Event()
    embedding = asyncio.create_task(entry.client.call("inference.embed", {"input": "x"}))
    await asyncio.wait_for(fast.replicas[1].started.wait(), SECONDS)
    entry.peers.states[fast.id] = MemberState.DEAD
    entry.router._fleet.peer_died(fast.id)
    result = await asyncio.wait_for(embedding, SECONDS)
    assert [each["outcome"] for each in result["served_by"]["attempts"]] == ["peer_unreachable", "answered"]
    assert result["served_by"]["node"] == slow.id


async def test_a_stream_whose_peer_dies_after_the_first_piece_goes_on_elsewhere(three):
    entry, fast, slow = three.nodes
    fast.replicas[0].gate = asyncio.Event()
    slow.replicas[0].pieces = (Delta(text="lo", token_ids=[2]),)
    slow.replicas[0].end = generated("Hello")
    stream = entry.client.stream("inference.chat", chat())
    name, body = await anext(stream)
    assert (name, body["text"]) == ("inference.delta", "Hel")
    await fast.die()
    async with asyncio.timeout(SECONDS):
        rest = [each async for each in stream]
    assert [body["text"] for name, body in rest[:-1]] == ["lo"]
    _, result = rest[-1]
    assert result["message"]["content"] == "Hello"
    said = [(each["node"], each["outcome"], each["tokens"]) for each in result["served_by"]["attempts"]]
    assert said == [(fast.id, "peer_unreachable", 1), (slow.id, "answered", 1)]
    (resume,) = [each.resume for each in slow.replicas[0].calls]
    assert resume.answers == [[1]]
    assert resume.seed == result_seed(slow.replicas[0].works[0])


def result_seed(work):
    assert work.seed is not None, "the gateway draws it, so that every attempt has it"
    return work.seed


async def test_a_broken_stream_that_nobody_can_go_on_with_says_so_in_time_and_is_worth_a_retry(two):
    small, big = two.nodes
    big.replicas[0].gate = asyncio.Event()
    stream = small.client.stream("inference.chat", chat(), timeout=1.0)
    await anext(stream)
    await big.die()
    with pytest.raises((PeerUnreachable, DeadlineExceeded), match="big") as met:
        await asyncio.wait_for(anext(stream), SECONDS)
    assert met.value.retryable


async def test_a_call_that_kills_whoever_takes_it_does_not_go_round_the_mesh():
    async with mesh_of("entry", "a", "b", "c") as mesh:
        mesh.want("m")
        for node in mesh.nodes[1:]:
            node.replicas.append(ScriptedReplica(f"m@{node.name}#0", "m", failures=[WorkerCrashed("died")]))
        mesh.changed()
        with pytest.raises(WorkerCrashed) as met:
            await mesh.nodes[0].client.call("inference.chat", chat())
        assert len(met.value.details["attempts"]) == 2
        assert sum(len(node.replicas[0].works) for node in mesh.nodes[1:]) == 2


async def test_full_peers_are_asked_one_after_the_other_and_again(three):
    entry, fast, slow = three.nodes
    fast.replicas[0].failures = [Overloaded("full", retry_after_ms=1)]
    slow.replicas[0].failures = [Overloaded("full too", retry_after_ms=1)]
    result = await entry.client.call("inference.chat", chat())
    attempts = result["served_by"]["attempts"]
    assert [each["outcome"] for each in attempts] == ["overloaded", "overloaded", "answered"]
    assert {each["node"] for each in attempts[:2]} == {fast.id, slow.id}
    assert "after overloaded" in attempts[2]["reason"]


async def test_full_peers_fail_a_call_at_once_where_they_say_that_there_is_no_use_in_waiting(three):
    entry, fast, slow = three.nodes
    fast.replicas[0].failures = [Overloaded("full", retry_after_ms=60_000)]
    slow.replicas[0].failures = [Overloaded("full too", retry_after_ms=90_000)]
    with pytest.raises(Overloaded, match=r"full$") as met:
        await entry.client.call("inference.chat", chat(), timeout=10.0)
    assert met.value.retry_after_ms == 60_000, "of the one that has room first"
    assert [each["node"] for each in met.value.details["attempts"]] == [fast.id, slow.id]


async def test_a_draining_node_sends_its_calls_to_its_peers_and_takes_none(three):
    entry, fast, slow = three.nodes
    fast.inference.draining = True
    fast.draining = True
    three.changed()
    assert (await fast.client.call("inference.chat", chat()))["served_by"]["node"] == slow.id
    result = await entry.client.call("inference.chat", chat())
    assert [each["node"] for each in result["served_by"]["attempts"]] == [slow.id], "its advert says so"
    with pytest.raises(Draining):
        await fast.client.call("inference.chat", chat(), hops=1)
    slow.replicas[0].state = ReplicaState.LOADING
    three.changed()
    with pytest.raises(Draining):
        await fast.client.call("inference.chat", chat())


async def test_a_suspected_node_is_asked_last_and_a_dead_one_never(three):
    entry, fast, slow = three.nodes
    entry.peers.states[fast.id] = MemberState.SUSPECT
    assert (await entry.client.call("inference.chat", chat()))["served_by"]["node"] == slow.id
    entry.peers.states[slow.id] = MemberState.DEAD
    assert (await entry.client.call("inference.chat", chat()))["served_by"]["node"] == fast.id
    entry.peers.states[fast.id] = MemberState.LEFT
    with pytest.raises(PeerUnreachable, match="m was served by fast, slow, which does not answer"):
        await asked(entry)


async def test_a_model_that_is_being_loaded_somewhere_says_where_and_how_far(two):
    small, big = two.nodes
    big.replicas[0].state = ReplicaState.LOADING
    big.replicas[0].report = {"stage": "fetch", "percent": 40.0}
    two.changed()
    with pytest.raises(
        StillLoading, match=r"still loading on big \(Card of big\): its file is being copied, 40 %"
    ) as met:
        await asked(small)
    assert met.value.details["percent"] == 40.0


async def test_a_call_waits_for_a_model_that_is_being_loaded_and_its_reader_hears_how_far_it_is(two):
    small, big = two.nodes
    big.replicas[0].state = ReplicaState.LOADING
    big.replicas[0].report = {"stage": "load", "percent": 40.0}
    two.changed()
    stream = small.client.stream("inference.chat", chat())
    assert await anext(stream) == ("inference.progress", {"stage": "load", "percent": 40.0, "node": "big"})
    waiting = asyncio.create_task(small.client.call("inference.chat", chat()))
    big.replicas[0].state = ReplicaState.READY
    big.replicas[0].report = {}
    two.changed()
    async with asyncio.timeout(SECONDS):
        assert [name for name, _ in [each async for each in stream]] == ["inference.delta", "inference.delta", None]
        assert (await waiting)["message"]["content"] == "Hello"


async def test_a_burst_of_calls_spreads_over_equal_peers():
    async with mesh_of("entry", "a", "b", "c", "d") as mesh:
        mesh.want("m")
        gate, started = asyncio.Event(), asyncio.Event()
        for node in mesh.nodes[1:]:
            node.replicas.append(ScriptedReplica(f"m@{node.name}#0", "m", gate=gate, started=started))
        mesh.changed()
        calls = [asyncio.create_task(mesh.nodes[0].client.call("inference.chat", chat())) for _ in range(40)]
        replicas = [node.replicas[0] for node in mesh.nodes[1:]]

        await running(40, *replicas)
        assert [each.running for each in replicas] == [10, 10, 10, 10]
        gate.set()
        await asyncio.gather(*calls)


async def test_what_a_peer_had_left_is_known_after_its_answer(two):
    small, big = two.nodes
    big.replicas[0].gate = asyncio.Event()
    others = [asyncio.create_task(streamed(big.client, chat())) for _ in range(3)]

    await running(3, big.replicas[0])
    big.replicas[0].gate, waiting = None, big.replicas[0].gate
    await small.client.call("inference.chat", chat())
    (told,) = small.router.state.ledger._books.values()
    assert told.told_calls == 3
    waiting.set()
    await asyncio.gather(*others)


async def test_a_peer_that_is_no_node_is_not_believed(two, unused_tcp_port_factory):
    from aiohttp import web

    small, big = two.nodes

    async def nonsense(request):
        return web.json_response({"jsonrpc": "2.0", "id": (await request.json())["id"], "result": {"made": "up"}})

    app = web.Application()
    app.router.add_post("/rpc", nonsense)
    runner = web.AppRunner(app)
    await runner.setup()
    port = unused_tcp_port_factory()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    await small.connections[big.id].close()
    small.connections[big.id] = RpcConnection(f"http://127.0.0.1:{port}")
    with pytest.raises(PeerUnreachable, match="big answered what this version of TARS does not understand"):
        await small.client.call("inference.chat", chat(), timeout=5.0)
    await runner.cleanup()


async def test_a_peer_that_does_not_know_this_node_costs_the_caller_no_key_error(two):
    """A 401 of the peer's is between the nodes: the caller's own key was right."""
    from tars.errors import Unauthorized

    small, big = two.nodes
    big.replicas[0].failures = [Unauthorized("who are you?") for _ in range(1000)]
    with pytest.raises(DeadlineExceeded, match="big does not take this node's calls") as met:
        await asked(small)
    assert met.value.details["cause"] == "peer_unreachable"


async def test_a_hop_costs_little(two):
    """The number that `routing.HOP_SECONDS` stands on; here only that it is of its order, for machines are noisy."""
    small, big = two.nodes

    async def median(connection, calls=60):
        took = []
        for _ in range(calls):
            began = time.perf_counter()
            await connection.call("inference.tokenize", {"text": "a", "model": "m"})
            took.append(time.perf_counter() - began)
        return statistics.median(took)

    await median(small.client, 5)
    direct, through = await median(big.client), await median(small.client)
    assert through - direct < 0.05
    print(f"direct {direct * 1000:.2f} ms, through a peer {through * 1000:.2f} ms: {through / direct:.2f} times")
