"""A coordinator with the real planner and catalogue, devices that the test sets, and workers that only pretend to load."""

import asyncio
import itertools
import shutil
from dataclasses import replace
from pathlib import Path

from tars.catalogue import Catalogue
from tars.core.types import Bytes, DeviceId, DeviceKind, DeviceSnapshot, NodeId, NodeSnapshot, ReplicaState
from tars.mesh.coordinator import Coordinator
from tars.mesh.deployments import Deployments
from tars.mesh.measured_memory import MeasuredMemory
from tars.mesh.replicated_store import ReplicatedStore
from tars.mesh.tuned_settings import TunedSettingsStore
from tars.messages.node import LoadedInfo
from tars.state_folder import StateFolder
from tars.workers.options import WorkerOptions

NODE = NodeSnapshot(NodeId("00000000-0000-4000-8000-000000000001"), "pc")

PIDS = itertools.count(1000)


class FakeWorker:
    """Loads when it is told to."""

    def __init__(self, spec, on_change):
        self.spec = spec
        self.on_change = on_change
        self.state = ReplicaState.STARTING
        self.restarts = self.active_calls = self.queued_calls = self.calls_total = 0
        self.info = self.progress = self.last_error = self.counters = None
        self.retry_due = False
        self.options, self.watchers = WorkerOptions(), []
        self.starts = 0
        self.stopped_with = None
        self.stop_asked = asyncio.Event()
        self.script = []
        self.pid = next(PIDS)
        self.may_stop = asyncio.Event()
        self.may_stop.set()

    async def start(self):
        self.retry_due = False
        self.starts += 1
        self.state = ReplicaState.LOADING
        self.on_change(self)

    def loaded(self, memory=100 * 2**20):
        self.info = LoadedInfo(model_kind="chat", memory_bytes=memory, load_seconds=0.1)
        self.state = ReplicaState.READY
        self.on_change(self)

    def failed(self, error):
        self.state, self.last_error = ReplicaState.FAILED, error
        self.on_change(self)

    async def run(self, work, deadline, *, resume=None, handle=None, on_end=None):
        for event in self.script:
            yield event
        if on_end is not None:
            on_end(self.script[-1] if self.script else None)

    def cooled_down(self):
        self.retry_due = True
        self.on_change(self)

    async def stop(self, grace):
        self.stopped_with = grace
        self.stop_asked.set()
        await self.may_stop.wait()
        self.state = ReplicaState.STOPPED


class Bench:
    """A coordinator on devices that the test sets."""

    def __init__(self, folder, devices, files, node=NODE, builtin=True, **more):
        self.devices = devices
        self.told = {}
        """What the driver says of processes: device -> process id -> bytes."""
        self.workers = []
        self.catalogue = Catalogue.load(builtin=builtin)
        self.model = self.catalogue.add_file(files[0], name="tiny").name
        self.second = self.catalogue.add_file(files[1], name="second").name
        self.store = ReplicatedStore(folder, node.id)
        self.deployments = Deployments(self.store, [], folder)
        self.measured = MeasuredMemory(self.store)
        self.coordinator = Coordinator(
            node,
            probe=self.probe,
            catalogue=self.catalogue,
            records=self.store,
            deployments=self.deployments,
            measured=self.measured,
            tuned=TunedSettingsStore(folder),
            make_worker=self.make_worker,
            process_memory=lambda: self.told,
            **more,
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


def card(suffix="gpu-a", mib=2000, node=NODE, **more):
    return DeviceSnapshot(
        DeviceId(f"{node.id}/{suffix}"),
        node.id,
        DeviceKind.CUDA,
        f"Card {suffix}",
        Bytes.mib(mib),
        Bytes.mib(mib),
        compute_capability=(8, 6),
        index=0,
        **more,
    )


def make_bench(folder, tiny_gguf):
    """One 2,000 MiB card and two models, `tiny` and `second`, in `folder`."""
    files = [Path(shutil.copy(tiny_gguf, folder / name)) for name in ("first.gguf", "second.gguf")]
    return Bench(StateFolder(folder), [card()], files)
