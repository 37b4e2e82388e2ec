"""Orders carried out by fake workers: files first, one load a device, reports for peers."""

import asyncio
from dataclasses import replace

import pytest
from coordinator_bench import card, make_bench
from tiny_gguf import write_tiny_adapter, write_tiny_gguf

from tars.catalogue import Catalogue
from tars.config import AdapterSource, ModelSource
from tars.core.records import HeldFile
from tars.core.types import Bytes, Deployment, ReplicaState
from tars.errors import BadModelFile, TransferFailed
from tars.mesh.executor import FETCH_AGAIN_SECONDS
from tars.messages.files import TransferDescription
from tars.messages.node import LoadedInfo, MeasuredSpeeds


class Files:
    """Fetches when it is told to."""

    def __init__(self, bench, source):
        self.bench = bench
        self.source = source
        self.asked = []
        self.report = None
        self.done = asyncio.Event()
        self.error = None

    def held(self):
        return []

    async def ensure(self, entry, variant, progress):
        self.asked.append((entry.name, variant.name))
        self.report = lambda done, total: progress(
            TransferDescription(
                model=entry.name,
                variant=variant.name,
                stage="fetch",
                bytes_done=done,
                bytes_total=total,
                bytes_per_second=1.0,
                sources=["pc2"],
            )
        )
        await self.done.wait()
        if self.error is not None:
            raise self.error
        self.bench.catalogue._paths[entry.name, variant.name] = self.source
        return self.source


class Held:
    """Only says what is here."""

    def __init__(self, *files):
        self.files = files

    def held(self):
        return list(self.files)


@pytest.fixture
def bench(tmp_path, tiny_gguf):
    return make_bench(tmp_path, tiny_gguf)


@pytest.fixture
async def fetching(bench, tmp_path):
    """The file of `tiny` is not here, and a peer has it."""
    bench.deployments.deploy(Deployment(bench.model))
    await bench.coordinator.reconcile()
    bench.workers[0].loaded()
    orders = [live.assignment for live in bench.coordinator.replicas.values()]
    await bench.coordinator.executor.stop(0)
    bench.workers.clear()
    bench.catalogue._paths.pop((bench.model, orders[0].variant))
    files = Files(bench, tmp_path / "first.gguf")
    bench.coordinator.executor._files = files
    return bench.coordinator.executor, orders, files


def devices(bench):
    return {device.id: device for device in bench.devices}


async def until(condition):
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110  # what is waited for are tasks' effects, not one event
            await asyncio.sleep(0)


async def test_a_file_is_fetched_first_its_progress_reported_and_then_it_is_loaded(bench, fetching):
    executor, orders, files = fetching
    await executor.carry_out(orders, devices(bench))
    await until(lambda: files.report is not None)
    files.report(30, 120)
    (report,) = executor.reports()
    assert (report.state, report.stage, report.percent) == (ReplicaState.STARTING, "fetch", 25.0)
    assert not executor.settled()
    assert executor.moving() == set()
    await executor.carry_out(orders, devices(bench))
    assert len(files.asked) == 1, "one transfer"
    files.done.set()
    await until(lambda: not executor.fetches)
    await executor.carry_out(orders, devices(bench))
    assert [worker.spec.model for worker in bench.workers] == ["tiny"]
    assert bench.workers[0].spec.path == str(files.source)


async def test_a_file_that_does_not_come_is_a_failed_replica_that_is_tried_again_later(bench, fetching):
    executor, orders, files = fetching
    now = [100.0]
    executor._now = lambda: now[0]
    files.error = TransferFailed("the peer went away")
    files.done.set()
    await executor.carry_out(orders, devices(bench))
    await until(lambda: any(fetch.error for fetch in executor.fetches.values()))
    (report,) = executor.reports()
    assert (report.state, report.error) == (ReplicaState.FAILED, "the peer went away")
    assert executor.settled()
    await executor.carry_out(orders, devices(bench))
    assert len(files.asked) == 1
    now[0] += FETCH_AGAIN_SECONDS
    files.error = None
    await executor.carry_out(orders, devices(bench))
    await until(lambda: not executor.fetches)
    assert len(files.asked) == 2


async def test_whoever_deploys_again_does_not_wait(bench, fetching):
    executor, orders, files = fetching
    files.error = TransferFailed("no")
    files.done.set()
    await executor.carry_out(orders, devices(bench))
    await until(lambda: any(fetch.error for fetch in executor.fetches.values()))
    executor.retry_failed("tiny")
    await executor.carry_out(orders, devices(bench))
    await until(lambda: len(files.asked) == 2)


async def test_an_order_that_is_taken_back_ends_its_transfer(bench, fetching):
    executor, orders, files = fetching
    await executor.carry_out(orders, devices(bench))
    task = executor.fetches[orders[0].replica].task
    await until(lambda: files.asked)
    await executor.carry_out([], devices(bench))
    assert executor.fetches == {}
    await until(task.done)
    assert task.cancelled()


async def test_a_bug_in_a_transfer_is_a_failed_replica_not_a_dead_round(bench, fetching, caplog):
    executor, orders, files = fetching
    files.error = ZeroDivisionError("bug")
    files.done.set()
    await executor.carry_out(orders, devices(bench))
    await until(lambda: any(fetch.error for fetch in executor.fetches.values()))
    assert executor.reports()[0].state is ReplicaState.FAILED
    assert "could not be fetched" in caplog.text


async def test_a_model_that_this_node_does_not_know_fails_with_that(bench, fetching):
    executor, orders, _ = fetching
    executor._find = lambda name: None
    await executor.carry_out(orders, devices(bench))
    assert "knows no" in executor.reports()[0].error


async def test_adapters_do_not_travel_and_the_report_says_so(bench, tmp_path, tiny_gguf):
    adapter = write_tiny_adapter(tmp_path / "a.gguf")
    model = ModelSource(name="mine", path=tiny_gguf, adapters=(AdapterSource(name="legal", path=adapter),))
    theirs = Catalogue.load(builtin=False, extra=[model])
    bench.coordinator.catalogue = theirs
    bench.deployments.deploy(Deployment("mine"))
    await bench.coordinator.reconcile()
    orders = [live.assignment for live in bench.coordinator.replicas.values()]
    await bench.coordinator.executor.stop(0)
    theirs._adapters.clear()
    executor = bench.coordinator.executor
    await executor.carry_out(orders, devices(bench))
    (report,) = executor.reports()
    assert report.state is ReplicaState.FAILED
    assert "adapters" in report.error


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
    bench.coordinator.executor._files = Held(HeldFile(bench.model, variant, Bytes(1), "ab" * 32))
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


async def test_without_a_store_of_files_the_report_says_where_to_get_it(bench, fetching):
    executor, orders, _ = fetching
    executor._files = None
    await executor.carry_out(orders, devices(bench))
    assert "its file is not on this PC" in executor.reports()[0].error
    write_tiny_gguf(bench.catalogue._paths.setdefault(("tiny", orders[0].variant), fetching[2].source), layers=1)
    await executor.carry_out(orders, devices(bench))
    assert len(bench.workers) == 1, "it is there now"
    assert executor.fetches == {}


async def test_held_files_of_a_store_are_told(bench):
    held = HeldFile("tiny", "Q8_0", Bytes(1), "ab" * 32)
    bench.coordinator.advertising._held = lambda: [held]
    await bench.coordinator.reconcile()
    assert held in bench.coordinator._advert.files
