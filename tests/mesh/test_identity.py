"""Identity: certificates that OpenSSL itself accepts and refuses, over real TLS; what a damaged, copied or worn-out one says."""

from __future__ import annotations

import asyncio
import datetime as dates
import random
import shutil
import ssl
import stat
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from raw_server import raw_server

from tars.core.records import Member
from tars.core.types import NodeId
from tars.errors import ConfigError, NotAMember
from tars.mesh.certificates import PeerCertificate, peer_of
from tars.mesh.identity import IDENTITY_FILE, Identity

NOW = dates.datetime.now(dates.UTC)


def new_id() -> NodeId:
    return NodeId(str(uuid.uuid4()))


def in_folder(path: Path) -> Path:
    path.mkdir(exist_ok=True)
    return path


@pytest.fixture
def first(tmp_path: Path) -> Identity:
    """The identity of a mesh's first node."""
    return Identity.create(in_folder(tmp_path / "first"), new_id())


def admitted(by: Identity, folder: Path, node: NodeId | None = None, now: dates.datetime | None = None) -> Identity:
    """Another node's identity in the same mesh."""
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = by.issue(node or new_id(), key.public_key(), now)
    identity = Identity.accept(in_folder(folder), key, certificate, by.ca_certificate_pem, by.ca_key_pem)
    identity.save()
    return identity


def trust_all(peer: PeerCertificate) -> None:
    """Judges nobody."""


async def exchange(
    server: ssl.SSLContext, client: ssl.SSLContext
) -> tuple[PeerCertificate | None, PeerCertificate | None]:
    """One line each way over real TLS on loopback: (whom the server saw, whom the client saw)."""
    saw: asyncio.Future[PeerCertificate | None] = asyncio.get_running_loop().create_future()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readline()
            saw.set_result(peer_of(writer.get_extra_info("ssl_object")))
            writer.write(b"here\n")
            await writer.drain()
        except (OSError, NotAMember) as error:
            if not saw.done():
                saw.set_exception(error)
                saw.exception()

    async with asyncio.timeout(10), raw_server(serve, server) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=client, server_hostname="")
        try:
            writer.write(b"there?\n")
            if await reader.readline() != b"here\n":
                raise ConnectionResetError("closed")
            return await saw, peer_of(writer.get_extra_info("ssl_object"))
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()


async def test_two_members_see_each_others_node_over_tls_1_3(first: Identity, tmp_path: Path) -> None:
    other = admitted(first, tmp_path / "other")
    server_saw, client_saw = await exchange(first.server_context(), other.client_context(trust_all))
    assert server_saw == PeerCertificate(other.node, other.fingerprint)
    assert client_saw == PeerCertificate(first.node, first.fingerprint)
    assert first.mesh_id == other.mesh_id


async def test_tls_1_2_is_refused(first: Identity) -> None:
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname = False
    old.verify_mode = ssl.CERT_NONE
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises((ssl.SSLError, ConnectionError)):
        await exchange(first.server_context(), old)


async def test_a_peer_without_a_certificate_is_nobody_and_may_still_connect(first: Identity) -> None:
    nameless = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    nameless.check_hostname = False
    nameless.load_verify_locations(cadata=first.ca_certificate_pem.decode())
    server_saw, client_saw = await exchange(first.server_context(), nameless)
    assert server_saw is None
    assert client_saw is not None
    assert client_saw.node == first.node


def self_signed(folder: Path, first: Identity) -> ssl.SSLContext:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([])
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(NOW - dates.timedelta(days=1))
        .not_valid_after(NOW + dates.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier(f"tars:node:{first.node}")]), critical=True
        )
        .sign(key, hashes.SHA256())
    )
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "own.pem").write_bytes(pem + made.public_bytes(serialization.Encoding.PEM))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.load_cert_chain(folder / "own.pem")
    return context


def of_another_mesh(folder: Path, first: Identity) -> ssl.SSLContext:
    other = Identity.create(in_folder(folder / "mesh2"), first.node).client_context(trust_all)
    other.sslobject_class = ssl.SSLObject
    other.verify_mode = ssl.CERT_NONE
    return other


def expired(folder: Path, first: Identity) -> ssl.SSLContext:
    return admitted(first, folder / "old", now=NOW - dates.timedelta(days=400)).client_context(trust_all)


def not_yet_valid(folder: Path, first: Identity) -> ssl.SSLContext:
    return admitted(first, folder / "future", now=NOW + dates.timedelta(days=400)).client_context(trust_all)


@pytest.mark.parametrize("bad", [self_signed, of_another_mesh, expired, not_yet_valid])
async def test_a_bad_client_certificate_ends_the_connection(
    first: Identity, tmp_path: Path, bad: Callable[[Path, Identity], ssl.SSLContext]
) -> None:
    with pytest.raises((ssl.SSLError, ConnectionError)):
        await exchange(first.server_context(), bad(tmp_path, first))


async def test_the_client_refuses_a_server_of_another_mesh_and_an_expired_one(first: Identity, tmp_path: Path) -> None:
    stranger = Identity.create(in_folder(tmp_path / "mesh2"), first.node)
    old = admitted(first, tmp_path / "old", now=NOW - dates.timedelta(days=400))
    for server in (stranger, old):
        with pytest.raises(ssl.SSLCertVerificationError):
            await exchange(server.server_context(), first.client_context(trust_all))


async def test_the_client_judges_the_server_before_it_says_anything(first: Identity, tmp_path: Path) -> None:
    other = admitted(first, tmp_path / "other")
    seen: list[PeerCertificate] = []

    def refuse(peer: PeerCertificate) -> None:
        seen.append(peer)
        raise ssl.SSLCertVerificationError("not this one")

    with pytest.raises(ssl.SSLCertVerificationError, match="not this one"):
        await exchange(other.server_context(), first.client_context(refuse))
    assert seen == [PeerCertificate(other.node, other.fingerprint)]


def test_a_restart_finds_the_same_identity_which_only_its_user_can_read(first: Identity, tmp_path: Path) -> None:
    folder = tmp_path / "first"
    again = Identity.load_or_none(folder, first.node)
    assert again is not None
    assert (again.node, again.fingerprint, again.ca_hash) == (first.node, first.fingerprint, first.ca_hash)
    assert again.certificate_pem == first.certificate_pem
    assert stat.S_IMODE((folder / IDENTITY_FILE).stat().st_mode) == 0o600
    assert [each.name for each in folder.iterdir()] == [IDENTITY_FILE]


def test_an_identity_that_others_could_read_is_closed_to_them(first: Identity, tmp_path: Path) -> None:
    (tmp_path / "first" / IDENTITY_FILE).chmod(0o644)
    Identity.load_or_none(tmp_path / "first", first.node)
    assert stat.S_IMODE((tmp_path / "first" / IDENTITY_FILE).stat().st_mode) == 0o600


def test_no_identity_is_no_mesh_and_a_second_mesh_is_not_begun_over_the_first(tmp_path: Path, first: Identity) -> None:
    assert Identity.load_or_none(tmp_path, first.node) is None
    with pytest.raises(ConfigError, match="belongs to a mesh"):
        Identity.create(tmp_path / "first", first.node)


def damages(content: bytes, other: bytes) -> dict[str, bytes]:
    blocks = [block + b"-----\n" for block in content.split(b"-----\n") if block]
    pems = [blocks[index] + blocks[index + 1] for index in range(0, len(blocks), 2)]
    others = [block + b"-----\n" for block in other.split(b"-----\n") if block]
    other_pems = [others[index] + others[index + 1] for index in range(0, len(others), 2)]
    return {
        "empty": b"",
        "half": content[: len(content) // 2],
        "without its end": content[:-30],
        "junk": b"\x00\xff" * 500,
        "one bit": content.replace(content[200:201], bytes([content[200] ^ 1]), 1),
        "without the CA's key": b"".join(pems[:3]),
        "another key": b"".join([other_pems[0], *pems[1:]]),
        "another CA": b"".join([*pems[:2], *other_pems[2:]]),
        "another CA key": b"".join([*pems[:3], other_pems[3]]),
        "too much": content + pems[1],
        "the CA's certificate as its own": b"".join([pems[3], pems[2], pems[2], pems[3]]),
    }


@pytest.mark.parametrize(
    "damage",
    [
        "empty", "half", "without its end", "junk", "one bit", "without the CA's key", "another key", "another CA",
        "another CA key", "the CA's certificate as its own",
    ],
)  # fmt: skip
def test_a_damaged_identity_says_what_to_do_and_stays_as_it_is(first: Identity, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "first" / IDENTITY_FILE
    other = Identity.create(in_folder(tmp_path / "mesh2"), first.node)
    content = damages(path.read_bytes(), (tmp_path / "mesh2" / IDENTITY_FILE).read_bytes())[damage]
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"damaged.*backup.*tars token new"):
        Identity.load_or_none(tmp_path / "first", other.node)
    assert path.read_bytes() == content


@pytest.mark.filterwarnings("ignore:Parsed a serial number:cryptography.utils.CryptographyDeprecationWarning")
def test_whichever_bit_of_an_identity_is_wrong_it_loads_or_says_that_it_is_damaged(
    first: Identity, tmp_path: Path
) -> None:
    path = tmp_path / "first" / IDENTITY_FILE
    content, dice = path.read_bytes(), random.Random(1)
    refused = 0
    for position in range(0, len(content), 3):
        damaged = bytes([content[position] ^ (1 << dice.randrange(8))])
        path.write_bytes(content[:position] + damaged + content[position + 1 :])
        try:
            Identity.load_or_none(path.parent, first.node)
        except ConfigError:
            refused += 1
    assert refused > len(content) / 3 * 0.8  # some bits of a PEM file say nothing


def test_an_identity_that_was_copied_to_another_pc_is_refused(first: Identity, tmp_path: Path) -> None:
    shutil.copytree(tmp_path / "first", tmp_path / "copy")
    with pytest.raises(ConfigError, match=r"copied from another PC.*token of its own"):
        Identity.load_or_none(tmp_path / "copy", new_id())


@pytest.mark.parametrize("years", [-30, 60])
def test_a_clock_that_is_years_off_is_named(first: Identity, tmp_path: Path, years: int) -> None:
    now = NOW + dates.timedelta(days=365 * years)
    with pytest.raises(ConfigError, match=rf"clock says {now:%Y-%m-%d}.*Set this PC's"):
        Identity.load_or_none(tmp_path / "first", first.node, now)


def test_a_certificate_is_renewed_well_before_its_end_and_not_earlier(first: Identity, tmp_path: Path) -> None:
    before, fingerprint = first.expires, first.fingerprint
    assert not first.renew_if_due(NOW + dates.timedelta(days=200))
    assert first.renew_if_due(NOW + dates.timedelta(days=250))
    assert first.expires - before == pytest.approx(dates.timedelta(days=250), abs=dates.timedelta(hours=3))
    assert first.fingerprint == fingerprint
    again = Identity.load_or_none(tmp_path / "first", first.node, NOW + dates.timedelta(days=251))
    assert again is not None
    assert again.expires == first.expires


def test_a_node_that_was_off_for_two_years_renews_when_it_starts(first: Identity, tmp_path: Path) -> None:
    later = NOW + dates.timedelta(days=730)
    again = Identity.load_or_none(tmp_path / "first", first.node, later)
    assert again is not None
    assert again.expires > later
    assert again.fingerprint == first.fingerprint


def test_a_certificate_made_while_the_clock_was_ahead_is_replaced(first: Identity, tmp_path: Path) -> None:
    ahead = admitted(first, tmp_path / "ahead", now=NOW + dates.timedelta(days=300))
    assert ahead.renew_if_due(NOW)
    assert ahead.expires < NOW + dates.timedelta(days=366)


async def test_contexts_made_before_a_renewal_present_the_new_certificate(first: Identity, tmp_path: Path) -> None:
    other = admitted(first, tmp_path / "other", now=NOW - dates.timedelta(days=400))
    context = other.client_context(trust_all)
    with pytest.raises((ssl.SSLError, ConnectionError)):
        await exchange(first.server_context(), context)
    assert other.renew_if_due()
    assert (await exchange(first.server_context(), context))[0] == PeerCertificate(other.node, other.fingerprint)


async def test_renewal_goes_on_by_itself_also_after_a_failure(
    first: Identity, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    renewed, tries = asyncio.Event(), [OSError(28, "full"), True]

    def renew() -> bool:
        outcome = tries.pop(0)
        if isinstance(outcome, OSError):
            raise outcome
        renewed.set()
        return True

    monkeypatch.setattr(first, "renew_if_due", renew)
    task = asyncio.create_task(first.keep_renewed(every=0.001))
    async with asyncio.timeout(5):
        await renewed.wait()
    task.cancel()
    assert "could not be renewed" in caplog.text


@pytest.mark.parametrize("part", ["certificate", "ca_certificate", "ca_key"])
@pytest.mark.parametrize("junk", [b"", b"junk", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"])
def test_what_a_join_gave_is_saved_only_where_it_fits_together(
    first: Identity, tmp_path: Path, part: str, junk: bytes
) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    parts = {
        "certificate": first.issue(new_id(), key.public_key()),
        "ca_certificate": first.ca_certificate_pem,
        "ca_key": first.ca_key_pem,
    }
    with pytest.raises(ValueError, match=r"\S"):  # whatever cryptography calls it
        Identity.accept(in_folder(tmp_path / "new"), key, **(parts | {part: junk}))
    assert not list((tmp_path / "new").iterdir())


def test_its_own_record_names_its_key_and_itself_as_who_admitted_it(first: Identity) -> None:
    member = first.member("box", ("192.0.2.1:8001",))
    assert member == Member(first.node, "box", first.fingerprint, ("192.0.2.1:8001",), admitted_by=first.node)
