"""Fetches the state of an answer from the peer that keeps it, into a file of this node's own.

Law of this file: it asks by id, and believes nothing of the answer but bytes that were counted and whose hash is right. In every other case
no file is left.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote

import aiohttp

from tars.core.types import NodeId
from tars.errors import DeadlineExceeded, PeerUnreachable
from tars.messages.base import SavedState
from tars.rpc.http_client import RpcConnection
from tars.rpc.state_routes import STATES_PATH

READ_SIZE = 2**20
LOOK_SECONDS = 0.25
"""After so long the speed is known: a state that will not come in time is given up then, and not when the time is over."""


class HttpPeerStates:
    """See `serving.running_answers.PeerStates`. `connection`: the kept one to a peer; may raise a `TarsError`."""

    def __init__(self, connection: Callable[[NodeId], RpcConnection], folder: Path) -> None:
        self._connection = connection
        self._folder = folder

    async def fetch(self, saved: SavedState, seconds: float) -> Path:
        """A new file (mode 0600) with the bytes that `saved` promises, within `seconds`.

        Raises `PeerUnreachable`, `DeadlineExceeded`, another `TarsError` of the connection, or `OSError`; then no file is left.
        """
        path = _new_file(self._folder)
        try:
            async with asyncio.timeout(seconds):
                await self._into(path, saved, seconds)
        except TimeoutError:
            _remove(path)
            raise DeadlineExceeded(f"The state did not come within {seconds:g} s.") from None
        except (aiohttp.ClientError, ConnectionError):
            _remove(path)
            raise PeerUnreachable("The connection broke while the state came.") from None
        except BaseException:
            _remove(path)
            raise
        return path

    async def _into(self, target: Path, saved: SavedState, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        digest, count = hashlib.sha256(), 0
        path = f"{STATES_PATH}/{quote(saved.id, safe='')}"
        headers = {"Accept-Encoding": "identity"}
        asking = self._connection(NodeId(saved.node)).get(path, headers, timeout=seconds)
        with _opened(target) as file:
            async with asking as response:
                if response.status != 200:
                    raise PeerUnreachable("The state is not there any more.")
                async for chunk in response.content.iter_chunked(READ_SIZE):
                    count += len(chunk)
                    if count > saved.bytes:
                        break
                    elapsed = loop.time() - began
                    if elapsed > LOOK_SECONDS and elapsed * saved.bytes > seconds * count:
                        raise DeadlineExceeded(
                            f"The state comes too slowly: it would not be here within {seconds:g} s."
                        )
                    # A chunk takes about a millisecond.
                    digest.update(chunk)
                    file.write(chunk)
        if count != saved.bytes or digest.hexdigest() != saved.sha256:
            raise PeerUnreachable("What came is not the state that was promised.")


def _new_file(folder: Path) -> Path:
    """An empty one with mode 0600 from its first moment, in a folder that is this user's alone."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix="sequence-", suffix=".fetched", dir=folder)
    os.close(descriptor)
    return Path(name)


def _opened(path: Path) -> BinaryIO:
    return path.open("wb")


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)
