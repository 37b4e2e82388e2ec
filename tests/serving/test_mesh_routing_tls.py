"""Calls from node to node over the real mesh listener: mutual TLS, and what becomes of them when a node is thrown out."""

import asyncio
from contextlib import aclosing
from dataclasses import replace

import pytest
from mesh_bench import running_mesh
from mesh_nodes import MeshNode, PretendMesh, ScriptedReplica

from tars.core.types import Deadline, ModelKind
from tars.errors import DeadlineExceeded
from tars.messages.base import CallContext
from tars.messages.inference import ChatMessage, ChatParams, EmbedParams
from tars.rpc.dispatcher import Dispatcher
from tars.rpc.mesh_listener import MeshListener
from tars.rpc.methods import handlers_of
from tars.rpc.options import RpcOptions

SECONDS = 5.0
CHAT = ChatParams(messages=[ChatMessage(role="user", content="hi")], model="m")
EMBED = EmbedParams(input=["one", "three"], model="e")


@pytest.fixture
async def pair(tmp_path):
    """`entry`, which has nothing, and `big`, which has a chat model and an embedder; between them the real connections."""
    async with running_mesh(tmp_path, "entry", "big") as (entry, big):
        mesh = PretendMesh()
        entry.service, big.service = (MeshNode(mesh, each.name, each.id) for each in (entry, big))
        mesh.nodes = [entry.service, big.service]
        mesh.want("m")
        mesh.want("e", ModelKind.EMBEDDING)
        big.service.replicas += [ScriptedReplica("m@big#0", "m"), ScriptedReplica("e@big#0", "e", ModelKind.EMBEDDING)]
        options = RpcOptions()
        dispatcher = Dispatcher(handlers_of(big.service), big.service, options)
        listener = MeshListener(big.identity, big.check, dispatcher, options)
        await listener.start("127.0.0.1", 0)
        entry.addresses[big.id] = [f"127.0.0.1:{listener.port}"]
        entry.service.peers.connection = entry.peers.connection
        big.calls_here = listener
        yield entry, big
        await listener.close()


def call(seconds=30.0):
    return CallContext(
        Deadline(asyncio.get_running_loop().time() + seconds), "0af7651916cd43dd8448eb211c80319c", "inference.chat"
    )


async def test_a_chat_and_an_embedding_over_mutual_tls(pair):
    entry, big = pair
    items = [item async for item in entry.service.chat(CHAT, call())]
    assert [item.text for item in items[:-1]] == ["Hel", "lo"]
    assert items[-1].served_by.node == big.id
    embedded = await entry.service.embed(EMBED, call())
    assert (embedded.dimensions, len(embedded.embeddings)) == (2, 2)
    arrived = big.service.replicas[0].calls[0]
    assert (arrived.caller, arrived.peer, arrived.hops) == ("local", entry.id, 1), "whose call it is travels with it"
    assert arrived.trace_id == "0af7651916cd43dd8448eb211c80319c"


async def test_closing_the_stream_stops_the_work_behind_the_tls(pair):
    entry, big = pair
    replica = big.service.replicas[0]
    replica.gate = asyncio.Event()
    async with aclosing(entry.service.chat(CHAT, call())) as running:
        await anext(running)
        assert replica.running == 1
    await asyncio.wait_for(replica.closed.wait(), SECONDS)
    assert replica.running == 0


@pytest.mark.slow
async def test_a_node_that_was_thrown_out_gets_no_answers_and_its_callers_are_told_that_it_is_the_mesh(pair):
    entry, big = pair
    await entry.service.embed(EMBED, call())
    member = big.store.map.get(f"member/{entry.id}")
    big.store.put(f"member/{entry.id}", replace(member, removed=True))
    with pytest.raises(DeadlineExceeded, match=r"big does not take this node's calls \(not_a_member\)") as met:
        await entry.service.embed(EMBED, call(1.0))
    assert met.value.details["cause"] == "peer_unreachable"
    assert len(big.service.replicas[1].works) == 1


@pytest.mark.slow
async def test_a_connection_that_is_cut_in_the_middle_of_an_answer_says_so(pair):
    entry, big = pair
    big.service.replicas[0].gate = asyncio.Event()
    running = entry.service.chat(CHAT, call(2.0))
    await anext(running)
    member = big.store.map.get(f"member/{entry.id}")
    big.store.put(f"member/{entry.id}", replace(member, removed=True))
    assert big.calls_here.members_changed() == 1
    with pytest.raises(DeadlineExceeded, match="big does not take this node's calls"):
        await asyncio.wait_for(anext(running), SECONDS)
    await asyncio.wait_for(big.service.replicas[0].closed.wait(), SECONDS)
