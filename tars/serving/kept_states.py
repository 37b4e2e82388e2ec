"""States of answers that have left this node, each kept in its file until the answer's successor has had it.

Law of this file: files and their names. A name is random, and good once: whoever knows it is the gateway's choice of a successor. No file
outlives `KEEP_SECONDS`, whatever becomes of the answer. What is in a file is `workers.sequence_state`'s to say; how it travels, `rpc`'s.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tars.core.types import NodeId
from tars.messages.base import SavedState

KEEP_SECONDS = 60.0
"""A successor asks within milliseconds. One that has not asked by now computes the tokens again, or there is none."""
KEEP_BYTES_MOST = 8 * 2**30
"""Of all files together: what a card of 24 GB may have in its cache. A disk's space is not this node's alone."""


@dataclass(frozen=True, slots=True)
class _Kept:
    path: Path
    size: int
    expires: asyncio.TimerHandle


class KeptStates:
    """See the module's law. In a running event loop; `keep` alone reads a file."""

    def __init__(self, node: NodeId) -> None:
        self._node = node
        self._kept: dict[str, _Kept] = {}
        self._bytes = 0
        self._reading = 0
        self._none = asyncio.Event()
        self._none.set()

    def __len__(self) -> int:
        """Files that wait for somebody."""
        return len(self._kept)

    async def keep(self, path: Path, layout: str = "") -> SavedState | None:
        """Take a file over and say how it is had: under another name in its folder. None where it cannot be kept; then it stays."""
        try:
            sha256, size = await asyncio.to_thread(_digest, path)
            if self._bytes + size > KEEP_BYTES_MOST:
                return None
            name = secrets.token_hex(16)
            path = _renamed(path, f"sequence-{name}.kept")
        except OSError:
            return None
        timer = asyncio.get_running_loop().call_later(KEEP_SECONDS, self.discard, name)
        self._kept[name] = _Kept(path, size, timer)
        self._bytes += size
        self._none.clear()
        return SavedState(node=self._node, id=name, bytes=size, sha256=sha256, layout=layout)

    @contextmanager
    def taken(self, name: str) -> Iterator[Path | None]:
        """The file of that name, which nobody gets a second time and which is removed afterwards; None: there is none (any more)."""
        kept = self._forget(name)
        if kept is None:
            yield None
            return
        self._reading += 1
        try:
            yield kept.path
        finally:
            self._reading -= 1
            kept.path.unlink(missing_ok=True)
            self._say_whether_none()

    def handed_on(self, name: str) -> Path | None:
        """The same for an answer that goes on with another replica of this very node: the file is the caller's to remove."""
        kept = self._forget(name)
        self._say_whether_none()
        return None if kept is None else kept.path

    def discard(self, name: str) -> None:
        """Nobody needs it."""
        kept = self._forget(name)
        if kept is not None:
            kept.path.unlink(missing_ok=True)
            self._say_whether_none()

    async def collected(self) -> None:
        """Wait until none is left, and none is being read."""
        await self._none.wait()

    def close(self) -> None:
        """Remove all that wait."""
        for name in list(self._kept):
            self.discard(name)

    def _forget(self, name: str) -> _Kept | None:
        kept = self._kept.pop(name, None)
        if kept is not None:
            kept.expires.cancel()
            self._bytes -= kept.size
        return kept

    def _say_whether_none(self) -> None:
        if not self._kept and not self._reading:
            self._none.set()


def _digest(path: Path) -> tuple[str, int]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return digest.hexdigest(), file.tell()


def _renamed(path: Path, name: str) -> Path:
    return path.rename(path.with_name(name))
