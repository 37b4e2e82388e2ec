"""The files of ordered replicas: fetched first, told while they come, tried again where they did not, given up with the order."""

import asyncio

import pytest
from coordinator_bench import make_bench
from tiny_gguf import write_tiny_adapter, write_tiny_gguf

from tars.catalogue import Catalogue
from tars.config import AdapterSource, ModelSource
from tars.core.types import Deployment, ReplicaState
from tars.errors import TransferFailed
from tars.mesh.replica_files import FETCH_AGAIN_SECONDS
from tars.messages.files import TransferDescription


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
    bench.coordinator.executor.files._store = files
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
    await until(lambda: not executor.files.fetches)
    await executor.carry_out(orders, devices(bench))
    assert [worker.spec.model for worker in bench.workers] == ["tiny"]
    assert bench.workers[0].spec.path == str(files.source)


async def test_a_file_that_does_not_come_is_a_failed_replica_that_is_tried_again_later(bench, fetching):
    executor, orders, files = fetching
    now = [100.0]
    executor.files._now = lambda: now[0]
    files.error = TransferFailed("the peer went away")
    files.done.set()
    await executor.carry_out(orders, devices(bench))
    await until(lambda: any(fetch.error for fetch in executor.files.fetches.values()))
    (report,) = executor.reports()
    assert (report.state, report.error) == (ReplicaState.FAILED, "the peer went away")
    assert executor.settled()
    await executor.carry_out(orders, devices(bench))
    assert len(files.asked) == 1
    now[0] += FETCH_AGAIN_SECONDS
    files.error = None
    await executor.carry_out(orders, devices(bench))
    await until(lambda: not executor.files.fetches)
    assert len(files.asked) == 2


async def test_whoever_deploys_again_does_not_wait(bench, fetching):
    executor, orders, files = fetching
    files.error = TransferFailed("no")
    files.done.set()
    await executor.carry_out(orders, devices(bench))
    await until(lambda: any(fetch.error for fetch in executor.files.fetches.values()))
    executor.retry_failed("tiny")
    await executor.carry_out(orders, devices(bench))
    await until(lambda: len(files.asked) == 2)


async def test_an_order_that_is_taken_back_ends_its_transfer(bench, fetching):
    executor, orders, files = fetching
    await executor.carry_out(orders, devices(bench))
    task = executor.files.fetches[orders[0].replica].task
    await until(lambda: files.asked)
    await executor.carry_out([], devices(bench))
    assert executor.files.fetches == {}
    await until(task.done)
    assert task.cancelled()


async def test_a_bug_in_a_transfer_is_a_failed_replica_not_a_dead_round(bench, fetching, caplog):
    executor, orders, files = fetching
    files.error = ZeroDivisionError("bug")
    files.done.set()
    await executor.carry_out(orders, devices(bench))
    await until(lambda: any(fetch.error for fetch in executor.files.fetches.values()))
    assert executor.reports()[0].state is ReplicaState.FAILED
    assert "could not be fetched" in caplog.text


async def test_a_model_that_this_node_does_not_know_fails_with_that(bench, fetching):
    executor, orders, _ = fetching
    executor.files._find = lambda name: None
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


async def test_without_a_store_of_files_the_report_says_where_to_get_it(bench, fetching):
    executor, orders, _ = fetching
    executor.files._store = None
    await executor.carry_out(orders, devices(bench))
    assert "its file is not on this PC" in executor.reports()[0].error
    write_tiny_gguf(bench.catalogue._paths.setdefault(("tiny", orders[0].variant), fetching[2].source), layers=1)
    await executor.carry_out(orders, devices(bench))
    assert len(bench.workers) == 1, "it is there now"
    assert executor.files.fetches == {}
