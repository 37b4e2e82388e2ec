"""Carries this node's orders out: load, wait, measure, unload; again whenever something changed. Files are `replica_files`'.

Law of this file: it decides nothing; what comes next is `core.node_steps`'s to say. It is level-triggered: every round starts from what is,
so a lost wake-up or a crash costs at most one round. Loads on one device happen one at a time. Without fresh orders what runs is kept.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tars.config import EnginesSection
from tars.core.coordination_view import FETCH
from tars.core.node_steps import next_steps
from tars.core.records import HeldFile, ReplicaReport
from tars.core.types import (
    Assignment,
    Bytes,
    DeviceId,
    DeviceKind,
    DeviceSnapshot,
    ModelKind,
    NodeId,
    NodeSnapshot,
    ReplicaId,
    ReplicaState,
)
from tars.errors import ModelFileMissing, TarsError
from tars.mesh.loaded_files import LoadedFile
from tars.mesh.measured_memory import MeasuredMemory
from tars.mesh.replica_files import ReplicaFiles
from tars.mesh.tuned_settings import TunedSettingsStore
from tars.workers.engine import AdapterSpec, LoadSpec
from tars.workers.supervisor import ReplicaWorker

log = logging.getLogger(__name__)

STOP_GRACE_SECONDS = 10.0
"""What a replica that is moved or removed gets to finish its calls."""
ERROR_LENGTH_MOST = 1000
"""Of an error in a report: every node keeps it."""

BUSY = (ReplicaState.STARTING, ReplicaState.LOADING, ReplicaState.RESTARTING)


@dataclass(slots=True)
class LiveReplica:
    """One assignment that is being carried out, and the worker that does it."""

    assignment: Assignment
    device: DeviceSnapshot
    kind: ModelKind
    worker: ReplicaWorker
    spec: LoadSpec
    file: LoadedFile
    taken: Bytes | None = None
    """What the worker with `measured_pid` really took on the device; None before it was measured."""
    measured_pid: int | None = None


StartWorker = Callable[[LoadSpec, Callable[[ReplicaWorker], None]], ReplicaWorker]
"""Makes (does not start) a worker; tests give a fake."""


class Executor:
    """See the module's law. `probe(held)` reads the devices and may block; it runs in a thread. `on_change` is told of whatever changes."""

    def __init__(
        self,
        node: NodeSnapshot,
        *,
        probe: Callable[[Mapping[DeviceId, Bytes]], tuple[DeviceSnapshot, ...]],
        measured: MeasuredMemory,
        make_worker: StartWorker,
        on_change: Callable[[bool], None],
        files: ReplicaFiles,
        tuned: TunedSettingsStore | None = None,
        engines: EnginesSection | None = None,
        process_memory: Callable[[], Mapping[DeviceId, Mapping[int, Bytes | None]]] = dict,
    ):
        self.node = node
        self.probe = probe
        self.files = files
        self._measured = measured
        self._make_worker = make_worker
        self._on_change = on_change
        """`True`: a round should follow."""
        self._tuned = tuned
        self.engines = EnginesSection() if engines is None else engines
        self._process_memory = process_memory
        self.on_retire: Callable[[Assignment], None] = lambda assignment: None
        """Told of a replica that is about to end, while its worker still has its calls: they may go elsewhere."""
        self.replicas: dict[ReplicaId, LiveReplica] = {}
        self._quiet: dict[DeviceId, DeviceSnapshot] = {}
        self._stops: dict[asyncio.Task[None], LiveReplica] = {}

    @property
    def node_id(self) -> NodeId:
        """This node's id."""
        return self.node.id

    # --- what is here ------------------------------------------------------------------------------------------------

    async def snapshot(self) -> NodeSnapshot:
        """This node and its devices now. While a device loads, its memory is in motion: for planning see `quiet_snapshot`."""
        devices = await asyncio.to_thread(self.probe, self._held())
        return replace(self.node, devices=devices)

    async def quiet_snapshot(self) -> NodeSnapshot:
        """The snapshot to plan from: a device whose memory is in motion counts as it was before that began."""
        now = await self.snapshot()
        moving = self.moving()
        devices = []
        for device in now.devices:
            if device.id in moving and device.id in self._quiet:
                devices.append(self._quiet[device.id])
            else:
                self._quiet[device.id] = device
                devices.append(device)
        return replace(now, devices=tuple(devices))

    def moving(self) -> set[DeviceId]:
        """Devices whose memory is in motion: something loads there, or is being unloaded."""
        busy = {live.assignment.device for live in self.replicas.values() if live.worker.state in BUSY}
        return busy | {live.assignment.device for live in self._stops.values()}

    def settled(self) -> bool:
        """Whether nothing loads, restarts or is fetched."""
        return not any(live.worker.state in BUSY for live in self.replicas.values()) and self.files.settled()

    def reports(self) -> tuple[ReplicaReport, ...]:
        """Every replica as peers should know it, those too that are ending: their memory is not free yet."""
        files = self.files.held()
        found = {
            live.assignment.replica: replace(_report(live, files), state=ReplicaState.STOPPING)
            for live in self._stops.values()
        }
        for fetch in self.files.fetches.values():
            found[fetch.assignment.replica] = ReplicaReport(
                fetch.assignment,
                fetch.kind,
                fetch.state,
                stage=FETCH,
                percent=fetch.progress.percent,
                error=None if fetch.error is None else _short(fetch.error),
            )
        for live in self.replicas.values():
            # One that ends under the same name comes first: its device waits for it.
            found.setdefault(live.assignment.replica, _report(live, files))
        return tuple(found[replica] for replica in sorted(found))

    # --- a round -----------------------------------------------------------------------------------------------------

    async def measure(self) -> None:
        """Note what each freshly loaded replica really took; the planner counts with it from now on.

        On a card the driver's own word on the process is best. Where it has none (WSL2), the engine's difference of free memory misses
        what the process took before it looked, its CUDA context, so the estimate's overhead is added.
        """
        fresh = [
            live
            for live in self.replicas.values()
            if live.worker.state is ReplicaState.READY and live.worker.pid != live.measured_pid
        ]
        if not fresh:
            return
        await self.snapshot()  # a reading from after the loads
        told = self._process_memory()
        for live in fresh:
            info, pid = live.worker.info, live.worker.pid
            if info is None or pid is None:
                continue
            on_card = live.device.kind is DeviceKind.CUDA and not live.device.simulated
            known = told.get(live.assignment.device, {}).get(pid) if on_card else None
            overhead = live.assignment.memory.overhead if on_card else 0
            live.taken = known or Bytes(info.memory_bytes + overhead)
            live.measured_pid = pid
            if self._tuned is not None:
                self._tuned.learn(live.spec, live.device, info.tuned)
            self._measured.learn(live.assignment, live.device, live.taken)

    async def carry_out(self, orders: Sequence[Assignment], devices: Mapping[DeviceId, DeviceSnapshot]) -> None:
        """The next steps towards `orders`. `devices` are those of this node, as they were planned with."""
        orders = [each for each in orders if each.device in devices]
        held = {replica: live.assignment for replica, live in self.replicas.items()}
        paths = {each.replica: self.files.path(each) for each in orders if each.replica not in held}
        self.files.keep(paths)
        steps = next_steps(
            orders,
            held,
            self.moving(),
            retry_due=[replica for replica, live in self.replicas.items() if live.worker.retry_due],
            without_file=[replica for replica, path in paths.items() if path is None],
        )
        for replica in steps.stop:
            self.retire(replica)
        for assignment in steps.fetch:
            self.files.fetch(assignment, devices[assignment.device])
        for assignment in steps.start:
            if (known := self.replicas.get(assignment.replica)) is not None:
                await known.worker.start()
            elif (path := paths[assignment.replica]) is not None:
                await self._load(assignment, devices[assignment.device], path)

    def retry_failed(self, model: str) -> None:
        """Forget a model's failed replicas and fetches, so that the next round begins them again."""
        for replica, live in list(self.replicas.items()):
            if live.assignment.model == model and live.worker.state is ReplicaState.FAILED:
                self.retire(replica)
        self.files.retry_failed(model)

    def retire(self, replica: ReplicaId, grace: float = STOP_GRACE_SECONDS) -> None:
        """Unload one, giving its calls so many seconds."""
        log.info("unloading %s", replica)
        self.on_retire(self.replicas[replica].assignment)
        self._end(self.replicas.pop(replica), grace)

    async def stop(self, grace: float) -> None:
        """Stop every worker, each within `grace` seconds; no worker outlives this call.

        When it is cancelled the workers go on ending; called again it waits for them, with the grace it is given then.
        """
        self.files.keep(())
        for live in list(self._stops.values()):
            self._end(live, grace)  # it was given another grace, perhaps a longer one
        for replica in list(self.replicas):
            self.retire(replica, grace)
        if self._stops:
            await asyncio.wait(self._stops)

    # --- loads -------------------------------------------------------------------------------------------------------

    def _held(self) -> dict[DeviceId, Bytes]:
        """What this node's replicas hold on each device: measured where it can be, declared on a simulated device."""
        held: dict[DeviceId, Bytes] = {}
        for live in self.replicas.values():
            if live.device.simulated:
                taken = live.assignment.memory.total
            elif live.taken is not None and live.worker.state is ReplicaState.READY:
                taken = live.taken
            else:
                continue
            held[live.assignment.device] = Bytes(held.get(live.assignment.device, 0) + taken)
        return held

    async def _load(self, assignment: Assignment, device: DeviceSnapshot, path: Path) -> None:
        found = self.files.entry(assignment)
        assert found is not None  # it has a path
        entry, variant = found
        settings, kind = assignment.settings, entry.kind
        try:
            adapters = [
                AdapterSpec(name=each.name, path=str(self.files.catalogue.adapter_path(entry, each)), scale=each.scale)
                for each in entry.adapters
            ]
            draft = self.files.catalogue.draft_path(entry)
            if entry.draft is not None and draft is None:
                raise KeyError(entry.name)
        except KeyError:
            why = f"{entry.name} has adapters or a draft model whose files are not on this node: they do not travel yet"
            missing = ModelFileMissing(why, details={"model": entry.name})
            self.files.cannot_come(assignment, device, kind, missing)
            return
        file = await asyncio.to_thread(LoadedFile.taken, assignment.model, assignment.variant, path, adapters)
        # From here to the replica's own entry there is no await: nobody sees a moment in which it is neither here nor on its way.
        self.files.came(assignment.replica)
        spec = LoadSpec(
            replica=assignment.replica,
            model=assignment.model,
            engine="llama" if kind is ModelKind.CHAT else "sentence-transformers",
            path=str(path),
            sha256=variant.sha256,
            cuda_device=None if device.simulated or device.index is None else str(device.index),
            context=settings.context,
            slots=settings.slots,
            kv_tokens=settings.kv_tokens or None,
            gpu_layers=settings.gpu_layers,
            threads=settings.threads,
            batch=settings.batch,
            micro_batch=settings.micro_batch,
            flash_attention=settings.flash_attention,
            kv_type=settings.kv_type.value,
            mmap=settings.mmap,
            precision=settings.precision.value,
            batch_tokens=settings.batch_tokens,
            inter_token_ms=self.engines.inter_token_ms,
            exact=self.engines.exact,
            adapters=adapters,
            draft_path=None if draft is None else str(draft),
            backend=None if kind is ModelKind.CHAT else self.engines.embedding_backend,
        )
        if self._tuned is not None:
            spec = spec.model_copy(update={"tuned": self._tuned.known(spec, device)})
        worker = self._make_worker(spec, lambda worker: self._worker_changed(assignment.replica, worker))
        worker.device_busy = lambda: self._busy_beside(worker, device.id)
        self.replicas[assignment.replica] = LiveReplica(assignment, device, kind, worker, spec, file)
        log.info("loading %s on %s: %s", assignment.replica, device.name, assignment.reason)
        await worker.start()

    def _busy_beside(self, worker: ReplicaWorker, device: DeviceId) -> bool:
        """Whether something else loads or ends there. Two that both wait for their restart do not wait for each other."""
        return any(
            live.assignment.device == device
            and live.worker is not worker
            and live.worker.state in (ReplicaState.STARTING, ReplicaState.LOADING)
            for live in self.replicas.values()
        ) or any(live.assignment.device == device for live in self._stops.values())

    def _worker_changed(self, replica: ReplicaId, worker: ReplicaWorker) -> None:
        live = self.replicas.get(replica)
        settled = worker.state not in (ReplicaState.STARTING, ReplicaState.LOADING)
        self._on_change(live is not None and live.worker is worker and settled)

    def _end(self, live: LiveReplica, grace: float) -> None:
        replica = live.assignment.replica
        task = asyncio.create_task(live.worker.stop(grace), name=f"stop {replica}")
        self._stops[task] = live

        def stopped(task: asyncio.Task[None]) -> None:
            del self._stops[task]
            if not task.cancelled() and task.exception() is not None:
                log.error("stopping %s failed", replica, exc_info=task.exception())
            self._on_change(True)

        task.add_done_callback(stopped)


def _report(live: LiveReplica, files: Sequence[HeldFile]) -> ReplicaReport:
    worker, info = live.worker, live.worker.info
    speeds = None if info is None else info.speeds
    speed = None
    if speeds is not None:
        speed = speeds.decode_tokens_per_second if live.kind is ModelKind.CHAT else speeds.texts_per_second
    return ReplicaReport(
        assignment=live.assignment,
        kind=live.kind,
        state=worker.state,
        slots=live.assignment.settings.slots if info is None else info.slots,
        taken=live.taken,
        file_sha256=live.file.identify(files),
        exact=live.spec.exact,
        speed=speed,
        prefill_speed=None if speeds is None else speeds.prefill_tokens_per_second,
        stage=None if worker.progress is None else worker.progress.stage,
        percent=None if worker.progress is None else worker.progress.percent,
        error=None if worker.last_error is None else _short(worker.last_error),
    )


def _short(error: TarsError) -> str:
    return error.message[:ERROR_LENGTH_MOST]
