"""What people ask about models and their places: which there are, what is wanted of them, where they are or would be loaded and why, and
their files.

Law of this file: it gathers, phrases and passes wishes on. What fits where is the coordinator's to say, what is wanted stands in the
deployments, and no call to a model passes here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from tars.core.explanation import explain
from tars.core.placement_cost import contradiction
from tars.core.routing import Candidate
from tars.core.types import Deployment, KvType, ReplicaState
from tars.errors import InvalidParams, ModelFileMissing, TarsError
from tars.mesh.coordinator import Coordinator, refusal_error
from tars.mesh.model_store import FileStore
from tars.mesh.plan_report import describe_assignment, describe_verdict, plan_result
from tars.messages.files import AddFileParams, PullParams, PullResult, TransfersResult
from tars.messages.node import (
    DeployParams,
    DeployResult,
    ExplainResult,
    ModelDescription,
    ModelPlace,
    ModelsResult,
    PlanResult,
    RemoveResult,
)
from tars.serving.local_fleet import LocalFleet
from tars.serving.local_view import LocalView
from tars.serving.mesh_fleet import MeshFleet
from tars.serving.router import Router


class ModelRequests:
    """See the module's law; every method is documented at `service.NodeService`. `fleet`: the replicas of the whole mesh, as `router`
    sees them. `files` None: this node has no folder for model files.
    """

    def __init__(
        self,
        coordinator: Coordinator,
        view: LocalView,
        fleet: LocalFleet | MeshFleet,
        router: Router,
        files: FileStore | None = None,
    ):
        self._coordinator = coordinator
        self._view = view
        self._fleet = fleet
        self._router = router
        self._files = files

    # --- what there is -----------------------------------------------------------------------------------------------

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

    async def plan(self) -> PlanResult:
        """The plan in force."""
        return plan_result(self._coordinator.plan, await self._view.nodes(), self._coordinator.moves)

    async def explain(self, model: str) -> ExplainResult:
        """For a deployed model the plan in force; for another one what would happen if it were deployed."""
        entry = self._coordinator.known.resolve(model)
        deployment = self._coordinator.deployments.get(entry.name)
        nodes = await self._view.nodes()
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
            replicas=[each for each in self._view.replicas() if each.model == entry.name],
            text="\n".join([text, *self._routing(entry.name)]),
        )

    # --- what is wanted ----------------------------------------------------------------------------------------------

    async def deploy(self, params: DeployParams) -> DeployResult:
        """Refused, and not wanted, where it fits nowhere."""
        entry = self._coordinator.known.resolve(params.model)
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
        nodes = await self._view.nodes()
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

    # --- files -------------------------------------------------------------------------------------------------------

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
        """What `node.describe` says of them, alone."""
        return TransfersResult(transfers=[] if self._files is None else self._files.transfers())

    # --- inside ------------------------------------------------------------------------------------------------------

    def _routing(self, model: str) -> list[str]:
        """Where a usual call to the model would go now, where there is a choice."""
        reasons = self._router.ranked(model)
        return ["A call now:", *(f"  {replica}: {why}" for replica, why in reasons.items())] if len(reasons) > 1 else []

    def _places(self) -> Callable[[Candidate], ModelPlace]:
        """How a replica's place is described."""
        names = self._view.names()

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

    def _file_store(self) -> FileStore:
        if self._files is None:
            raise ModelFileMissing("This node has no folder for model files, so it fetches none.")
        return self._files
