"""Who a node is to its peers: the mesh's certificate authority (CA), this node's certificate under it, and the TLS contexts made from them.

Law of this file: identity is the certificate, never an address. Every member holds the CA's key, so that any of them can admit and renew
and nobody is in charge for ever; what that key alone must not give, membership, is `member_check`'s to say. The private halves lie in one
file of the state folder (0600), written in one step: a crash leaves the old identity or the new one, never a key without its certificate.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import stat
import weakref
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tars.core.records import Member
from tars.core.types import NodeId
from tars.errors import ConfigError, DiskFull, NotAMember, TarsError
from tars.mesh.certificates import (
    UNREADABLE,
    PeerCertificate,
    authority,
    check_clock,
    fingerprint_of,
    hash_of_ca,
    issue,
    peer_certificate,
    peer_of,
)
from tars.state_folder import write_atomically

log = logging.getLogger(__name__)

IDENTITY_FILE = "mesh_identity.pem"
RENEW_BEFORE = timedelta(days=122)
"""Renewed when less than a third is left: months in which a node that is on at all renews in time."""
RENEWAL_CHECK_SECONDS = 12 * 3600.0

_LOST = (
    "Either put the file back from a backup, or move it away and join again with a new token (`tars token new` on another node of the "
    "mesh); where this was the only node, it then simply begins a new mesh."
)


class WrongPeer(ssl.SSLCertVerificationError):
    """What a check raises within a TLS handshake; `error` says it to people."""

    def __init__(self, error: TarsError) -> None:
        super().__init__(error.message)
        self.error = error


class Identity:
    """This node's own. `load_or_none`, `create` (a new mesh) and `accept` (what a join gave) make one."""

    def __init__(
        self,
        path: Path,
        key: ec.EllipticCurvePrivateKey,
        certificate: x509.Certificate,
        ca_certificate: x509.Certificate,
        ca_key: ec.EllipticCurvePrivateKey,
    ) -> None:
        self._path = path
        self._key = key
        self._certificate = certificate
        self._ca_certificate = ca_certificate
        self._ca_key = ca_key
        self._contexts: weakref.WeakSet[ssl.SSLContext] = weakref.WeakSet()
        self._peer = peer_certificate(certificate.public_bytes(serialization.Encoding.DER))

    # --- making one ---------------------------------------------------------------------------------------------------

    @classmethod
    def load_or_none(cls, folder: Path, node: NodeId, now: datetime | None = None) -> Identity | None:
        """The identity in the state folder, its certificate renewed where that was due; None where this node is in no mesh.

        Raises `ConfigError` where the file is damaged, of another node, or this PC's clock cannot be right.
        """
        path = folder / IDENTITY_FILE
        now = now or datetime.now(UTC)
        try:
            content = path.read_bytes()
            if stat.S_IMODE(path.stat().st_mode) & 0o077:
                log.warning("%s could be read by other users of this PC; it is closed to them now", path)
                path.chmod(0o600)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ConfigError(f"the mesh identity {path} cannot be read ({error.strerror}). {_LOST}") from None
        try:
            identity = cls(path, *_parsed(content))
        except (*UNREADABLE, NotAMember):
            raise ConfigError(
                f"the mesh identity {path} is damaged, so this node cannot prove who it is. {_LOST}"
            ) from None
        if identity.node != node:
            raise ConfigError(
                f"the mesh identity {path} belongs to node {identity.node}, and this state folder to node {node}: it was copied from "
                f"another PC. Move it away; this PC needs a token of its own (`tars token new` on a node of the mesh, then "
                f"`tars-node --join`)."
            )
        check_clock(identity._ca_certificate, now)
        identity.renew_if_due(now)
        return identity

    @classmethod
    def create(cls, folder: Path, node: NodeId, now: datetime | None = None) -> Identity:
        """A new mesh: its CA, and this node's certificate under it, saved. Raises `DiskFull`; `ConfigError` where there is one already."""
        path = folder / IDENTITY_FILE
        if path.exists():
            raise ConfigError(f"{path} is there already: this node belongs to a mesh.")
        now = now or datetime.now(UTC)
        ca_key = ec.generate_private_key(ec.SECP256R1())
        ca_certificate = authority(ca_key, now)
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = issue(ca_certificate, ca_key, node, key.public_key(), now)
        identity = cls(path, key, certificate, ca_certificate, ca_key)
        identity.save()
        return identity

    @classmethod
    def accept(
        cls, folder: Path, key: ec.EllipticCurvePrivateKey, certificate: bytes, ca_certificate: bytes, ca_key: bytes
    ) -> Identity:
        """What a join gave (PEM), checked; `save` it. Raises `ValueError` where it does not fit together."""
        blocks = [_pem_key(key), certificate, ca_certificate, ca_key]
        try:
            identity = cls(folder / IDENTITY_FILE, *_parsed(b"".join(blocks)))
        except (*UNREADABLE, NotAMember):
            raise ValueError("the certificate, its key and the CA do not fit together") from None
        return identity

    def save(self) -> None:
        """In place of what was there, in one step. Raises `DiskFull`."""
        # The node's key and certificate first: what OpenSSL loads of a file with several is its first key and the chain of certificates.
        blocks = [_pem_key(self._key), self.certificate_pem, self.ca_certificate_pem, self.ca_key_pem]
        write_atomically(self._path, b"".join(blocks), mode=0o600)

    # --- what it says ---------------------------------------------------------------------------------------------------

    @property
    def node(self) -> NodeId:
        """The NodeId in the certificate."""
        return self._peer.node

    @property
    def fingerprint(self) -> str:
        """Of this node's public key; stays the same when the certificate is renewed."""
        return self._peer.fingerprint

    @property
    def ca_hash(self) -> bytes:
        """sha256 of the CA's certificate (DER), 32 bytes. A join token carries its first half."""
        return hash_of_ca(self._ca_certificate)

    @property
    def mesh_id(self) -> str:
        """16 hexadecimal digits that tell this mesh from another one, for people and for discovery; no secret."""
        return self.ca_hash.hex()[:16]

    @property
    def expires(self) -> datetime:
        """The end of this node's certificate."""
        return self._certificate.not_valid_after_utc

    @property
    def certificate_pem(self) -> bytes:
        """This node's certificate."""
        return self._certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def ca_certificate_pem(self) -> bytes:
        """The CA's certificate: public."""
        return self._ca_certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def ca_key_pem(self) -> bytes:
        """The CA's private key: for a node that was just admitted, and for nobody else."""
        return _pem_key(self._ca_key)

    def member(self, name: str, addresses: tuple[str, ...] = ()) -> Member:
        """This node's own record, for the replicated map."""
        return Member(self.node, name, self.fingerprint, addresses, admitted_by=self.node)

    # --- what it does ---------------------------------------------------------------------------------------------------

    def issue(self, node: NodeId, public_key: ec.EllipticCurvePublicKey, now: datetime | None = None) -> bytes:
        """A certificate (PEM) for another node's key."""
        signed = issue(self._ca_certificate, self._ca_key, node, public_key, now or datetime.now(UTC))
        return signed.public_bytes(serialization.Encoding.PEM)

    def renew_if_due(self, now: datetime | None = None) -> bool:
        """Issue this node a new certificate where its time nears its end (or this clock was ahead when it was made). True if it did.

        The key stays, so the member record does; contexts that were made before present the new certificate from the next connection on.
        """
        now = now or datetime.now(UTC)
        if self._certificate.not_valid_before_utc <= now < self._certificate.not_valid_after_utc - RENEW_BEFORE:
            return False
        self._certificate = issue(self._ca_certificate, self._ca_key, self.node, self._key.public_key(), now)
        self.save()
        for context in self._contexts:
            context.load_cert_chain(self._path)
        log.info("this node's certificate was renewed; it ends on %s", self.expires.date())
        return True

    async def keep_renewed(self, every: float = RENEWAL_CHECK_SECONDS) -> None:
        """Renew for as long as the node runs; cancel it. A full disk is tried again the next time."""
        while True:
            await asyncio.sleep(every)
            try:
                self.renew_if_due()
            except (DiskFull, OSError) as error:
                log.warning("this node's certificate could not be renewed and ends on %s: %s", self.expires, error)

    def server_context(self) -> ssl.SSLContext:
        """TLS 1.3 for the mesh listener. A client's certificate is asked for; where one comes, it must be the CA's (a joiner has none)."""
        context = self._context(ssl.PROTOCOL_TLS_SERVER)
        context.verify_mode = ssl.CERT_OPTIONAL
        # No resumption: each connection proves the key again, and connections are kept anyway.
        context.num_tickets = 0
        return context

    def client_context(self, check: Callable[[PeerCertificate], None]) -> ssl.SSLContext:
        """TLS 1.3 to a peer. `check` judges who answered before anything is said: a `TarsError` of it ends the connection."""
        context = self._context(ssl.PROTOCOL_TLS_CLIENT)
        # Who it is stands in the certificate; the name or address that it was reached at is only where somebody said it might be.
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED
        context.sslobject_class = _checking(check)
        return context

    def _context(self, protocol: int) -> ssl.SSLContext:
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_verify_locations(cadata=self.ca_certificate_pem.decode())
        context.load_cert_chain(self._path)
        self._contexts.add(context)
        return context


def trusting(ca_certificate: x509.Certificate, check: Callable[[PeerCertificate], None]) -> ssl.SSLContext:
    """TLS 1.3 to a node of that CA, without a certificate of one's own: a joiner's. `check` as in `Identity.client_context`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(cadata=ca_certificate.public_bytes(serialization.Encoding.PEM).decode())
    context.sslobject_class = _checking(check)
    return context


def _checking(check: Callable[[PeerCertificate], None]) -> type[ssl.SSLObject]:
    class CheckedConnection(ssl.SSLObject):
        """Ends the handshake where the peer is not the one that it must be; before it, nothing of a call was sent."""

        def do_handshake(self) -> None:
            super().do_handshake()
            try:
                peer = peer_of(self)
                if peer is None:
                    raise NotAMember("What answers there showed no certificate.")
                check(peer)
            except TarsError as error:
                raise WrongPeer(error) from None

    return CheckedConnection


def _pem_key(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _parsed(
    content: bytes,
) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate, x509.Certificate, ec.EllipticCurvePrivateKey]:
    """Key, certificate, CA's certificate, CA's key. Raises one of `UNREADABLE` where they do not fit."""
    end = b"-----END PRIVATE KEY-----\n"
    first, _, rest = content.partition(end)
    certificates_text, _, ca_key_text = rest.partition(b"-----BEGIN PRIVATE KEY-----")
    certificates = x509.load_pem_x509_certificates(certificates_text)
    key = serialization.load_pem_private_key(first + end, None)
    ca_key = serialization.load_pem_private_key(b"-----BEGIN PRIVATE KEY-----" + ca_key_text, None)
    if len(certificates) != 2 or not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError("not one key and two certificates")
    certificate, ca_certificate = certificates
    if not isinstance(ca_key, ec.EllipticCurvePrivateKey):
        raise ValueError("the CA's key is of another kind")
    certificate.verify_directly_issued_by(ca_certificate)
    for held, shown in ((key, certificate), (ca_key, ca_certificate)):
        if fingerprint_of(held.public_key()) != fingerprint_of(shown.public_key()):
            raise ValueError("a certificate is another key's")
    return key, certificate, ca_certificate, ca_key
