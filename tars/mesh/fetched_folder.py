"""The folder of fetched model files: `<folder>/<sha256>/<name>`, each with a line on which model it is, and each in the catalogue.

Law of this file: it names, places and registers what was verified; it fetches nothing. A name never leads out of the folder.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from tars.catalogue import Catalogue
from tars.core.types import Bytes, ModelEntry, ModelKind, Variant
from tars.errors import BadModelFile, ConfigError, DiskFull, ModelError
from tars.mesh import folder_manifest
from tars.model_files import FileHashes, inspect
from tars.state_folder import write_atomically

log = logging.getLogger(__name__)

ABOUT = "model.json"
"""Beside each fetched file: which model it is, so that the next start needs nothing else."""
MARGIN = Bytes(256 * 2**20)
"""What stays free on the disk: the node's own state, and everybody else's."""


HEAVIER = 1.1
"""Tensors may take so much more than was planned: quantisations of the same name differ by a few percent from maker to maker."""


class FetchedFolder:
    """See the module's law. `margin` bytes stay free on its disk."""

    def __init__(self, folder: Path, catalogue: Catalogue, hashes: FileHashes, margin: int = MARGIN):
        self.path = folder
        self._catalogue = catalogue
        self._hashes = hashes
        self._margin = margin
        self._fetched: dict[tuple[str, str], Path] = {}

    def attach_all(self) -> None:
        """At a start: put what was fetched before into the catalogue. What went bad meanwhile is left out, with a line in the log."""
        try:
            rows = sorted(self.path.glob(f"*/{ABOUT}"))
        except OSError:
            return
        for row in rows:
            try:
                about = json.loads(row.read_bytes())
                path, model, variant = row.parent / str(about["name"]), str(about["model"]), str(about["variant"])
                if not is_name(about["name"]) or not path.exists():
                    continue
                self._attach(path, model, ModelKind(about["kind"]), variant, tuple(map(str, about.get("aliases", ()))))
            except (OSError, ValueError, KeyError, TypeError) as error:
                log.warning("%s says nothing usable about its model: %s", row, error)
            except (ModelError, ConfigError) as error:
                log.warning("%s is not used: %s", row.parent, error.message)

    def path_of(self, entry: ModelEntry, variant: Variant) -> Path | None:
        """Where the variant's file (or folder) is on this PC; None where it is not here."""
        path = self._catalogue.path_of(entry, variant)
        if path is None:
            path = self._fetched.get((entry.name, variant.name))
        return path if path is not None and path.exists() else None

    def require_room(self, model: str, size: int, there: int = 0, coming: int = 0) -> None:
        """Raise `DiskFull` unless the disk has room for `size` bytes, of which `there` are there already, beside `coming` of others."""
        self.path.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.path).free
        missing = max(0, size - there) + coming + self._margin - free
        if missing <= 0:
            return
        biggest = sorted(
            ((_bytes_below(path), name) for name, path in self._fetched.items() if path.exists()), reverse=True
        )
        remedy = "".join(f" {name} ({variant}) takes {Bytes(taken)}." for taken, (name, variant) in biggest[:3])
        raise DiskFull(
            f"{model} takes {Bytes(size)}, and the disk of the fetched model files has {Bytes(free)} free, of which {Bytes(self._margin)} "
            f"stay free{f' and {Bytes(coming)} are for what is being fetched now' if coming else ''}. Free {Bytes(missing)}, or set "
            f"`folder` in [files] to a larger disk; what came before is kept."
            + (f" Of what was fetched before:{remedy}" if remedy else ""),
            details={"needed_bytes": int(size), "free_bytes": int(free), "missing_bytes": int(missing)},
        )

    def settle(self, target: Path) -> tuple[Path, str]:
        """Move what was fetched under another name into the folder of its sha256."""
        _, sha256 = self.described(target)
        place = self.path / sha256 / target.name
        if not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(target, place)
        shutil.rmtree(target.parent, ignore_errors=True)
        return place, sha256

    def discard(self, target: Path) -> None:
        """Remove a file that turned out not to be what it should be."""
        if target.parent.parent == self.path:
            shutil.rmtree(target.parent, ignore_errors=True)

    def described(self, path: Path) -> tuple[int, str]:
        """Size in bytes and sha256 of a file or folder."""
        if path.is_dir():
            manifest = folder_manifest.made(path, self._hashes.sha256)
            return sum(os.stat(path / each.path).st_size for each in manifest.files), manifest.sha256
        return os.stat(path).st_size, self._hashes.sha256(path)

    async def arrived(self, target: Path, sha256: str, entry: ModelEntry | None, variant: Variant | None) -> Path:
        """A verified file gets its name in the catalogue. Raises `BadModelFile` (and removes it) where it is not that model."""
        try:
            folder = await asyncio.to_thread(self._checked, target, sha256, variant)
            # In the loop, which is the catalogue's.
            if entry is None:
                return self.note(target, sha256, None, ModelKind.EMBEDDING if folder else ModelKind.CHAT, None)
            return self.note(target, sha256, entry.name, entry.kind, variant.name if variant else None, entry.aliases)
        except (ModelError, ConfigError) as error:
            await asyncio.to_thread(self.discard, target)
            raise BadModelFile(
                f"{target.name} came whole, but it is not the model that was asked for: {error.message}"
            ) from error

    def _checked(self, target: Path, sha256: str, variant: Variant | None) -> bool:
        """True for a folder. Raises `BadModelFile` for a file that would take clearly more memory than was planned for its name."""
        if target.is_dir():
            return True
        self._hashes.remember(target, sha256)
        planned = 0 if variant is None else variant.shape.tensor_bytes
        found = inspect(target).shape.tensor_bytes
        if planned and found > planned * HEAVIER:
            raise BadModelFile(
                f"its tensors take {Bytes(found)}, not {Bytes(planned)} as those of {variant and variant.name}."
            )
        return False

    def note(
        self,
        path: Path,
        sha256: str,
        model: str | None,
        kind: ModelKind,
        variant: str | None,
        aliases: tuple[str, ...] = (),
    ) -> Path:
        """Into the catalogue, now and at every start. `model` None: the name that the file gives itself. Raises as `Catalogue.add_file`."""
        entry, found = self._attach(path, model, kind, variant, aliases)
        about = {
            "model": entry.name,
            "variant": found,
            "kind": entry.kind.value,
            "name": path.name,
            "sha256": sha256,
            "aliases": list(entry.aliases),
        }
        # Not saved (a full disk), the next start does not know it; asked for then, it is hashed and taken up where it is.
        with suppress(OSError, DiskFull):
            write_atomically(path.parent / ABOUT, json.dumps(about).encode())
        return path

    def _attach(
        self, path: Path, model: str | None, kind: ModelKind, variant: str | None, aliases: tuple[str, ...]
    ) -> tuple[ModelEntry, str]:
        """Into the catalogue. An operator's own file of the same variant is left in its place."""
        known = None if model is None else self._catalogue.find(model)
        mine = None if known is None else next((each for each in known.variants if each.name == variant), None)
        if known is not None and mine is not None and self._catalogue.path_of(known, mine) is not None:
            self._fetched[known.name, mine.name] = path
            return known, mine.name
        # A kind is not told to a folder: only it knows whether it ranks or embeds. The catalogue may call the quantisation otherwise than
        # the file's header does; its word is the one that plans are made with.
        word = None if path.is_dir() else variant
        told = None if path.is_dir() else kind
        try:
            entry = self._catalogue.add_file(path, model, told, variant=word, aliases=aliases)
        except ConfigError:
            entry = self._catalogue.add_file(path, model, told, variant=word)
        added = next(each.name for each in entry.variants if self._catalogue.path_of(entry, each) == path)
        self._fetched[entry.name, added] = path
        return entry, added


def is_name(name: Any) -> bool:
    """Whether a file may be called so here, whoever says it."""
    return (
        isinstance(name, str)
        and re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+ -]{0,200}", name) is not None
        and not name.endswith((".partial", ".journal", ".folder", " ", "."))
        and name != ABOUT
    )


def file_name(entry: ModelEntry, variant: Variant) -> str:
    """The original name, where it is one; else one of the model's and the variant's."""
    own = (variant.file or "").rpartition("/")[2]
    if entry.kind is ModelKind.CHAT and is_name(own):
        return own
    made = re.sub(r"[^A-Za-z0-9_.-]+", "-", entry.name).strip("-._") or "model"
    return (
        f"{made[:100]}.{re.sub(r'[^A-Za-z0-9_]+', '', variant.name)[:40]}.gguf"
        if entry.kind is ModelKind.CHAT
        else made
    )


def _bytes_below(path: Path) -> int:
    with suppress(OSError):
        if path.is_dir():
            return sum(each.stat().st_size for each in path.rglob("*") if each.is_file())
        return path.stat().st_size
    return 0
