"""What loads really took: kept across restarts, and used instead of the estimate from then on.

Law of this file: a measurement counts only for the very same load (`MeasuredKey`); the newest one stands.
"""

from __future__ import annotations

import logging
from dataclasses import asdict
from typing import Any

from tars.core.placement import MeasuredKey, measured_key
from tars.core.types import Assignment, Bytes, DeviceId, DeviceSnapshot, KvType
from tars.errors import TarsError
from tars.state_folder import StateFolder

log = logging.getLogger(__name__)

FILE = "measured_memory.json"


class MeasuredMemory:
    """This node's measurements; a full disk loses at most their persistence."""

    def __init__(self, folder: StateFolder):
        self._folder = folder
        self._bytes: dict[MeasuredKey, Bytes] = {}
        stored = folder.read_json(FILE)
        for record in stored.get("measured", []) if isinstance(stored, dict) else []:
            try:
                self._bytes[_key(record["key"])] = Bytes(record["bytes"])
            except (KeyError, TypeError, ValueError):
                continue  # written by another version: measured again at the next load

    def by_key(self) -> dict[MeasuredKey, Bytes]:
        """For the planner."""
        return self._bytes

    def learn(self, assignment: Assignment, device: DeviceSnapshot, taken: Bytes) -> None:
        """Keep what this load took. A simulated device's bytes are declared, not measured, so they teach nothing."""
        if device.simulated or taken <= 0:
            return
        key = measured_key(assignment, device)
        if self._bytes.get(key) == taken:
            return
        self._bytes[key] = taken
        records: list[dict[str, Any]] = [{"key": _plain(key), "bytes": int(size)} for key, size in self._bytes.items()]
        try:
            self._folder.write_json(FILE, {"version": 1, "measured": records})
        except (TarsError, OSError) as error:
            log.warning("measured memory was not saved: %s", error)


def _plain(key: MeasuredKey) -> dict[str, Any]:
    return {**asdict(key), "kv_type": key.kv_type.value}


def _key(plain: dict[str, Any]) -> MeasuredKey:
    return MeasuredKey(**{**plain, "device": DeviceId(plain["device"]), "kv_type": KvType(plain["kv_type"])})
