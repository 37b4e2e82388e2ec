"""The coordinator's rounds, with the real planner, simulated cards and workers that only pretend to load."""

import asyncio
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from tars.catalogue import Catalogue
from tars.core.types import (
    Bytes,
    Deployment,
    DeviceId,
    DeviceKind,
    DeviceSnapshot,
    NodeId,
    NodeSnapshot,
    ReplicaState,
)
from tars.errors import BadModelFile, DoesNotFit, ModelFileMissing, UnknownModel
from tars.mesh.coordinator import Coordinator
from tars.mesh.deployments import Deployments
from tars.mesh.measured_memory import MeasuredMemory
from tars.messages.node import LoadedInfo
from tars.state_folder import StateFolder

NODE = NodeSnapshot(NodeId("00000000-0000-4000-8000-000000000001"), "pc")


class FakeWorker:
    """Loads when it is told to."""

    def __init__(self, spec, on_change):
        self.spec = spec
        self.on_change = on_change
        self.state = ReplicaState.STARTING
        self.info = self.progress = self.last_error = None
        self.stopped_with = None
        self.may_stop = asyncio.Event()
        self.may_stop.set()

    async def start(self):
        self.state = ReplicaState.LOADING
        self.on_change(self)

    def loaded(self, memory=100 * 2**20):
        self.info = LoadedInfo(model_kind="chat", memory_bytes=memory, load_seconds=0.1)
        self.state = ReplicaState.READY
        self.on_change(self)

    def failed(self, error):
        self.state, self.last_error = ReplicaState.FAILED, error
        self.on_change(self)

    async def stop(self, grace):
        self.stopped_with = grace
        await self.may_stop.wait()
        self.state = ReplicaState.STOPPED


class Bench:
    """A coordinator on devices that the test sets."""

    def __init__(self, folder, devices, files):
        self.devices = devices
        self.workers = []
        self.catalogue = Catalogue.load(builtin=True)
        self.model = self.catalogue.add_file(files[0], name="tiny").name
        self.second = self.catalogue.add_file(files[1], name="second").name
        self.deployments = Deployments(folder, [])
        self.measured = MeasuredMemory(folder)
        self.coordinator = Coordinator(
            NODE,
            probe=self.probe,
            catalogue=self.catalogue,
            deployments=self.deployments,
            measured=self.measured,
            make_worker=self.make_worker,
        )

    def probe(self, held):
        return tuple(
            replace(
                device,
                memory_held=held.get(device.id, Bytes(0)),
                memory_free=Bytes(device.memory_free - held.get(device.id, 0)),
            )
            for device in self.devices
        )

    def make_worker(self, spec, on_change):
        worker = FakeWorker(spec, on_change)
        self.workers.append(worker)
        return worker

    @property
    def states(self):
        return sorted(live.worker.state.value for live in self.coordinator.replicas.values())


def card(suffix="gpu-a", mib=2000, **more):
    return DeviceSnapshot(
        DeviceId(f"{NODE.id}/{suffix}"),
        NODE.id,
        DeviceKind.CUDA,
        f"Card {suffix}",
        Bytes.mib(mib),
        Bytes.mib(mib),
        compute_capability=(8, 6),
        index=0,
        **more,
    )


@pytest.fixture
def bench(tmp_path, tiny_gguf):
    files = [Path(shutil.copy(tiny_gguf, tmp_path / name)) for name in ("first.gguf", "second.gguf")]
    return Bench(StateFolder(tmp_path), [card()], files)


async def test_a_wish_becomes_a_load_and_the_load_a_measurement(bench):
    bench.deployments.deploy(Deployment(bench.model))
    await bench.coordinator.reconcile()
    (worker,) = bench.workers
    assert (worker.spec.model, worker.spec.engine, worker.spec.cuda_device) == ("tiny", "llama", "0")
    assert not bench.coordinator.settled()
    worker.loaded(123 * 2**20)
    assert bench.coordinator.settled()
    assert list(bench.measured.by_key().values()) == [123 * 2**20]


async def test_loads_on_one_device_happen_one_at_a_time(bench):
    for model in (bench.model, bench.second):
        bench.deployments.deploy(Deployment(model))
    await bench.coordinator.reconcile()
    await bench.coordinator.reconcile()
    assert len(bench.workers) == 1
    bench.workers[0].loaded()
    await bench.coordinator.reconcile()
    assert len(bench.workers) == 2


async def test_two_devices_load_side_by_side(bench):
    bench.devices = [card("gpu-a", 700), card("gpu-b", 700)]
    bench.deployments.deploy(Deployment(bench.model, replicas=2))
    await bench.coordinator.reconcile()
    assert len({worker.spec.replica for worker in bench.workers}) == 2


async def test_a_ready_replica_is_not_touched_by_further_rounds(bench):
    bench.deployments.deploy(Deployment(bench.model))
    await bench.coordinator.reconcile()
    bench.workers[0].loaded()
    for _ in range(3):
        await bench.coordinator.reconcile()
    assert len(bench.workers) == 1
    assert bench.workers[0].stopped_with is None


async def test_a_removed_model_is_unloaded_and_its_device_waits_until_it_is_gone(bench):
    bench.deployments.deploy(Deployment(bench.model))
    await bench.coordinator.reconcile()
    bench.workers[0].loaded()
    bench.workers[0].may_stop.clear()
    bench.deployments.remove(bench.model)
    bench.deployments.deploy(Deployment(bench.second))
    await bench.coordinator.reconcile()
    await asyncio.sleep(0)
    assert bench.workers[0].stopped_with is not None
    assert len(bench.workers) == 1
    bench.workers[0].may_stop.set()
    await asyncio.sleep(0)
    await bench.coordinator.reconcile()
    assert bench.workers[1].spec.model == "second"


async def test_a_changed_wish_replaces_the_replica(bench):
    bench.deployments.deploy(Deployment(bench.model, context=128))
    await bench.coordinator.reconcile()
    bench.workers[0].loaded()
    bench.deployments.deploy(Deployment(bench.model, context=256))
    await bench.coordinator.reconcile()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    await bench.coordinator.reconcile()
    assert bench.workers[0].stopped_with is not None
    assert bench.workers[1].spec.context == 256


async def test_what_fits_nowhere_is_a_problem_with_bytes_and_starts_nothing(bench):
    bench.devices = [card(mib=100)]
    bench.deployments.deploy(Deployment(bench.model))
    await bench.coordinator.reconcile()
    assert bench.workers == []
    problem = bench.coordinator.problems[bench.model]
    assert isinstance(problem, DoesNotFit)
    assert problem.details["devices"][0]["needed_bytes"] > 100 * 2**20
    assert bench.coordinator.settled()


async def test_memory_that_a_foreign_program_frees_is_used_in_a_later_round(bench):
    bench.devices = [card(mib=100)]
    bench.deployments.deploy(Deployment(bench.model))
    await bench.coordinator.reconcile()
    bench.devices = [card(mib=2000)]
    await bench.coordinator.reconcile()
    assert len(bench.workers) == 1
    assert bench.coordinator.problems == {}


async def test_a_model_of_the_catalogue_without_a_file_says_where_to_get_it(bench):
    bench.deployments.deploy(Deployment("mistral-7b-instruct-v0.2"))
    await bench.coordinator.reconcile()
    problem = bench.coordinator.problems["mistral-7b-instruct-v0.2"]
    assert isinstance(problem, ModelFileMissing)
    assert "TheBloke" in problem.message
    with pytest.raises(ModelFileMissing):
        await bench.coordinator.preview(Deployment("mistral-7b"))


async def test_a_failed_load_stays_failed_until_somebody_asks_again(bench):
    bench.deployments.deploy(Deployment(bench.model))
    await bench.coordinator.reconcile()
    bench.workers[0].failed(BadModelFile("corrupt"))
    await bench.coordinator.reconcile()
    assert bench.states == ["failed"]
    bench.coordinator.retry_failed(bench.model)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    await bench.coordinator.reconcile()
    assert len(bench.workers) == 2


async def test_a_preview_changes_nothing(bench):
    plan = await bench.coordinator.preview(Deployment(bench.model))
    assert [assignment.model for assignment in plan.assignments] == ["tiny"]
    assert bench.deployments.wanted() == ()
    assert bench.workers == []
    with pytest.raises(UnknownModel):
        await bench.coordinator.preview(Deployment("no-such-model"))


async def test_stop_stops_every_worker_within_its_grace(bench):
    bench.deployments.deploy(Deployment(bench.model))
    await bench.coordinator.reconcile()
    await bench.coordinator.stop(1.5)
    assert bench.workers[0].stopped_with == 1.5
    await bench.coordinator.reconcile()
    assert len(bench.workers) == 1


async def test_a_round_that_fails_is_logged_and_the_next_one_works(bench, caplog):
    bench.deployments.deploy(Deployment(bench.model))
    good, failures, failed = bench.probe, [RuntimeError("driver hiccup")], threading.Event()

    def flaky(held):
        if failures:
            failed.set()
            raise failures.pop()
        return good(held)

    bench.coordinator._probe = flaky
    running = asyncio.create_task(bench.coordinator.run())
    async with asyncio.timeout(5):
        await asyncio.to_thread(failed.wait)
        while not bench.workers:
            bench.coordinator.wake()
            await asyncio.sleep(0)
    assert "placement round failed" in caplog.text
    running.cancel()


async def test_a_simulated_card_computes_on_the_cpu_and_holds_what_it_declares(bench):
    bench.devices = [replace(card(), simulated=True, index=None)]
    bench.deployments.deploy(Deployment(bench.model))
    await bench.coordinator.reconcile()
    assert bench.workers[0].spec.cuda_device is None
    assert bench.workers[0].spec.gpu_layers == 0
    bench.workers[0].loaded(1)
    snapshot = await bench.coordinator.snapshot()
    (live,) = bench.coordinator.replicas.values()
    assert snapshot.devices[0].memory_held == live.assignment.memory.total
    assert bench.measured.by_key() == {}
