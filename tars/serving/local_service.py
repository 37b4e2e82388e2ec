"""The node itself behind `service.NodeService`: its parts put together, its life from the first call to the last, and the way of a call in.

Law of this file: it only puts together and passes on; every decision is made elsewhere. What people ask about models is
`model_requests`', what this node tells of itself is `node_description`'s.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from typing import Any

from tars import __version__
from tars.core.types import Assignment, NodeId, NodeSnapshot
from tars.errors import TarsError
from tars.mesh.administration import Administration
from tars.mesh.client_keys import ClientKeys
from tars.mesh.coordinator import Coordinator, Drained
from tars.mesh.model_store import FileStore
from tars.mesh.plan_report import describe_assignment
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
    DeployParams,
    DeployResult,
    DrainResult,
    ExplainResult,
    ModelsResult,
    NodeDescription,
    PeerDescription,
    PeersResult,
    PingResult,
    PlanResult,
    RemoveResult,
)
from tars.serving.call_explaining import CallExplainer
from tars.serving.call_log import CallLog
from tars.serving.call_record import CallRecords
from tars.serving.idempotency import IdempotentAnswers, OtherNodes
from tars.serving.inference import Inference
from tars.serving.kept_states import KeptStates
from tars.serving.leaving import Leaving
from tars.serving.local_fleet import LocalFleet
from tars.serving.local_view import LocalView
from tars.serving.mesh_fleet import MeshFleet, Peers
from tars.serving.model_requests import ModelRequests
from tars.serving.node_description import NodeDescriber
from tars.serving.router import Router
from tars.serving.running_answers import PeerStates, RunningAnswers
from tars.serving.service import MeshService


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
        self._on_drain = on_drain
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
        view = LocalView(coordinator, self._local, name, now)
        self._models = ModelRequests(coordinator, view, self._fleet, self._router, files)
        self._describer = NodeDescriber(
            coordinator,
            view,
            self._fleet,
            self._router,
            self._calls,
            self.keys,
            name=name,
            wsl2=wsl2,
            addresses=addresses,
            others=others,
            files=files,
            file_bytes_sent=file_bytes_sent,
            now=now,
            wall_clock=wall_clock,
        )
        self._explainer = CallExplainer(
            self.node_id,
            records,
            view.names,
            tuple if keys_at is None else keys_at.live,
            None if peers is None else peers.connection,
        )
        self._leaving = Leaving(self._local.answers, self._fleet.candidates)
        coordinator.executor.on_retire = self._retired
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
        return await self._describer.node(self._state())

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
        return self._describer.peers()

    def describe_mesh(self, params: MeshParams) -> MeshDescription:
        """As told last; this node too, so that the answer changes only when something did."""
        return self._describer.mesh(params)

    async def explain_call(self, params: ExplainCallParams, call: CallContext) -> ExplainCallResult:
        """See `serving.call_explaining`."""
        return await self._explainer.explain(params, call)

    # --- models (see `model_requests`) ---------------------------------------------------------------------------------

    def models(self) -> ModelsResult:
        """Deployed ones first."""
        return self._models.models()

    async def plan(self) -> PlanResult:
        """The plan in force."""
        return await self._models.plan()

    async def explain(self, model: str) -> ExplainResult:
        """Why here, why not there."""
        return await self._models.explain(model)

    async def deploy(self, params: DeployParams) -> DeployResult:
        """Refused, and not wanted, where it fits nowhere."""
        return await self._models.deploy(params)

    async def remove(self, model: str) -> RemoveResult:
        """Unloading goes on after the answer."""
        return await self._models.remove(model)

    async def pull(self, params: PullParams) -> PullResult:
        """A deployment that waits for the file is carried out then."""
        return await self._models.pull(params)

    async def add_file(self, params: AddFileParams) -> PullResult:
        """Likewise."""
        return await self._models.add_file(params)

    async def transfers(self) -> TransfersResult:
        """What `describe` says of them, alone."""
        return await self._models.transfers()

    # --- inference ---------------------------------------------------------------------------------------------------

    def load(self) -> list[tuple[str, int, int]]:
        """This node's queues, for its answers to peers' probes: (replica, active calls, queued calls)."""
        return self._local.load()

    def peer_died(self, node: NodeId) -> None:
        """Membership gives a peer up: calls that wait for it are answered elsewhere."""
        if isinstance(self._fleet, MeshFleet):
            self._fleet.peer_died(node)

    def peer_went(self, node: NodeId) -> None:
        """A peer died or said good-bye: it may be back in a moment."""
        if isinstance(self._fleet, MeshFleet):
            self._fleet.peer_went(node)

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

    def _state(self) -> str:
        if self._closing or self._coordinator.draining.on:
            return "draining"
        return "ready" if self._coordinator.settled() else "loading"

    def _serving(self) -> Inference:
        """In a mesh a node that drains still sends calls to the others; alone it can only refuse them."""
        self._inference.draining = self._closing or (self._coordinator.draining.on and self._alone())
        return self._inference

    def _alone(self) -> bool:
        return all(node.id == self.node_id for node in self._coordinator.nodes())


def drain_message(drained: Drained, nodes: Sequence[NodeSnapshot], name: str) -> str:
    """What a person who wants the memory now should know."""
    names = {node.id: node.name for node in nodes}
    parts = [f"{name} gives {drained.freed} back" if drained.freed else f"{name} held nothing"]
    for each in drained.moves:
        parts.append(f"{each.model} goes to {names.get(each.node, each.node)} and stays here until it is ready there")
    for model in sorted({each.model for each in drained.unloaded}):
        parts.append(f"{model} fits nowhere else and is unloaded: it answers again after `tars resume`")
    return f"{'; '.join(parts)}."
