"""The node itself behind `service.NodeService`: what the faces call, answered from the coordinator, the router and the devices.

Law of this file: it only gathers and phrases; every decision is made elsewhere.
"""

from __future__ import annotations

import asyncio
import platform
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tars import __version__
from tars.core.explanation import explain
from tars.core.placement_cost import contradiction
from tars.core.replicated_map import adverts
from tars.core.routing import Candidate
from tars.core.types import Assignment, Deployment, KvType, ModelEntry, NodeId, NodeSnapshot, ReplicaState
from tars.errors import InvalidParams, ModelFileMissing, TarsError
from tars.mesh.administration import Administration
from tars.mesh.client_keys import ClientKeys
from tars.mesh.coordinator import Coordinator, Drained, FileFetch, LiveReplica, refusal_error
from tars.mesh.model_store import FileStore
from tars.mesh.plan_report import describe_assignment, describe_device, describe_verdict, plan_result
from tars.messages.base import CallContext
from tars.messages.calls import ExplainCallParams, ExplainCallResult
from tars.messages.files import AddFileParams, PullParams, PullResult, TransfersResult
from tars.messages.inference import (
    ChatParams,
    ChatResult,
    CompleteParams,
    CompleteResult,
    Delta,
    EmbedParams,
    EmbedResult,
    Progress,
    RerankParams,
    RerankResult,
    TokenizeParams,
    TokenizeResult,
)
from tars.messages.mesh_state import MeshDescription, MeshParams
from tars.messages.node import (
    AttemptCounts,
    DeployParams,
    DeployResult,
    DrainResult,
    ExplainResult,
    ModelDescription,
    ModelPlace,
    ModelsResult,
    NodeDescription,
    PeerCalls,
    PeerDescription,
    PeersResult,
    PingResult,
    PlanResult,
    RemoveResult,
    ReplicaDescription,
)
from tars.serving.call_explaining import CallExplainer, Names
from tars.serving.call_log import CallLog
from tars.serving.call_record import CallRecords
from tars.serving.gate import Gate
from tars.serving.idempotency import IdempotentAnswers, OtherNodes
from tars.serving.inference import Inference
from tars.serving.kept_states import KeptStates
from tars.serving.leaving import Leaving
from tars.serving.local_fleet import LocalFleet
from tars.serving.mesh_fleet import MeshFleet, Peers
from tars.serving.mesh_overview import describe_mesh, device_names
from tars.serving.router import Router
from tars.serving.running_answers import PeerStates, RunningAnswers
from tars.serving.service import MeshService

SNAPSHOT_SECONDS = 1.0
"""Devices are read at most so often for `node.describe`: watchers of the status page share one reading."""


class LocalNodeService:
    """See the module's law; every method is documented at `service.NodeService`."""

    def __init__(
        self,
        coordinator: Coordinator,
        *,
        name: str,
        redacted_config: dict[str, Any],
        wsl2: bool,
        addresses: Callable[[], list[str]],
        mesh: MeshService | None = None,
        peers: Peers | None = None,
        states: PeerStates | None = None,
        keys_at: OtherNodes | None = None,
        on_traffic: Callable[[NodeId], None] = lambda node: None,
        on_drain: Callable[[bool], None] = lambda draining: None,
        others: Callable[[], list[PeerDescription]] = list,
        files: FileStore | None = None,
        file_bytes_sent: Callable[[], int] = lambda: 0,
        load_on_demand: bool = True,
        now: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ):
        self._coordinator = coordinator
        self._name = name
        self._config = redacted_config
        self.mesh = mesh or Administration(ClientKeys())
        self._wsl2 = wsl2
        self._addresses = addresses
        self._on_drain = on_drain
        self._others = others
        """The peers as this node sees them."""
        self._files = files
        self._file_bytes_sent = file_bytes_sent
        self._now = now
        self._calls = CallLog(wall_clock)
        answers = RunningAnswers(KeptStates(coordinator.node_id), states, now)
        self._local = LocalFleet(coordinator, load_on_demand, answers=answers)
        self._fleet: LocalFleet | MeshFleet = self._local
        if peers is not None:
            self._fleet = MeshFleet(coordinator.node_id, self._local, peers, coordinator.catalogue.find)
        records = CallRecords(now, wall_clock)
        self._router = Router(self._fleet, now, on_traffic, exact=coordinator.executor.engines.exact, records=records)
        if isinstance(self._fleet, MeshFleet):
            self._fleet.tell(self._router.state.ledger, now)
        self._inference = Inference(self._router, now, keys_at, records)
        self._explainer = CallExplainer(
            self.node_id,
            records,
            self._names,
            tuple if keys_at is None else keys_at.live,
            None if peers is None else peers.connection,
        )
        self._leaving = Leaving(self._local.answers, self._fleet.candidates)
        coordinator.executor.on_retire = self._retired
        self._started_at = wall_clock()
        self._started = now()
        self._snapshot: tuple[float, int, NodeSnapshot] | None = None
        self._probing = asyncio.Lock()
        self._pong: PingResult | None = None
        self._closing = False

    # --- the node ----------------------------------------------------------------------------------------------------

    @property
    def node_id(self) -> str:
        """This node's UUID."""
        return self._coordinator.node_id

    @property
    def active_calls(self) -> int:
        """Calls that are running now."""
        return self._calls.active

    async def idle(self) -> None:
        """Wait until no call runs."""
        await self._calls.idle()

    @property
    def keys(self) -> IdempotentAnswers:
        """See `serving.idempotency`."""
        return self._inference.answers

    def ping(self) -> PingResult:
        """No probe, no await."""
        state = self._state()
        # Frozen: the last answer is given again until the state changes, for pings are what comes most often.
        if self._pong is None or self._pong.state != state:
            self._pong = PingResult(node=self.node_id, version=__version__, state=state)
        return self._pong

    async def describe(self) -> NodeDescription:
        """Devices, replicas, counters."""
        snapshot = await self._recent_snapshot()
        return NodeDescription(
            node=self.node_id,
            name=self._name,
            version=__version__,
            state=self._state(),
            started_at=self._started_at,
            uptime_seconds=self._now() - self._started,
            platform=f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
            wsl2=self._wsl2,
            devices=[describe_device(device) for device in snapshot.devices],
            replicas=self._replicas(),
            calls=self._calls.counters().model_copy(update={"with_key": dict(self.keys.outcomes)}),
            recent_errors=self._calls.recent_errors(),
            sent_to_peers=[
                PeerCalls(peer=peer, outcome=outcome, calls=calls)
                for (peer, outcome), calls in sorted(self._router.calls_at_peers().items())
            ],
            calls_from_peers=self._router.calls_from_peers,
            attempts=[
                AttemptCounts(why=why, outcome=outcome, attempts=count)
                for (why, outcome), count in sorted(self._router.attempts().items())
            ],
            retries_refused=self._router.state.retries.refused,
            hedged_units=self._router.state.hedges.extra_units,
            peers_silent=self._fleet.pulses.times_silent if isinstance(self._fleet, MeshFleet) else 0,
            transfers=[] if self._files is None else self._files.transfers(),
            file_bytes_received=0 if self._files is None else self._files.bytes_received,
            file_bytes_sent=self._file_bytes_sent(),
        )

    def config(self) -> dict[str, Any]:
        """Secrets are `***`."""
        return self._config

    async def drain(self) -> DrainResult:
        """Running calls go on; replicas go elsewhere where they fit, and this node's memory comes back."""
        drained = await self._coordinator.drain()
        self._on_drain(True)
        await self._leaving.drained()
        nodes = self._coordinator.nodes()
        return DrainResult(
            state=self._state(),
            active_calls=self._calls.active,
            moved=[describe_assignment(each, nodes) for each in drained.moves],
            unloaded=sorted({each.model for each in drained.unloaded}),
            freed_bytes=int(drained.freed),
            message=drain_message(drained, nodes, self._name),
        )

    async def resume(self) -> DrainResult:
        """Take calls and replicas again."""
        self._coordinator.resume()
        self._on_drain(False)
        return DrainResult(
            state=self._state(),
            active_calls=self._calls.active,
            message=f"{self._name} takes replicas again: what fits nowhere else is loaded now; what moved stays where it is.",
        )

    def refuse_calls(self) -> None:
        """The node ends: no new call, and nothing moves because of that."""
        self._closing = True

    async def hand_over(self) -> None:
        """The node ends: the answers of other nodes' callers go on elsewhere, where they can."""
        await self._leaving.stopping()

    async def handed_over(self) -> None:
        """Wait until every state that left was fetched, or has waited long enough."""
        await self.kept_states.collected()

    async def close(self) -> None:
        """What is left of the answers that ran here goes with them."""
        await self._local.answers.close()

    @property
    def kept_states(self) -> KeptStates:
        """States of answers that peers go on with."""
        return self._local.answers.kept

    # --- the mesh -----------------------------------------------------------------------------------------------------

    def peers(self) -> PeersResult:
        """This node first, then its peers."""
        me = PeerDescription(
            node=self.node_id,
            name=self._name,
            state="DRAINING" if self._coordinator.draining.on else "ALIVE",
            addresses=self._addresses(),
            coordinator=self._coordinator.coordinates,
            version=__version__,
        )
        return PeersResult(peers=[me, *self._others()])

    def describe_mesh(self, params: MeshParams) -> MeshDescription:
        """As told last; this node too, so that the answer changes only when something did."""
        coordinator = self._coordinator
        view = coordinator.mesh()
        return describe_mesh(
            params,
            self.node_id,
            self.peers().peers,
            adverts(coordinator.records.map),
            plan=coordinator.plan,
            moves=coordinator.moves,
            problems=coordinator.problems,
            isolated=view is not None and view.isolated,
        )

    async def plan(self) -> PlanResult:
        """The plan in force."""
        return plan_result(self._coordinator.plan, await self._nodes(), self._coordinator.moves)

    async def explain(self, model: str) -> ExplainResult:
        """For a deployed model the plan in force; for another one what would happen if it were deployed."""
        entry = self._entry(model)
        deployment = self._coordinator.deployments.get(entry.name)
        nodes = await self._nodes()
        problem = self._coordinator.problems.get(entry.name)
        if deployment is not None:
            plan = self._coordinator.plan
        else:
            try:
                plan = await self._coordinator.preview(Deployment(entry.name))
            except TarsError as error:
                plan, problem = self._coordinator.plan, error
        verdicts = plan.verdicts.get(entry.name, ())
        remedy = next((each.remedy for each in plan.refusals if each.model == entry.name), None)
        words = explain(entry.name, plan, nodes, self._coordinator.moves)
        text = problem.message if problem is not None and not verdicts else words
        return ExplainResult(
            model=entry.name,
            deployed=deployment is not None,
            assignments=[describe_assignment(each, nodes) for each in plan.assignments if each.model == entry.name],
            verdicts=[describe_verdict(verdict, nodes) for verdict in verdicts],
            remedy=remedy or (problem.message if problem else None),
            replicas=[each for each in self._replicas() if each.model == entry.name],
            text="\n".join([text, *self._routing(entry.name)]),
        )

    async def explain_call(self, params: ExplainCallParams, call: CallContext) -> ExplainCallResult:
        """See `serving.call_explaining`."""
        return await self._explainer.explain(params, call)

    # --- models ------------------------------------------------------------------------------------------------------

    def models(self) -> ModelsResult:
        """Deployed ones first."""
        catalogue = self._coordinator.catalogue
        wanted = {deployment.model: deployment for deployment in self._coordinator.deployments.wanted()}
        described = []
        entries = {**self._fleet.entries(), **catalogue.entries}
        places = self._places()
        for entry in sorted(entries.values(), key=lambda entry: (entry.name not in wanted, entry.name)):
            deployment = wanted.get(entry.name)
            candidates = self._fleet.candidates(entry.name)
            states = [each.state for each in candidates]
            described.append(
                ModelDescription(
                    name=entry.name,
                    aliases=list(entry.aliases),
                    model_kind=entry.kind.value,
                    variants=[variant.name for variant in entry.variants],
                    description=entry.description,
                    licence=entry.licence,
                    adapters=[adapter.name for adapter in entry.adapters],
                    deployed=deployment is not None,
                    replicas_wanted=deployment.replicas if deployment else 0,
                    replicas_ready=states.count(ReplicaState.READY),
                    state=self._model_state(entry.name, states) if deployment else "available",
                    local=any(catalogue.path_of(entry, variant) is not None for variant in entry.variants),
                    places=[places(each) for each in candidates],
                )
            )
        return ModelsResult(models=described)

    async def deploy(self, params: DeployParams) -> DeployResult:
        """Refused, and not wanted, where it fits nowhere."""
        entry = self._entry(params.model)
        deployment = Deployment(
            model=entry.name,
            replicas=params.replicas,
            context=params.context,
            slots=params.slots,
            kv_tokens=params.kv_tokens,
            kv_type=KvType(params.kv_type),
            gpu_layers=params.gpu_layers,
            variant=params.variant,
            device=params.device,
        )
        if (wrong := contradiction(entry, deployment)) is not None:
            raise InvalidParams(wrong)
        preview = await self._coordinator.preview(deployment)
        refusal = next((each for each in preview.refusals if each.model == entry.name), None)
        message = ""
        if refusal is not None:
            room = None if refusal.replicas_missing > 1 else await self._coordinator.room_for(deployment)
            if room is None:
                raise refusal_error(refusal)
            message = f"No device has room for {entry.name} now. If it is still so in a minute, room is made: {room}."
        self._coordinator.deployments.deploy(deployment)
        self._coordinator.retry_failed(entry.name)
        nodes = await self._nodes()
        return DeployResult(
            model=entry.name,
            accepted=True,
            assignments=[describe_assignment(each, nodes) for each in preview.assignments if each.model == entry.name],
            message=message,
        )

    async def remove(self, model: str) -> RemoveResult:
        """Unloading goes on after the answer."""
        # Not `resolve`: a model whose file is bad, or that left the configuration, must still be removable.
        entry = self._coordinator.find(model)
        name = model if entry is None else entry.name
        removed = self._coordinator.deployments.remove(name)
        if entry is None and not removed:
            self._coordinator.catalogue.resolve(model)
        self._coordinator.wake()
        return RemoveResult(model=name, removed=removed)

    async def pull(self, params: PullParams) -> PullResult:
        """A deployment that waits for the file is carried out then."""
        store = self._file_store()
        self._coordinator.wake()  # peers hear of the transfer as soon as there is one
        pulled = await store.pull(params.model, params.variant)
        self._coordinator.wake()
        return pulled

    async def add_file(self, params: AddFileParams) -> PullResult:
        """Likewise."""
        pulled = await self._file_store().add_file(params.model, Path(params.path), params.variant)
        self._coordinator.wake()
        return pulled

    async def transfers(self) -> TransfersResult:
        """What `describe` says of them, alone."""
        return TransfersResult(transfers=[] if self._files is None else self._files.transfers())

    # --- inference ---------------------------------------------------------------------------------------------------

    def load(self) -> list[tuple[str, int, int]]:
        """This node's queues, for its answers to peers' probes: (replica, active calls, queued calls)."""
        return self._local.load()

    def peer_died(self, node: NodeId) -> None:
        """Membership gives a peer up: calls that wait for it are answered elsewhere."""
        if isinstance(self._fleet, MeshFleet):
            self._fleet.peer_died(node)

    def peer_lives(self, node: NodeId) -> None:
        """Membership heard of a peer that it had given up, or suspected: calls go there again as if nothing had been."""
        self._router.state.ledger.works(node)

    async def leave_peers(self) -> None:
        """The node ends: ask no peer any more."""
        if isinstance(self._fleet, MeshFleet):
            await self._fleet.close()

    def load_told(self, loads: Iterable[tuple[str, int, int]]) -> None:
        """A peer's queues, likewise: the router reckons with them."""
        self._router.load_told(loads)

    def chat(self, params: ChatParams, call: CallContext) -> AsyncGenerator[Delta | Progress | ChatResult]:
        """See `serving.inference`."""
        return self._serving().chat(params, call)

    def complete(self, params: CompleteParams, call: CallContext) -> AsyncGenerator[Delta | Progress | CompleteResult]:
        """See `serving.inference`."""
        return self._serving().complete(params, call)

    async def embed(self, params: EmbedParams, call: CallContext) -> EmbedResult:
        """See `serving.inference`."""
        return await self._serving().embed(params, call)

    async def rerank(self, params: RerankParams, call: CallContext) -> RerankResult:
        """See `serving.inference`."""
        return await self._serving().rerank(params, call)

    async def tokenize(self, params: TokenizeParams, call: CallContext) -> TokenizeResult:
        """See `serving.inference`."""
        return await self._serving().tokenize(params, call)

    def call_started(self, method: str) -> None:
        """Count a call."""
        self._calls.started(method)

    def call_ended(self, method: str, error: TarsError | None, trace_id: str) -> None:
        """Count its end."""
        self._calls.ended(method, error, trace_id)

    # --- inside ------------------------------------------------------------------------------------------------------

    def _retired(self, assignment: Assignment) -> None:
        if not self._closing:
            self._leaving.unloaded(assignment.replica, assignment.model)

    def _file_store(self) -> FileStore:
        if self._files is None:
            raise ModelFileMissing("This node has no folder for model files, so it fetches none.")
        return self._files

    def _state(self) -> str:
        if self._closing or self._coordinator.draining.on:
            return "draining"
        return "ready" if self._coordinator.settled() else "loading"

    def _routing(self, model: str) -> list[str]:
        """Where a usual call to the model would go now, where there is a choice."""
        reasons = self._router.ranked(model)
        return ["A call now:", *(f"  {replica}: {why}" for replica, why in reasons.items())] if len(reasons) > 1 else []

    def _entry(self, model: str) -> ModelEntry:
        """By name or alias: this node's own, looked at again where its file was bad; else a peer's. Raises `UnknownModel`."""
        entry = self._coordinator.find(model)
        own = self._coordinator.catalogue
        return own.resolve(model) if entry is None or entry.name in own.entries else entry

    async def _nodes(self) -> list[NodeSnapshot]:
        """Every live node; this one as it is now, the others as they told last."""
        own = await self._recent_snapshot()
        return [own, *(node for node in self._coordinator.nodes() if node.id != own.id)]

    def _serving(self) -> Inference:
        """In a mesh a node that drains still sends calls to the others; alone it can only refuse them."""
        self._inference.draining = self._closing or (self._coordinator.draining.on and self._alone())
        return self._inference

    def _alone(self) -> bool:
        return all(node.id == self.node_id for node in self._coordinator.nodes())

    async def _recent_snapshot(self) -> NodeSnapshot:
        async with self._probing:  # those who ask meanwhile share the answer, however slow the driver is
            now, changes = self._now(), self._coordinator.changes
            known = self._snapshot
            if known is not None and now - known[0] <= SNAPSHOT_SECONDS and known[1] == changes:
                return known[2]
            snapshot = await self._coordinator.snapshot()
            self._snapshot = (now, changes, snapshot)
            return snapshot

    def _names(self) -> Names:
        """What people call nodes, and the devices of replicas."""
        told = adverts(self._coordinator.records.map)
        nodes = {node: advert.node.name for node, advert in told.items()} | {NodeId(self.node_id): self._name}
        devices = device_names(told.values())
        devices |= {replica: live.device.name for replica, live in self._coordinator.replicas.items()}
        devices |= {replica: fetch.device.name for replica, fetch in self._coordinator.fetches.items()}
        return Names(nodes, devices)

    def _places(self) -> Callable[[Candidate], ModelPlace]:
        """How a replica's place is described."""
        names = self._names()

        def describe(candidate: Candidate) -> ModelPlace:
            return ModelPlace(
                replica=candidate.replica,
                node=candidate.node,
                node_name=names.node(candidate.node),
                device_name=names.device(candidate.replica),
                state=candidate.state.value,
            )

        return describe

    def _model_state(self, model: str, states: Sequence[ReplicaState]) -> str:
        if ReplicaState.READY in states:
            return "ready"
        if ReplicaState.FAILED in states:
            return "failed"
        return "refused" if not states and model in self._coordinator.problems else "loading"

    def _replicas(self) -> list[ReplicaDescription]:
        return [
            *(
                _describe_replica(live, self._local.gate(replica, live.worker))
                for replica, live in self._coordinator.replicas.items()
            ),
            *(_describe_fetch(fetch) for fetch in self._coordinator.fetches.values()),
        ]


def drain_message(drained: Drained, nodes: Sequence[NodeSnapshot], name: str) -> str:
    """What a person who wants the memory now should know."""
    names = {node.id: node.name for node in nodes}
    parts = [f"{name} gives {drained.freed} back" if drained.freed else f"{name} held nothing"]
    for each in drained.moves:
        parts.append(f"{each.model} goes to {names.get(each.node, each.node)} and stays here until it is ready there")
    for model in sorted({each.model for each in drained.unloaded}):
        parts.append(f"{model} fits nowhere else and is unloaded: it answers again after `tars resume`")
    return f"{'; '.join(parts)}."


def _describe_fetch(fetch: FileFetch) -> ReplicaDescription:
    assignment = fetch.assignment
    return ReplicaDescription(
        id=assignment.replica,
        model=assignment.model,
        model_kind=fetch.kind.value,
        variant=assignment.variant,
        device=assignment.device,
        device_name=fetch.device.name,
        simulated=fetch.device.simulated,
        state=fetch.state.value,
        progress=fetch.progress,
        estimated_bytes=int(assignment.memory.total),
        info=None,
        restarts=0,
        active_calls=0,
        queued_calls=0,
        calls_total=0,
        last_error=None if fetch.error is None else fetch.error.message,
        reason=assignment.reason,
    )


def _describe_replica(live: LiveReplica, gate: Gate) -> ReplicaDescription:
    worker, assignment = live.worker, live.assignment
    return ReplicaDescription(
        id=assignment.replica,
        model=assignment.model,
        model_kind=live.kind.value,
        variant=assignment.variant,
        device=assignment.device,
        device_name=live.device.name,
        simulated=live.device.simulated,
        state=worker.state.value,
        progress=worker.progress,
        estimated_bytes=int(assignment.memory.total),
        info=worker.info,
        restarts=worker.restarts,
        active_calls=worker.active_calls,
        queued_calls=worker.queued_calls + gate.waiting,
        calls_total=worker.calls_total,
        counters=worker.counters,
        waiting=gate.describe(),
        last_error=worker.last_error.message if worker.last_error else None,
        reason=assignment.reason,
    )
