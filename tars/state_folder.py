"""The one folder a node writes to: its id, its lock, and small JSON files that survive a crash at any moment.

Law of this file: a reader never sees half a file. Every write goes to a `.partial` neighbour, is flushed to the disk and renamed.
"""

from __future__ import annotations

import errno
import fcntl
import os
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

import orjson

from tars.core.types import NodeId
from tars.errors import ConfigError, DiskFull

SEQUENCES = "sequences"
"""The folder in it where running answers' states are put while they move to another replica; emptied at each start."""

PARTIAL = ".partial"
"""How the name of a file ends while it is being written."""


class StateFolder:
    """A node's state folder, held by at most one process at a time (an `flock`, which ends with the process)."""

    def __init__(self, path: Path):
        self.path = path
        self._lock: int | None = None

    def open(self) -> None:
        """Make the folder (mode 0700) and take its lock. Raises `ConfigError` where it cannot be used, or another node uses it."""
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(
                f"the state folder {self.path} cannot be used ({error.strerror}); "
                "choose another with --state-dir, or TARS_STATE_DIR in the environment"
            ) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(lock, 32, 0).decode("ascii", "replace").strip()
            os.close(lock)
            raise ConfigError(
                f"another tars-node{f' (process {holder})' if holder else ''} uses the state folder {self.path}; "
                "stop it, or give this one its own with --state-dir"
            ) from error
        self._lock = lock
        # Only for the message above: on a full disk the lock holds all the same.
        with suppress(OSError):
            os.ftruncate(lock, 0)
            os.pwrite(lock, str(os.getpid()).encode(), 0)
        # What a node that was killed in the middle of a write left behind; the lock says that nobody writes now.
        with suppress(OSError):
            for partial in self.path.glob(f"*{PARTIAL}"):
                partial.unlink(missing_ok=True)
            for sequence in (self.path / SEQUENCES).glob("sequence-*"):
                sequence.unlink(missing_ok=True)

    def close(self) -> None:
        """Give the lock back. Idempotent."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def node_id(self) -> NodeId:
        """This node's id: made once, then always the same. A damaged file is replaced, so that a node always starts."""
        stored = self.read_json("node.json")
        try:
            return NodeId(str(uuid.UUID(stored["id"])))
        except (KeyError, TypeError, ValueError):
            made = fresh_node_id()
            self.set_node_id(made)
            return made

    def set_node_id(self, node: NodeId) -> None:
        """Another id from now on: for a node whose old one was removed from its mesh for ever. Raises `DiskFull`."""
        self.write_json("node.json", {"id": node})

    def read_json(self, name: str) -> Any:
        """The value in the file, or {} where it is missing, unreadable or damaged."""
        try:
            return orjson.loads((self.path / name).read_bytes())
        except (OSError, orjson.JSONDecodeError):
            return {}

    def write_json(self, name: str, value: Any) -> None:
        """Replace the file's content in one step. Raises `DiskFull`; then the old content stands."""
        write_atomically(self.path / name, orjson.dumps(value, option=orjson.OPT_INDENT_2))


def fresh_node_id() -> NodeId:
    """An id that no node has."""
    return NodeId(str(uuid.uuid4()))


def write_atomically(path: Path, content: bytes, *, mode: int = 0o666) -> None:
    """Write `content` so that the file holds either the old or the new bytes, whatever happens. Raises `DiskFull`, or `OSError`.

    `mode` is that of a new file, less the process's umask; 0o600 for a secret, which is then never readable by others, not for a moment.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")
    try:
        with open(partial, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(
                f"the disk of the state folder is full, so {path.name} could not be saved; "
                "nothing was lost: free some space and repeat the call"
            ) from error
        raise
