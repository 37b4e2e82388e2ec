"""Orders carried out by fake workers: one load a device, reports for peers."""

import asyncio
from dataclasses import replace

import pytest
from coordinator_bench import card, make_bench

from tars.core.records import HeldFile
from tars.core.types import Bytes, Deployment, ReplicaState
from tars.errors import BadModelFile
from tars.messages.node import LoadedInfo, MeasuredSpeeds


class Held:
    """Only says what is here."""

    def __init__(self, *files):
        self.files = files

    def held(self):
        return list(self.files)


@pytest.fixture
def bench(tmp_path, tiny_gguf):
    return make_bench(tmp_path, tiny_gguf)


def devices(bench):
    return {device.id: device for device in bench.devices}


async def until(condition):
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110  # what is waited for are tasks' effects, not one event
            await asyncio.sleep(0)


async def test_reports_tell_peers_what_a_replica_is_and_took(bench):
    bench.deployments.deploy(Deployment(bench.model))
    await bench.coordinator.reconcile()
    worker = bench.workers[0]
    worker.info = LoadedInfo(
        model_kind="chat",
        memory_bytes=123 * 2**20,
        load_seconds=0.1,
        slots=3,
        speeds=MeasuredSpeeds(decode_tokens_per_second=50.0, prefill_tokens_per_second=900.0),
    )
    worker.state = ReplicaState.READY
    await bench.coordinator.executor.measure()
    (report,) = bench.coordinator.executor.reports()
    assert (report.state, report.slots, report.speed, report.prefill_speed) == (ReplicaState.READY, 3, 50.0, 900.0)
    assert (report.file_sha256, report.exact) == (None, False), "its file was not hashed yet"
    variant = bench.coordinator.executor.replicas[report.assignment.replica].assignment.variant
    bench.coordinator.executor.files._store = Held(HeldFile(bench.model, variant, Bytes(1), "ab" * 32))
    (report,) = bench.coordinator.executor.reports()
    assert report.file_sha256 == "ab" * 32
    assert report.taken > 123 * 2**20
    worker.failed(BadModelFile("x" * 5000))
    assert len(bench.coordinator.executor.reports()[0].error) == 1000


async def test_one_that_ends_is_reported_until_its_memory_is_free(bench):
    bench.deployments.deploy(Deployment(bench.model))
    await bench.coordinator.reconcile()
    worker = bench.workers[0]
    worker.loaded()
    worker.may_stop.clear()
    executor = bench.coordinator.executor
    await executor.carry_out([], devices(bench))
    await worker.stop_asked.wait()
    assert [report.state for report in executor.reports()] == [ReplicaState.STOPPING]
    assert executor.moving() == {bench.devices[0].id}
    worker.may_stop.set()
    await until(lambda: executor.reports() == ())


async def test_whoever_wants_to_move_its_calls_hears_of_a_replica_before_it_ends(bench):
    bench.deployments.deploy(Deployment(bench.model))
    await bench.coordinator.reconcile()
    bench.workers[0].loaded()
    executor = bench.coordinator.executor
    heard = []

    def on_retire(assignment):
        heard.append(assignment.replica)
        assert executor.replicas[assignment.replica].worker.state is ReplicaState.READY

    executor.on_retire = on_retire
    (replica,) = executor.replicas
    await executor.carry_out([], devices(bench))
    assert heard == [replica]
    await until(lambda: executor.reports() == ())


async def test_while_something_loads_its_device_is_told_as_it_was_before(bench):
    bench.deployments.deploy(Deployment(bench.model))
    await bench.coordinator.reconcile()
    before = (await bench.coordinator.executor.quiet_snapshot()).devices
    bench.devices = [replace(bench.devices[0], memory_free=Bytes.mib(700))]
    assert (await bench.coordinator.executor.quiet_snapshot()).devices == before
    bench.workers[0].loaded()
    (now,) = (await bench.coordinator.executor.quiet_snapshot()).devices
    assert now.memory_free == Bytes.mib(700)


async def test_a_restart_waits_for_other_loads_of_its_device_and_for_what_ends_there_and_not_for_another_restart(bench):
    for model in (bench.model, bench.second):
        bench.deployments.deploy(Deployment(model))
        await bench.coordinator.reconcile()
        bench.workers[-1].loaded()
    first, second = bench.workers
    assert not first.device_busy()
    for state in ReplicaState:
        second.state = state
        assert first.device_busy() is (state in (ReplicaState.STARTING, ReplicaState.LOADING))
    second.state = ReplicaState.READY
    first.state = ReplicaState.LOADING
    assert not first.device_busy()  # not for itself
    second.may_stop.clear()
    executor = bench.coordinator.executor
    executor.retire(next(key for key, live in executor.replicas.items() if live.worker is second))
    assert first.device_busy()
    second.may_stop.set()
    await until(lambda: not first.device_busy())


async def test_orders_for_a_device_that_is_gone_are_left_alone(bench):
    bench.deployments.deploy(Deployment(bench.model))
    await bench.coordinator.reconcile()
    bench.workers[0].loaded()
    orders = [live.assignment for live in bench.coordinator.replicas.values()]
    other = card("gpu-b")
    await bench.coordinator.executor.carry_out([replace(orders[0], device=other.id)], {})
    await asyncio.sleep(0)
    assert bench.workers[0].stopped_with is not None


async def test_held_files_of_a_store_are_told(bench):
    held = HeldFile("tiny", "Q8_0", Bytes(1), "ab" * 32)
    bench.coordinator.advertising._held = lambda: [held]
    await bench.coordinator.reconcile()
    assert held in bench.coordinator.known.own.files
