"""What loads really took: shared with all nodes, kept across restarts, and used instead of the estimate from then on.

Law of this file: a measurement counts only for the very same load on the same kind of card (`MeasuredKey`), wherever in the mesh it was
made; the newest one stands.
"""

from __future__ import annotations

import logging

from tars.core.placement_cost import MeasuredKey, measured_by_key, measured_key
from tars.core.records import MeasuredLoad
from tars.core.replicated_map import measured
from tars.core.replicated_map import measured_key as record_key
from tars.core.types import Assignment, Bytes, DeviceSnapshot
from tars.errors import TarsError
from tars.mesh.replicated_store import Records

log = logging.getLogger(__name__)

SAME = 0.02
"""Loads of one model differ by so little: a lower figure within it changes nothing, so that two PCs do not take turns in correcting each
other. A higher one always counts, since the planner must not promise what a load took before."""


class MeasuredMemory:
    """The mesh's measurements; a full disk loses at most their persistence."""

    def __init__(self, records: Records):
        self._records = records

    def by_key(self) -> dict[MeasuredKey, Bytes]:
        """For the planner."""
        return measured_by_key(measured(self._records.map))

    def learn(self, assignment: Assignment, device: DeviceSnapshot, taken: Bytes) -> None:
        """Keep what this load took. A simulated device's bytes are declared, not measured, so they teach nothing."""
        if device.simulated or taken <= 0:
            return
        key = measured_key(assignment, device)
        load = MeasuredLoad(
            card=key.card,
            file=key.file,
            context=key.context,
            slots=key.slots,
            kv_tokens=key.kv_tokens,
            kv_type=key.kv_type,
            gpu_layers=key.gpu_layers,
            taken=taken,
        )
        name = record_key(load)
        known = self._records.map.get(name)
        if isinstance(known, MeasuredLoad) and known.taken * (1 - SAME) <= taken <= known.taken:
            return
        try:
            self._records.put(name, load)
        except (TarsError, OSError) as error:
            log.warning("measured memory was not saved: %s", error)
            self._records.put(name, load, saved=False)
