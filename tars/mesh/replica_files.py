"""The files of the replicas that this node was ordered to have: where they are, which are on their way, and why one did not come.

Law of this file: one transfer a replica. What did not come is asked for again after a while, for as long as the replica is ordered; which
ones are is the executor's to say, and what came is kept by whoever keeps files.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from tars.catalogue import Catalogue
from tars.core.coordination_view import FETCH
from tars.core.records import HeldFile
from tars.core.types import Assignment, DeviceSnapshot, ModelEntry, ModelKind, ReplicaId, ReplicaState, Variant
from tars.errors import InternalError, ModelFileMissing, TarsError
from tars.messages.files import TransferDescription
from tars.messages.node import LoadProgress

log = logging.getLogger(__name__)

FETCH_AGAIN_SECONDS = 60.0
"""A file that could not be had is asked for again so much later, where the node is still to have it: what came is kept."""


@dataclass(slots=True)
class FileFetch:
    """The file of an ordered replica on its way to this node, or why it did not come."""

    assignment: Assignment
    device: DeviceSnapshot
    kind: ModelKind
    progress: LoadProgress = field(default_factory=lambda: LoadProgress(stage=FETCH, percent=0.0))
    task: asyncio.Task[None] | None = None
    error: TarsError | None = None
    again_at: float = 0.0

    @property
    def state(self) -> ReplicaState:
        """As its replica's."""
        return ReplicaState.STARTING if self.error is None else ReplicaState.FAILED


class ModelFiles(Protocol):
    """The model files of this node; `model_store.FileStore` is the real one."""

    async def ensure(
        self, entry: ModelEntry, variant: Variant, progress: Callable[[TransferDescription], None]
    ) -> Path:
        """The file (or folder), fetched if need be. Raises `TarsError`s."""

    def held(self) -> list[HeldFile]:
        """What is here."""


class ReplicaFiles:
    """See the module's law. `find`: a model's entry by name. `store` None: nothing can be fetched. `on_change` is told of whatever changes,
    with `True` where the executor should look again.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        store: ModelFiles | None,
        *,
        find: Callable[[str], ModelEntry | None],
        on_change: Callable[[bool], None],
        now: Callable[[], float],
    ):
        self.catalogue = catalogue
        self._store = store
        self._find = find
        self._on_change = on_change
        self._now = now
        self.fetches: dict[ReplicaId, FileFetch] = {}
        """On their way, or not come."""

    def held(self) -> list[HeldFile]:
        """The files that are here."""
        return [] if self._store is None else self._store.held()

    def settled(self) -> bool:
        """Whether nothing is on its way."""
        return not any(fetch.error is None for fetch in self.fetches.values())

    def entry(self, assignment: Assignment) -> tuple[ModelEntry, Variant] | None:
        """What it is to load; None where this node knows no such model."""
        entry = self._find(assignment.model)
        variant = (
            None if entry is None else next((each for each in entry.variants if each.name == assignment.variant), None)
        )
        return None if entry is None or variant is None else (entry, variant)

    def path(self, assignment: Assignment) -> Path | None:
        """Where its file is; None where it is not here."""
        found = self.entry(assignment)
        return None if found is None else self.catalogue.path_of(*found)

    def fetch(self, assignment: Assignment, device: DeviceSnapshot) -> None:
        """Have its file come, unless it is on its way, or did not come a moment ago."""
        known = self.fetches.get(assignment.replica)
        if known is not None and (known.error is None or self._now() < known.again_at):
            return
        found = self.entry(assignment)
        if found is None:
            unknown = ModelFileMissing(f"this node knows no {assignment.variant} of {assignment.model}")
            self.cannot_come(assignment, device, ModelKind.CHAT, unknown)
        elif self._store is None:
            self.cannot_come(assignment, device, found[0].kind, file_missing(self.catalogue, found[0]))
        else:
            log.info("fetching the file of %s", assignment.replica)
            fetch = self.fetches[assignment.replica] = FileFetch(assignment, device, found[0].kind)
            fetch.task = asyncio.create_task(
                self._fetched(fetch, self._store, *found), name=f"file {assignment.replica}"
            )

    def cannot_come(self, assignment: Assignment, device: DeviceSnapshot, kind: ModelKind, error: TarsError) -> None:
        """A file that the replica needs cannot be fetched at all."""
        fetch = self.fetches[assignment.replica] = FileFetch(assignment, device, kind)
        self._did_not_come(fetch, error)

    def came(self, replica: ReplicaId) -> None:
        """It is being loaded."""
        self.fetches.pop(replica, None)

    def keep(self, replicas: Container[ReplicaId]) -> None:
        """Give up those of all others."""
        for replica in [replica for replica in self.fetches if replica not in replicas]:
            self._give_up(replica)

    def retry_failed(self, model: str) -> None:
        """Forget that a model's files did not come, so that they are asked for again at once."""
        for replica, fetch in list(self.fetches.items()):
            if fetch.assignment.model == model and fetch.error is not None:
                self._give_up(replica)

    async def _fetched(self, fetch: FileFetch, files: ModelFiles, entry: ModelEntry, variant: Variant) -> None:
        def report(transfer: TransferDescription) -> None:
            share = transfer.bytes_done / transfer.bytes_total if transfer.bytes_total else 0.0
            fetch.progress = LoadProgress(stage=FETCH, percent=round(100 * max(0.0, min(1.0, share)), 1))
            self._on_change(False)

        try:
            await files.ensure(entry, variant, report)
        except TarsError as error:
            self._did_not_come(fetch, error)
        except Exception as error:
            log.exception("the file of %s could not be fetched", fetch.assignment.replica)
            self._did_not_come(fetch, InternalError(f"the file of {entry.name} could not be fetched: {error}"))
        else:
            self.came(fetch.assignment.replica)
            self._on_change(True)

    def _did_not_come(self, fetch: FileFetch, error: TarsError) -> None:
        fetch.error, fetch.again_at = error, self._now() + FETCH_AGAIN_SECONDS
        # Without a task it fails within a round: waking another one at once would spin.
        self._on_change(fetch.task is not None)

    def _give_up(self, replica: ReplicaId) -> None:
        fetch = self.fetches.pop(replica)
        if fetch.task is not None:
            fetch.task.cancel()


def file_missing(catalogue: Catalogue, entry: ModelEntry) -> TarsError:
    """Why no file of the model can be loaded, and where to get one."""
    if (known := catalogue.missing(entry)) is not None:
        return known
    sources = "; ".join(f"{v.file} of {v.repo} on Hugging Face" for v in entry.variants if v.repo and v.file)
    return ModelFileMissing(
        f"the catalogue knows {entry.name}, but its file is not on this PC. "
        + (f"Download {sources or 'it'}, then name it in a [[model]] table (name, path) of the node's ")
        + "configuration, or start with `tars-node --model FILE`",
        details={"model": entry.name},
    )
