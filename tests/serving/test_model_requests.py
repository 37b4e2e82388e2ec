"""What people ask about models, on a coordinator whose workers only pretend to load."""

import time
from dataclasses import replace

import pytest
from coordinator_bench import card, make_bench

from tars.core.types import Adapter, Bytes, Deployment
from tars.errors import DoesNotFit, InvalidParams, ModelFileMissing, ReplicaFailed, UnknownModel
from tars.messages.files import AddFileParams, PullParams
from tars.messages.node import DeployParams
from tars.serving.local_fleet import LocalFleet
from tars.serving.local_view import LocalView
from tars.serving.model_requests import ModelRequests
from tars.serving.router import Router


@pytest.fixture
def bench(tmp_path, tiny_gguf):
    return make_bench(tmp_path, tiny_gguf)


@pytest.fixture
def requests(bench):
    fleet = LocalFleet(bench.coordinator)
    view = LocalView(bench.coordinator, fleet, "pc", time.monotonic)
    return ModelRequests(bench.coordinator, view, fleet, Router(fleet))


async def test_what_does_not_fit_is_refused_and_not_wanted(bench, requests):
    bench.devices = [card(mib=50)]
    with pytest.raises(DoesNotFit) as refused:
        await requests.deploy(DeployParams(model="tiny"))
    assert refused.value.details["devices"][0]["device"] == "Card gpu-a"
    assert bench.deployments.wanted() == ()


async def test_deploying_again_retries_a_failed_load(bench, requests):
    await requests.deploy(DeployParams(model="tiny"))
    await bench.coordinator.reconcile()
    bench.workers[0].failed(ReplicaFailed("no"))
    await requests.deploy(DeployParams(model="tiny"))
    assert bench.coordinator.replicas == {}


async def test_removing_a_model_twice_says_that_it_was_gone(bench, requests):
    await requests.deploy(DeployParams(model="tiny"))
    assert (await requests.remove("tiny")).removed
    assert not (await requests.remove("tiny")).removed
    with pytest.raises(UnknownModel):
        await requests.remove("no-such-model")


async def test_a_saved_wish_for_a_model_that_the_catalogue_lost_can_be_removed(bench, requests):
    bench.deployments.deploy(Deployment("was-in-the-configuration"))
    assert (await requests.remove("was-in-the-configuration")).removed
    assert bench.deployments.wanted() == ()


async def test_a_deployment_that_contradicts_itself_is_refused_and_not_wanted(bench, requests):
    with pytest.raises(InvalidParams, match="kv_tokens = 128 does not go with a context of 512 and 4 slots"):
        await requests.deploy(DeployParams(model="tiny", context=512, kv_tokens=128))
    assert bench.deployments.get("tiny") is None
    accepted = await requests.deploy(DeployParams(model="tiny", context=512, kv_tokens=1024, gpu_layers=1))
    assert [(each.slots, each.kv_tokens, each.gpu_layers) for each in accepted.assignments] == [(4, 1024, 1)]


async def test_explains_a_deployed_model_one_that_is_not_and_one_without_a_file(bench, requests):
    await requests.deploy(DeployParams(model="tiny"))
    await bench.coordinator.reconcile()
    deployed = await requests.explain("tiny")
    assert deployed.deployed
    assert deployed.verdicts[0].accepted
    assert "Card gpu-a" in deployed.text
    not_deployed = await requests.explain("second")
    assert not not_deployed.deployed
    assert not_deployed.assignments[0].model == "second"
    without_file = await requests.explain("mistral-7b")
    assert "file is not on this PC" in without_file.text
    assert without_file.remedy


async def test_the_plan_in_force_is_shown(bench, requests):
    await requests.deploy(DeployParams(model="tiny"))
    await bench.coordinator.reconcile()
    plan = await requests.plan()
    assert plan.assignments[0].needed_bytes > 0
    assert plan.devices[0].name == "Card gpu-a"


async def test_a_model_shows_its_adapters(bench, requests):
    entry = bench.catalogue.resolve("tiny")
    bench.catalogue.entries["tiny"] = replace(entry, adapters=(Adapter("legal", 1.0, Bytes(10)),))
    await requests.deploy(DeployParams(model="tiny"))
    assert requests.models().models[0].adapters == ["legal"]
    assert LocalFleet(bench.coordinator).models()[0].adapters == ("legal",)


async def test_a_node_without_a_folder_for_model_files_fetches_none(requests):
    with pytest.raises(ModelFileMissing, match="no folder for model files"):
        await requests.pull(PullParams(model="tiny"))
    with pytest.raises(ModelFileMissing, match="no folder for model files"):
        await requests.add_file(AddFileParams(model="tiny", path="tiny.gguf"))
    assert (await requests.transfers()).transfers == []
