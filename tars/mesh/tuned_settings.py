"""What loads measured and chose by themselves (flash attention, chunk, back end, speeds): kept across restarts, so that the next load of
the very same need not measure again.

Law of this file: "the very same" is everything that the worker is told, the files' sizes and times, what computes, and the versions of the
engine's packages. Whatever differs is measured anew; nothing is decided here.
"""

from __future__ import annotations

import json
import logging
import os
import platform
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from tars import __version__
from tars.core.types import DeviceSnapshot
from tars.errors import TarsError
from tars.messages.node import TunedSettings
from tars.state_folder import StateFolder
from tars.workers.engine import LoadSpec

log = logging.getLogger(__name__)

FILE = "tuned_settings.json"
MOST = 200
"""Loads remembered: the oldest leave first, and cost a second measurement."""
PACKAGES: Mapping[str, tuple[str, ...]] = {
    "llama": ("llama-cpp-python",),
    "sentence-transformers": ("torch", "sentence-transformers", "transformers", "openvino", "onnxruntime"),
}
"""By engine: what computes there. Another version may be faster in another way."""
NOT_THE_LOAD = {"replica", "sha256", "tuned"}
"""What of a `LoadSpec` changes nothing in how it runs."""


def installed_versions(engine: str) -> dict[str, str]:
    """Of the engine's packages that are installed; read from their metadata, nothing is imported."""
    found = {"tars": __version__}
    for package in PACKAGES.get(engine, ()):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


class TunedSettingsStore:
    """This node's measurements; a full disk loses at most their persistence."""

    def __init__(self, folder: StateFolder, versions: Callable[[str], Mapping[str, str]] = installed_versions):
        self._folder = folder
        self._versions = versions
        self._tuned: dict[str, TunedSettings] = {}
        stored = folder.read_json(FILE)
        records = stored.get("tuned") if isinstance(stored, dict) else None
        for record in records if isinstance(records, list) else []:
            try:
                self._tuned[_text(record["load"])] = TunedSettings.model_validate(record["tuned"])
            except (KeyError, TypeError, ValueError):
                continue  # written by another version: measured again at the next load

    def known(self, spec: LoadSpec, device: DeviceSnapshot) -> TunedSettings | None:
        """What an earlier load of the very same found; None where it was not loaded yet, or something has changed."""
        return self._tuned.get(_text(self._load(spec, device)))

    def learn(self, spec: LoadSpec, device: DeviceSnapshot, tuned: TunedSettings) -> None:
        """Keep what this load found; nothing where it measured nothing."""
        if tuned == TunedSettings():
            return
        key = _text(self._load(spec, device))
        if self._tuned.pop(key, None) == tuned:
            self._tuned[key] = tuned
            return
        self._tuned[key] = tuned
        for oldest in list(self._tuned)[:-MOST]:
            del self._tuned[oldest]
        records = [{"load": json.loads(each), "tuned": found.model_dump()} for each, found in self._tuned.items()]
        try:
            self._folder.write_json(FILE, {"version": 1, "tuned": records})
        except (TarsError, OSError) as error:
            log.warning("tuned settings were not saved: %s", error)

    def _load(self, spec: LoadSpec, device: DeviceSnapshot) -> dict[str, Any]:
        files = [
            spec.path,
            *(adapter.path for adapter in spec.adapters),
            *([spec.draft_path] if spec.draft_path else []),
        ]
        return {
            **spec.model_dump(exclude=NOT_THE_LOAD),
            "computes": _computes(spec, device),
            "files": [_changed(Path(file)) for file in files],
            "versions": dict(self._versions(spec.engine)),
        }


def _computes(spec: LoadSpec, device: DeviceSnapshot) -> str:
    """The card, or the CPU that also computes for every simulated card."""
    if spec.cuda_device is not None:
        return f"{device.id} {device.name} {device.driver}"
    return f"cpu {platform.machine()} {os.cpu_count()}"


def _changed(path: Path) -> list[int]:
    """Size and time of the last change, of a folder those of its largest file; empty where there is nothing to read."""
    try:
        if path.is_dir():
            rows = [file.stat() for file in path.iterdir() if file.is_file()]
            found = max(rows, key=lambda row: row.st_size)
        else:
            found = path.stat()
    except (OSError, ValueError):
        return []
    return [found.st_size, found.st_mtime_ns]


def _text(load: Any) -> str:
    return json.dumps(load, sort_keys=True)
