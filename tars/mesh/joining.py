"""How a node gets in: what a member checks and gives, and what the joiner checks of that. The wire between them is `rpc.join_client`'s.

Law of this file: a member gives nothing before the token is spent on its disk; a joiner believes nothing that does not hang on the CA whose
hash stands in its token. Everything that can be checked is checked before the token is spent, so that a mistake does not cost one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tars.config_schema.listen_address import ListenAddress
from tars.core.mesh_messages import Record
from tars.core.records import Member
from tars.core.replicated_map import MEMBER
from tars.core.types import NodeId
from tars.errors import BadPeerAnswer, InvalidParams, JoinRefused
from tars.mesh.certificates import UNREADABLE, PeerCertificate, fingerprint_of, hash_of_ca
from tars.mesh.identity import IDENTITY_FILE, Identity
from tars.mesh.join_tokens import JoinTokens, Token, decode_secret, encode
from tars.mesh.member_check import REMOVED, check_member
from tars.mesh.record_codec import decode_record, encode_record
from tars.mesh.replicated_store import Records
from tars.messages.admission import JoinParams, JoinResult
from tars.state_folder import StateFolder

log = logging.getLogger(__name__)

CLOCK_DIFFERENCE_MS = 86_400_000
"""A day. Certificates reach two days back (`certificates.CLOCK_TOLERANCE`); what is worse than that would lock the node out at once."""
MOST_RECORDS = 1_000_000
"""Of a mesh's map: a hundred times what a thousand nodes with a hundred models have."""


class Admitting:
    """The member's side. `wall_clock` is Unix time in seconds."""

    def __init__(
        self,
        identity: Identity,
        tokens: JoinTokens,
        store: Records,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._identity = identity
        self._tokens = tokens
        self._store = store
        self._wall_clock = wall_clock

    def admit(self, params: JoinParams, source: str) -> JoinResult:
        """Spend the token, write the member, give everything. `source` is the address that asks, for the bound on wrong tokens.

        Raises `JoinRefused`, `InvalidParams`, `Overloaded`, `DiskFull`; then nobody was admitted.
        """
        node = NodeId(params.node)
        public_key = requested_key(params.certificate_request)
        for address in params.addresses:
            try:
                ListenAddress.parse(address)
            except ValueError as error:
                raise InvalidParams(f"Invalid params: mesh.join: addresses: {error}. Nobody was admitted.") from None
        secret = decode_secret(params.secret)
        self._check_clock(params.clock_ms)
        if node == self._identity.node:
            raise JoinRefused(
                "The node that wants to join has the NodeId of the node that it asks: its state folder is a copy. Give it one of its own "
                "(--state-dir), or move the copy's node.json away. The token was not used up.",
                details={"reason": "same_node"},
            )
        known = self._store.map.get(MEMBER + node)
        if isinstance(known, Member) and known.removed:
            raise JoinRefused(
                f"Node {node} was removed from this mesh, and that is for ever: nobody comes back under an id that was thrown out. Move "
                "node.json out of its state folder, so that it gets a new id, and join again. The token was not used up.",
                details={"reason": REMOVED},
            )
        # Signed first: what can fail has failed before the token is spent.
        certificate = self._identity.issue(node, public_key)
        entry = self._tokens.spend(secret, source, node)
        member = Member(
            node, params.name, fingerprint_of(public_key), tuple(params.addresses), admitted_by=self._identity.node
        )
        self._store.put(MEMBER + node, member)
        log.warning("node %s (%s) joined the mesh from %s with token %s", params.name, node, source, entry.id)
        return JoinResult(
            node=self._identity.node,
            certificate=certificate.decode(),
            ca_certificate=self._identity.ca_certificate_pem.decode(),
            ca_key=self._identity.ca_key_pem.decode(),
            records=[encode_record(record) for record in self._store.map.records()],
        )

    def _check_clock(self, clock_ms: int) -> None:
        ahead = clock_ms - int(self._wall_clock() * 1000)
        if abs(ahead) > CLOCK_DIFFERENCE_MS:
            raise JoinRefused(
                f"The joining PC's clock is {abs(ahead) / 86_400_000:,.1f} days {'ahead of' if ahead > 0 else 'behind'} this node's, and "
                "certificates need clocks that agree. Set the wrong one (timedatectl set-ntp true), then join again. The token was not "
                "used up.",
                details={"reason": "clock"},
            )


def take_place(identity: Identity, records: Records, name: str, addresses: tuple[str, ...]) -> None:
    """At each start: have this node's own member record in the map, with its name and addresses of now.

    The first node of a mesh writes its own so; a joiner has it from the member that admitted it. Raises `NotAMember` where this node was
    removed, or joined again since with another key (a copied state folder): it cannot take part, and the message says what to do.
    """
    member = records.map.get(MEMBER + identity.node)
    if isinstance(member, Member) and member.fingerprint:
        check_member(records.map, PeerCertificate(identity.node, identity.fingerprint))
        own = replace(member, name=name, addresses=addresses)
    else:
        own = identity.member(name, addresses)
    if own != member:
        records.put(MEMBER + identity.node, own)


@dataclass(frozen=True, slots=True)
class Grant:
    """What a join gave, checked. Give `records` to the store first, then `save` the identity: who crashes in between has joined nothing."""

    node: NodeId
    name: str
    admitted_by: NodeId
    records: tuple[Record, ...]
    _key: ec.EllipticCurvePrivateKey
    _answer: JoinResult

    def save(self, folder: StateFolder) -> Identity:
        """This node is a member from now on. Raises `DiskFull`, or `BadPeerAnswer`; then it is what it was before."""
        answer = self._answer
        pems = (answer.certificate.encode(), answer.ca_certificate.encode(), answer.ca_key.encode())
        try:
            identity = Identity.accept(folder.path, self._key, *pems)
        except ValueError:
            raise _bad_grant("its certificates do not fit together") from None
        if folder.node_id() != self.node:
            # The old identity belongs to an id that was removed for ever. It goes first: a crash between the two writes must not leave one
            # node's identity beside another one's id.
            (folder.path / IDENTITY_FILE).unlink(missing_ok=True)
            folder.set_node_id(self.node)
        identity.save()
        return identity


class JoinRequest:
    """The joiner's side: a new key, what is sent for it, and whether what comes back is right."""

    def __init__(self, token: Token, node: NodeId, name: str, addresses: tuple[str, ...]) -> None:
        self._token = token
        self._node = node
        self._name = name
        self._addresses = addresses
        self._key = ec.generate_private_key(ec.SECP256R1())

    def params(self, wall_clock: Callable[[], float] = time.time) -> JoinParams:
        """What is sent, over a connection whose other end has proved to be of the token's mesh."""
        request = (
            x509.CertificateSigningRequestBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "TARS node")]))
            .sign(self._key, hashes.SHA256())
        )
        return JoinParams(
            secret=encode(self._token.secret),
            node=self._node,
            name=self._name,
            certificate_request=request.public_bytes(serialization.Encoding.PEM).decode(),
            addresses=list(self._addresses),
            clock_ms=int(wall_clock() * 1000),
        )

    def granted(self, answer: JoinResult) -> Grant:
        """Raises `BadPeerAnswer` where anything is not as it was asked for."""
        try:
            certificate = x509.load_pem_x509_certificate(answer.certificate.encode())
            ca_certificate = x509.load_pem_x509_certificate(answer.ca_certificate.encode())
            certificate.verify_directly_issued_by(ca_certificate)
        except UNREADABLE:
            raise _bad_grant("its certificates do not fit together") from None
        if not self._token.names(hash_of_ca(ca_certificate)):
            raise _bad_grant("its CA is not the token's")
        if fingerprint_of(certificate.public_key()) != fingerprint_of(self._key.public_key()):
            raise _bad_grant("the certificate is for another key")
        if len(answer.records) > MOST_RECORDS:
            raise _bad_grant(f"it has more than {MOST_RECORDS:,} records")
        try:
            decoded = [decode_record(record, f"records[{place}]") for place, record in enumerate(answer.records)]
        except InvalidParams as fault:
            raise _bad_grant(f"a record is none: {fault.message}") from None
        # What this version does not know, a newer one wrote; gossip brings it again after an update.
        records = tuple(record for record in decoded if record is not None)
        return Grant(self._node, self._name, NodeId(answer.node), records, self._key, answer)


def requested_key(certificate_request: str) -> ec.EllipticCurvePublicKey:
    """The public key of a request whose sender has the private one. Raises `InvalidParams`."""
    try:
        request = x509.load_pem_x509_csr(certificate_request.encode("utf-8", "replace"))
        key = request.public_key()
        signed = request.is_signature_valid
    except UNREADABLE:
        signed, key = False, None
    if not signed or not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise InvalidParams(
            "Invalid params: mesh.join: certificate_request: it should be a PKCS #10 request in PEM with a P-256 key, signed with it. "
            "Nobody was admitted."
        )
    return key


def _bad_grant(problem: str) -> BadPeerAnswer:
    return BadPeerAnswer(
        f"The mesh's answer to the join cannot be used: {problem}. This PC has joined nothing. Update TARS on both PCs, make a new token "
        "and join again."
    )
