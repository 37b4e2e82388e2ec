"""What a model that is a folder consists of: its files, each with its sha256, as text that names the folder as a whole.

Law of this file: a path in a manifest stands below the folder, whoever wrote it: `parse` lets nothing else through. `listed` follows no
symbolic link. The same rules choose the files of a folder here and of a repository on the hub, so that both have the same sha256.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from tars.errors import BadModelFile

MOST_MANIFEST = 2**20
"""Bytes: some 8,000 files; the largest model folder known has forty."""
MOST_FILES = 2000
SUFFIXES = frozenset({".json", ".txt", ".safetensors", ".model"})
"""Configurations, vocabularies, weights, SentencePiece models. No code and no pickles, which would be run."""
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,199}")
_MODULE = re.compile(r"[0-9]+_[A-Za-z0-9_.-]+")
"""How sentence-transformers names the folders of a model's parts: `1_Pooling`. Others hold exports for other engines (`onnx`)."""
_LINE = re.compile(r"([0-9a-f]{64})  (.+)")


@dataclass(frozen=True, slots=True)
class ManifestFile:
    """One file of a folder."""

    path: str
    """Relative, with `/` between parts."""
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """Files sorted by path."""

    files: tuple[ManifestFile, ...]

    def text(self) -> bytes:
        """`<sha256>  <relative path>` lines: what sha256sum prints, and reads with `-c`."""
        return "".join(f"{each.sha256}  {each.path}\n" for each in self.files).encode()

    @property
    def sha256(self) -> str:
        """The folder's."""
        return hashlib.sha256(self.text()).hexdigest()

    def find(self, path: str) -> ManifestFile | None:
        """The file of this relative path; None where the folder has none."""
        return next((each for each in self.files if each.path == path), None)


def is_safe_path(path: str) -> bool:
    """Whether a relative path stays below its folder on every system: plain parts, none of them hidden, `.` or `..`; at most four."""
    parts = path.split("/")
    return len(parts) <= 4 and all(_PART.fullmatch(part) is not None for part in parts)


def is_model_file(path: str) -> bool:
    """Whether the file of this relative path belongs to the model: loaded without running code, in the folder itself or a module's."""
    *folders, name = path.split("/")
    return (
        is_safe_path(path)
        and os.path.splitext(name)[1] in SUFFIXES
        and all(_MODULE.fullmatch(folder) is not None for folder in folders)
    )


def parse(text: bytes) -> Manifest:
    """The manifest in the text. Raises `BadModelFile` for anything that `Manifest.text` would not have written: other lines, other order,
    a path that leaves the folder, a path twice.
    """
    bad = BadModelFile("The list of a model folder's files that a peer sent is damaged, so the folder is not fetched.")
    if len(text) > MOST_MANIFEST:
        raise bad
    try:
        lines = text.decode("ascii").split("\n")
    except UnicodeDecodeError:
        raise bad from None
    if lines[-1] != "" or not 1 < len(lines) <= MOST_FILES + 1:
        raise bad
    files = []
    for line in lines[:-1]:
        found = _LINE.fullmatch(line)
        if found is None or not is_model_file(found[2]):
            raise bad
        files.append(ManifestFile(found[2], found[1]))
    paths = [each.path for each in files]
    if paths != sorted(set(paths)):
        raise bad
    # `a` as a file and as the folder of `a/b`: the second would fail midway.
    if any(f"{path}/" == other[: len(path) + 1] for path in paths for other in paths):
        raise bad
    return Manifest(tuple(files))


def listed(folder: Path) -> list[str]:
    """Relative paths of the model's files in a folder, sorted. Symbolic links are left out: one may lead anywhere."""
    found: list[str] = []
    for root, folders, names in os.walk(folder):
        relative = "" if (inner := os.path.relpath(root, folder)) == "." else inner.replace(os.sep, "/") + "/"
        folders[:] = [each for each in folders if _MODULE.fullmatch(each) is not None]
        for name in names:
            path = relative + name
            if is_model_file(path) and stat.S_ISREG(os.lstat(os.path.join(root, name)).st_mode):
                found.append(path)
        if len(found) > MOST_FILES:
            raise BadModelFile(f"The model's folder holds more than {MOST_FILES} files, so it is no model's folder.")
    return sorted(found)


def made(folder: Path, sha256: Callable[[Path], str], paths: Iterable[str] | None = None) -> Manifest:
    """The folder's manifest; `sha256` hashes one file. Seconds for large ones: not in an event loop."""
    chosen = listed(folder) if paths is None else sorted(paths)
    return Manifest(tuple(ManifestFile(path, sha256(folder / path)) for path in chosen))


def open_below(folder: Path, path: str) -> int:
    """A descriptor of a manifest's file, reading. No part of `path` may be a symbolic link. Raises `OSError`, or `ValueError` for an unsafe
    path."""
    if not is_safe_path(path):
        raise ValueError("unsafe path")
    *folders, name = path.split("/")
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
    at = os.open(folder, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
    try:
        for part in folders:
            inner = os.open(part, flags | os.O_DIRECTORY, dir_fd=at)
            os.close(at)
            at = inner
        descriptor = os.open(name, flags | os.O_NONBLOCK, dir_fd=at)
    finally:
        os.close(at)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError("not a regular file")
    return descriptor
