"""The node's service on a coordinator whose workers only pretend to load."""

import asyncio
import json
import struct
import time

import pytest
from coordinator_bench import card, make_bench

from tars.core.types import Deadline, Deployment
from tars.errors import (
    BadModelFile,
    DoesNotFit,
    StillLoading,
    TarsError,
    UnknownModel,
    WrongModelKind,
)
from tars.messages.base import CallContext
from tars.messages.inference import ChatMessage, ChatParams, Generated, Reranked, RerankParams, Timings, Usage
from tars.messages.node import DeployParams, LoadProgress
from tars.serving.local_service import LocalNodeService

CHAT = ChatParams(messages=[ChatMessage(role="user", content="hi")], model="tiny")
DONE = Generated(
    text="hello",
    finish_reason="stop",
    usage=Usage(prompt_tokens=1, completion_tokens=1, total_tokens=2),
    timings=Timings(),
)


def call(seconds=60.0):
    return CallContext(Deadline(time.monotonic() + seconds), "trace")


@pytest.fixture
def bench(tmp_path, tiny_gguf):
    return make_bench(tmp_path, tiny_gguf)


@pytest.fixture
def service(bench):
    return LocalNodeService(
        bench.coordinator,
        name="pc",
        redacted_config={"node": {"name": "pc"}},
        wsl2=False,
        addresses=lambda: ["http://127.0.0.1:8000"],
    )


async def chat(service, seconds=60.0):
    return [item async for item in service.chat(CHAT, call(seconds))]


async def test_a_model_goes_from_wanted_over_loading_to_answering(bench, service):
    accepted = await service.deploy(DeployParams(model="tiny"))
    assert [assignment.model for assignment in accepted.assignments] == ["tiny"]
    with pytest.raises(StillLoading):
        await chat(service, seconds=0.2)
    await bench.coordinator.reconcile()
    bench.workers[0].progress = LoadProgress(stage="read", percent=40.0)
    with pytest.raises(StillLoading) as loading:
        await chat(service, seconds=0.2)
    assert loading.value.details == {"stage": "read", "percent": 40.0, "node_name": "pc"}
    assert service.ping().state == "loading"
    bench.workers[0].loaded()
    bench.workers[0].script = [DONE]
    assert (await chat(service))[-1].message.content == "hello"
    assert service.ping().state == "ready"


def reranker(folder):
    """A folder that the catalogue takes for a cross-encoder; nothing here loads it."""
    folder.mkdir()
    config = {
        "architectures": ["BertForSequenceClassification"],
        "model_type": "bert",
        "hidden_size": 8,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "vocab_size": 100,
    }
    (folder / "config.json").write_text(json.dumps(config))
    header = json.dumps({"a": {"dtype": "F32", "shape": [10], "data_offsets": [0, 40]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(40))
    return folder


async def test_a_reranker_is_found_placed_loaded_and_asked(bench, service, tmp_path):
    name = bench.catalogue.add_file(reranker(tmp_path / "Ranker"), name="ranker").name
    await service.deploy(DeployParams(model=name))
    await service.deploy(DeployParams(model="tiny"))
    await bench.coordinator.reconcile()
    bench.workers[0].loaded()  # the smaller one first
    await bench.coordinator.reconcile()
    (worker,) = [worker for worker in bench.workers if worker.spec.model == name]
    assert (worker.spec.engine, worker.spec.path) == ("sentence-transformers", str(tmp_path / "Ranker"))
    worker.loaded()
    worker.script = [Reranked(scores=[0.1, 0.9], prompt_tokens=4, timings=Timings())]
    result = await service.rerank(RerankParams(query="q", documents=["a", "b"]), call())
    assert [scored.index for scored in result.results] == [1, 0]
    assert (result.model, result.served_by.device) == (name, "Card gpu-a")
    with pytest.raises(WrongModelKind, match="try ranker"):
        await service.rerank(RerankParams(model="tiny", query="q", documents=["a"]), call())
    (model,) = [each for each in service.models().models if each.name == name]
    assert (model.model_kind, model.state) == ("rerank", "ready")
    (replica,) = [each for each in (await service.describe()).replicas if each.model == name]
    assert replica.model_kind == "rerank"


async def test_a_failed_load_answers_with_the_loads_own_error(bench, service):
    await service.deploy(DeployParams(model="tiny"))
    await bench.coordinator.reconcile()
    bench.workers[0].failed(BadModelFile("the file is corrupt"))
    with pytest.raises(BadModelFile, match="corrupt"):
        await chat(service)
    (model,) = [each for each in service.models().models if each.name == "tiny"]
    assert model.state == "failed"


async def test_a_configured_model_that_does_not_fit_says_so_when_called(bench, service):
    bench.devices = [card(mib=50)]
    bench.deployments.deploy(Deployment("tiny"))
    await bench.coordinator.reconcile()
    with pytest.raises(DoesNotFit):
        await chat(service)
    (model,) = [each for each in service.models().models if each.name == "tiny"]
    assert (model.state, model.replicas_ready, model.replicas_wanted) == ("refused", 0, 1)


async def test_drain_refuses_new_calls_until_resume(bench, service):
    await service.deploy(DeployParams(model="tiny"))
    await bench.coordinator.reconcile()
    bench.workers[0].loaded()
    bench.workers[0].script = [DONE]
    assert (await service.drain()).state == "draining"
    assert service.peers().peers[0].state == "DRAINING"
    with pytest.raises(TarsError, match="drained"):
        await chat(service)
    assert (await service.resume()).state == "ready"
    assert len(await chat(service)) == 1


async def test_idle_waits_for_the_last_call(service):
    await service.idle()
    service.call_started("inference.embed")
    assert service.active_calls == 1
    service.call_ended("inference.embed", None, "t")
    await service.idle()


async def test_answers_leave_with_their_replica_at_a_drain_and_when_the_node_ends(bench, service):
    class Leaving:
        def __init__(self):
            self.asked = []

        def unloaded(self, replica, model):
            self.asked.append(("unloaded", replica, model))

        async def drained(self):
            self.asked.append("drained")

        async def stopping(self):
            self.asked.append("stopping")

    service._leaving = leaving = Leaving()
    await service.deploy(DeployParams(model="tiny"))
    await bench.coordinator.reconcile()
    bench.workers[0].loaded()
    (replica,) = bench.coordinator.replicas
    await service.drain()
    await bench.coordinator.reconcile()
    assert leaving.asked == ["drained", ("unloaded", replica, "tiny")]
    await service.resume()
    await bench.coordinator.reconcile()
    service.refuse_calls()
    await service.hand_over()
    await bench.coordinator.stop(0.0)
    assert leaving.asked[2:] == ["stopping"], "a node that ends gives nothing to others one by one"
    async with asyncio.timeout(5):
        await service.handed_over()
    await service.close()


async def test_a_call_for_a_model_on_disk_has_it_loaded(bench, service):
    await bench.coordinator.reconcile()
    calling = asyncio.create_task(chat(service))
    async with asyncio.timeout(10):
        while not bench.workers:
            await bench.coordinator.reconcile()
            await asyncio.sleep(0)
    assert not calling.done()
    bench.workers[0].script = [DONE]
    bench.workers[0].loaded()
    items = await asyncio.wait_for(calling, 10)
    assert items[-1].message.content == "hello"
    assert [each.model for each in bench.deployments.wanted()] == ["tiny"]


async def test_where_it_is_off_only_deployed_models_are_served(bench):
    service = LocalNodeService(
        bench.coordinator, name="pc", redacted_config={}, wsl2=False, addresses=list, load_on_demand=False
    )
    await bench.coordinator.reconcile()
    with pytest.raises(UnknownModel, match="no model 'tiny' is served here"):
        await chat(service)
    assert bench.deployments.wanted() == ()


async def test_the_configuration_is_shown_as_it_is(service):
    assert service.config() == {"node": {"name": "pc"}}
