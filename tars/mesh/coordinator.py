"""This node's part in the mesh's placement: it tells what it has, decides where it coordinates, and carries its own orders out.

Law of this file: it knows nothing that `known_mesh` knows, decides nothing that `core.coordination` decides and does nothing that
`executor` does. It is level-triggered: every round starts from what is. A node without a mesh takes the same way, with itself as the
coordinator of one.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from tars.catalogue import Catalogue
from tars.config import EnginesSection
from tars.core.coordination import Coordination, CoordinationSettings, Decision, Move
from tars.core.mesh_events import MeshView
from tars.core.records import NodeAdvert, Orders
from tars.core.replicated_map import DEPLOYMENT, MEASURED, NODE, ORDERS, orders_for, overrules
from tars.core.taking_over import TakingOver
from tars.core.types import (
    Assignment,
    Bytes,
    Deployment,
    DeviceId,
    DeviceSnapshot,
    ModelEntry,
    NodeId,
    NodeSnapshot,
    Plan,
    Refusal,
    ReplicaId,
)
from tars.errors import DoesNotFit, TarsError
from tars.mesh.advertising import Advertising
from tars.mesh.deployments import Deployments
from tars.mesh.draining import Draining
from tars.mesh.executor import BUSY, Executor, LiveReplica, StartWorker
from tars.mesh.known_mesh import KnownMesh
from tars.mesh.measured_memory import MeasuredMemory
from tars.mesh.replica_files import FileFetch, ModelFiles, ReplicaFiles, file_missing
from tars.mesh.replicated_store import Records
from tars.mesh.tuned_settings import TunedSettingsStore
from tars.messages.files import TransferDescription

__all__ = ["BUSY", "Coordinator", "Drained", "FileFetch", "LiveReplica", "refusal_error"]

log = logging.getLogger(__name__)

ROUND_SECONDS = 10.0
"""A round at least so often, so that memory freed by a foreign program is noticed; a round costs a few ms."""
DEBOUNCE_SECONDS = 0.05
"""News comes in bursts: adverts of several nodes, a worker's states. They are taken together."""
PROGRESS_SECONDS = 2.0
"""A round so often while something loads or is fetched, so that peers see it go on; nothing else asks for one then."""
OVERRULED_SECONDS = 1.0
"""A coordinator that hears of orders of another one looks after so long: one that stood still puts them right, and two that do not yet see
each other do not write against each other at every packet."""


@dataclass(frozen=True, slots=True)
class Drained:
    """What a drain does with this node's replicas, as planned when it began."""

    moves: tuple[Assignment, ...] = ()
    """Elsewhere, in place of those here; theirs stay until these are ready."""
    unloaded: tuple[Assignment, ...] = ()
    """Fit nowhere else: their models answer no more until there is room."""
    freed: Bytes = Bytes(0)
    """What this node's replicas hold, all of which comes back."""


class Coordinator:
    """See the module's law. `probe(held)` reads the devices and may block; it runs in a thread.

    `mesh` gives this node's view of its peers, None where there is no mesh. Whoever hears of records or members calls `heard` or `wake`.
    """

    def __init__(
        self,
        node: NodeSnapshot,
        *,
        probe: Callable[[Mapping[DeviceId, Bytes]], tuple[DeviceSnapshot, ...]],
        catalogue: Catalogue,
        records: Records,
        deployments: Deployments,
        measured: MeasuredMemory,
        make_worker: StartWorker,
        tuned: TunedSettingsStore | None = None,
        engines: EnginesSection | None = None,
        process_memory: Callable[[], Mapping[DeviceId, Mapping[int, Bytes | None]]] = dict,
        mesh: Callable[[], MeshView | None] = lambda: None,
        takes_part: Callable[[], bool] = lambda: True,
        files: ModelFiles | None = None,
        hub: bool = False,
        draining: Draining | None = None,
        client_url: Callable[[], str | None] = lambda: None,
        transfers: Callable[[], Iterable[TransferDescription]] = tuple,
        settings: CoordinationSettings | None = None,
        now: Callable[[], float] = time.monotonic,
    ):
        self.records = records
        self.deployments = deployments
        self.mesh = mesh
        self.takes_part = takes_part
        """False for a node that was removed from its mesh: it keeps what runs, and the mesh's wishes are no longer its own."""
        self.draining = Draining() if draining is None else draining
        self._now = now
        self.known = KnownMesh(
            node.id,
            catalogue,
            records,
            measured,
            mesh=lambda: self.mesh(),
            exact=lambda: self.executor.engines.exact,
            hub=hub,
            now=lambda: self._now(),
        )
        self.executor = Executor(
            node,
            probe=probe,
            measured=measured,
            make_worker=make_worker,
            on_change=self._executor_changed,
            tuned=tuned,
            engines=engines,
            process_memory=process_memory,
            files=ReplicaFiles(catalogue, files, find=self.known.find, on_change=self._executor_changed, now=now),
        )
        held = tuple if files is None else files.held
        self.advertising = Advertising(
            catalogue, records, held=held, client_url=client_url, transfers=transfers, now=now
        )
        self._coordination = Coordination(settings)
        self._taking_over = TakingOver()
        self._decision = Decision(Plan(), {})
        self._stale = False
        """The decision is older than what is known: planned anew when somebody looks."""
        self.problems: dict[str, TarsError] = {}
        self._not_given = ""
        self._wake = asyncio.Event()
        self._wake_at: float | None = None
        self._overruled: asyncio.TimerHandle | None = None
        self._round = asyncio.Lock()
        self._changed = asyncio.Event()
        self._stopping = False
        self.rounds = 0
        self.changes = 0
        """Grows with every change of a replica or of the plan: what was read before it may be stale."""

    # --- what others ask ---------------------------------------------------------------------------------------------

    @property
    def node_id(self) -> NodeId:
        """This node's id."""
        return self.executor.node_id

    @property
    def name(self) -> str:
        """This node's name, for people."""
        return self.executor.node.name

    @property
    def catalogue(self) -> Catalogue:
        """The models that this node knows by itself."""
        return self.known.catalogue

    @catalogue.setter
    def catalogue(self, catalogue: Catalogue) -> None:
        self.known.catalogue = self.executor.files.catalogue = self.advertising.catalogue = catalogue

    @property
    def replicas(self) -> dict[ReplicaId, LiveReplica]:
        """This node's own."""
        return self.executor.replicas

    @property
    def fetches(self) -> dict[ReplicaId, FileFetch]:
        """Replicas whose file is on its way to this node, or did not come."""
        return self.executor.files.fetches

    @property
    def plan(self) -> Plan:
        """The plan for every node that is alive: in force where this node coordinates, elsewhere what the coordinator makes of the same."""
        return self._latest().plan

    @property
    def moves(self) -> tuple[Move, ...]:
        """Replicas that are on their way from one device to another."""
        return self._latest().moves

    @property
    def coordinates(self) -> bool:
        """Whether this node is the coordinator, as it sees it."""
        view = self.mesh()
        return view is None or view.coordinator == self.node_id

    def wake(self) -> None:
        """Ask for a round soon."""
        self._wake.set()

    def heard(self, keys: Iterable[str]) -> None:
        """Records under `keys` have changed: ask for a round if they are about placement."""
        mine = f"{ORDERS}{self.node_id}"
        if any(key == mine or key.startswith((NODE, DEPLOYMENT, MEASURED)) for key in keys):
            self.wake()
        elif self._overruled is None and overrules(self.records.map, keys, self.node_id) and self.coordinates:
            self._overruled = asyncio.get_running_loop().call_later(OVERRULED_SECONDS, self._answer_overruling)

    async def changed(self) -> None:
        """Wait until a replica's state, a load's progress or the plan changes."""
        await self._changed.wait()

    async def snapshot(self) -> NodeSnapshot:
        """This node and its devices now."""
        return replace(await self.executor.snapshot(), draining=self.draining.on)

    def nodes(self) -> list[NodeSnapshot]:
        """Every live node as its advert has it, this one first."""
        return [advert.node for advert in self.known.adverts()]

    def settled(self) -> bool:
        """True when every replica that this node should have is ready or has failed, and nothing is left to start."""
        if self.rounds == 0:
            return False
        if self.coordinates:
            if not self._decision.orders:
                return False  # it looks round first
            wanted = {each.replica for each in self.plan.assignments if each.node == self.node_id}
        elif (orders := self._orders()) is None:
            return False
        else:
            wanted = {each.replica for each in orders}
        return wanted <= {*self.replicas, *self.fetches} and self.executor.settled()

    def entries(self) -> dict[str, ModelEntry]:
        """Every model that some live node knows, by name."""
        return self.known.entries()

    def find(self, model: str) -> ModelEntry | None:
        """An entry by name or alias: this node's own, else a peer's."""
        return self.known.find(model)

    def on_disk(self) -> dict[str, ModelEntry]:
        """Models that nobody wants and of which some live node has a file, by name."""
        return self.known.on_disk()

    async def preview(self, deployment: Deployment) -> Plan:
        """The plan as it would be with `deployment`. Raises the reason why its model cannot be planned at all."""
        await self._look()
        return self._coordination.preview(self.known.view_with(deployment))

    async def room_for(self, deployment: Deployment) -> str | None:
        """Which replicas would move to make room for a deployment that `preview` refuses, as a sentence; None where none can."""
        await self._look()
        name = self.known.resolve(deployment.model).name
        room = self._coordination.room_for(self.known.view_with(deployment), name)
        if room is None:
            return None
        moves = ", ".join(
            f"{move.assignment.model} moves to {move.device.name} of {move.node.name}" for move in room.moves
        )
        return f"{moves}, and then it fits on {room.device.name} of {room.node.name} ({room.need})"

    def retry_failed(self, model: str) -> None:
        """Forget a model's failed replicas, so that the next round loads them again."""
        self._coordination.forget(model)
        self.executor.retry_failed(model)
        self.wake()

    async def drain(self) -> Drained:
        """Give this node's memory back: replicas go elsewhere where they fit. Saved; returns what is planned. Idempotent."""
        self.draining.set(True)
        await self._look()
        made = self._coordination.preview(self.known.view())
        here = [live.assignment for live in self.replicas.values()]
        held = sum(device.memory_held for device in (await self.snapshot()).devices)
        running = {report.assignment.replica for advert in self.known.adverts() for report in advert.replicas}
        moves: list[Assignment] = []
        unloaded: list[Assignment] = []
        for assignment in here:
            taken = {each.replica for each in moves}
            successor = next(
                (
                    each
                    for each in made.assignments
                    if each.model == assignment.model and each.replica not in running and each.replica not in taken
                ),
                None,
            )
            if successor is None:
                unloaded.append(assignment)
            else:
                moves.append(successor)
        self.wake()
        return Drained(tuple(moves), tuple(unloaded), Bytes(held))

    def resume(self) -> None:
        """Undo `drain`: the plan decides what comes back."""
        self.draining.set(False)
        self.wake()

    # --- the rounds --------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Round after round until cancelled; an unexpected error is logged and the next round tries again."""
        while True:
            self._wake.clear()
            self._wake_at = None
            try:
                await self.reconcile()
            except Exception:
                log.exception("a placement round failed; the next one tries again")
            try:
                async with asyncio.timeout(self._patience()):
                    await self._wake.wait()
            except TimeoutError:
                continue
            await asyncio.sleep(DEBOUNCE_SECONDS)

    async def announce(self) -> None:
        """Put in the map what is here, before peers hear of this node: what it had before a restart, by its last word, is gone."""
        async with self._round:
            await self.executor.measure()
            self._due(self.advertising.tell(await self._look()))

    async def reconcile(self) -> None:
        """One round: tell what is here, decide where it is this node's to decide, and carry this node's orders out."""
        async with self._round:
            if self._stopping:
                return
            await self.executor.measure()
            advert = await self._look()
            self._due(self.advertising.tell(advert))
            if self._decides():
                self._decide()
            else:
                self._stale = True
            orders = self._orders()
            if orders is not None:
                await self.executor.carry_out(orders, {device.id: device for device in advert.node.devices})
            self._find_problems()
            if any(report.state in BUSY for report in advert.replicas) or advert.transfers:
                self._due(self._now() + PROGRESS_SECONDS)
            if (reports := self.executor.reports()) != advert.replicas:
                self.known.own = replace(advert, replicas=reports)
                self._due(self.advertising.tell(self.known.own))
            self.rounds += 1
            self._pulse()

    async def stop(self, grace: float) -> None:
        """Stop every worker, each within `grace` seconds; no worker outlives this call.

        When it is cancelled the workers go on ending; called again it waits for them, with the grace it is given then.
        """
        self._stopping = True
        async with self._round:
            pass
        await self.executor.stop(grace)

    async def _look(self) -> NodeAdvert:
        """This node now, to plan with."""
        node = replace(await self.executor.quiet_snapshot(), draining=self.draining.on)
        self.known.own = advert = self.advertising.advert(node, self.executor.reports())
        return advert

    # --- decisions ---------------------------------------------------------------------------------------------------

    def _decides(self) -> bool:
        """Whether this node gives orders now: it coordinates, and has done so for long enough to know the others."""
        if not self.takes_part():
            return False
        view, now = self.mesh(), self._now()
        if view is None:
            return True
        due = self._taking_over.due(view, self.node_id, now)
        if due is not None and due > now:
            self._due(due)
            return False
        return due is not None

    def _decide(self) -> None:
        self._decision, self._stale = self._coordination.decide(self.known.view()), False
        self._due(self._decision.wake_at)
        for node, assignments in self._decision.orders.items():
            orders = Orders(node, self.node_id, assignments)
            if orders_for(self.records.map, node) != orders:
                self._give(orders)

    def _give(self, orders: Orders) -> None:
        try:
            self.records.put(f"{ORDERS}{orders.node}", orders, saved=False)
        except TarsError as error:
            # A node that was removed this second, or this very one: said once, the other nodes' orders go on.
            if error.message != self._not_given:
                log.warning("orders for %s cannot be given: %s", orders.node, error.message)
            self._not_given = error.message

    def _orders(self) -> tuple[Assignment, ...] | None:
        """This node's orders, by the word of whom it sees coordinate; None: keep what runs."""
        orders = orders_for(self.records.map, self.node_id)
        view = self.mesh()
        coordinator = self.node_id if view is None else view.coordinator
        if orders is None or orders.coordinator != coordinator:
            return None
        if coordinator == self.node_id and not self._decision.orders:
            return None  # its own, of before its restart: they are decided anew in a moment
        return orders.assignments

    def _latest(self) -> Decision:
        if self._stale and self.known.own is not None:
            # A machine of its own: looking must not count as deciding.
            self._decision = replace(Coordination().decide(self.known.view()), orders={})
            self._stale = False
        return self._decision

    def _find_problems(self) -> None:
        """By wanted model: why it, or a part of it, is loaded nowhere."""
        found: dict[str, TarsError] = {}
        known, held, catalogue = self.known.entries(), self.known.plannable(), self.catalogue
        for deployment in self.deployments.wanted():
            entry = known.get(deployment.model)
            if entry is None or (entry.name in held.without_file and entry.name in catalogue.entries):
                try:
                    entry = catalogue.resolve(deployment.model)
                except TarsError as error:
                    found[deployment.model] = error
                    continue
            if entry.name in held.without_file:
                found[deployment.model] = file_missing(catalogue, entry)
        for refusal in self.plan.refusals:
            found.setdefault(refusal.model, refusal_error(refusal))
        for fetch in self.fetches.values():
            if fetch.error is not None:
                found.setdefault(fetch.assignment.model, fetch.error)
        self.problems = found

    # --- inside ------------------------------------------------------------------------------------------------------

    def _executor_changed(self, wake: bool) -> None:
        if wake:
            self.wake()
        self._pulse()

    def _answer_overruling(self) -> None:
        self._overruled = None
        self.wake()

    def _patience(self) -> float:
        """Seconds until the next round, if nothing happens."""
        if self._wake_at is None:
            return ROUND_SECONDS
        return min(ROUND_SECONDS, max(0.0, self._wake_at - self._now()))

    def _due(self, at: float | None) -> None:
        if at is not None and (self._wake_at is None or at < self._wake_at):
            self._wake_at = at

    def _pulse(self) -> None:
        self.changes += 1
        self._changed.set()
        self._changed = asyncio.Event()


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
