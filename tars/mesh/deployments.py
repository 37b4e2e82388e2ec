"""What is wanted: the configuration's deployments, overlaid by what `models.deploy` and `models.remove` decided since.

Law of this file: it knows wishes only, nothing of devices or replicas. Every decision is saved before it counts.
A decision outlives restarts until somebody edits the configuration's entry for that model: then the file, being newer, wins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from tars.core.types import Deployment, KvType
from tars.state_folder import StateFolder

FILE = "deployments.json"


def _to_json(deployment: Deployment | None) -> dict[str, Any] | None:
    return None if deployment is None else {**asdict(deployment), "kv_type": deployment.kv_type.value}


def _from_json(value: Any) -> Deployment | None:
    return None if value is None else Deployment(**{**value, "kv_type": KvType(value["kv_type"])})


class Deployments:
    """The wishes of this node. `declared` come from the configuration, in its order."""

    def __init__(self, folder: StateFolder, declared: Sequence[Deployment]):
        self._folder = folder
        self._declared = {deployment.model: deployment for deployment in declared}
        self._decided: dict[str, Deployment | None] = {}
        stored = folder.read_json(FILE)
        records = stored.get("decided", {}) if isinstance(stored, dict) else {}
        for model, record in records.items():
            try:
                wanted, basis = _from_json(record["wanted"]), _from_json(record["declared"])
            except (KeyError, TypeError, ValueError):
                continue  # written by another version, or by hand: the configuration stands
            if basis == self._declared.get(model):
                self._decided[model] = wanted

    def wanted(self) -> tuple[Deployment, ...]:
        """Every deployment in force: the configuration's first, in its order."""
        merged: dict[str, Deployment | None] = {**self._declared, **self._decided}
        return tuple(deployment for deployment in merged.values() if deployment is not None)

    def get(self, model: str) -> Deployment | None:
        """The deployment of one model, if it is wanted."""
        return next((deployment for deployment in self.wanted() if deployment.model == model), None)

    def deploy(self, deployment: Deployment) -> None:
        """Want a model. Raises `DiskFull`; then nothing changed."""
        self._save({**self._decided, deployment.model: deployment})

    def remove(self, model: str) -> bool:
        """Want it no longer; False where it was not wanted. Raises `DiskFull`; then nothing changed."""
        if self.get(model) is None:
            return False
        self._save({**self._decided, model: None})
        return True

    def _save(self, decided: dict[str, Deployment | None]) -> None:
        records = {
            model: {"wanted": _to_json(wanted), "declared": _to_json(self._declared.get(model))}
            for model, wanted in decided.items()
            if wanted is not None or model in self._declared
        }
        self._folder.write_json(FILE, {"version": 1, "decided": records})
        self._decided = {model: wanted for model, wanted in decided.items() if model in records}
