"""Joining over real TLS: a PC comes in with one token; whoever stands in the middle, or at the wrong port, learns nothing."""

from __future__ import annotations

import asyncio
import base64
import datetime as dates
import ssl
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import orjson
import pytest
from aiohttp import web
from mesh_bench import MeshNode, certified, new_id, running_mesh
from raw_server import raw_server, sockets_closed

from tars.config_schema.listen_address import ListenAddress
from tars.core.records import Member
from tars.core.types import NodeId
from tars.errors import BadPeerAnswer, ConfigError, JoinRefused, NotAMember, PeerUnreachable, TarsError
from tars.mesh import identity as identity_module
from tars.mesh import joining
from tars.mesh.identity import Identity
from tars.mesh.join_tokens import Invitation, Token, encode
from tars.mesh.replicated_store import ReplicatedStore
from tars.rpc import join_client
from tars.rpc.join_client import Applicant, enter_mesh
from tars.rpc.mesh_listener import add_mesh_hint
from tars.state_folder import StateFolder

APPLICANT = Applicant("two", ("192.0.2.2:8001",))


@pytest.fixture(autouse=True)
async def no_socket_is_left() -> AsyncIterator[None]:
    yield
    await sockets_closed()


@pytest.fixture
async def one(tmp_path: Path) -> AsyncIterator[MeshNode]:
    async with running_mesh(tmp_path, "one") as (node,):
        yield node


@pytest.fixture
def folder(tmp_path: Path) -> StateFolder:
    (tmp_path / "joiner").mkdir()
    return StateFolder(tmp_path / "joiner")


def invite(node: MeshNode, token: Token | None = None, port: int | None = None) -> Invitation:
    return Invitation(token or node.tokens.new()[0], ListenAddress("127.0.0.1", port or node.listener.port))


async def test_one_token_brings_a_pc_in_and_a_restart_needs_none(one: MeshNode, folder: StateFolder) -> None:
    invitation = invite(one)
    grant = await enter_mesh(invitation, folder, APPLICANT, None)
    assert grant is not None
    store = ReplicatedStore(folder, grant.node)
    store.adopt(grant.records)
    identity = grant.save(folder)
    two = MeshNode(folder.path, "two", identity)
    two.store.map.merge(store.map.records(), 2**41)
    await two.listener.start("127.0.0.1", 0)
    try:
        # Each knows the other: the one admitted it, and the other got all records.
        assert (await one.peers.exchange(two.address, two.id, one.ping()))[0] == two.id
        assert (await two.peers.exchange(one.address, one.id, two.ping()))[0] == one.id
        # The same command line at the next start, with the used token.
        again = Identity.load_or_none(folder.path, grant.node)
        assert await enter_mesh(invitation, folder, APPLICANT, again) is None
        # A third comes in through the second, while the first is away.
        await one.listener.close()
        third = StateFolder(folder.path.parent / "third")
        third.path.mkdir()
        assert (await enter_mesh(invite(two), third, Applicant("three"), None)) is not None
        assert await enter_mesh(invitation, folder, APPLICANT, again) is None
    finally:
        await two.peers.close()
        await two.listener.close()


async def test_a_member_that_does_not_know_its_host_any_more_joins_again_with_a_fresh_token(
    one: MeshNode, folder: StateFolder, caplog: pytest.LogCaptureFixture
) -> None:
    invitation = invite(one)
    grant = await enter_mesh(invitation, folder, APPLICANT, None)
    assert grant is not None
    identity = grant.save(folder)
    # The used token of a command line is no error: they may find each other by themselves.
    assert await enter_mesh(invitation, folder, APPLICANT, identity, knows=lambda node: node != one.id) is None
    assert "make a new token there" in caplog.text
    again = await enter_mesh(invite(one), folder, APPLICANT, identity, knows=lambda node: node != one.id)
    assert again is not None
    assert again.node == identity.node
    assert again.save(folder).fingerprint != identity.fingerprint
    assert any(record.key == f"member/{one.id}" for record in again.records)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("used", "used already"),
        ("expired", "expired"),
        ("revoked", "revoked"),
        ("unknown", "no such join token"),
        ("other_mesh", "not the one that this token is for"),
    ],
)
async def test_each_bad_token_has_its_own_clear_error_and_changes_nothing(
    one: MeshNode, folder: StateFolder, what: str, words: str
) -> None:
    token, entry = one.tokens.new()
    if what == "used":
        one.tokens.spend(token.secret, "x", new_id())
    elif what == "expired":
        one.tokens._entries[0] = replace(entry, expires_ms=entry.created_ms)
    elif what == "revoked":
        one.tokens.revoke(entry.id)
    elif what == "unknown":
        token = Token(bytes(16), token.ca_hash)
    else:
        token = Token(token.secret, bytes(16))
    with pytest.raises(JoinRefused, match=words) as refused:
        await enter_mesh(invite(one, token), folder, APPLICANT, None)
    assert refused.value.details["reason"] == what
    assert not (folder.path / identity_module.IDENTITY_FILE).exists()
    assert len(one.store.map.items("member/")) == 1


class InTheMiddle:
    """Listens for joiners with a certificate of its own CA, answers plausibly, and writes down every decrypted byte."""

    def __init__(self, identity: Identity, ca_pem: bytes) -> None:
        self.identity = identity
        self.ca_pem = ca_pem
        self.seen = b""
        self.port = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while chunk := await reader.read(65_536):
                self.seen += chunk
                if b"\r\n\r\n" in self.seen:
                    writer.write(
                        b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%b"
                        % (len(self.ca_pem), self.ca_pem)
                    )
                    await writer.drain()
                    break
        except OSError:
            pass

    async def __aenter__(self) -> InTheMiddle:
        self._serving = raw_server(self.serve, self.identity.server_context())
        self.port = await self._serving.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._serving.__aexit__(None, None, None)


@pytest.mark.parametrize("shows", ["its own CA", "the mesh's CA"])
async def test_a_man_in_the_middle_sees_no_secret(
    one: MeshNode, folder: StateFolder, tmp_path: Path, shows: str
) -> None:
    token, entry = one.tokens.new()
    (tmp_path / "evil").mkdir()
    evil = Identity.create(tmp_path / "evil", new_id())
    # The second one passes the mesh's real CA on, which is public, and cannot prove to belong to it.
    shown = evil.ca_certificate_pem if shows == "its own CA" else one.identity.ca_certificate_pem
    async with InTheMiddle(evil, shown) as middle, asyncio.timeout(20):
        with pytest.raises((JoinRefused, NotAMember), match=r"nothing was said|Nothing was sent"):
            await enter_mesh(invite(one, token, middle.port), folder, APPLICANT, None)
    assert middle.seen.startswith(b"GET /ca.pem HTTP/1.1\r\n")
    assert middle.seen.count(b"\r\n\r\n") == 1
    assert b"POST" not in middle.seen
    for secret in (token.secret, encode(token.secret).encode(), str(token).encode(), token.secret.hex().encode()):
        assert secret not in middle.seen
        assert base64.b64encode(secret) not in middle.seen
    # And it is as good as before.
    assert one.tokens.state(entry) == "open"
    assert await enter_mesh(invite(one, token), folder, APPLICANT, None) is not None


async def test_a_node_without_a_name_in_its_certificate_gets_no_secret(
    one: MeshNode, folder: StateFolder, tmp_path: Path
) -> None:
    """Signed by the CA, but no node: the CA's own certificate, used as a server's."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    (tmp_path / "ca.pem").write_bytes(one.identity.ca_key_pem + one.identity.ca_certificate_pem)
    context.load_cert_chain(tmp_path / "ca.pem")
    (tmp_path / "evil").mkdir()
    evil = Identity.create(tmp_path / "evil", new_id())
    evil.server_context = lambda: context  # type: ignore[method-assign]  # what it shows
    async with InTheMiddle(evil, one.identity.ca_certificate_pem) as middle, asyncio.timeout(20):
        with pytest.raises(NotAMember):
            await enter_mesh(invite(one, None, middle.port), folder, APPLICANT, None)
    assert b"POST" not in middle.seen


# --- wrong places -------------------------------------------------------------------------------------------------------


async def serving(handler: web.Application) -> tuple[web.AppRunner, int]:
    runner = web.AppRunner(handler)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    return runner, runner.addresses[0][1]


async def test_the_clients_port_leads_to_the_meshs(
    one: MeshNode, folder: StateFolder, caplog: pytest.LogCaptureFixture
) -> None:
    app = web.Application()
    add_mesh_hint(app, lambda: one.listener.port)
    runner, port = await serving(app)
    try:
        assert await enter_mesh(invite(one, None, port), folder, APPLICANT, None) is not None
    finally:
        await runner.cleanup()
    assert f"port {port} is for clients; joining at the mesh's port, {one.listener.port}" in caplog.text


@pytest.mark.parametrize("answer", [{"mesh_port": None}, {"mesh_port": "8001"}, {"mesh_port": 0}, [], "x", None])
async def test_a_plain_http_port_that_gives_no_hint_names_the_usual_one(
    one: MeshNode, folder: StateFolder, answer: object
) -> None:
    async def hint(request: web.Request) -> web.Response:
        return web.json_response(answer) if answer is not None else web.Response(status=404)

    app = web.Application()
    app.router.add_get("/mesh", hint)
    runner, port = await serving(app)
    try:
        with pytest.raises(JoinRefused, match=rf"does not speak TLS.*usually the port after the clients', {port + 1}"):
            await enter_mesh(invite(one, None, port), folder, APPLICANT, None)
    finally:
        await runner.cleanup()


async def test_where_nobody_answers_it_says_so(one: MeshNode, folder: StateFolder) -> None:
    invitation = invite(one)
    await one.listener.close()
    with pytest.raises(PeerUnreachable, match="No node answers"):
        await enter_mesh(invitation, folder, APPLICANT, None)


@pytest.mark.parametrize("said", [b"", b"220 smtp.example ESMTP\r\n", b"\x00" * 100])
async def test_another_program_at_that_port_is_one_clear_error(one: MeshNode, folder: StateFolder, said: bytes) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(said)
        await reader.read(100)

    async with asyncio.timeout(20), raw_server(serve) as port:
        with pytest.raises((JoinRefused, PeerUnreachable, BadPeerAnswer)):
            await enter_mesh(invite(one, None, port), folder, APPLICANT, None)


async def test_another_https_server_is_no_node(one: MeshNode, folder: StateFolder, tmp_path: Path) -> None:
    (tmp_path / "web").mkdir()
    async with InTheMiddle(Identity.create(tmp_path / "web", new_id()), b"<html>hello</html>") as page:
        with pytest.raises(BadPeerAnswer, match="no TARS node"):
            await enter_mesh(invite(one, None, page.port), folder, APPLICANT, None)


# --- clocks ---------------------------------------------------------------------------------------------------------------


class FixedClock(dates.datetime):
    years = 0

    @classmethod
    def now(cls, tz: dates.tzinfo | None = None) -> dates.datetime:  # type: ignore[override]  # of the base class, for arithmetic
        return dates.datetime.now(tz) + dates.timedelta(days=365 * cls.years)


@pytest.mark.parametrize("years", [-40, 70])
async def test_a_joiner_whose_clock_is_off_by_years_hears_both_dates(
    one: MeshNode, folder: StateFolder, monkeypatch: pytest.MonkeyPatch, years: int
) -> None:
    monkeypatch.setattr(FixedClock, "years", years)
    monkeypatch.setattr(join_client, "datetime", FixedClock)
    with pytest.raises(ConfigError, match=r"this PC's clock says .* UTC.*one of the clocks is wrong"):
        await enter_mesh(invite(one), folder, APPLICANT, None)


async def test_a_member_whose_certificate_ended_while_its_clock_stood_is_told_apart(
    one: MeshNode, folder: StateFolder
) -> None:
    one.identity.renew_if_due(dates.datetime.now(dates.UTC) - dates.timedelta(days=800))
    with pytest.raises(NotAMember, match=r"has expired, and this PC's clock says"):
        await enter_mesh(invite(one), folder, APPLICANT, None)


async def test_a_joiner_some_days_ahead_is_refused_by_the_member_and_keeps_its_token(
    one: MeshNode, folder: StateFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    token, entry = one.tokens.new()
    monkeypatch.setattr(joining, "CLOCK_DIFFERENCE_MS", -1)
    with pytest.raises(JoinRefused, match="clock"):
        await enter_mesh(invite(one, token), folder, APPLICANT, None)
    assert one.tokens.state(entry) == "open"


# --- those who were in before -----------------------------------------------------------------------------------------------


async def joined(one: MeshNode, folder: StateFolder) -> Identity:
    grant = await enter_mesh(invite(one), folder, APPLICANT, None)
    assert grant is not None
    return grant.save(folder)


async def test_a_removed_pc_comes_back_with_a_new_token_under_a_new_id(one: MeshNode, folder: StateFolder) -> None:
    identity = await joined(one, folder)
    former = one.store.map.get(f"member/{identity.node}")
    assert isinstance(former, Member)
    one.store.put(f"member/{identity.node}", replace(former, removed=True))
    used, token = one.tokens.new()[0], one.tokens.new()[0]
    one.tokens.spend(used.secret, "x", new_id())
    with pytest.raises(JoinRefused, match=r"removed from the mesh.*used already"):
        await enter_mesh(invite(one, used), folder, APPLICANT, identity)
    # What was refused has changed nothing: the next start finds what it had.
    assert Identity.load_or_none(folder.path, folder.node_id()) is not None
    grant = await enter_mesh(invite(one, token), folder, APPLICANT, identity)
    assert grant is not None
    assert grant.node != identity.node
    assert folder.node_id() == identity.node
    fresh = grant.save(folder)
    assert folder.node_id() == grant.node
    member = one.store.map.get(f"member/{fresh.node}")
    assert isinstance(member, Member)
    assert (member.fingerprint, member.removed) == (fresh.fingerprint, False)
    loaded = Identity.load_or_none(folder.path, NodeId(grant.node))
    assert loaded is not None


async def test_a_member_of_another_mesh_is_not_moved_silently(
    one: MeshNode, folder: StateFolder, tmp_path: Path
) -> None:
    token, entry = one.tokens.new()
    other = Identity.create(folder.path, folder.node_id())
    with pytest.raises(ConfigError, match=r"belongs to another mesh.*--state-dir"):
        await enter_mesh(invite(one, token), folder, APPLICANT, other)
    assert one.tokens.state(entry) == "open"
    assert Identity.load_or_none(folder.path, folder.node_id()) is not None


async def test_a_pc_that_lost_its_identity_but_not_its_id_replaces_its_key(one: MeshNode, folder: StateFolder) -> None:
    first = await joined(one, folder)
    (folder.path / identity_module.IDENTITY_FILE).unlink()
    second = await joined(one, folder)
    assert first.node == second.node
    member = one.store.map.get(f"member/{first.node}")
    assert isinstance(member, Member)
    assert member.fingerprint == second.fingerprint != first.fingerprint
    assert len(one.store.map.items("member/")) == 2


async def test_a_certificate_that_was_signed_by_the_ca_is_no_way_to_join(one: MeshNode, tmp_path: Path) -> None:
    minted = certified(one.identity, tmp_path / "minted")
    folder = StateFolder(tmp_path / "minted")
    folder.write_json("node.json", {"id": minted.node})
    token = Token(bytes(16), one.identity.ca_hash[:16])
    with pytest.raises(JoinRefused, match="no such join token"):
        await enter_mesh(invite(one, token), folder, APPLICANT, minted)


async def test_a_broken_answer_joins_nothing(one: MeshNode, folder: StateFolder) -> None:
    one.node.mesh = type("Broken", (), {"join": staticmethod(lambda *_: 5)})()  # type: ignore[assignment]  # only this is asked
    with pytest.raises(TarsError):
        await enter_mesh(invite(one), folder, APPLICANT, None)
    assert not (folder.path / identity_module.IDENTITY_FILE).exists()
    assert orjson.loads((folder.path / "node.json").read_bytes())
