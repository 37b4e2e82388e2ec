"""Gives this node's model files to its peers: by hash only, a range at a time, so many at once and so fast.

Law of this file: no path from the wire is ever opened. A hash finds what this node holds; within a folder a path is one of its
manifest's, and no part of it may be a symbolic link. A file that is not as it was when it was hashed is not given. HTTP is
`rpc.file_routes`' business.
"""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tars.core.transfer import TokenBucket
from tars.mesh.folder_manifest import open_below
from tars.mesh.held_files import SharedFile
from tars.model_files import Fingerprint

MOST_AT_ONCE = 16
"""Ranges that are being sent at once; the others are told to ask again. Two for each of eight peers."""
CHUNK = 2**20


class NotShared(Exception):
    """This node holds nothing by that name, or no longer as it was."""


class Busy(Exception):
    """As many ranges as are allowed are being sent already."""


class Gone(Exception):
    """The file became shorter while it was sent."""


@dataclass(slots=True)
class Resource:
    """An opened file, or a folder's manifest. Close it."""

    size: int
    etag: str
    content: bytes | None = None
    descriptor: int = -1

    def close(self) -> None:
        """Idempotent."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


class FileServer:
    """See the module's law. `shared`: what this node holds by a hash."""

    def __init__(
        self,
        shared: Callable[[str], SharedFile | None],
        *,
        most_bytes_per_second: float | None = None,
        most_at_once: int = MOST_AT_ONCE,
    ):
        self._shared = shared
        self._outgoing = TokenBucket(most_bytes_per_second)
        self._most_at_once = most_at_once
        self.sending = 0
        """Ranges that are being sent now."""
        self.bytes_sent = 0

    def open(self, sha256: str, path: str = "") -> Resource:
        """A file; a folder's manifest; or, with a path, a file of a folder. A few system calls. Raises `NotShared`."""
        shared = self._shared(sha256)
        if shared is None:
            raise NotShared
        if shared.manifest is not None and not path:
            text = shared.manifest.text()
            return Resource(len(text), sha256, content=text)
        before = shared.prints.get(path)
        if before is None:
            raise NotShared
        if shared.manifest is None:
            etag = sha256
        else:
            listed = shared.manifest.find(path)
            if listed is None:
                raise NotShared
            etag = listed.sha256
        try:
            if shared.manifest is None:
                # The operator's own path, which may be a link; regular, or opening could wait for ever.
                descriptor = os.open(shared.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            else:
                descriptor = open_below(shared.path, path)
        except (OSError, ValueError):
            raise NotShared from None
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or Fingerprint(found.st_size, found.st_mtime_ns) != before:
            os.close(descriptor)
            raise NotShared
        return Resource(found.st_size, etag, descriptor=descriptor)

    @contextmanager
    def place(self) -> Iterator[None]:
        """One of the places for sending. Raises `Busy`."""
        if self.sending >= self._most_at_once:
            raise Busy
        self.sending += 1
        try:
            yield
        finally:
            self.sending -= 1

    async def read(self, resource: Resource, start: int, stop: int) -> AsyncGenerator[bytes, None]:
        """The bytes from `start` up to `stop`, no faster than allowed. Raises `Gone` or `OSError`."""
        loop = asyncio.get_running_loop()
        while start < stop:
            count = min(CHUNK, stop - start)
            if resource.content is not None:
                chunk = resource.content[start : start + count]
            else:
                chunk = await asyncio.to_thread(os.pread, resource.descriptor, count, start)
            if not chunk:
                raise Gone
            if wait := self._outgoing.take(len(chunk), loop.time()):
                await asyncio.sleep(wait)
            yield chunk
            start += len(chunk)
            self.bytes_sent += len(chunk)
