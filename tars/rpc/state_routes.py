"""`GET /states/<id>`: how a peer has the state of an answer that it goes on with, once. On the mesh's listener only.

Law of this file: HTTP alone; what there is, and that nobody has it twice, is `serving.kept_states`' decision.
"""

from __future__ import annotations

import asyncio

from aiohttp import hdrs, web

from tars.serving.kept_states import KeptStates

STATES_PATH = "/states"
WRITE_SECONDS = 10.0
"""For the whole; who takes it has given up long before."""
CHUNK = 2**20


def add_state_routes(application: web.Application, kept: KeptStates) -> None:
    """Give what is kept on `application`, which must let nobody in but peers."""

    async def answer(request: web.Request) -> web.StreamResponse:
        with kept.taken(request.match_info["id"]) as path:
            if path is None:
                return web.Response(status=404)
            try:
                file = path.open("rb")
            except OSError:
                return web.Response(status=404)
            with file:
                response = web.StreamResponse(headers={hdrs.CONTENT_TYPE: "application/octet-stream"})
                response.content_length = path.stat().st_size
                try:
                    async with asyncio.timeout(WRITE_SECONDS):
                        await response.prepare(request)
                        while chunk := await asyncio.to_thread(file.read, CHUNK):
                            await response.write(chunk)
                        await response.write_eof()
                except (OSError, TimeoutError):
                    # What was promised cannot be sent: the reader must see an end that is none, not a whole answer.
                    if request.transport is not None:
                        request.transport.abort()
                return response

    # No HEAD: it would take what it only asks about.
    application.router.add_get(STATES_PATH + "/{id}", answer, allow_head=False)
