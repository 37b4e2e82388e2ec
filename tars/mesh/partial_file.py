"""The file that a transfer fills: `<name>.partial`, and beside it `<name>.journal`, which says what of it is there.

Law of this file: a piece counts once it is on the disk, then a line in the journal says so; what was not verified never gets the target's
name. It blocks: its callers are in threads.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tars.core.types import Bytes
from tars.errors import BadModelFile, DiskFull
from tars.state_folder import write_atomically

log = logging.getLogger(__name__)

PARTIAL = ".partial"
JOURNAL = ".journal"
HASH_CHUNK = 4 * 2**20


@dataclass(frozen=True, slots=True)
class Digest:
    """What the whole file must hash to. `algorithm`: `sha256`, or `git-sha1`: git's name of a blob, which the hub gives for small files."""

    algorithm: str
    value: str

    def start(self, size: int) -> Any:
        """A hash object, ready for the file's bytes."""
        if self.algorithm == "sha256":
            return hashlib.sha256()
        # Source: git's object format: sha1 of "blob <size>\0" and the content.
        return hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)


@dataclass(frozen=True, slots=True)
class WantedFile:
    """What is to be fetched, and where it shall stand. Beside it stand `<name>.partial` and `<name>.journal` meanwhile."""

    target: Path
    size: int
    digest: Digest


@dataclass(slots=True)
class Journal:
    """Which pieces are in the partial file, from whom, and what they hashed to."""

    now: dict[int, tuple[str, str]] = field(default_factory=dict)
    """piece -> (source's name, digest): what lies in the partial file."""
    claims: dict[tuple[str, int], str] = field(default_factory=dict)
    """(source's name, piece) -> digest: what each one ever gave."""

    def note(self, piece: int, source: str, digest: str) -> None:
        """`source` gave the piece that is there now."""
        self.now[piece] = (source, digest)
        self.claims[source, piece] = digest


def held_on_disk(target: Path) -> int:
    """Bytes that an earlier attempt at `target` already takes on the disk; 0 where there was none."""
    try:
        return os.stat(_beside(target, PARTIAL)).st_blocks * 512
    except OSError:
        return 0


class PartialFile:
    """One file under way. `open` it, then `save` pieces; in the end `move` or `discard`. Every method but `close` may block."""

    def __init__(self, wanted: WantedFile, piece: int):
        self.journal = Journal()
        self._wanted = wanted
        self._piece = piece
        self._saving = threading.Lock()
        self._partial_descriptor = self._journal_descriptor = -1

    @property
    def pieces(self) -> int:
        """How many the whole file has."""
        return -(-self._wanted.size // self._piece)

    def open(self) -> None:
        """Take up what an earlier attempt left, if it was at the same file. Raises `DiskFull` or `BadModelFile`."""
        partial, journal = _beside(self._wanted.target, PARTIAL), _beside(self._wanted.target, JOURNAL)
        head = {
            "digest": f"{self._wanted.digest.algorithm}:{self._wanted.digest.value}",
            "size": self._wanted.size,
            "piece": self._piece,
        }
        try:
            self._wanted.target.parent.mkdir(parents=True, exist_ok=True)
            self.journal = _read_journal(journal, head, partial)
            fresh = not self.journal.claims
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_TRUNC if fresh else 0)
            self._partial_descriptor = os.open(partial, flags, 0o600)
            # Always written anew, in one step: the torn last line of a crash must not join the next one.
            rows = [{"piece": p, "source": s, "digest": d} for p, (s, d) in self.journal.now.items()]
            write_atomically(journal, b"".join(_line(row) for row in [head, *rows]))
            self._journal_descriptor = os.open(journal, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        except OSError as error:
            self.close()
            raise self.failed(error) from error
        except DiskFull:
            self.close()
            raise self.failed(OSError(errno.ENOSPC, "No space left on device")) from None

    def close(self) -> None:
        """Idempotent."""
        for descriptor in (self._partial_descriptor, self._journal_descriptor):
            if descriptor >= 0:
                os.close(descriptor)
        self._partial_descriptor = self._journal_descriptor = -1

    def save(self, piece: int, start: int, content: bytes, source: str) -> None:
        """A whole piece onto the disk, then into the journal. Raises `OSError`."""
        digest = hashlib.sha256(content).hexdigest()
        with self._saving:
            if piece in self.journal.now:
                # Two brought it; the first one's bytes stand, and the second's are remembered as its word.
                self.journal.claims[source, piece] = digest
                return
            done = 0
            while done < len(content):
                done += os.pwrite(self._partial_descriptor, content[done:] if done else content, start + done)
            # The data first: a line about a piece that a power cut takes away would be a lie.
            os.fdatasync(self._partial_descriptor)
            _write_all(self._journal_descriptor, _line({"piece": piece, "source": source, "digest": digest}))
            self.journal.note(piece, source, digest)

    def matches(self, stop: threading.Event, report: Callable[[int], None]) -> bool:
        """Whether the whole file hashes to what it should; `report(bytes)` on the way. `stop` ends it early, with False."""
        found = self._wanted.digest.start(self._wanted.size)
        done = 0
        while not stop.is_set() and (
            chunk := os.pread(self._partial_descriptor, min(HASH_CHUNK, self._wanted.size - done), done)
        ):
            found.update(chunk)
            done += len(chunk)
            report(done)
        return bool(done == self._wanted.size and found.hexdigest() == self._wanted.digest.value)

    def damaged(self) -> list[int]:
        """Pieces whose bytes on the disk are not those that came."""
        damaged = []
        for piece, (_, digest) in self.journal.now.items():
            start = piece * self._piece
            size = min(self._piece, self._wanted.size - start)
            if hashlib.sha256(os.pread(self._partial_descriptor, size, start)).hexdigest() != digest:
                damaged.append(piece)
        return damaged

    def discard(self) -> None:
        """Nothing of it is worth keeping."""
        for suffix in (PARTIAL, JOURNAL):
            _beside(self._wanted.target, suffix).unlink(missing_ok=True)

    def move(self) -> None:
        """The file is right: give it its name. Raises `DiskFull` or `BadModelFile`."""
        target = self._wanted.target
        try:
            partial = _beside(target, PARTIAL)
            # A file that an earlier attempt with other ends left longer is cut; then everything is on the disk before it has its name.
            with open(partial, "rb+") as file:
                file.truncate(self._wanted.size)
                os.fsync(file.fileno())
            os.replace(partial, target)
            _beside(target, JOURNAL).unlink(missing_ok=True)
        except OSError as error:
            raise self.failed(error) from error

    def failed(self, error: OSError) -> DiskFull | BadModelFile:
        """What an error of this disk means, for people."""
        log.warning("%s: %s", self._wanted.target, error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            kept = sum(min(self._piece, self._wanted.size - piece * self._piece) for piece in list(self.journal.now))
            return DiskFull(
                f"The disk became full while {self._wanted.target.name} was fetched. What came ({Bytes(kept)} of "
                f"{Bytes(self._wanted.size)}) is kept: free {Bytes(self._wanted.size - kept)}, then ask again, and it goes on from there."
            )
        return BadModelFile(
            f"{self._wanted.target.name} cannot be written to the folder of fetched model files "
            f"({os.strerror(error.errno) if error.errno else 'unknown reason'}). Let the user that runs tars-node write there, or set "
            "`folder` in [files]."
        )


def _beside(target: Path, suffix: str) -> Path:
    return target.with_name(target.name + suffix)


def _line(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row).encode() + b"\n"


def _write_all(descriptor: int, content: bytes) -> None:
    done = 0
    while done < len(content):
        done += os.write(descriptor, content[done:])


def _read_journal(path: Path, head: Mapping[str, Any], partial: Path) -> Journal:
    """What the journal says, if it is about the same file in the same pieces; a line that is no whole one ends it."""
    journal = Journal()
    try:
        there = os.stat(partial).st_size
        lines = path.read_bytes().split(b"\n")
        if json.loads(lines[0]) != head:
            return journal
    except (OSError, ValueError):
        return journal
    for line in lines[1:-1]:
        try:
            row = json.loads(line)
            piece, source, digest = row["piece"], row["source"], row["digest"]
        except (ValueError, KeyError, TypeError):
            break
        if type(piece) is not int or not isinstance(source, str) or not isinstance(digest, str):
            break
        stop = min(head["size"], (piece + 1) * head["piece"])
        if piece >= 0 and piece * head["piece"] < head["size"] and stop <= there:
            journal.note(piece, source, digest)
    return journal
