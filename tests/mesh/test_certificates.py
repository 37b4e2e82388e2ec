"""Certificates: how long they last, whose they are, and which are nobody's."""

from __future__ import annotations

import datetime as dates
import uuid

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tars.core.types import NodeId
from tars.errors import ConfigError, NotAMember
from tars.mesh.certificates import (
    NODE_LIFETIME,
    PeerCertificate,
    authority,
    check_clock,
    fingerprint_of,
    issue,
    peer_certificate,
)
from tars.mesh.identity import RENEW_BEFORE

NOW = dates.datetime.now(dates.UTC)
CA_KEY = ec.generate_private_key(ec.SECP256R1())
CA = authority(CA_KEY, NOW)


def new_id() -> NodeId:
    return NodeId(str(uuid.uuid4()))


def test_a_certificate_names_its_node_and_its_key() -> None:
    node, key = new_id(), ec.generate_private_key(ec.SECP256R1())
    made = issue(CA, CA_KEY, node, key.public_key(), NOW)
    made.verify_directly_issued_by(CA)
    shown = peer_certificate(made.public_bytes(serialization.Encoding.DER))
    assert shown == PeerCertificate(node, fingerprint_of(key.public_key()))


@pytest.mark.parametrize(
    "names",
    [
        None,
        [x509.DNSName("tars")],
        [x509.UniformResourceIdentifier("tars:node:")],
        [x509.UniformResourceIdentifier("tars:node:NOT-A-UUID")],
        [x509.UniformResourceIdentifier("tars:node:{00000000-0000-4000-8000-000000000000}")],
        [x509.UniformResourceIdentifier("https://example.org/00000000-0000-4000-8000-000000000000")],
        [x509.UniformResourceIdentifier(f"tars:node:{uuid.uuid4()}") for _ in range(2)],
    ],
)
def test_a_certificate_that_names_no_node_or_two_is_nobodys(names: list[x509.GeneralName] | None) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([]))
        .issuer_name(x509.Name([]))
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(NOW)
        .not_valid_after(NOW + dates.timedelta(days=1))
    )
    if names is not None:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=True)
    der = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)
    with pytest.raises(NotAMember):
        peer_certificate(der)


def test_fingerprints_are_of_the_key_and_not_of_the_certificate() -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    one, another = (issue(CA, CA_KEY, new_id(), key.public_key(), NOW) for _ in range(2))
    assert one != another
    assert fingerprint_of(one.public_key()) == fingerprint_of(another.public_key()) == fingerprint_of(key.public_key())


def test_a_ca_outlives_the_pcs() -> None:
    assert CA.not_valid_after_utc - CA.not_valid_before_utc > dates.timedelta(days=40 * 365)
    assert RENEW_BEFORE < NODE_LIFETIME / 2


@pytest.mark.parametrize("days", [-3, 0, 40 * 365, 51 * 365])
def test_a_clock_outside_the_cas_time_is_named(days: int) -> None:
    now = NOW + dates.timedelta(days=days)
    if 0 <= days < 50 * 365:
        check_clock(CA, now)
        return
    with pytest.raises(ConfigError, match=rf"clock says {now:%Y-%m-%d}.*Set this PC's"):
        check_clock(CA, now)


@pytest.mark.parametrize("junk", [b"", b"junk", b"\x30\x03\x02\x01\x01"])
def test_bytes_that_are_no_certificate_are_nobodys(junk: bytes) -> None:
    with pytest.raises(NotAMember):
        peer_certificate(junk)
