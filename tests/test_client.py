"""The Python client: a typed method for every row of the table, deltas as messages, errors as classes."""

from __future__ import annotations

import asyncio
import inspect
import subprocess
import sys
from collections.abc import AsyncIterator

import pytest
from fake_node import FakeNode, listening

from tars.client import BatchCall, CallOptions, Client, GenerationOptions
from tars.errors import BadPeerAnswer, InvalidParams, StillLoading, UnknownModel
from tars.messages.inference import ChatMessage, ChatResult, CompleteResult, Delta, GenerationParams, Progress
from tars.rpc.method_table import METHODS, Role


@pytest.fixture
def node() -> FakeNode:
    return FakeNode()


@pytest.fixture
async def client(node: FakeNode) -> AsyncIterator[Client]:
    async with listening(node) as url, Client(url) as one:
        yield one


async def test_how_urgent_a_call_is_goes_along(client: Client, node: FakeNode) -> None:
    await client.embed("x", model="m", priority="batch")
    await client.embed("x", model="m")
    assert [context.priority for context in node.contexts] == ["batch", None]


# The client's name for each row.
CALLS = {
    "rpc.discover": ("discover", ()),
    "node.ping": ("ping", ()),
    "node.describe": ("describe", ()),
    "node.drain": ("drain", ()),
    "node.resume": ("resume", ()),
    "mesh.peers": ("peers", ()),
    "mesh.describe": ("describe_mesh", ()),
    "mesh.plan": ("plan", ()),
    "mesh.explain": ("explain", ("m",)),
    "mesh.token_new": ("new_token", ()),
    "mesh.token_list": ("tokens", ()),
    "mesh.token_revoke": ("revoke_token", ("0a1b2c3d",)),
    "mesh.key_new": ("new_key", ("laptop",)),
    "mesh.key_list": ("keys", ()),
    "mesh.key_revoke": ("revoke_key", ("laptop",)),
    "mesh.remove": ("remove_node", ("box",)),
    "models.list": ("models", ()),
    "models.deploy": ("deploy", ("m",)),
    "models.pull": ("pull", ("m",)),
    "models.add_file": ("add_file", ("m", "/f")),
    "models.transfers": ("transfers", ()),
    "models.remove": ("remove", ("m",)),
    "calls.explain": ("explain_call", ("0a",)),
    "inference.chat": ("chat", ("hello",)),
    "inference.complete": ("complete", ("once",)),
    "inference.embed": ("embed", ("text",)),
    "inference.rerank": ("rerank", ("query", ["one", "another"])),
    "inference.tokenize": ("tokenize", ("text",)),
}


def test_every_row_has_a_method_but_what_only_nodes_ask_each_other() -> None:
    assert list(CALLS) == [name for name, spec in METHODS.items() if Role.ADMINISTRATOR in spec.roles]
    among_nodes = {"mesh.join", "mesh.gossip", "mesh.claim", "mesh.settle", "mesh.await_answer"}
    assert set(METHODS) - set(CALLS) == among_nodes


@pytest.mark.parametrize("name", CALLS)
async def test_a_rows_method_gives_the_rows_result(client: Client, node: FakeNode, name: str) -> None:
    method, arguments = CALLS[name]
    result = await getattr(client, method)(*arguments)
    assert node.started == [name]
    if METHODS[name].result is None:
        assert [one["name"] for one in result["methods"]] == list(METHODS)
    else:
        assert type(result) is METHODS[name].result


@pytest.mark.parametrize("name", CALLS)
def test_a_rows_method_takes_the_rows_params(name: str) -> None:
    taken = [
        one for one in inspect.signature(getattr(Client, CALLS[name][0])).parameters if one not in ("self", "options")
    ]
    params = METHODS[name].params
    own = set(params.model_fields)
    if issubclass(params, GenerationParams):
        assert set(GenerationOptions.__annotations__) - set(CallOptions.__annotations__) == set(
            GenerationParams.model_fields
        )
        own -= set(GenerationParams.model_fields)
    assert set(taken) == own


async def test_params_left_out_are_left_to_the_nodes_defaults(client: Client, node: FakeNode) -> None:
    await client.chat("hello", temperature=0.0, timeout=30)
    params = node.params[0]
    assert params.model_fields_set == {"messages", "temperature"}


@pytest.mark.parametrize(
    "messages",
    ["hi", [{"role": "user", "content": "hi"}], [ChatMessage(role="user", content="hi")]],
)
async def test_messages_may_be_a_text_dicts_or_messages(client: Client, node: FakeNode, messages: object) -> None:
    await client.chat(messages)  # type: ignore[arg-type]  # one of the three each time
    assert node.params[0].messages == [ChatMessage(role="user", content="hi")]


async def test_a_wrong_param_is_refused_before_anything_is_sent(client: Client, node: FakeNode) -> None:
    with pytest.raises(InvalidParams, match="temperature"):
        await client.chat("hello", temperature=-1)
    with pytest.raises(InvalidParams, match="max_tokens"):
        client.chat_stream("hello", max_token=5)  # type: ignore[call-arg]  # the typo is the point
    assert node.started == []


async def test_a_stream_is_deltas_and_then_the_result(client: Client) -> None:
    stream = client.chat_stream("hello")
    with pytest.raises(RuntimeError, match="not ended"):
        _ = stream.result
    deltas = [delta async for delta in stream]
    assert [type(delta) for delta in deltas] == [Delta, Delta]
    assert type(stream.result) is ChatResult
    assert "".join(delta.text for delta in deltas) == stream.result.message.content
    assert [delta async for delta in stream] == []
    async with client.complete_stream("once") as completing:
        assert "".join([delta.text async for delta in completing]) == "Hello"
        assert type(completing.result) is CompleteResult


async def test_whoever_reads_a_stream_can_hear_how_far_the_load_is(client: Client, node: FakeNode) -> None:
    node.loads = [Progress(stage="load", percent=percent, node="pc2") for percent in (10.0, 60.0)]
    heard: list[Progress] = []
    stream = client.chat_stream("hello")
    stream.on_progress = heard.append
    assert "".join([delta.text async for delta in stream]) == "Hello"
    assert heard == node.loads
    assert (await client.chat("hello")).message.content == "Hello", "where there is no stream it is only waited"


async def test_leaving_a_stream_early_cancels_the_work(client: Client, node: FakeNode) -> None:
    node.gate = asyncio.Event()
    async with asyncio.timeout(5):
        async with client.chat_stream("hello") as stream:
            async for delta in stream:
                assert delta.text == "Hel"
                break
        await node.closed.wait()
        await node.ended_one.wait()


async def test_errors_are_the_trees_classes(client: Client, node: FakeNode) -> None:
    with pytest.raises(UnknownModel) as raised:
        await client.remove("nobody")
    assert raised.value.details["known"] == ["demo"]
    node.error = StillLoading("wait")
    with pytest.raises(StillLoading):
        await client.embed(["a"])
    with pytest.raises(StillLoading):
        await anext(client.chat_stream("hello"))


async def test_any_method_can_be_called_streamed_and_batched_by_name(client: Client) -> None:
    assert (await client.call("node.ping"))["node"] == "node-1"
    chat = {"messages": [{"role": "user", "content": "hello"}]}
    assert [name async for name, _ in client.stream("inference.chat", chat)] == ["inference.delta"] * 2 + [None]
    pong, unknown = await client.batch([BatchCall("node.ping"), BatchCall("models.remove", {"model": "nobody"})])
    assert pong["state"] == "ready"
    assert isinstance(unknown, UnknownModel)


async def test_a_result_of_another_version_is_a_bad_peer_answer(client: Client, node: FakeNode) -> None:
    async def call(*_: object, **__: object) -> object:
        return {"node": "n", "renamed": 1}

    client._connection.call = call  # type: ignore[method-assign]  # stands for a newer node
    with pytest.raises(BadPeerAnswer, match="version"):
        await client.ping()


@pytest.mark.slow
def test_the_client_needs_no_engine_and_no_server_part() -> None:
    program = (
        "import sys, tars.client\n"
        "print([name for name in ('torch', 'llama_cpp', 'sentence_transformers', 'pynvml', 'jsonrpcserver') if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
