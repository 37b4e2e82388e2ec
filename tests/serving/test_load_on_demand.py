"""A call has a model loaded, on a coordinator with the real planner and workers that only pretend to load."""

import asyncio

import pytest
from coordinator_bench import card, make_bench

from tars.core.types import Deployment, ReplicaState
from tars.errors import DoesNotFit
from tars.serving.load_on_demand import LoadOnDemand


@pytest.fixture
async def bench(tmp_path, tiny_gguf):
    bench = make_bench(tmp_path, tiny_gguf)
    await bench.coordinator.reconcile()
    return bench


async def test_what_nobody_deployed_and_has_a_file_can_be_loaded(bench):
    on_demand = LoadOnDemand(bench.coordinator)
    assert {each.name for each in on_demand.loadable()} >= {"tiny", "second"}
    assert not any(each.deployed for each in on_demand.loadable())
    bench.deployments.deploy(Deployment("tiny"))
    names = {each.name for each in on_demand.loadable()}
    assert "second" in names
    assert "tiny" not in names
    assert LoadOnDemand(bench.coordinator, on=False).loadable() == []


async def test_a_call_deploys_it_once_and_the_next_round_loads_it(bench):
    on_demand = LoadOnDemand(bench.coordinator)
    await asyncio.gather(*(on_demand.ask("tiny") for _ in range(5)))
    assert [each.model for each in bench.deployments.wanted()] == ["tiny"]
    await bench.coordinator.reconcile()
    assert bench.states == [ReplicaState.LOADING.value]


async def test_what_fits_nowhere_is_refused_and_not_wanted(bench):
    bench.devices[:] = [card(mib=1)]
    with pytest.raises(DoesNotFit, match="tiny fits on no device"):
        await LoadOnDemand(bench.coordinator).ask("tiny")
    assert bench.deployments.wanted() == ()


async def test_nothing_that_runs_is_moved_or_unloaded_for_it(bench):
    bench.deployments.deploy(Deployment("tiny"))
    await bench.coordinator.reconcile()
    bench.workers[0].loaded(memory=1990 * 2**20)
    bench.devices[:] = [card(mib=2000)]
    await bench.coordinator.reconcile()
    with pytest.raises(DoesNotFit):
        await LoadOnDemand(bench.coordinator).ask("second")
    await bench.coordinator.reconcile()
    assert [each.model for each in bench.deployments.wanted()] == ["tiny"]
    assert bench.states == [ReplicaState.READY.value]


async def test_a_deployed_model_is_not_deployed_again_with_other_settings(bench):
    bench.deployments.deploy(Deployment("tiny", replicas=2, slots=3))
    await LoadOnDemand(bench.coordinator).ask("tiny")
    assert bench.deployments.get("tiny") == Deployment("tiny", replicas=2, slots=3)


async def test_why_a_wanted_model_is_loaded_nowhere_is_known(bench):
    on_demand = LoadOnDemand(bench.coordinator)
    assert on_demand.refusal("tiny") is None
    bench.devices[:] = [card(mib=1)]
    bench.deployments.deploy(Deployment("tiny"))
    await bench.coordinator.reconcile()
    assert isinstance(on_demand.refusal("tiny"), DoesNotFit)
