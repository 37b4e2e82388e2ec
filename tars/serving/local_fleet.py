"""This node's own replicas as the router sees them.

Law of this file: it reads the coordinator and its workers, and changes nothing there.
"""

from __future__ import annotations

from collections.abc import Sequence

from tars.core.coordination_view import FETCH
from tars.core.mesh_messages import MemberState
from tars.core.routing import Candidate
from tars.core.types import ModelEntry, ModelKind, ReplicaId, ReplicaState
from tars.errors import StillLoading, TarsError
from tars.mesh.coordinator import Coordinator, LiveReplica
from tars.serving.call_costs import Capacity, capacity_of
from tars.serving.fleet import ServedModel, no_replica_error
from tars.serving.gate import Gate
from tars.serving.kept_states import KeptStates
from tars.serving.load_on_demand import LoadOnDemand
from tars.serving.local_target import LocalTarget
from tars.serving.running_answers import RunningAnswers
from tars.workers.supervisor import ReplicaWorker


class LocalFleet:
    """This node's replicas as the router sees them; see `router.Fleet`. `answers`: where what runs on them is kept."""

    def __init__(self, coordinator: Coordinator, load_on_demand: bool = True, *, answers: RunningAnswers | None = None):
        self._coordinator = coordinator
        self.answers = RunningAnswers(KeptStates(coordinator.node_id)) if answers is None else answers
        self._on_demand = LoadOnDemand(coordinator, load_on_demand)
        self._gates: dict[ReplicaId, tuple[ReplicaWorker, Gate]] = {}

    def models(self) -> list[ServedModel]:
        """Every deployed model that the catalogue knows."""
        served = []
        for deployment in self._coordinator.deployments.wanted():
            entry = self._coordinator.catalogue.find(deployment.model)
            if entry is None:
                continue
            problem = self._coordinator.problems.get(deployment.model)
            has_replica = any(each.assignment.model == entry.name for each in self._coordinator.replicas.values())
            adapters = tuple(adapter.name for adapter in entry.adapters)
            served.append(
                ServedModel(entry.name, entry.kind, entry.aliases, None if has_replica else problem, adapters)
            )
        return served

    def loadable(self) -> list[ServedModel]:
        """What a call may have loaded."""
        return self._on_demand.loadable()

    def entries(self) -> dict[str, ModelEntry]:
        """Wanted models that the catalogue lacks: without a mesh there are none."""
        return {}

    def candidates(self, model: str) -> Sequence[Candidate]:
        """The model's replicas on this node, those too whose file is still coming.

        While the node gives its memory back they answer what no peer can: a replica stays until it is ready elsewhere.
        """
        standing = MemberState.DRAINING if self._coordinator.draining.on else MemberState.ALIVE
        found = [
            Candidate(
                replica=replica,
                model=model,
                kind=live.kind,
                state=live.worker.state,
                node=live.assignment.node,
                standing=standing,
                active=live.worker.active_calls,
                queued=live.worker.queued_calls + self.gate(replica, live.worker).waiting,
                # What the worker really serves at once, which may be less than the slots that were planned.
                slots=live.worker.info.slots if live.worker.info is not None else live.assignment.settings.slots,
                speed=_speed(live),
                prefill_speed=_prefill_speed(live),
                cache_tokens=live.assignment.settings.kv_tokens,
                file_sha256=live.file.sha256,
                exact=live.spec.exact,
            )
            for replica, live in self._coordinator.replicas.items()
            if live.assignment.model == model
        ]
        found += [
            Candidate(replica, model, fetch.kind, fetch.state, node=fetch.assignment.node)
            for replica, fetch in self._coordinator.fetches.items()
            if fetch.assignment.model == model and replica not in self._coordinator.replicas
        ]
        return found

    def target(self, replica: ReplicaId) -> LocalTarget:
        """The worker behind a replica."""
        live = self._coordinator.replicas[replica]
        return LocalTarget(
            live.assignment,
            live.device.name,
            live.device.simulated,
            live.worker,
            self.gate(replica, live.worker),
            self.answers,
        )

    def gate(self, replica: ReplicaId, worker: ReplicaWorker) -> Gate:
        """The door of a replica, as old as its worker."""
        known = self._gates.get(replica)
        if known is not None and known[0] is worker:
            return known[1]
        self._gates = {each: kept for each, kept in self._gates.items() if each in self._coordinator.replicas}
        gate = Gate(lambda: _capacity(worker), worker.options.queue_limit)
        worker.watchers.append(gate.worker_changed)
        self._gates[replica] = (worker, gate)
        return gate

    def load(self) -> list[tuple[str, int, int]]:
        """Each ready replica's (id, active calls, queued calls): what peers want to know."""
        return [
            (replica, live.worker.active_calls, live.worker.queued_calls + self.gate(replica, live.worker).waiting)
            for replica, live in self._coordinator.replicas.items()
            if live.worker.state is ReplicaState.READY
        ]

    async def wait_change(self) -> None:
        """A replica, a load's progress, the plan; what peers tell and who they are ends in a round, too."""
        await self._coordinator.changed()

    async def ask_to_load(self, model: str) -> None:
        """See `LoadOnDemand`. Raises what `not_ready` says where loading on demand is off."""
        if not self._on_demand.on:
            raise self.not_ready(model)
        await self._on_demand.ask(model)

    def not_ready(self, model: str) -> TarsError:
        """Still loading, with stage and percent; failed, with the load's own error; why it is loaded nowhere; or no replica."""
        live = [each for each in self._coordinator.replicas.values() if each.assignment.model == model]
        for each in live:
            if each.worker.state is ReplicaState.FAILED and each.worker.last_error is not None:
                return each.worker.last_error
        fetches = [each for each in self._coordinator.fetches.values() if each.assignment.model == model]
        if not live:
            for fetch in fetches:
                if fetch.error is not None:
                    return fetch.error
            if not fetches and (refusal := self._on_demand.refusal(model)) is not None:
                return refusal
        states = [*(each.worker.state for each in live), *(each.state for each in fetches)]
        error = no_replica_error(states or [ReplicaState.STARTING], model)
        told = [*(each.worker.progress for each in live), *(each.progress for each in fetches)]
        progress = next((each for each in told if each is not None), None)
        if isinstance(error, StillLoading):
            if progress is not None and progress.stage == FETCH:
                error = StillLoading(
                    f"{model} is still loading: its file is being copied, {progress.percent:.0f} %; try again shortly",
                    retry_after_ms=error.retry_after_ms,
                )
            error.details.update(
                stage=progress.stage if progress else "planned",
                percent=progress.percent if progress else 0.0,
                node_name=self._coordinator.name,
            )
        return error


def _capacity(worker: ReplicaWorker) -> Capacity | None:
    """What it takes at once; None while it takes nothing."""
    if worker.state is not ReplicaState.READY or worker.info is None:
        return None
    return capacity_of(worker.info, worker.options.queue_limit)


def _prefill_speed(live: LiveReplica) -> float | None:
    """Prompt tokens a second, likewise."""
    return None if live.worker.info is None else live.worker.info.speeds.prefill_tokens_per_second


def _speed(live: LiveReplica) -> float | None:
    """Tokens (texts) a second of one call alone, as the replica measured itself."""
    if live.worker.info is None:
        return None
    speeds = live.worker.info.speeds
    return speeds.decode_tokens_per_second if live.kind is ModelKind.CHAT else speeds.texts_per_second
