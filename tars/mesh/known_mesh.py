"""What this node knows of its mesh to plan from: who is alive and has what, what is wanted, and every model's entry.

Law of this file: it reads and decides nothing, and keeps nothing but this node's own latest advert: all else is in the replicated map.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from tars.catalogue import Catalogue
from tars.core.coordination_view import CoordinationView
from tars.core.mesh_events import MeshView
from tars.core.peer import LIVE
from tars.core.plannable_models import Plannable, known_models, plannable
from tars.core.records import NodeAdvert, Wish
from tars.core.replicated_map import DEPLOYMENT, adverts, orders_for, wishes
from tars.core.types import Deployment, ModelEntry, NodeId
from tars.mesh.measured_memory import MeasuredMemory
from tars.mesh.replica_files import file_missing
from tars.mesh.replicated_store import Records


class KnownMesh:
    """`mesh`: how this node sees its peers, None where there is no mesh. `exact`: whether answers are to be the same wherever they are
    computed. `now`: monotonic seconds.
    """

    def __init__(
        self,
        node: NodeId,
        catalogue: Catalogue,
        records: Records,
        measured: MeasuredMemory,
        *,
        mesh: Callable[[], MeshView | None],
        exact: Callable[[], bool],
        hub: bool,
        now: Callable[[], float],
    ):
        self._node = node
        self.catalogue = catalogue
        self._records = records
        self._measured = measured
        self._mesh = mesh
        self._exactly = exact
        self._hub = hub
        self._now = now
        self.own: NodeAdvert | None = None
        """This node's advert, the latest, told or not; None before its first round."""

    def adverts(self) -> list[NodeAdvert]:
        """Of the nodes that this node sees alive, its own first."""
        view = self._mesh()
        live: set[NodeId] = set()
        if view is not None:
            live = {member.node for member in view.members.values() if member.state in LIVE}
        found = [advert for node, advert in adverts(self._records.map).items() if node in live and node != self._node]
        return found if self.own is None else [self.own, *found]

    def entries(self) -> dict[str, ModelEntry]:
        """Every model that some live node knows, by name."""
        return known_models(self.catalogue.entries, self.adverts(), wishes(self._records.map).values())

    def find(self, model: str) -> ModelEntry | None:
        """An entry by name or alias: this node's own, else a peer's."""
        return self.catalogue.find(model) or self.entries().get(model)

    def resolve(self, model: str) -> ModelEntry:
        """The same; raises `UnknownModel`."""
        entry = self.find(model)
        own = entry is None or entry.name in self.catalogue.entries
        return self.catalogue.resolve(model) if own or entry is None else entry

    def plannable(self) -> Plannable:
        """The wanted models, with and without files."""
        return plannable(self.catalogue.entries, self.adverts(), self.wishes(), hub=self._hub)

    def on_disk(self) -> dict[str, ModelEntry]:
        """Models that nobody wants and of which some live node has a file, by name."""
        wanted = {wish.deployment.model for wish in self.wishes()}
        others = [Wish(Deployment(name), entry) for name, entry in self.entries().items() if name not in wanted]
        return plannable(self.catalogue.entries, self.adverts(), others, hub=False).models

    def wishes(self) -> list[Wish]:
        """What is wanted, as it is planned."""
        return [replace(wish, deployment=self._exact(wish.deployment)) for wish in wishes(self._records.map).values()]

    def view(self, wanted: Sequence[Wish] | None = None) -> CoordinationView:
        """All that a decision is made from; `wanted` instead of `wishes`."""
        wanted = self.wishes() if wanted is None else wanted
        records = self._records.map
        found = self.adverts()
        orders = {advert.node.id: orders_for(records, advert.node.id) for advert in found}
        versions = {
            wish.deployment.model: record.stamp
            for wish in wanted
            if (record := records.record(DEPLOYMENT + wish.deployment.model)) is not None
        }
        return CoordinationView(
            adverts=tuple(found),
            wishes=tuple(wanted),
            now=self._now(),
            orders={node: each for node, each in orders.items() if each is not None},
            models=self.catalogue.entries,
            measured=self._measured.by_key(),
            hub=self._hub,
            versions=versions,
        )

    def view_with(self, deployment: Deployment) -> CoordinationView:
        """The same, with `deployment` wanted too. Raises the reason why its model cannot be planned at all."""
        entry = self.resolve(deployment.model)
        others = [each for each in self.wishes() if each.deployment.model != entry.name]
        known = wishes(self._records.map).get(entry.name)
        wish = Wish(self._exact(replace(deployment, model=entry.name)), None if known is None else known.entry)
        view = self.view((*others, wish))
        if entry.name in plannable(view.models, view.adverts, view.wishes, hub=view.hub).without_file:
            raise file_missing(self.catalogue, entry)
        return view

    def _exact(self, deployment: Deployment) -> Deployment:
        """Slots that share cells are never exact, and sharing is the default: without a word on slots there is one, as large."""
        if self._exactly() and deployment.slots is deployment.kv_tokens is None:
            return replace(deployment, slots=1)
        return deployment
