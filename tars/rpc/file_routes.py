"""`GET /files/<sha256>[/<relative path>]`, with ranges: how a peer reads a model file of this node. On the mesh's listener only.

Law of this file: HTTP alone; what is given, and how fast, is `mesh.file_server`'s decision. Answers have no body but the file's bytes.
"""

from __future__ import annotations

import asyncio
import re
from contextlib import aclosing

from aiohttp import hdrs, web

from tars.mesh.file_server import Busy, FileServer, Gone, NotShared, Resource

FILES_PATH = "/files"
WRITE_SECONDS = 60.0
"""A reader that takes nothing for so long is gone; its place is another's."""
RETRY_SECONDS = 1
"""What a peer is told where every place is taken."""
_SHA256 = re.compile("[0-9a-f]{64}")
_RANGE = re.compile(r"bytes=(\d{0,19})-(\d{0,19})", re.ASCII)


def add_file_routes(application: web.Application, server: FileServer) -> None:
    """Give `server`'s files on `application`, which must let nobody in but peers."""

    async def answer(request: web.Request) -> web.StreamResponse:
        sha256, path = request.match_info["sha256"], request.match_info.get("path", "")
        if _SHA256.fullmatch(sha256) is None:
            return web.Response(status=404)
        try:
            resource = server.open(sha256, path)
        except NotShared:
            return web.Response(status=404)
        try:
            if request.method == hdrs.METH_HEAD:
                return web.Response(headers={**_headers(resource), hdrs.CONTENT_LENGTH: str(resource.size)})
            span = _span(request.headers.get(hdrs.RANGE), resource.size)
            if span is None:
                return web.Response(status=416, headers={hdrs.CONTENT_RANGE: f"bytes */{resource.size}"})
            with server.place():
                return await _send(request, server, resource, *span)
        except Busy:
            return web.Response(status=503, headers={hdrs.RETRY_AFTER: str(RETRY_SECONDS)})
        finally:
            resource.close()

    application.router.add_get(FILES_PATH + "/{sha256}", answer)
    application.router.add_get(FILES_PATH + "/{sha256}/{path:.+}", answer)


async def _send(
    request: web.Request, server: FileServer, resource: Resource, start: int, stop: int
) -> web.StreamResponse:
    headers = _headers(resource)
    whole = request.headers.get(hdrs.RANGE) is None
    if not whole:
        headers[hdrs.CONTENT_RANGE] = f"bytes {start}-{stop - 1}/{resource.size}"
    response = web.StreamResponse(status=200 if whole else 206, headers=headers)
    response.content_length = stop - start
    await response.prepare(request)
    try:
        async with aclosing(server.read(resource, start, stop)) as chunks:
            async for chunk in chunks:
                async with asyncio.timeout(WRITE_SECONDS):
                    await response.write(chunk)
        await response.write_eof()
    except (Gone, OSError, TimeoutError):
        # What was promised cannot be sent: the reader must see an end that is none, not a whole answer.
        if request.transport is not None:
            request.transport.abort()
    return response


def _headers(resource: Resource) -> dict[str, str]:
    return {
        hdrs.CONTENT_TYPE: "application/octet-stream",
        hdrs.ACCEPT_RANGES: "bytes",
        hdrs.ETAG: f'"{resource.etag}"',
    }


def _span(header: str | None, size: int) -> tuple[int, int] | None:
    """First byte and the one after the last of the range that is asked for (RFC 9110, 14.1.2; one range); None: it cannot be given."""
    if header is None:
        return 0, size
    found = _RANGE.fullmatch(header.strip())
    if found is None or not (found[1] or found[2]):
        return None
    if not found[1]:
        start, stop = max(0, size - int(found[2])), size
    else:
        start, stop = int(found[1]), min(size, int(found[2]) + 1) if found[2] else size
    return (start, stop) if start < stop else None
