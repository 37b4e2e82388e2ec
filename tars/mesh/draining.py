"""Whether this node gives its memory back: `node.drain` until `node.resume`, over restarts.

Law of this file: one flag, saved before it counts.
"""

from __future__ import annotations

from tars.state_folder import StateFolder

FILE = "draining.json"


class Draining:
    """See the module's law; without a folder (tests) nothing outlives the process."""

    def __init__(self, folder: StateFolder | None = None):
        self._folder = folder
        stored = None if folder is None else folder.read_json(FILE)
        self._on = isinstance(stored, dict) and stored.get("draining") is True

    @property
    def on(self) -> bool:
        """True from `node.drain` to `node.resume`."""
        return self._on

    def set(self, on: bool) -> None:
        """Raises `DiskFull`; then nothing changed."""
        if on != self._on and self._folder is not None:
            self._folder.write_json(FILE, {"version": 1, "draining": on})
        self._on = on
