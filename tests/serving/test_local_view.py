"""This node as it is now, on a coordinator whose workers only pretend to load."""

import asyncio
import time

import pytest
from coordinator_bench import make_bench

from tars.core.types import Deployment
from tars.messages.node import EngineCounters
from tars.serving.local_fleet import LocalFleet
from tars.serving.local_view import SNAPSHOT_SECONDS, LocalView


@pytest.fixture
def bench(tmp_path, tiny_gguf):
    return make_bench(tmp_path, tiny_gguf)


@pytest.fixture
def view(bench):
    return LocalView(bench.coordinator, LocalFleet(bench.coordinator), "pc", time.monotonic)


async def loading(bench):
    bench.deployments.deploy(Deployment("tiny"))
    await bench.coordinator.reconcile()


async def test_those_who_describe_at_the_same_time_share_one_reading_of_the_devices(bench, view):
    readings, read = [], bench.probe
    bench.coordinator.executor.probe = lambda held: readings.append(held) or read(held)
    await asyncio.gather(*(view.snapshot() for _ in range(5)))
    assert len(readings) == 1


async def test_a_reading_is_kept_for_a_moment_and_not_beyond_a_change_of_the_replicas(bench):
    clock = [10.0]
    view = LocalView(bench.coordinator, LocalFleet(bench.coordinator), "pc", lambda: clock[0])
    first = await view.snapshot()
    clock[0] += SNAPSHOT_SECONDS
    assert await view.snapshot() is first
    clock[0] += 0.1
    second = await view.snapshot()
    assert second is not first
    await loading(bench)
    assert await view.snapshot() is not second
    assert [node.id for node in await view.nodes()] == [bench.coordinator.node_id]


async def test_replicas_show_what_each_engine_counted(bench, view):
    await loading(bench)
    assert view.replicas()[0].counters is None
    bench.workers[0].counters = EngineCounters(running=2, prompt_tokens=100, prompt_tokens_cached=60)
    assert view.replicas()[0].counters == bench.workers[0].counters


async def test_nodes_and_devices_have_the_names_that_people_gave_them(bench, view):
    await loading(bench)
    (replica,) = bench.coordinator.replicas
    names = view.names()
    assert (names.node(bench.coordinator.node_id), names.device(replica)) == ("pc", "Card gpu-a")
    assert (names.node("gone"), names.device("gone")) == ("gone", "")
