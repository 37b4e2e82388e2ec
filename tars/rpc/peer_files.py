"""The peers' model files over their kept connections; see `mesh.model_fetch.PeerFiles`.

Law of this file: it asks by hash, and believes nothing that the answer says of itself but bytes that are counted: what they are, their
hash proves.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import AbstractAsyncContextManager
from urllib.parse import quote

import aiohttp

from tars.core.records import NodeAdvert
from tars.core.types import ModelEntry, NodeId
from tars.errors import CallerError, TarsError
from tars.mesh.file_transfer import SourceFailed
from tars.mesh.hub import check_range
from tars.mesh.model_fetch import Holder
from tars.rpc.file_routes import FILES_PATH
from tars.rpc.http_client import RpcConnection

ANSWER_SECONDS = 10.0
"""Until an answer begins: a frozen peer must not hold a piece; what comes after has its own bound (`file_transfer.IDLE_SECONDS`)."""
READ_SIZE = 256 * 2**10


class HttpPeerFiles:
    """`adverts`: those of the peers that are alive. `connection`: the kept one to a peer; may raise a `TarsError`."""

    def __init__(self, adverts: Callable[[], Iterable[NodeAdvert]], connection: Callable[[NodeId], RpcConnection]):
        self._adverts = adverts
        self._connection = connection

    def holders(self) -> list[Holder]:
        """See `PeerFiles`."""
        return [Holder(each.node.id, each.node.name, file) for each in self._adverts() for file in each.files]

    def entry(self, model: str) -> ModelEntry | None:
        """See `PeerFiles`."""
        wanted = model.lower()
        for advert in self._adverts():
            for entry in advert.models:
                if wanted in (entry.name.lower(), *(alias.lower() for alias in entry.aliases)):
                    return entry
        return None

    async def size(self, node: NodeId, resource: str) -> int:
        """See `PeerFiles`. The first byte is asked for: its answer tells how many there are."""
        try:
            async with self._open(node, resource, 0, 1) as response:
                told = response.headers.get("Content-Range", "")
                found = re.fullmatch(r"bytes (?:0-0|\*)/(\d{1,15})", told)
                if response.status not in (206, 416) or found is None:
                    check_range(response, 0, 1, 1)
                    raise SourceFailed("it does not say how large the file is", final=True)
                return int(found[1])
        except TarsError as error:
            raise _failed(error) from error
        except (aiohttp.ClientError, ConnectionError) as error:
            raise SourceFailed("the connection to it broke") from error

    async def read(self, node: NodeId, resource: str, start: int, stop: int, size: int) -> AsyncGenerator[bytes, None]:
        """See `PeerFiles`."""
        try:
            async with self._open(node, resource, start, stop) as response:
                check_range(response, start, stop, size)
                async for chunk in response.content.iter_chunked(READ_SIZE):
                    yield chunk
        except TarsError as error:
            raise _failed(error) from error
        except (aiohttp.ClientError, ConnectionError) as error:
            raise SourceFailed("the connection to it broke") from error

    def _open(
        self, node: NodeId, resource: str, start: int, stop: int
    ) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        headers = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        return self._connection(node).get(f"{FILES_PATH}/{quote(resource)}", headers, timeout=ANSWER_SECONDS)


def _failed(error: TarsError) -> SourceFailed:
    return SourceFailed(error.message.rstrip("."), final=isinstance(error, CallerError))
