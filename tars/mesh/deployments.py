"""What is wanted in the whole mesh: every configuration's deployments, and what `models.deploy` and `models.remove` decided since.

Law of this file: it knows wishes only, nothing of devices or replicas. They stand in the replicated map, and the newest one counts. An
entry of this node's configuration is a wish of the moment when it was first seen: it is written once, and again when somebody edits it. So
a decision outlives restarts until somebody edits the configuration's entry for that model: then the file, being newer, wins. An entry that
was taken out of the file takes its wish with it, unless somebody decided otherwise since.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from tars.core.mesh_messages import Record, Stamp
from tars.core.records import Wish
from tars.core.replicated_map import DEPLOYMENT, wishes
from tars.core.types import Deployment, ModelEntry
from tars.errors import DiskFull, InvalidParams, TarsError
from tars.mesh.record_codec import decode_stamp, encode_stamp
from tars.mesh.replicated_store import Records
from tars.state_folder import StateFolder

log = logging.getLogger(__name__)

FILE = "declared.json"
"""What this node last wrote of its configuration's entries, and when."""
OLD_FILE = "deployments.json"
"""Of TARS before the mesh: this node's own decisions. Read once, then renamed."""

_DEPLOYMENT = TypeAdapter(Deployment)


@dataclass(frozen=True, slots=True)
class _Written:
    """An entry of the configuration as it was last written to the map; `stamp` None where an older decision stood against it."""

    deployment: Deployment
    stamp: Stamp | None


class Deployments:
    """The wishes as this node sees them. `declared` come from its configuration, in its order.

    `folder` None: nothing is remembered of what was declared before (tests). `entry_of` gives the catalogue entry of a model that other
    nodes' catalogues lack, None for all others.
    """

    def __init__(
        self,
        records: Records,
        declared: Sequence[Deployment] = (),
        folder: StateFolder | None = None,
        *,
        entry_of: Callable[[str], ModelEntry | None] = lambda model: None,
    ):
        self._records = records
        self._declared = {deployment.model: deployment for deployment in declared}
        self._entry_of = entry_of
        self._folder = folder
        self._declare()

    def wanted(self) -> tuple[Deployment, ...]:
        """Every deployment in force: the configuration's first, in its order, then by name."""
        wanted = {model: wish.deployment for model, wish in wishes(self._records.map).items()}
        first = [wanted.pop(model) for model in self._declared if model in wanted]
        return (*first, *wanted.values())

    def get(self, model: str) -> Deployment | None:
        """The deployment of one model, if it is wanted."""
        wish = self._records.map.get(DEPLOYMENT + model)
        return wish.deployment if isinstance(wish, Wish) else None

    def deploy(self, deployment: Deployment) -> None:
        """Want a model, in the whole mesh. Raises `DiskFull`; then nothing changed."""
        self._records.put(DEPLOYMENT + deployment.model, self._wish(deployment))

    def remove(self, model: str) -> bool:
        """Want it no longer, in the whole mesh; False where it was not wanted. Raises `DiskFull`; then nothing changed."""
        if self.get(model) is None:
            return False
        self._records.remove(DEPLOYMENT + model)
        return True

    def _wish(self, deployment: Deployment) -> Wish:
        return Wish(deployment, self._entry_of(deployment.model))

    # --- the configuration's entries ------------------------------------------------------------------------------------

    def _declare(self) -> None:
        """Write what is new in the configuration since this node last did."""
        before = self._read()
        written = {**before, **self._migrate()}
        for model, deployment in self._declared.items():
            known = written.get(model)
            if known is None or known.deployment != deployment:
                written[model] = _Written(deployment, self._put(deployment).stamp)
            elif known.stamp is not None and self._records.lost:
                # Saved by this node, and lost with its file. Not a new wish: whatever the mesh decided since stands.
                self._records.restore(Record(DEPLOYMENT + model, known.stamp, self._wish(deployment)))
        for model in [model for model in written if model not in self._declared]:
            try:
                self._withdraw(model, written[model])
            except (TarsError, OSError) as error:
                log.warning(
                    "%s is in the configuration no longer; that is not saved, and tried again at the next start: %s",
                    model,
                    error,
                )
            else:
                del written[model]
        if written != before:
            self._save(written)

    def _put(self, deployment: Deployment) -> Record:
        key, wish = DEPLOYMENT + deployment.model, self._wish(deployment)
        try:
            return self._records.put(key, wish)
        except (DiskFull, OSError) as error:
            # The configuration is on the disk, so nothing is lost by going on.
            log.warning(
                "the configuration's deployment of %s is in force, but was not saved yet: %s", deployment.model, error
            )
            return self._records.put(key, wish, saved=False)

    def _withdraw(self, model: str, written: _Written) -> None:
        record = self._records.map.record(DEPLOYMENT + model)
        if record is not None and record.value is not None and record.stamp == written.stamp:
            self._records.remove(DEPLOYMENT + model)

    # --- what this node remembers of them -------------------------------------------------------------------------------

    def _read(self) -> dict[str, _Written]:
        stored = {} if self._folder is None else self._folder.read_json(FILE)
        found: dict[str, _Written] = {}
        for plain in _list(stored, "declared"):
            # What is of another version, or written by hand, is as if the entry were new: the configuration stands.
            with suppress(AttributeError, ValidationError, InvalidParams):
                deployment = _DEPLOYMENT.validate_python(plain.get("deployment"))
                stamp = plain.get("stamp")
                found[deployment.model] = _Written(deployment, None if stamp is None else decode_stamp(stamp))
        return found

    def _save(self, written: dict[str, _Written]) -> None:
        if self._folder is None:
            return
        declared = [
            {
                "deployment": _DEPLOYMENT.dump_python(each.deployment, mode="json"),
                "stamp": None if each.stamp is None else encode_stamp(each.stamp),
            }
            for each in written.values()
        ]
        try:
            self._folder.write_json(FILE, {"version": 1, "declared": declared})
        except (TarsError, OSError) as error:
            log.warning(
                "which deployments the configuration has was not saved; the next start writes them again: %s", error
            )
            return
        with suppress(OSError):
            os.replace(self._folder.path / OLD_FILE, self._folder.path / f"{OLD_FILE}.old")

    def _migrate(self) -> dict[str, _Written]:
        """Take over the decisions of a single node from before the mesh: each holds while the configuration's entry is as it was then."""
        stored = {} if self._folder is None else self._folder.read_json(OLD_FILE)
        decided = stored.get("decided") if isinstance(stored, dict) else None
        taken: dict[str, _Written] = {}
        for model, plain in decided.items() if isinstance(decided, dict) else ():
            try:
                wanted, basis = (
                    None if plain[name] is None else _DEPLOYMENT.validate_python(plain[name])
                    for name in ("wanted", "declared")
                )
            except (KeyError, TypeError, ValidationError):
                continue  # written by another version, or by hand: the configuration stands
            if basis != self._declared.get(model):
                continue
            if wanted is not None and self.get(model) != wanted:
                self._put(wanted)
            if basis is not None:
                taken[model] = _Written(basis, None)
        return taken


def _list(stored: Any, name: str) -> Iterable[Any]:
    found = stored.get(name) if isinstance(stored, dict) else None
    return found if isinstance(found, list) else ()
