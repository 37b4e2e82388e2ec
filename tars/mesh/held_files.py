"""Which model files this node has, with their sha256: what it tells its peers, and what it gives to them.

Law of this file: a file is known by its hash only while it is as it was when it was hashed (size and time of change). Hashing happens
in the background, in a thread of the lowest priority, one file after another; calls and loads never wait for it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

from tars.catalogue import Catalogue
from tars.core.records import HeldFile
from tars.core.types import Bytes
from tars.errors import ModelError
from tars.mesh import folder_manifest
from tars.mesh.folder_manifest import Manifest
from tars.model_files import FileHashes, Fingerprint

log = logging.getLogger(__name__)

SCAN_SECONDS = 10.0
"""How often the files are looked at again; it costs a few calls of stat."""
LOWEST_PRIORITY = 19

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class SharedFile:
    """Something that may be given to a peer. `manifest` None: `path` is a file, else a folder."""

    path: Path
    size: int
    prints: dict[str, Fingerprint] = field(default_factory=dict)
    """Relative path ("" for a file itself) -> what it was like when it was hashed."""
    manifest: Manifest | None = None


@dataclass(frozen=True, slots=True)
class _Place:
    model: str
    variant: str
    path: Path
    size: int


class Stopped(Exception):
    """Raised inside a hashing that is no longer wanted."""


class HeldFiles:
    """See the module's law. `on_change` is called in the event loop when `held` has changed."""

    def __init__(self, catalogue: Catalogue, hashes: FileHashes, on_change: Callable[[], None] = lambda: None):
        self._catalogue = catalogue
        self._hashes = hashes
        self._on_change = on_change
        self._held: tuple[HeldFile, ...] = ()
        self._shared: dict[str, SharedFile] = {}
        self._wake = asyncio.Event()
        self._stop = threading.Event()
        self._bad: dict[Path, Fingerprint] = {}
        self.scans = 0
        """Rounds that ended; every file that was there in the last one is hashed."""

    def held(self) -> list[HeldFile]:
        """What is here; a file that was not hashed yet has no sha256."""
        return list(self._held)

    def shared(self, sha256: str) -> SharedFile | None:
        """What this node holds by that hash; None for everything else."""
        return self._shared.get(sha256)

    def look_again(self) -> None:
        """Something was fetched, added or removed."""
        self._wake.set()

    async def run(self) -> None:
        """Look and hash, again and again, until cancelled."""
        self._stop.clear()
        try:
            while True:
                self._wake.clear()
                await self.scan()
                with suppress(TimeoutError):
                    async with asyncio.timeout(SCAN_SECONDS):
                        await self._wake.wait()
        finally:
            self._stop.set()

    async def scan(self) -> None:
        """One round: returns when every file is hashed. A file that cannot be read is left out, with a line in the log."""
        places = await asyncio.to_thread(self._found, self._named())
        rows = [(place, self._share_known(place)) for place in places]
        self._publish(rows)
        for index, (place, shared) in enumerate(rows):
            if shared is None:
                rows[index] = (place, await in_quiet_thread(partial(self._share, place)))
                self._publish(rows)
        self.scans += 1

    # --- inside -------------------------------------------------------------------------------------------------------

    def _named(self) -> list[tuple[str, str, Path]]:
        named = []
        for entry in self._catalogue.entries.values():
            for variant in entry.variants:
                if (path := self._catalogue.path_of(entry, variant)) is not None:
                    named.append((entry.name, variant.name, path))
        return sorted(named)

    def _found(self, named: Sequence[tuple[str, str, Path]]) -> list[_Place]:
        found = []
        for model, variant, path in named:
            with suppress(OSError, ModelError):
                if path.is_dir():
                    size = sum(os.stat(path / each).st_size for each in folder_manifest.listed(path))
                else:
                    size = os.stat(path).st_size
                if size:
                    found.append(_Place(model, variant, path, size))
        return found

    def _share_known(self, place: _Place) -> tuple[str, SharedFile] | None:
        """What the last round found, while it is unchanged: no file is read, not even that of the hashes."""
        for sha256, shared in self._shared.items():
            if shared.path == place.path and all(
                _print_of(shared.path / inner) == before for inner, before in shared.prints.items()
            ):
                return sha256, shared
        return None

    def _share(self, place: _Place) -> tuple[str, SharedFile] | None:
        """Hash what is not known. In a thread."""
        try:
            if not place.path.is_dir():
                sha256, now = self._hashed(place.path)
                return sha256, SharedFile(place.path, now.size, {"": now})
            prints: dict[str, Fingerprint] = {}

            def hashed(path: Path) -> str:
                sha256, prints[path.relative_to(place.path).as_posix()] = self._hashed(path)
                return sha256

            manifest = folder_manifest.made(place.path, hashed)
            if not manifest.files:
                return None
            return manifest.sha256, SharedFile(place.path, sum(p.size for p in prints.values()), prints, manifest)
        except Stopped:
            return None
        except (ModelError, OSError) as error:
            # Said once for each state of the file, not every ten seconds.
            state = _print_of(place.path) or Fingerprint(0, 0)
            if self._bad.get(place.path) != state:
                self._bad[place.path] = state
                log.warning("the file of %s (%s) cannot be given to peers: %s", place.model, place.variant, error)
            return None

    def _hashed(self, path: Path) -> tuple[str, Fingerprint]:
        def progress(percent: float) -> None:
            if self._stop.is_set():
                raise Stopped

        sha256 = self._hashes.sha256(path, progress)
        now = _print_of(path)
        if now is None or self._hashes.known(path) not in (sha256, None):
            raise OSError("it changed while it was hashed")
        return sha256, now

    def _publish(self, rows: Sequence[tuple[_Place, tuple[str, SharedFile] | None]]) -> None:
        held = tuple(
            HeldFile(
                place.model,
                place.variant,
                Bytes(place.size),
                None if shared is None else shared[0],
                place.path.is_dir() if shared is None else shared[1].manifest is not None,
            )
            for place, shared in rows
        )
        # A file whose turn has not come yet stays given by what is known of it.
        self._shared = {shared[0]: shared[1] for _, shared in rows if shared is not None}
        if held != self._held:
            self._held = held
            self._on_change()


def _print_of(path: Path) -> Fingerprint | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return Fingerprint(found.st_size, found.st_mtime_ns)


async def in_quiet_thread(work: Callable[[], Result]) -> Result:
    """`work()` in a thread of its own that yields to everything else; a cancelled caller leaves it running."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[Result] = loop.create_future()

    def tell(set_it: Callable[[], None]) -> None:
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(lambda: None if answer.done() else set_it())

    def run() -> None:
        # On Linux a thread's own; elsewhere the call fails or means the process, which then is left as it is.
        with suppress(OSError, AttributeError):
            if os.uname().sysname == "Linux":
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST_PRIORITY)
        try:
            result = work()
        except BaseException as error:  # noqa: BLE001  # the waiter gets it, whatever it is
            tell(partial(answer.set_exception, error))
        else:
            tell(partial(answer.set_result, result))

    threading.Thread(target=run, name="hash model files", daemon=True).start()
    return await answer
