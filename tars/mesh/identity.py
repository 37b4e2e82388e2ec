"""Who a node is to its peers: the mesh's certificate authority (CA), this node's certificate under it, and the TLS contexts made from them.

Law of this file: identity is the certificate, never an address. Every member holds the CA's key, so that any of them can admit and renew
and nobody is in charge for ever; what that key alone must not give, membership, is `check_member`'s to say: a certificate counts only where
`member/<NodeId>` in the replicated map names its public key. The private halves lie in one file of the state folder (0600), written in one
step: a crash leaves the old identity or the new one, never a key without its certificate.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import ssl
import stat
import time
import uuid
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from tars.core.records import Member, Value
from tars.core.replicated_map import MEMBER
from tars.core.types import NodeId
from tars.errors import ConfigError, DiskFull, NotAMember, TarsError
from tars.state_folder import write_atomically

log = logging.getLogger(__name__)

IDENTITY_FILE = "mesh_identity.pem"
REMOVED = "removed"
"""`details["reason"]` of `NotAMember` and of `JoinRefused` where the NodeId was thrown out of the mesh: that is for ever."""
NODE_URI = "tars:node:"
"""How the subject alternative name of a node's certificate begins; the NodeId follows."""

CA_LIFETIME = timedelta(days=50 * 365)
"""Longer than any PC: a CA that ends would end the mesh on one day, and nobody would remember why."""
NODE_LIFETIME = timedelta(days=365)
"""A node renews its own certificate (it has the CA's key), also after it lay switched off for longer than this."""
RENEW_BEFORE = timedelta(days=122)
"""Renewed when less than a third is left: months in which a node that is on at all renews in time."""
CLOCK_TOLERANCE = timedelta(days=2)
"""How far a new certificate reaches back: PCs that wake from sleep, or have lost their battery's time zone, are off by hours."""
RENEWAL_CHECK_SECONDS = 12 * 3600.0
FORGIVING_SECONDS = 600.0

UNREADABLE = (
    ValueError,
    TypeError,
    InvalidSignature,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.ExtensionNotFound,
    x509.UnsupportedGeneralNameType,
)
"""What `cryptography` raises for bytes that are no key or certificate any more, or none yet: one wrong bit is enough for most of them."""

_LOST = (
    "Either put the file back from a backup, or move it away and join again with a new token (`tars token new` on another node of the "
    "mesh); where this was the only node, it then simply begins a new mesh."
)


class WrongPeer(ssl.SSLCertVerificationError):
    """What a check raises within a TLS handshake; `error` says it to people."""

    def __init__(self, error: TarsError) -> None:
        super().__init__(error.message)
        self.error = error


class MemberRecords(Protocol):
    """The part of the replicated map that says who belongs to the mesh."""

    def get(self, key: str) -> Value | None:
        """The live value of `member/<NodeId>`."""
        ...

    def items(self, prefix: str) -> list[tuple[str, Value]]:
        """The live records whose keys begin so."""
        ...


@dataclass(frozen=True, slots=True)
class PeerCertificate:
    """What a certificate says of its holder."""

    node: NodeId
    fingerprint: str
    """As in `core.records.Member`."""


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
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"TARS mesh {uuid.uuid4().hex[:8]}")])
        ca_certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(ca_key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - CLOCK_TOLERANCE)
            .not_valid_after(now + CA_LIFETIME)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(signs_certificates=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key()), critical=False)
            .sign(ca_key, hashes.SHA256())
        )
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


# --- certificates -------------------------------------------------------------------------------------------------------


def issue(
    ca_certificate: x509.Certificate,
    ca_key: ec.EllipticCurvePrivateKey,
    node: NodeId,
    public_key: ec.EllipticCurvePublicKey,
    now: datetime,
) -> x509.Certificate:
    """A node's certificate: its NodeId as a URI, good as client and as server, for `NODE_LIFETIME`."""
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "TARS node")]))
        .issuer_name(ca_certificate.subject)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_TOLERANCE)
        .not_valid_after(now + NODE_LIFETIME)
        .add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier(f"{NODE_URI}{node}")]), critical=True
        )
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]), critical=False
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_certificate.public_key()),  # type: ignore[arg-type]  # EC, as made here
            critical=False,
        )
        .sign(ca_key, hashes.SHA256())
    )


@lru_cache(maxsize=4096)
def peer_certificate(der: bytes) -> PeerCertificate:
    """Whose certificate it is; whether it may be believed, the TLS handshake has checked. Raises `NotAMember` where it names no node."""
    try:
        certificate = x509.load_der_x509_certificate(der)
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
        if len(uris) == 1 and uris[0].startswith(NODE_URI):
            written = uris[0].removeprefix(NODE_URI)
            if str(uuid.UUID(written)) == written:
                return PeerCertificate(NodeId(written), fingerprint_of(certificate.public_key()))
    except (ValueError, x509.ExtensionNotFound):
        pass
    raise NotAMember("The certificate that was shown is no TARS node's, so it opens nothing here.")


def peer_of(connection: Any) -> PeerCertificate | None:
    """Who is at the other end of a TLS connection (an `ssl.SSLObject` or socket); None where no certificate was shown."""
    der = None if connection is None else connection.getpeercert(binary_form=True)
    return None if der is None else peer_certificate(der)


def fingerprint_of(public_key: Any) -> str:
    """sha256 of the public key (SubjectPublicKeyInfo, DER), hex."""
    encoded = public_key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(encoded).hexdigest()


def hash_of_ca(certificate: x509.Certificate) -> bytes:
    """sha256 of the certificate (DER)."""
    return hashlib.sha256(certificate.public_bytes(serialization.Encoding.DER)).digest()


def check_clock(certificate: x509.Certificate, now: datetime) -> None:
    """Raise `ConfigError` where `now`, this PC's clock, lies outside the certificate's time."""
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if not begin <= now <= end:
        raise ConfigError(
            f"this PC's clock says {now:%Y-%m-%d %H:%M} UTC, and the mesh's certificates are good from {begin:%Y-%m-%d} to {end:%Y-%m-%d}: "
            "one of the clocks is wrong. Set this PC's (a time server does it: timedatectl set-ntp true), then start again."
        )


def check_member(records: MemberRecords, peer: PeerCertificate) -> Member:
    """The member that the certificate belongs to. Raises `NotAMember` that says why it is none."""
    member = records.get(MEMBER + peer.node)
    if not isinstance(member, Member):
        raise NotAMember(
            f"Node {peer.node} is not known as a member of this mesh (not yet, where it has just joined elsewhere; otherwise join with a "
            "token: `tars token new` on a node of the mesh)."
        )
    if member.removed:
        raise NotAMember(
            "This node was removed from the mesh; join again with a new token: `tars token new` on a node of the mesh, then "
            "`tars-node --join TOKEN@HOST:PORT` here.",
            details={"reason": REMOVED},
        )
    if not hmac.compare_digest(member.fingerprint, peer.fingerprint):
        raise NotAMember(
            f"The mesh knows node {peer.node} under another key: it joined again since, or its state folder was copied. Join this one with "
            "a new token and a state folder of its own."
        )
    return member


class MemberCheck:
    """`check_member` for as long as a node runs, on every connection and request.

    `lost` (`Records.lost`) is a node whose records were missing or damaged at this start: where it knows no other member, for its first
    `FORGIVING_SECONDS` the CA's signature is enough, so that its peers can send everything back. All it risks is a removed node that kept
    the CA's key and comes within these minutes.
    """

    def __init__(
        self, records: MemberRecords, *, lost: bool = False, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._records = records
        self._now = now
        # Who knows another member has lost nothing: it has just joined, and was given everything.
        self._forgiving_until = now() + FORGIVING_SECONDS if lost and len(records.items(MEMBER)) <= 1 else None
        self._let_in: set[NodeId] = set()

    def __call__(self, peer: PeerCertificate) -> None:
        """Raises `NotAMember`."""
        if self._forgiving_until is not None:
            if self._now() >= self._forgiving_until:
                self._forgiving_until = None
            elif self._records.get(MEMBER + peer.node) is None:
                if peer.node not in self._let_in:
                    log.warning("node %s is let in by its certificate alone: this node has lost its records", peer.node)
                    self._let_in.add(peer.node)
                return
        check_member(self._records, peer)


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


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


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
