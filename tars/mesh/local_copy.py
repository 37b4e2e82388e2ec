"""Takes a model file that is on this PC already into the folder of fetched files: a hard link where it can be one, else a copy.

Law of this file: the file is looked into and hashed before it is taken, and a copy is hashed again while it is written; the original is
never changed. It blocks: its callers are in threads.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tars.core.types import Bytes, ModelKind
from tars.errors import BadModelFile, DiskFull
from tars.mesh import folder_manifest
from tars.mesh.folder_manifest import Manifest
from tars.model_files import FileHashes, inspect, inspect_folder

COPY_CHUNK = 4 * 2**20


@dataclass(frozen=True, slots=True)
class LocalFile:
    """A good model file of this PC. `manifest` is a folder's."""

    path: Path
    kind: ModelKind
    variant: str
    size: int
    sha256: str
    manifest: Manifest | None = None


def look(path: Path, hashes: FileHashes) -> LocalFile:
    """What the file (or folder) is. Seconds for a large one. Raises `BadModelFile` or `ModelFileMissing`."""
    if not path.is_absolute():
        raise BadModelFile("The file's path must be a whole one, from the root: the node runs in another folder.")
    # A link would keep the name of what it leads to, not the file.
    path = Path(os.path.realpath(path))
    if path.is_dir():
        folder = inspect_folder(path)
        manifest = folder_manifest.made(path, hashes.sha256)
        kind = ModelKind.RERANK if folder.reranker else ModelKind.EMBEDDING
        size = sum(os.stat(path / each.path).st_size for each in manifest.files)
        return LocalFile(path, kind, "fp32", size, manifest.sha256, manifest)
    found = inspect(path)
    return LocalFile(path, ModelKind.CHAT, found.header.quantisation, found.fingerprint.size, hashes.sha256(path))


def place(found: LocalFile, target: Path, require_room: Callable[[int], None]) -> None:
    """Put it at `target`, whole or not at all; `require_room(bytes)` is asked before a copy. Raises `DiskFull` or `BadModelFile`."""
    partial = target.with_name(target.name + ".copy")
    files = [("", found.sha256)] if found.manifest is None else [(f.path, f.sha256) for f in found.manifest.files]
    room_asked = False
    try:
        _remove(partial)
        for inner, sha256 in files:
            origin, copy = (found.path / inner, partial / inner) if inner else (found.path, partial)
            copy.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(origin, copy, follow_symlinks=False)
            except OSError:  # another disk, or one that knows no links
                if not room_asked:
                    require_room(found.size)
                    room_asked = True
                _copy(origin, copy, sha256)
        os.replace(partial, target)
    except OSError as error:
        _remove(partial)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(
                f"The disk became full while {found.path.name} ({Bytes(found.size)}) was copied; the copy was removed, the file itself is "
                "untouched. Free some space, then ask again."
            ) from error
        reason = os.strerror(error.errno) if error.errno else "unknown reason"
        raise BadModelFile(f"{found.path.name} cannot be taken into the folder of model files ({reason}).") from error
    except BaseException:
        _remove(partial)
        raise


def _copy(origin: Path, target: Path, sha256: str) -> None:
    digest = hashlib.sha256()
    with open(origin, "rb") as read, open(target, "wb") as write:
        while chunk := read.read(COPY_CHUNK):
            digest.update(chunk)
            write.write(chunk)
        write.flush()
        os.fsync(write.fileno())
    if digest.hexdigest() != sha256:
        raise BadModelFile(f"{origin.name} changed while it was copied. Try again when nothing writes to it.")


def _remove(partial: Path) -> None:
    if partial.is_dir():
        shutil.rmtree(partial, ignore_errors=True)
    else:
        partial.unlink(missing_ok=True)
