"""States over HTTP: by their name, once, gone afterwards."""

import os

import aiohttp
import pytest
from aiohttp import web

from tars.core.types import NodeId
from tars.rpc.state_routes import STATES_PATH, add_state_routes
from tars.serving.kept_states import KeptStates

CONTENT = os.urandom(2**20 + 3)


@pytest.fixture
async def kept():
    made = KeptStates(NodeId("n"))
    yield made
    made.close()


@pytest.fixture
async def url(aiohttp_server, kept):
    application = web.Application()
    add_state_routes(application, kept)
    return (await aiohttp_server(application)).make_url(STATES_PATH)


@pytest.fixture
async def session():
    async with aiohttp.ClientSession() as one:
        yield one


@pytest.fixture
async def saved(kept, tmp_path):
    file = tmp_path / "sequence-1.state"
    file.write_bytes(CONTENT)
    return await kept.keep(file)


async def test_a_state_is_given_once_and_is_gone(url, session, saved, kept, tmp_path):
    async with session.get(url / saved.id) as answer:
        assert answer.status == 200
        assert await answer.read() == CONTENT
    await kept.collected()
    assert os.listdir(tmp_path) == []
    async with session.get(url / saved.id) as answer:
        assert answer.status == 404


@pytest.mark.parametrize("name", ["0" * 32, "sequence-1.state", "%2e%2e%2fsequence-1.state", "..", "%00"])
async def test_nothing_but_a_kept_name_is_found(url, session, saved, kept, name):
    async with session.get(f"{url}/{name}") as answer:
        assert answer.status == 404
    assert len(kept) == 1


async def test_asking_about_it_takes_nothing(url, session, saved, kept):
    for method in ("HEAD", "POST", "DELETE"):
        async with session.request(method, url / saved.id) as answer:
            assert answer.status == 405
    assert len(kept) == 1


async def test_a_reader_who_leaves_in_the_middle_has_had_it(aiohttp_server, session, kept, tmp_path):
    application = web.Application()
    add_state_routes(application, kept)
    server = await aiohttp_server(application)
    file = tmp_path / "sequence-2.state"
    file.write_bytes(bytes(64 * 2**20))  # more than the sockets hold
    saved = await kept.keep(file)
    async with session.get(server.make_url(f"{STATES_PATH}/{saved.id}")) as answer:
        await answer.content.readexactly(1000)
    await kept.collected()
    assert os.listdir(tmp_path) == []


async def test_a_file_that_is_not_there_any_more_is_not_found(url, session, saved, tmp_path):
    for file in tmp_path.iterdir():
        file.unlink()
    async with session.get(url / saved.id) as answer:
        assert answer.status == 404
