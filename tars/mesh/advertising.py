"""Tells the mesh what this node is, has and runs: its advert, whenever it differs from the one that the peers have.

Law of this file: it gathers and paces, and decides nothing; what is worth telling is `core.advert_changes`. At most one advert a second.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from functools import cache

from tars import __version__
from tars.catalogue import Catalogue
from tars.core.advert_changes import differs
from tars.core.records import HeldFile, NodeAdvert, ReplicaReport, TransferReport
from tars.core.replicated_map import NODE
from tars.core.types import Bytes, ModelEntry, NodeSnapshot, ReplicaId, ReplicaState
from tars.errors import TarsError
from tars.mesh.replicated_store import Records
from tars.messages.files import TransferDescription

log = logging.getLogger(__name__)

PACE_SECONDS = 1.0
"""Between two adverts of a node: a load that reports every percent is news once a second at most."""


@cache
def builtin_names() -> frozenset[str]:
    """Of the models that come with TARS, which every node's catalogue has."""
    return frozenset(Catalogue.load().entries)


class Advertising:
    """See the module's law. `held` gives the files that peers may have from here; `client_url` where clients reach this node;
    `transfers` what is on its way to it."""

    def __init__(
        self,
        catalogue: Catalogue,
        records: Records,
        *,
        held: Callable[[], Iterable[HeldFile]] = tuple,
        client_url: Callable[[], str | None] = lambda: None,
        transfers: Callable[[], Iterable[TransferDescription]] = tuple,
        now: Callable[[], float] = time.monotonic,
    ):
        self.catalogue = catalogue
        self._records = records
        self._held = held
        self._client_url = client_url
        self._transfers = transfers
        self._now = now
        self._told_at = -PACE_SECONDS

    def advert(self, node: NodeSnapshot, replicas: tuple[ReplicaReport, ...]) -> NodeAdvert:
        """This node now. A file counts from the moment it is there, hashed or not."""
        files = {(file.model, file.variant): file for file in self._held()}
        for entry in self.catalogue.entries.values():
            for variant in entry.variants:
                key = (entry.name, variant.name)
                if key not in files and self.catalogue.path_of(entry, variant) is not None:
                    files[key] = HeldFile(*key, size=variant.shape.file_bytes)
        return NodeAdvert(
            node=node,
            version=__version__,
            replicas=replicas,
            files=tuple(files[key] for key in sorted(files)),
            models=self._own_models(),
            client_url=self._client_url(),
            transfers=tuple(_reported(each) for each in self._transfers()),
        )

    def tell(self, advert: NodeAdvert) -> float | None:
        """Write the advert, if it is news; when to try again, where the pace forbids it now."""
        # What the mesh has, not what was told: after a restart with the clock set back an older word of this node may win against a newer.
        known = self._records.map.get(f"{NODE}{advert.node.id}")
        told = known if isinstance(known, NodeAdvert) else None
        if not differs(told, advert):
            return None
        due = self._told_at + PACE_SECONDS
        # A node that comes, goes or drains does not wait for its turn; nor does a replica that is ready: another one, which it replaces,
        # is unloaded at once, and meanwhile peers would know of none.
        urgent = told is None or told.node.draining != advert.node.draining or bool(_ready(advert) - _ready(told))
        if self._now() < due and not urgent:
            return due
        try:
            self._records.put(f"{NODE}{advert.node.id}", advert, saved=False)
        except TarsError as error:
            log.error("this node's advert cannot be told: %s", error)
        self._told_at = self._now()
        return None

    def _own_models(self) -> tuple[ModelEntry, ...]:
        """Entries that other nodes cannot know: `[[model]]` and `--model` of this one."""
        known = builtin_names()
        return tuple(entry for name, entry in sorted(self.catalogue.entries.items()) if name not in known)


def _reported(transfer: TransferDescription) -> TransferReport:
    return TransferReport(
        transfer.model,
        transfer.variant,
        transfer.stage,
        Bytes(transfer.bytes_done),
        Bytes(transfer.bytes_total),
        transfer.bytes_per_second,
        tuple(transfer.sources),
        transfer.note,
    )


def _ready(advert: NodeAdvert) -> set[ReplicaId]:
    return {each.assignment.replica for each in advert.replicas if each.state is ReplicaState.READY}
