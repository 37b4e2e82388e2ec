"""A state from the peer that keeps it: all of it, in time, as it was promised; else no file."""

import asyncio
import hashlib
import os

import pytest
from aiohttp import web

from tars.core.types import NodeId
from tars.errors import DeadlineExceeded, PeerUnreachable, TarsError
from tars.messages.base import SavedState
from tars.rpc.http_client import RpcConnection
from tars.rpc.peer_states import HttpPeerStates
from tars.rpc.state_routes import STATES_PATH, add_state_routes
from tars.serving.kept_states import KeptStates

CONTENT = os.urandom(3 * 2**20 + 7)


def promised(**more):
    told = {"node": "n", "id": "one", "bytes": len(CONTENT), "sha256": hashlib.sha256(CONTENT).hexdigest()}
    return SavedState(**{**told, **more})


@pytest.fixture
async def states(aiohttp_server, tmp_path):
    """Makes the fetching side for a server that answers as it is told."""
    connections = []

    async def make(handler=None, kept=None):
        application = web.Application()
        if kept is not None:
            add_state_routes(application, kept)
        else:
            application.router.add_get(STATES_PATH + "/{id}", handler)
        server = await aiohttp_server(application)
        connection = RpcConnection(str(server.make_url("/")).rstrip("/"))
        connections.append(connection)
        asked = []

        def to(node):
            asked.append(node)
            return connection

        made = HttpPeerStates(to, tmp_path / "sequences")
        made.asked = asked
        return made

    yield make
    for connection in connections:
        await connection.close()
    left = os.listdir(tmp_path / "sequences") if (tmp_path / "sequences").exists() else []
    assert left == []


async def test_a_state_comes_whole_once_into_a_private_file(states, tmp_path):
    file = tmp_path / "sequence-1.state"
    file.write_bytes(CONTENT)
    kept = KeptStates(NodeId("n"))
    saved = await kept.keep(file)
    fetching = await states(kept=kept)
    path = await fetching.fetch(saved, 10.0)
    assert fetching.asked == ["n"]
    assert path.read_bytes() == CONTENT
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    path.unlink()
    await kept.collected()
    assert not list(tmp_path.glob("sequence-*"))
    with pytest.raises(PeerUnreachable, match="not there"):
        await fetching.fetch(saved, 10.0)


@pytest.mark.parametrize("wrong", [{"bytes": len(CONTENT) - 1}, {"bytes": len(CONTENT) + 1}, {"sha256": "0" * 64}])
async def test_what_is_not_as_promised_is_not_taken(states, wrong):
    async def answer(request):
        return web.Response(body=CONTENT)

    with pytest.raises(PeerUnreachable, match="promised"):
        await (await states(answer)).fetch(promised(**wrong), 10.0)


async def test_a_state_that_comes_too_slowly_is_given_up_before_the_time_is_over(states):
    async def answer(request):
        response = web.StreamResponse()
        response.content_length = len(CONTENT)
        await response.prepare(request)
        while True:
            await response.write(bytes(1000))
            await asyncio.sleep(0.02)

    began = asyncio.get_running_loop().time()
    with pytest.raises(DeadlineExceeded, match="too slowly"):
        await (await states(answer)).fetch(promised(), 60.0)
    assert asyncio.get_running_loop().time() - began < 30


async def test_one_that_says_nothing_is_given_up_when_the_time_is_over(states):
    async def answer(request):
        await asyncio.Event().wait()

    with pytest.raises(DeadlineExceeded):
        await (await states(answer)).fetch(promised(), 0.1)


async def test_a_connection_that_breaks_leaves_no_file(states):
    async def answer(request):
        response = web.StreamResponse()
        response.content_length = len(CONTENT)
        await response.prepare(request)
        await response.write(CONTENT[:1000])
        request.transport.abort()
        return response

    with pytest.raises(TarsError) as broken:
        await (await states(answer)).fetch(promised(), 10.0)
    assert broken.value.kind == "peer_unreachable"


async def test_a_peer_without_an_address_is_no_way(tmp_path):
    def nowhere(node):
        raise PeerUnreachable("No address is known.")

    with pytest.raises(PeerUnreachable, match="No address"):
        await HttpPeerStates(nowhere, tmp_path).fetch(promised(), 1.0)
    assert os.listdir(tmp_path) == []
