"""Carries the plan out on this node: snapshot + deployments -> plan -> load, wait, unload; again whenever something changed.

Law of this file: it decides nothing that `core.placement` decides. It is level-triggered: every round starts from what is, so a lost
wake-up or a crash costs at most one round. Loads on one device happen one at a time.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tars.catalogue import Catalogue
from tars.config import EnginesSection
from tars.core.placement import plan
from tars.core.types import (
    Assignment,
    Bytes,
    Deployment,
    DeviceId,
    DeviceKind,
    DeviceSnapshot,
    ModelEntry,
    ModelKind,
    NodeId,
    NodeSnapshot,
    Plan,
    Refusal,
    ReplicaId,
    ReplicaState,
)
from tars.errors import DoesNotFit, ModelFileMissing, TarsError
from tars.mesh.deployments import Deployments
from tars.mesh.measured_memory import MeasuredMemory
from tars.mesh.tuned_settings import TunedSettingsStore
from tars.workers.engine import AdapterSpec, LoadSpec
from tars.workers.supervisor import ReplicaWorker

log = logging.getLogger(__name__)

ROUND_SECONDS = 10.0
"""A round at least so often, so that memory freed by a foreign program is noticed; a round costs a few ms."""
STOP_GRACE_SECONDS = 10.0
"""What a replica that is moved or removed gets to finish its calls."""

BUSY = (ReplicaState.STARTING, ReplicaState.LOADING, ReplicaState.RESTARTING)


@dataclass(slots=True)
class LiveReplica:
    """One assignment that is being carried out, and the worker that does it."""

    assignment: Assignment
    device: DeviceSnapshot
    kind: ModelKind
    worker: ReplicaWorker
    spec: LoadSpec
    taken: Bytes | None = None
    """What the worker with `measured_pid` really took on the device; None before it was measured."""
    measured_pid: int | None = None


StartWorker = Callable[[LoadSpec, Callable[[ReplicaWorker], None]], ReplicaWorker]
"""Makes (does not start) a worker; tests give a fake."""


class Coordinator:
    """See the module's law. `probe(held)` reads the devices and may block; it runs in a thread."""

    def __init__(
        self,
        node: NodeSnapshot,
        *,
        probe: Callable[[Mapping[DeviceId, Bytes]], tuple[DeviceSnapshot, ...]],
        catalogue: Catalogue,
        deployments: Deployments,
        measured: MeasuredMemory,
        make_worker: StartWorker,
        tuned: TunedSettingsStore | None = None,
        engines: EnginesSection | None = None,
        process_memory: Callable[[], Mapping[DeviceId, Mapping[int, Bytes | None]]] = dict,
    ):
        self._node = node
        self._probe = probe
        self.catalogue = catalogue
        self.deployments = deployments
        self._measured = measured
        self._make_worker = make_worker
        self._tuned = tuned
        self._engines = EnginesSection() if engines is None else engines
        self._process_memory = process_memory
        self.replicas: dict[ReplicaId, LiveReplica] = {}
        self.plan = Plan()
        self.problems: dict[str, TarsError] = {}
        self._quiet: dict[DeviceId, DeviceSnapshot] = {}
        self._wake = asyncio.Event()
        self._round = asyncio.Lock()
        self._changed = asyncio.Event()
        self._stopping = False
        self._stops: dict[asyncio.Task[None], LiveReplica] = {}
        self.rounds = 0
        self.changes = 0
        """Grows with every change of a replica or of the plan: what was read before it may be stale."""

    @property
    def node_id(self) -> NodeId:
        """This node's id."""
        return self._node.id

    # --- what others ask ---------------------------------------------------------------------------------------------

    def wake(self) -> None:
        """Ask for a round soon."""
        self._wake.set()

    async def changed(self) -> None:
        """Wait until a replica's state, a load's progress or the plan changes."""
        await self._changed.wait()

    async def snapshot(self) -> NodeSnapshot:
        """This node and its devices now. While a device loads, its memory is in motion: for planning see `_planning_nodes`."""
        devices = await asyncio.to_thread(self._probe, self._held())
        return replace(self._node, devices=devices)

    def settled(self) -> bool:
        """True when every wanted replica is ready or has failed, and nothing is left to start."""
        if self.rounds == 0:
            return False
        planned = {assignment.replica for assignment in self.plan.assignments}
        return planned == set(self.replicas) and not any(live.worker.state in BUSY for live in self.replicas.values())

    async def preview(self, deployment: Deployment) -> Plan:
        """The plan as it would be with `deployment`. Raises the reason why its model cannot be planned here at all."""
        entry = self.catalogue.resolve(deployment.model)
        models = {**self._plannable()[0], entry.name: self._local(entry)}
        others = [each for each in self.deployments.wanted() if each.model != entry.name and each.model in models]
        return self._plan(await self._planning_nodes(), models, [*others, replace(deployment, model=entry.name)])

    def retry_failed(self, model: str) -> None:
        """Forget a model's failed replicas, so that the next round loads them again."""
        for replica, live in list(self.replicas.items()):
            if live.assignment.model == model and live.worker.state is ReplicaState.FAILED:
                self._retire(replica)
        self.wake()

    # --- the rounds --------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Round after round until cancelled; an unexpected error is logged and the next round tries again."""
        while True:
            self._wake.clear()
            try:
                await self.reconcile()
            except Exception:
                log.exception("a placement round failed; the next one tries again")
            try:
                async with asyncio.timeout(ROUND_SECONDS):
                    await self._wake.wait()
            except TimeoutError:
                pass

    async def reconcile(self) -> None:
        """One round: plan, retire what the plan no longer has, start what it has and nobody runs."""
        async with self._round:
            if self._stopping:
                return
            await self._measure()
            models, problems = self._plannable()
            wanted = [deployment for deployment in self.deployments.wanted() if deployment.model in models]
            nodes = await self._planning_nodes()
            self.plan = self._plan(nodes, models, wanted)
            self.problems = {**problems, **{r.model: refusal_error(r) for r in self.plan.refusals}}
            planned = {assignment.replica: assignment for assignment in self.plan.assignments}
            for replica, live in list(self.replicas.items()):
                target = planned.get(replica)
                if target is None or not _same_load(target, live.assignment):
                    self._retire(replica)
            loading = self._moving()
            devices = {device.id: device for node in nodes for device in node.devices}
            for assignment in self.plan.assignments:
                if assignment.device in loading:
                    continue
                if (known := self.replicas.get(assignment.replica)) is not None:
                    if known.worker.retry_due:
                        loading.add(assignment.device)
                        await known.worker.start()
                    continue
                entry = models[assignment.model]
                variant = next(each for each in entry.variants if each.name == assignment.variant)
                path = self.catalogue.path_of(entry, variant)
                if path is None:
                    # Gone since the round began, or only loaded copies are left. A later round looks again; waking one now would spin.
                    self.problems[assignment.model] = self._missing(entry)
                    continue
                loading.add(assignment.device)
                await self._load(assignment, devices[assignment.device], entry, path, variant.sha256)
            self.rounds += 1
            self._pulse()

    async def stop(self, grace: float) -> None:
        """Stop every worker, each within `grace` seconds; no worker outlives this call.

        When it is cancelled the workers go on ending; called again it waits for them, with the grace it is given then.
        """
        self._stopping = True
        async with self._round:
            for live in list(self._stops.values()):
                self._end(live, grace)  # it was given another grace, perhaps a longer one
            for replica in list(self.replicas):
                self._retire(replica, grace)
        if self._stops:
            await asyncio.wait(self._stops)

    # --- inside ------------------------------------------------------------------------------------------------------

    def _plan(
        self, nodes: Sequence[NodeSnapshot], models: Mapping[str, ModelEntry], wanted: Sequence[Deployment]
    ) -> Plan:
        current = [live.assignment for live in self.replicas.values()]
        if self._engines.exact:
            # Slots that share cells are never exact, and sharing is the default: without a word on slots there is one, as large.
            wanted = [replace(each, slots=1) if each.slots is each.kv_tokens is None else each for each in wanted]
        return plan(nodes, models, wanted, current, self._measured.by_key())

    async def _planning_nodes(self) -> list[NodeSnapshot]:
        """The snapshot to plan from: a device whose memory is in motion counts as it was before that began."""
        now = await self.snapshot()
        loading = self._moving()
        devices = []
        for device in now.devices:
            if device.id in loading and device.id in self._quiet:
                devices.append(self._quiet[device.id])
            else:
                self._quiet[device.id] = device
                devices.append(device)
        return [replace(now, devices=tuple(devices))]

    def _moving(self) -> set[DeviceId]:
        """Devices whose memory is in motion: something loads there, or is being unloaded."""
        busy = {live.assignment.device for live in self.replicas.values() if live.worker.state in BUSY}
        return busy | {live.assignment.device for live in self._stops.values()}

    def _plannable(self) -> tuple[dict[str, ModelEntry], dict[str, TarsError]]:
        models: dict[str, ModelEntry] = {}
        problems: dict[str, TarsError] = {}
        for deployment in self.deployments.wanted():
            try:
                models[deployment.model] = self._local(self.catalogue.resolve(deployment.model))
            except TarsError as error:
                problems[deployment.model] = error
        return models, problems

    def _local(self, entry: ModelEntry) -> ModelEntry:
        """The entry with only the variants whose files this node has, or has loaded: a share that is away for a moment unloads nothing."""
        loaded = {live.assignment.variant for live in self.replicas.values() if live.assignment.model == entry.name}
        local = tuple(
            variant
            for variant in entry.variants
            if variant.name in loaded or self.catalogue.path_of(entry, variant) is not None
        )
        if not local:
            raise self._missing(entry)
        return replace(entry, variants=local)

    def _missing(self, entry: ModelEntry) -> TarsError:
        """Why no file of the model can be loaded, and where to get one."""
        if (known := self.catalogue.missing(entry)) is not None:
            return known
        sources = "; ".join(f"{v.file} of {v.repo} on Hugging Face" for v in entry.variants if v.repo and v.file)
        return ModelFileMissing(
            f"the catalogue knows {entry.name}, but its file is not on this PC. "
            + (f"Download {sources or 'it'}, then name it in a [[model]] table (name, path) of the node's ")
            + "configuration, or start with `tars-node --model FILE`",
            details={"model": entry.name},
        )

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

    async def _measure(self) -> None:
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

    async def _load(
        self, assignment: Assignment, device: DeviceSnapshot, entry: ModelEntry, path: Path, sha256: str | None
    ) -> None:
        settings, kind = assignment.settings, entry.kind
        spec = LoadSpec(
            replica=assignment.replica,
            model=assignment.model,
            engine="llama" if kind is ModelKind.CHAT else "sentence-transformers",
            path=str(path),
            sha256=sha256,
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
            inter_token_ms=self._engines.inter_token_ms,
            exact=self._engines.exact,
            adapters=[
                AdapterSpec(name=each.name, path=str(self.catalogue.adapter_path(entry, each)), scale=each.scale)
                for each in entry.adapters
            ],
            draft_path=None if (draft := self.catalogue.draft_path(entry)) is None else str(draft),
            backend=None if kind is ModelKind.CHAT else self._engines.embedding_backend,
        )
        if self._tuned is not None:
            spec = spec.model_copy(update={"tuned": self._tuned.known(spec, device)})
        worker = self._make_worker(spec, lambda worker: self._on_change(assignment.replica, worker))
        self.replicas[assignment.replica] = LiveReplica(assignment, device, kind, worker, spec)
        log.info("loading %s on %s: %s", assignment.replica, device.name, assignment.reason)
        await worker.start()

    def _on_change(self, replica: ReplicaId, worker: ReplicaWorker) -> None:
        live = self.replicas.get(replica)
        settled = worker.state not in (ReplicaState.STARTING, ReplicaState.LOADING)
        if live is not None and live.worker is worker and settled:
            self.wake()
        self._pulse()

    def _retire(self, replica: ReplicaId, grace: float = STOP_GRACE_SECONDS) -> None:
        log.info("unloading %s", replica)
        self._end(self.replicas.pop(replica), grace)

    def _end(self, live: LiveReplica, grace: float) -> None:
        replica = live.assignment.replica
        task = asyncio.create_task(live.worker.stop(grace), name=f"stop {replica}")
        self._stops[task] = live

        def stopped(task: asyncio.Task[None]) -> None:
            del self._stops[task]
            if not task.cancelled() and task.exception() is not None:
                log.error("stopping %s failed", replica, exc_info=task.exception())
            self.wake()

        task.add_done_callback(stopped)

    def _pulse(self) -> None:
        self.changes += 1
        self._changed.set()
        self._changed = asyncio.Event()


def _same_load(planned: Assignment, live: Assignment) -> bool:
    return (planned.variant, planned.device, planned.settings) == (live.variant, live.device, live.settings)


def refusal_error(refusal: Refusal) -> DoesNotFit:
    """What a caller of a refused model gets: bytes needed against bytes free for each device, and what would make it fit."""
    return DoesNotFit(
        f"{refusal.model} fits on no device here. {refusal.remedy}".strip(),
        details={
            "devices": [
                {
                    "device": verdict.device_name,
                    "variant": verdict.variant,
                    "needed_bytes": int(verdict.needed),
                    "free_bytes": int(verdict.free),
                    "reason": verdict.reason,
                }
                for verdict in refusal.verdicts
            ]
        },
    )
