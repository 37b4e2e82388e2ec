"""A call asks for a model that no replica can answer for now: have one loaded, where that moves nothing that others run.

Law of this file: it asks and plans nothing itself: what fits is the coordinator's preview, and what is wanted stands in the deployments.
A model that a call had loaded is deployed like any other from then on, until somebody removes it: what a call may take, a person can give
back, and there is no second kind of wish that every node would have to know.
"""

from __future__ import annotations

import asyncio
import logging

from tars.core.types import Deployment
from tars.errors import TarsError
from tars.mesh.coordinator import Coordinator, refusal_error
from tars.serving.fleet import ServedModel

log = logging.getLogger(__name__)


class LoadOnDemand:
    """See the module's law. `on` is the configuration's `load_on_demand`."""

    def __init__(self, coordinator: Coordinator, on: bool = True):
        self._coordinator = coordinator
        self.on = on
        self._planning = asyncio.Lock()

    def loadable(self) -> list[ServedModel]:
        """Models that nobody deployed and whose file some live node has; those that would come from the hub are not among them."""
        if not self.on:
            return []
        return [
            ServedModel(
                entry.name, entry.kind, entry.aliases, None, tuple(each.name for each in entry.adapters), deployed=False
            )
            for entry in self._coordinator.on_disk().values()
        ]

    async def ask(self, model: str) -> None:
        """Want `model`, and have it loaded soon. Raises `DoesNotFit` where nothing has room for it as it is, and what `preview` raises."""
        coordinator = self._coordinator
        async with self._planning:  # of a hundred calls that come together the first one deploys
            if coordinator.deployments.get(model) is None:
                preview = await coordinator.preview(Deployment(model))
                refusal = next((each for each in preview.refusals if each.model == model), None)
                if refusal is not None:
                    raise refusal_error(refusal)
                coordinator.deployments.deploy(Deployment(model))
                log.info(
                    "%s is loaded because a call asks for it; `tars remove %s` gives its memory back", model, model
                )
        coordinator.wake()

    def refusal(self, model: str) -> TarsError | None:
        """Why `model` is loaded nowhere, and waiting for it is of no use; None where it is of use."""
        return self._coordinator.problems.get(model)
