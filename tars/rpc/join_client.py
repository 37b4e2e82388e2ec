"""The joiner's side of the wire: ask who is there without saying anything, compare with the token, and only then hand over its secret.

Law of this file: two connections, each trusted with no more than the one before it has shown. The first, unverified, fetches the CA's
certificate, which anybody may see. Its hash must be the token's. The second trusts that CA alone, and carries the secret. Whatever stands
in the middle with another certificate has seen nothing but a GET.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import aiohttp
import orjson
from cryptography import x509
from pydantic import ValidationError

from tars.config_schema.listen_address import ListenAddress
from tars.core.types import NodeId
from tars.errors import BadPeerAnswer, ConfigError, JoinRefused, NotAMember, PeerUnreachable, TarsError
from tars.mesh.certificates import UNREADABLE, PeerCertificate, check_clock, hash_of_ca
from tars.mesh.identity import Identity, trusting
from tars.mesh.join_tokens import Invitation
from tars.mesh.joining import Grant, JoinRequest
from tars.mesh.member_check import REMOVED
from tars.messages.admission import JoinResult
from tars.rpc.http_client import NotTls, RpcConnection
from tars.rpc.mesh_listener import CA_PATH, HINT_PATH
from tars.state_folder import StateFolder, fresh_node_id

log = logging.getLogger(__name__)

CONNECT_SECONDS = 5.0
"""A person waits: long enough for a tailnet that has to find its way first."""
JOIN_SECONDS = 30.0
"""For the whole map of a large mesh over a slow link."""
_MOST_CA_BYTES = 16 * 1024


@dataclass(frozen=True, slots=True)
class Applicant:
    """What this node says of itself when it joins. `addresses`: host:port of its own mesh listener, best first."""

    name: str
    addresses: tuple[str, ...] = ()


async def enter_mesh(
    invitation: Invitation,
    folder: StateFolder,
    applicant: Applicant,
    identity: Identity | None,
    knows: Callable[[NodeId], bool] = lambda node: True,
) -> Grant | None:
    """Join, unless this node is a member already (`identity`, from `Identity.load_or_none`): then None, and the token is not used.

    `knows` says whether a node is a member by this node's own records. A member whose inviting node is none there was away while the mesh
    changed, and whoever could vouch for the newcomers is gone: with a fresh token it joins again, under its own NodeId.

    So the same command line serves every start. Give the grant's records to the store (`ReplicatedStore.adopt`, made with the grant's
    NodeId, which may be new), then `save` it. Raises `JoinRefused`, `ConfigError`, `PeerUnreachable` and other `TarsError`s; then nothing
    was changed, but that the token is used where its node says so.
    """
    if identity is not None:
        if not invitation.token.names(identity.ca_hash):
            raise ConfigError(
                f"this PC belongs to another mesh ({identity.mesh_id}) than the token's. To move it, start it with a state folder of its "
                f"own for the new mesh (--state-dir), or move {folder.path} away first; on the old mesh, `tars node remove` takes it out."
            )
        thrown_out, host = await _why_no_member(invitation.address, identity)
        if thrown_out is None:
            if host is None or knows(host):
                return None
            try:
                return await join(invitation, folder, applicant)
            except TarsError as refusal:
                log.warning(
                    "node %s, which this PC was told to join through, is a member that this PC does not know yet. If they do not find each "
                    "other, make a new token there (`tars token new`) and join with it. %s",
                    host,
                    refusal.message,
                )
                return None
        try:
            return await join(invitation, folder, applicant)
        except JoinRefused as refusal:
            raise JoinRefused(
                f"{thrown_out.message} The token that was given does not let it in either: {refusal.message}",
                details=refusal.details,
            ) from None
    return await join(invitation, folder, applicant)


async def join(invitation: Invitation, folder: StateFolder, applicant: Applicant) -> Grant:
    """Join with the NodeId of the state folder, or, where that was thrown out of the mesh before, with a new one.

    The state folder stays as it is until the grant is saved.
    """
    address, certificate = await _mesh_port(invitation)
    context = trusting(certificate, _is_a_node)
    for node in (folder.node_id(), fresh_node_id()):
        request = JoinRequest(invitation.token, node, applicant.name, applicant.addresses)
        async with RpcConnection(f"https://{address}", tls=context, connect_seconds=CONNECT_SECONDS) as connection:
            try:
                answer = await connection.call("mesh.join", request.params().model_dump(), timeout=JOIN_SECONDS)
            except JoinRefused as refusal:
                if refusal.details.get("reason") != REMOVED:
                    raise
                log.warning("node %s was removed from this mesh, so this PC joins it as a new node", node)
                continue
        try:
            return request.granted(JoinResult.model_validate(answer))
        except ValidationError:
            raise BadPeerAnswer(
                "The mesh's answer to the join is none that this version knows. Update TARS on both PCs, make a new token and join again."
            ) from None
    raise JoinRefused("The mesh refuses also a NodeId that was made just now.", details={"reason": REMOVED})


async def _mesh_port(invitation: Invitation) -> tuple[ListenAddress, x509.Certificate]:
    """Where the mesh really is, and its CA's certificate, which is the token's."""
    address = invitation.address
    try:
        pem = await _ca_certificate(address)
    except NotTls:
        # People paste the port that they know, the clients'. It may say which one is right; the token's hash decides all the same.
        address = await _hinted(address)
        log.warning("port %d is for clients; joining at the mesh's port, %d", invitation.address.port, address.port)
        pem = await _ca_certificate(address)
    try:
        certificate = x509.load_pem_x509_certificate(pem)
    except UNREADABLE:
        raise BadPeerAnswer(
            f"What answers at {address} is no TARS node: it has no CA's certificate to show. Nothing was said to it. Copy the whole line "
            "that `tars token new` printed."
        ) from None
    if not invitation.token.names(hash_of_ca(certificate)):
        raise JoinRefused(
            f"The mesh at {address} is not the one that this token is for, so nothing was said to it. Either the token and the address do "
            "not belong together (copy the whole line that `tars token new` printed), or somebody stands between the two PCs.",
            details={"reason": "other_mesh"},
        )
    check_clock(certificate, datetime.now(UTC))
    return address, certificate


async def _ca_certificate(address: ListenAddress) -> bytes:
    """What is said to be the CA's certificate: nothing is proved yet, and nothing is said that anybody might not hear."""
    unverified = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    unverified.check_hostname = False
    unverified.verify_mode = ssl.CERT_NONE
    async with (
        RpcConnection(f"https://{address}", tls=unverified, connect_seconds=CONNECT_SECONDS) as connection,
        connection.get(CA_PATH, timeout=JOIN_SECONDS) as response,
    ):
        try:
            async with asyncio.timeout(JOIN_SECONDS):
                return await response.content.read(_MOST_CA_BYTES) if response.status == 200 else b""
        except (aiohttp.ClientError, ConnectionError, TimeoutError):
            raise PeerUnreachable(f"The connection to {address} broke before anything was said. Try again.") from None


async def _hinted(address: ListenAddress) -> ListenAddress:
    """The mesh's port, as the port for clients says it. Raises `JoinRefused` that says which one it usually is."""
    usual = f"the port after the clients', {address.port + 1}" if address.port < 65535 else "another one"
    port = None
    async with RpcConnection(f"http://{address}", connect_seconds=CONNECT_SECONDS) as connection:
        try:
            async with connection.get(HINT_PATH, timeout=CONNECT_SECONDS) as response:
                told = orjson.loads(await response.content.read(1024)) if response.status == 200 else None
                port = told.get("mesh_port") if isinstance(told, dict) else None
        except (TarsError, ValueError, aiohttp.ClientError, ConnectionError):
            pass
    if isinstance(port, int) and 0 < port < 65536:
        return replace(address, port=port)
    raise JoinRefused(
        f"What answers at {address} does not speak TLS, so it is no node's port for the mesh; that is usually {usual}. Copy the whole line "
        "that `tars token new` printed. Nothing was said to it.",
        details={"reason": "wrong_port"},
    )


async def _why_no_member(address: ListenAddress, identity: Identity) -> tuple[NotAMember | None, NodeId | None]:
    """Why the mesh does not take this node any more; None where it does, or cannot be asked: a restart must not depend on one other PC.

    And who it was that takes this node; None where nobody does.
    """
    met: list[NodeId] = []
    context = identity.client_context(lambda peer: met.append(peer.node))
    async with RpcConnection(f"https://{address}", tls=context, connect_seconds=CONNECT_SECONDS) as connection:
        try:
            await connection.call("node.ping", timeout=CONNECT_SECONDS)
        except NotAMember as refusal:
            return refusal, None
        except TarsError as error:
            log.info("this node is a member already, and %s could not be asked: %s", address, error.message)
            return None, None
    return None, met[-1] if met else None


def _is_a_node(peer: PeerCertificate) -> None:
    """The CA signed it and it names a node: that is all that a joiner can know."""
