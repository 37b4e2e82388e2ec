"""API keys: the configuration's, the mesh's and the operator's; shown once, kept hashed, good everywhere at once."""

from __future__ import annotations

import time

import pytest

from tars.core.mesh_messages import Record, Stamp
from tars.core.records import ClientKey
from tars.core.types import NodeId
from tars.errors import InvalidParams
from tars.mesh.client_keys import FIRST_KEY, ClientKeys, KeyHolder, digest_of
from tars.mesh.replicated_store import MemoryStore

ONE, OTHER = NodeId("00000000-0000-4000-8000-000000000001"), NodeId("00000000-0000-4000-8000-000000000002")


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore(ONE)


def test_a_new_key_works_is_shown_once_and_is_kept_as_its_hash(store: MemoryStore) -> None:
    keys = ClientKeys(store)
    key = keys.new("laptop")
    assert keys.holder(key) == KeyHolder("laptop", admin=False)
    assert key.startswith("tars-")
    assert len(key) > 40
    assert key not in repr(list(store.map.records()))
    assert store.map.get("key/laptop") == ClientKey(
        "laptop", digest_of(key).hex(), False, keys.listed()[1][0].created_ms
    )


def test_a_key_works_on_every_node_as_soon_as_its_record_is_there_and_no_longer_when_it_is_revoked(
    store: MemoryStore,
) -> None:
    here, elsewhere = ClientKeys(store), MemoryStore(OTHER)
    there = ClientKeys(elsewhere)
    key = here.new("laptop", admin=True)
    assert there.holder(key) is None
    for expected in (KeyHolder("laptop", admin=True), None):
        changed = elsewhere.map.merge(store.map.records(), int(time.time() * 1000))
        there.refresh(record.key for record in changed)
        assert there.holder(key) == expected
        if expected is not None:
            here.revoke("laptop")
            assert here.holder(key) is None
    assert not there.exist


def test_news_about_other_records_reads_nothing_again(store: MemoryStore) -> None:
    keys = ClientKeys(store)
    store.put("key/laptop", ClientKey("laptop", digest_of("k" * 20).hex()))
    keys.refresh(["node/x", "member/y"])
    assert keys.holder("k" * 20) is None
    keys.refresh(["node/x", "key/laptop"])
    assert keys.holder("k" * 20) == KeyHolder("laptop", admin=False)


def test_keys_of_the_configuration_are_admins_and_cannot_be_revoked(store: MemoryStore) -> None:
    keys = ClientKeys(store, {"me": "correct-horse-battery"})
    assert keys.holder("correct-horse-battery") == KeyHolder("me", admin=True)
    assert keys.exist
    with pytest.raises(InvalidParams, match="configuration"):
        keys.revoke("me")
    with pytest.raises(InvalidParams, match="already"):
        keys.new("me")


def test_the_operator_key_lets_in_and_does_not_count_as_one(store: MemoryStore) -> None:
    keys = ClientKeys(store)
    keys.accept_operator_key("operator-key-of-this-start")
    assert keys.holder("operator-key-of-this-start") == KeyHolder("operator", admin=True)
    assert not keys.exist
    keys.accept_operator_key("another")
    assert keys.holder("operator-key-of-this-start") is None


def test_an_exposed_node_makes_one_admin_key_and_only_where_there_is_none(store: MemoryStore) -> None:
    keys = ClientKeys(store)
    key = keys.first_admin_key()
    assert key is not None
    assert keys.holder(key) == KeyHolder(FIRST_KEY, admin=True)
    assert keys.first_admin_key() is None
    assert ClientKeys(store).first_admin_key() is None
    assert ClientKeys(MemoryStore(OTHER), {"me": "correct-horse-battery"}).first_admin_key() is None


@pytest.mark.parametrize("name", ["", "-x", "a b", "a/b", "ä", "x" * 64, "local", "operator", "mesh", "\n", "a\n"])
def test_an_odd_or_reserved_name_is_refused_and_makes_no_key(store: MemoryStore, name: str) -> None:
    with pytest.raises(InvalidParams):
        ClientKeys(store).new(name)
    assert len(store.map) == 0


def test_a_taken_name_is_refused_and_a_revoked_one_is_free_again(store: MemoryStore) -> None:
    keys = ClientKeys(store)
    first = keys.new("laptop")
    with pytest.raises(InvalidParams, match="tars key revoke laptop"):
        keys.new("laptop")
    assert keys.holder(first) is not None
    keys.revoke("laptop")
    second = keys.new("laptop")
    assert keys.holder(first) is None
    assert keys.holder(second) is not None


def test_revoking_what_is_not_there_says_where_to_look(store: MemoryStore) -> None:
    with pytest.raises(InvalidParams, match="tars key list"):
        ClientKeys(store).revoke("nobody")


def test_keys_are_listed_by_name(store: MemoryStore) -> None:
    keys = ClientKeys(store, {"me": "correct-horse-battery"})
    keys.new("b")
    keys.new("a")
    configured, mesh = keys.listed()
    assert configured == ("me",)
    assert [each.name for each in mesh] == ["a", "b"]


def test_without_a_store_nothing_can_be_made() -> None:
    keys = ClientKeys()
    assert not keys.exist
    with pytest.raises(InvalidParams):
        keys.new("laptop")


@pytest.mark.parametrize("digest", ["", "zz", "é", "00" * 31, "00" * 33, "0" * 63])
def test_a_record_with_a_digest_that_is_none_opens_nothing(store: MemoryStore, digest: str) -> None:
    store.map.merge([Record("key/x", Stamp(1, 0, OTHER), ClientKey("x", digest))], int(time.time() * 1000))
    keys = ClientKeys(store)
    for guess in ("", digest, "00"):
        assert keys.holder(guess) is None


@pytest.mark.parametrize("key", ["", " ", "\udce4", "x" * 2**20, "tars-"])
def test_any_text_may_be_given_for_a_key(store: MemoryStore, key: str) -> None:
    keys = ClientKeys(store)
    keys.new("laptop")
    assert keys.holder(key) is None


def test_a_thousand_keys_are_as_quick_as_one(store: MemoryStore) -> None:
    def seconds(keys: ClientKeys) -> float:
        return min(_timed(keys) for _ in range(5))

    def _timed(keys: ClientKeys) -> float:
        started = time.perf_counter()
        for _ in range(500):
            keys.holder("tars-no-such-key")
        return time.perf_counter() - started

    one = ClientKeys(configured={"a": "correct-horse-battery"})
    many = ClientKeys(configured={f"key {number}": f"correct-horse-{number}" for number in range(1000)})
    # A loop over a thousand digests takes some hundred times as long.
    assert seconds(many) < 10 * seconds(one)
