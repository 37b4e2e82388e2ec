"""What a replica was loaded from, in one hash: replicas of an equal one go on with each other's answers.

Law of this file: it believes hashes of content only, and only while the file is as it was when the replica took it. Hashing a model's file
is `held_files`' work, in its own time; adapters are small and hashed here, off the event loop. Until the hash is known there is none.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tars.core.records import HeldFile
from tars.model_files import Fingerprint
from tars.workers.engine import AdapterSpec


@dataclass(slots=True)
class LoadedFile:
    """Of one replica; `taken` when its load began."""

    model: str
    variant: str
    path: Path
    fingerprint: Fingerprint | None
    adapters: str
    """A hash of what was loaded onto the file; empty where nothing was."""
    sha256: str | None = None
    """Of all of it, once it is known."""

    @classmethod
    def taken(cls, model: str, variant: str, path: Path, adapters: Iterable[AdapterSpec] = ()) -> LoadedFile:
        """Now, before the worker opens the file. Reads the adapters, so not in an event loop."""
        return cls(model, variant, path, _print_of(path), _adapters_hash(adapters))

    def identify(self, held: Iterable[HeldFile]) -> str | None:
        """Its hash, if `held` (what the node's files are now) or an earlier look knows it."""
        if self.sha256 is None and self.fingerprint is not None:
            for file in held:
                if (file.model, file.variant) != (self.model, self.variant) or file.sha256 is None or file.folder:
                    continue
                # Another file may have come into its place since.
                if _print_of(self.path) == self.fingerprint:
                    said = f"{file.sha256}\n{self.adapters}" if self.adapters else ""
                    self.sha256 = hashlib.sha256(said.encode()).hexdigest() if said else file.sha256
        return self.sha256


def _adapters_hash(adapters: Iterable[AdapterSpec]) -> str:
    lines = []
    for each in sorted(adapters, key=lambda one: one.name):
        try:
            with open(each.path, "rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError:
            content = ""  # its load fails, and says why
        lines.append(f"{content}  {each.name} {each.scale!r}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest() if lines else ""


def _print_of(path: Path) -> Fingerprint | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return Fingerprint(found.st_size, found.st_mtime_ns)
