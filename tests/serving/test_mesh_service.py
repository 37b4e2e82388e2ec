"""A whole node's service in a mesh: what it lists, counts and explains of models that its peers hold."""

import asyncio
from types import SimpleNamespace

import pytest
from aiohttp import web
from coordinator_bench import make_bench
from mesh_nodes import PretendPeers, ScriptedReplica, generated, mesh_of

from tars.core.mesh_messages import MemberState
from tars.core.types import Deadline, ModelKind, ReplicaState
from tars.errors import Overloaded, StillLoading
from tars.messages.base import CallContext
from tars.messages.inference import ChatMessage, ChatParams, Delta, EmbedParams
from tars.messages.node import DeployParams
from tars.rpc.http_client import RpcConnection
from tars.rpc.options import RpcOptions
from tars.serving.local_service import LocalNodeService
from tars.web.metrics import render
from tars.web.routes import add_web_routes

CHAT = ChatParams(messages=[ChatMessage(role="user", content="hi")], model="theirs")


@pytest.fixture
async def mesh(tmp_path, tiny_gguf):
    """`big` holds the chat model `theirs` and loads the embedder `coming`; this node, which has real parts, holds nothing."""
    bench = make_bench(tmp_path, tiny_gguf)
    async with mesh_of("big") as mesh:
        (big,) = mesh.nodes
        mesh.want("theirs", aliases=("t",))
        mesh.want("coming", ModelKind.EMBEDDING)
        loading = ScriptedReplica("coming@big#0", "coming", ModelKind.EMBEDDING, ReplicaState.LOADING)
        big.replicas += [ScriptedReplica("theirs@big#0", "theirs"), loading]
        mesh.changed()
        heard = []
        for wish in mesh.wishes:
            bench.deployments.deploy(wish.deployment)
        async with RpcConnection(big.listener.url, api_key="this-node") as connection:
            service = LocalNodeService(
                bench.coordinator,
                name="pc",
                redacted_config={},
                wsl2=False,
                addresses=list,
                peers=PretendPeers(SimpleNamespace(connections={big.id: connection}), mesh),
                on_traffic=heard.append,
            )
            yield SimpleNamespace(service=service, big=big, heard=heard, bench=bench)


def call(seconds=30.0):
    return CallContext(Deadline(asyncio.get_running_loop().time() + seconds), "0af7651916cd43dd8448eb211c80319c")


async def test_the_models_of_the_whole_mesh_are_listed_with_their_state(mesh):
    models = {model.name: model for model in mesh.service.models().models if model.deployed}
    assert (models["theirs"].state, models["theirs"].replicas_ready, models["theirs"].local) == ("ready", 1, False)
    assert models["theirs"].aliases == ["t"]
    (place,) = models["theirs"].places
    assert (place.replica, place.node, place.state) == ("theirs@big#0", mesh.big.id, "ready")
    assert (models["coming"].state, models["coming"].replicas_ready) == ("loading", 0)


async def test_the_openai_api_lists_and_answers_models_that_only_a_peer_holds(mesh, aiohttp_client):
    app = web.Application()
    add_web_routes(app, mesh.service, RpcOptions())
    client = await aiohttp_client(app)
    listed = await (await client.get("/v1/models")).json()
    assert {"theirs", "coming"} <= {model["id"] for model in listed["data"]}
    body = {"model": "t", "messages": [{"role": "user", "content": "hi"}]}
    answered = await (await client.post("/v1/chat/completions", json=body)).json()
    assert answered["choices"][0]["message"]["content"] == "Hello"
    streamed = await (await client.post("/v1/chat/completions", json={**body, "stream": True})).text()
    assert '"content":"Hel"' in streamed
    assert streamed.rstrip().endswith("data: [DONE]")
    with pytest.raises(StillLoading, match="still loading on big"):
        await mesh.service.embed(EmbedParams(model="coming", input="x"), call(0.5))


async def test_calls_to_peers_are_counted_and_whoever_answers_is_heard_of(mesh):
    for _ in range(2):
        assert [item async for item in mesh.service.chat(CHAT, call())][-1].served_by.node == mesh.big.id
    described = await mesh.service.describe()
    assert [(each.peer, each.outcome, each.calls) for each in described.sent_to_peers] == [(mesh.big.id, "answered", 2)]
    metrics = render(described, mesh.service.peers())
    assert f'tars_peer_calls_total{{peer="{mesh.big.id}",outcome="answered"}} 2' in metrics
    assert "tars_calls_from_peers_total 0" in metrics
    assert [(each.why, each.outcome, each.attempts) for each in described.attempts] == [("first", "answered", 2)]
    assert 'tars_attempts_total{why="first",outcome="answered"} 2' in metrics
    assert "tars_retries_refused_total 0" in metrics
    assert "tars_hedged_units_total 0" in metrics
    assert "tars_peers_silent_total 0" in metrics
    assert mesh.heard == [mesh.big.id] * 2
    assert mesh.service.load() == []


async def test_explain_says_where_a_call_would_go_now_where_there_is_a_choice(mesh):
    assert "A call now" not in (await mesh.service.explain("tiny")).text
    mesh.big.replicas += [ScriptedReplica("tiny@big#0", "tiny"), ScriptedReplica("tiny@big#1", "tiny", speed=500.0)]
    mesh.service.load_told([("tiny@big#0", 3, 1)])
    mesh.service._fleet._peers.mesh.changed()
    text = (await mesh.service.explain("tiny")).text
    assert "A call now:" in text
    assert "tiny@big#1: rank 1: predicted" in text


async def test_a_node_that_drains_asks_its_peers_first_and_serves_what_only_it_has_until_it_is_gone(mesh):
    await mesh.service.deploy(DeployParams(model="tiny"))
    await mesh.bench.coordinator.reconcile()
    mesh.bench.workers[0].loaded()
    mesh.bench.workers[0].script = [generated("from here")]
    tiny = CHAT.model_copy(update={"model": "tiny"})

    async def answer():
        return [item async for item in mesh.service.chat(tiny, call())][-1].served_by.node

    assert await answer() == mesh.bench.coordinator.node_id
    mesh.bench.coordinator.draining.set(True)
    mesh.service._alone = lambda: False
    assert await answer() == mesh.bench.coordinator.node_id
    there = ScriptedReplica("tiny@big#0", "tiny", speed=1.0)
    mesh.big.replicas.append(there)
    mesh.service._fleet._peers.mesh.want("tiny")
    assert await answer() == mesh.big.id
    there.failures = [Overloaded("full")]
    assert await answer() == mesh.bench.coordinator.node_id


async def test_calls_at_a_peer_that_membership_gives_up_leave_it_at_once_and_go_on_where_the_file_is(mesh):
    replica, peers = mesh.big.replicas[0], mesh.service._fleet._peers
    replica.gate = asyncio.Event()
    running = mesh.service.chat(CHAT, call())
    assert (await anext(running)).text == "Hel"
    peers.states[mesh.big.id] = MemberState.DEAD
    mesh.service.peer_died(mesh.big.id)
    reading = asyncio.create_task(anext(running))
    await asyncio.wait_for(replica.closed.wait(), 5)
    replica.gate = None
    replica.pieces = (Delta(text="lo", token_ids=[2]),)
    peers.states.clear()
    mesh.service.peer_lives(mesh.big.id)
    mesh.bench.coordinator._pulse()
    assert (await asyncio.wait_for(reading, 5)).text == "lo"
    assert replica.calls[-1].resume.answers == [[1]]
    await running.aclose()
