"""The mesh's certificates: how its authority (CA) and its nodes get theirs, and what one says of its holder.

Law of this file: X.509 alone; it keeps no key and reads no file. What a certificate says is believed only after the TLS handshake, or
whoever reads it here, has checked who signed it.
"""

from __future__ import annotations

import hashlib
import uuid
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from tars.core.types import NodeId
from tars.errors import ConfigError, NotAMember

NODE_URI = "tars:node:"
"""How the subject alternative name of a node's certificate begins; the NodeId follows."""

CA_LIFETIME = timedelta(days=50 * 365)
"""Longer than any PC: a CA that ends would end the mesh on one day, and nobody would remember why."""
NODE_LIFETIME = timedelta(days=365)
"""A node renews its own certificate (it has the CA's key), also after it lay switched off for longer than this."""
CLOCK_TOLERANCE = timedelta(days=2)
"""How far a new certificate reaches back: PCs that wake from sleep, or have lost their battery's time zone, are off by hours."""

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


@dataclass(frozen=True, slots=True)
class PeerCertificate:
    """What a certificate says of its holder."""

    node: NodeId
    fingerprint: str
    """As in `core.records.Member`."""


def authority(key: ec.EllipticCurvePrivateKey, now: datetime) -> x509.Certificate:
    """A new mesh's CA: its certificate, signed by itself, good for `CA_LIFETIME`."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"TARS mesh {uuid.uuid4().hex[:8]}")])
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_TOLERANCE)
        .not_valid_after(now + CA_LIFETIME)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )


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
    except UNREADABLE:
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
