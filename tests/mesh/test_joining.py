"""Admission: what a member gives, to whom, and what the joiner believes of it. No network: `test_join_client` has that."""

from __future__ import annotations

import random
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from mesh_bench import MeshNode, certified, new_id

from tars.core.records import ClientKey, Member
from tars.core.types import NodeId
from tars.errors import BadPeerAnswer, DiskFull, InvalidParams, JoinRefused, NotAMember, Overloaded
from tars.mesh.identity import Identity
from tars.mesh.join_tokens import FAILURES_PER_SOURCE, Token, encode
from tars.mesh.joining import Grant, JoinRequest, requested_key, take_place
from tars.mesh.replicated_store import MemoryStore
from tars.messages.admission import JoinParams, JoinResult
from tars.state_folder import StateFolder

HERE = "192.0.2.7"


@pytest.fixture
def one(tmp_path: Path) -> MeshNode:
    (tmp_path / "one").mkdir()
    return MeshNode(tmp_path / "one", "one", Identity.create(tmp_path / "one", new_id()))


def ask(one: MeshNode, node: NodeId | None = None, token: Token | None = None) -> JoinRequest:
    return JoinRequest(token or one.tokens.new()[0], node or new_id(), "two", ("192.0.2.2:8001",))


def joining(path: Path, node: NodeId) -> StateFolder:
    folder = StateFolder(path)
    folder.set_node_id(node)
    return folder


def reason(one: MeshNode, params: JoinParams, source: str = HERE) -> object:
    with pytest.raises(JoinRefused) as refused:
        one.admitting.admit(params, source)
    return refused.value.details["reason"]


def test_whoever_has_a_token_becomes_a_member_with_all_that_members_have(one: MeshNode, tmp_path: Path) -> None:
    one.store.put("key/laptop", ClientKey("laptop", "00" * 32))
    node = new_id()
    request = ask(one, node)
    grant = request.granted(one.admitting.admit(request.params(), HERE))
    store = MemoryStore(node)
    store.map.adopt(grant.records, int(time.time() * 1000), None)
    (tmp_path / "two").mkdir()
    identity = grant.save(joining(tmp_path / "two", node))
    assert grant.admitted_by == one.id
    assert (identity.node, identity.ca_hash, identity.ca_key_pem) == (
        node,
        one.identity.ca_hash,
        one.identity.ca_key_pem,
    )
    member = Member(node, "two", identity.fingerprint, ("192.0.2.2:8001",), admitted_by=one.id)
    assert store.map.get(f"member/{node}") == one.store.map.get(f"member/{node}") == member
    assert store.map.root == one.store.map.root
    again = Identity.load_or_none(tmp_path / "two", node)
    assert again is not None
    # And it can let in the next one, and nobody is in charge for ever.
    two = MeshNode(tmp_path / "two", "two", again)
    further = ask(two)
    assert further.granted(two.admitting.admit(further.params(), HERE)).admitted_by == node


def test_a_new_id_and_its_identity_are_never_mixed_with_the_old_ones(
    one: MeshNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node that was thrown out joins as a new one, and the PC loses its power after each write in turn."""
    old, new = new_id(), new_id()

    class PowerLoss(Exception):
        pass

    for survives in range(4):
        (tmp_path / str(survives)).mkdir()
        folder = joining(tmp_path / str(survives), old)
        first = ask(one, old)
        first.granted(one.admitting.admit(first.params(), HERE)).save(folder)
        second = ask(one, new)
        grant = second.granted(one.admitting.admit(second.params(), HERE))
        left = [survives]

        def step(real: object, left: list[int] = left) -> object:
            def counted(*arguments: object, **options: object) -> object:
                left[0] -= 1
                if left[0] < 0:
                    raise PowerLoss
                return real(*arguments, **options)  # type: ignore[operator]  # a method

            return counted

        with monkeypatch.context() as patched:
            for owner, name in ((Path, "unlink"), (StateFolder, "set_node_id"), (Identity, "save")):
                patched.setattr(owner, name, step(getattr(owner, name)))
            with suppress(PowerLoss):
                grant.save(folder)
        found = Identity.load_or_none(folder.path, folder.node_id())
        assert (None if found is None else found.node) == (old, None, None, new)[survives]


def test_a_replayed_request_is_refused(one: MeshNode) -> None:
    params = ask(one).params()
    one.admitting.admit(params, HERE)
    assert reason(one, params) == "used"
    assert reason(one, params.model_copy(update={"node": new_id()})) == "used"


def test_joining_again_with_the_same_node_id_and_a_new_token_replaces_the_key(one: MeshNode) -> None:
    node = new_id()
    fingerprints = []
    for _ in range(2):
        one.admitting.admit(ask(one, node).params(), HERE)
        member = one.store.map.get(f"member/{node}")
        assert isinstance(member, Member)
        fingerprints.append(member.fingerprint)
    assert fingerprints[0] != fingerprints[1]
    assert len(one.store.map.items("member/")) == 2


def test_a_removed_node_id_stays_out_and_the_token_is_kept_for_its_new_one(one: MeshNode) -> None:
    node, (token, _) = new_id(), one.tokens.new()
    one.store.put(f"member/{node}", Member(node, "two", "0" * 64, removed=True))
    assert reason(one, ask(one, node, token).params()) == "removed"
    one.admitting.admit(ask(one, new_id(), token).params(), HERE)


def test_a_copy_of_the_members_own_state_folder_is_refused(one: MeshNode) -> None:
    assert reason(one, ask(one, one.id).params()) == "same_node"


@pytest.mark.parametrize("years", [-50, -2, 1, 30])
def test_a_clock_that_is_far_off_is_named_and_costs_no_token(one: MeshNode, years: int) -> None:
    token, _ = one.tokens.new()
    with pytest.raises(JoinRefused, match=r"days (ahead of|behind).*Set the wrong one") as refused:
        one.admitting.admit(ask(one, token=token).params(lambda: time.time() + years * 365 * 86_400), HERE)
    assert refused.value.details["reason"] == "clock"
    one.admitting.admit(ask(one, token=token).params(lambda: time.time() + 3600), HERE)


def other_curve() -> bytes:
    return _request(ec.generate_private_key(ec.SECP384R1()))


def other_kind() -> bytes:
    return _request(rsa.generate_private_key(65537, 2048))


def not_signed_by_its_key() -> bytes:
    good = x509.load_pem_x509_csr(_request(ec.generate_private_key(ec.SECP256R1())))
    der = bytearray(good.public_bytes(serialization.Encoding.DER))
    der[-5] ^= 1
    return x509.load_der_x509_csr(bytes(der)).public_bytes(serialization.Encoding.PEM)


def _request(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> bytes:
    made = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    return made.public_bytes(serialization.Encoding.PEM)


@pytest.mark.parametrize("make", [other_curve, other_kind, not_signed_by_its_key, lambda: b"", lambda: b"junk"])
def test_a_certificate_request_that_is_none_costs_no_token(one: MeshNode, make: object) -> None:
    token, _ = one.tokens.new()
    wrong = make().decode()  # type: ignore[operator]  # one of the makers
    params = ask(one, token=token).params().model_copy(update={"certificate_request": wrong})
    with pytest.raises(InvalidParams, match="certificate_request"):
        one.admitting.admit(params, HERE)
    one.admitting.admit(ask(one, token=token).params(), HERE)


@pytest.mark.parametrize(
    "text", ["é", "\ud800", "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----"]
)
def test_odd_texts_for_a_certificate_request_are_refused(text: str) -> None:
    with pytest.raises(InvalidParams):
        requested_key(text)


@pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning")
def test_whichever_bit_of_a_certificate_request_is_wrong_it_is_refused_or_still_the_key_s(one: MeshNode) -> None:
    request, dice = ask(one).params().certificate_request.encode(), random.Random(1)
    refused = 0
    for position in range(len(request)):
        damaged = bytes([request[position] ^ (1 << dice.randrange(7))])
        try:
            requested_key((request[:position] + damaged + request[position + 1 :]).decode())
        except InvalidParams:
            refused += 1
    assert refused > len(request) * 0.8


@pytest.mark.parametrize("address", ["", "box", "box:99999", "http://box:1", "a b:1", "::1:1"])
def test_a_wrong_address_costs_no_token(one: MeshNode, address: str) -> None:
    token, _ = one.tokens.new()
    with pytest.raises(InvalidParams, match="addresses"):
        one.admitting.admit(ask(one, token=token).params().model_copy(update={"addresses": [address]}), HERE)
    assert [one.tokens.state(entry) for entry in one.tokens.entries()] == ["open"]


def test_a_full_disk_admits_nobody(one: MeshNode, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise DiskFull("full")

    params = ask(one).params()
    with monkeypatch.context() as patched:
        patched.setattr(StateFolder, "write_json", full)
        with pytest.raises(DiskFull):
            one.admitting.admit(params, HERE)
    assert len(one.store.map.items("member/")) == 1
    one.admitting.admit(params, HERE)


def test_guesses_are_bounded(one: MeshNode) -> None:
    wrong = ask(one).params().model_copy(update={"secret": encode(bytes(16))})
    for _ in range(FAILURES_PER_SOURCE):
        assert reason(one, wrong) == "unknown"
    with pytest.raises(Overloaded):
        one.admitting.admit(wrong, HERE)
    one.admitting.admit(ask(one).params(), "192.0.2.8")


# --- one's own place ----------------------------------------------------------------------------------------------------


def test_a_node_tells_its_name_and_addresses_of_now_and_writes_nothing_where_they_are_known(one: MeshNode) -> None:
    store = MemoryStore(one.id)
    take_place(one.identity, store, "one", ("192.0.2.1:8001",))
    first = store.map.record(f"member/{one.id}")
    assert first is not None
    assert first.value == one.identity.member("one", ("192.0.2.1:8001",))
    take_place(one.identity, store, "one", ("192.0.2.1:8001",))
    assert store.map.record(f"member/{one.id}") == first
    take_place(one.identity, store, "renamed", ())
    assert store.map.get(f"member/{one.id}") == one.identity.member("renamed")


def test_who_admitted_a_node_stays_known_and_a_node_without_a_mesh_gets_its_key(one: MeshNode) -> None:
    store, admitter = MemoryStore(one.id), new_id()
    store.put(f"member/{one.id}", replace(one.identity.member("x"), admitted_by=admitter))
    take_place(one.identity, store, "one", ())
    assert store.map.get(f"member/{one.id}") == replace(one.identity.member("one"), admitted_by=admitter)
    alone = MemoryStore(one.id)
    alone.put(f"member/{one.id}", Member(one.id, "one", ""))
    take_place(one.identity, alone, "one", ())
    assert alone.map.get(f"member/{one.id}") == one.identity.member("one")


def test_a_node_that_was_removed_or_replaced_cannot_take_part(one: MeshNode) -> None:
    for member, words in (
        (Member(one.id, "one", one.identity.fingerprint, removed=True), "removed from the mesh; join again"),
        (Member(one.id, "one", "0" * 64), "under another key"),
    ):
        store = MemoryStore(one.id)
        store.put(f"member/{one.id}", member)
        with pytest.raises(NotAMember, match=words):
            take_place(one.identity, store, "one", ())
        assert store.map.get(f"member/{one.id}") == member


# --- the joiner ---------------------------------------------------------------------------------------------------------


def answered(one: MeshNode) -> tuple[JoinRequest, JoinResult]:
    request = ask(one)
    return request, one.admitting.admit(request.params(), HERE)


@pytest.mark.parametrize("part", ["certificate", "ca_certificate"])
@pytest.mark.parametrize("junk", ["", "junk", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"])
def test_junk_for_a_certificate_is_not_believed(one: MeshNode, part: str, junk: str) -> None:
    request, answer = answered(one)
    with pytest.raises(BadPeerAnswer, match="joined nothing"):
        request.granted(answer.model_copy(update={part: junk}))


def test_a_grant_of_another_ca_or_for_another_key_is_not_believed(one: MeshNode, tmp_path: Path) -> None:
    request, answer = answered(one)
    (tmp_path / "far").mkdir()
    far = Identity.create(tmp_path / "far", new_id())
    foreign = {
        "certificate": far.certificate_pem.decode(),
        "ca_certificate": far.ca_certificate_pem.decode(),
        "ca_key": far.ca_key_pem.decode(),
    }
    with pytest.raises(BadPeerAnswer, match="not the token's"):
        request.granted(answer.model_copy(update=foreign))
    other = certified(one.identity, tmp_path / "other")
    with pytest.raises(BadPeerAnswer, match="another key"):
        request.granted(answer.model_copy(update={"certificate": other.certificate_pem.decode()}))
    grant = request.granted(answer.model_copy(update={"ca_key": far.ca_key_pem.decode()}))
    (tmp_path / "two").mkdir()
    with pytest.raises(BadPeerAnswer, match="do not fit"):
        grant.save(StateFolder(tmp_path / "two"))
    assert not list((tmp_path / "two").iterdir())


def test_a_bad_record_in_the_answer_is_named_and_an_unknown_kind_passed_over(one: MeshNode) -> None:
    request, answer = answered(one)
    with pytest.raises(BadPeerAnswer, match="record"):
        request.granted(answer.model_copy(update={"records": [{"key": 5}]}))
    newer = {"key": "future/x", "stamp": [1, 0, "n"], "value": {"a": 1}}
    grant = request.granted(answer.model_copy(update={"records": [*answer.records, newer]}))
    assert isinstance(grant, Grant)
    assert len(grant.records) == len(answer.records)
