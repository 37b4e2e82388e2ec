"""What is wanted, over restarts, edits of the configuration, and nodes."""

import errno

import orjson
import pytest

from tars import state_folder
from tars.core.records import Wish
from tars.core.replicated_map import SETTLED_SECONDS, TOMBSTONE_SECONDS
from tars.core.types import Deployment, KvType, ModelEntry, ModelKind, NodeId
from tars.errors import DiskFull, InvalidParams
from tars.mesh.deployments import FILE, OLD_FILE, Deployments
from tars.mesh.replicated_store import DURABLE_FILE, MemoryStore, ReplicatedStore, wall_ms
from tars.state_folder import StateFolder

NODE, PEER = NodeId("node-a"), NodeId("node-b")


@pytest.fixture
def folder(tmp_path):
    return StateFolder(tmp_path)


def started(folder, declared):
    """As a node does at its start."""
    return Deployments(ReplicatedStore(folder, NODE), declared, folder)


def names(deployments):
    return [each.model for each in deployments.wanted()]


def full(descriptor):
    raise OSError(errno.ENOSPC, "full")


def test_the_configurations_deployments_are_wanted_in_order(folder):
    assert names(started(folder, [Deployment("b"), Deployment("a")])) == ["b", "a"]


def test_decisions_outlive_a_restart(folder):
    declared = [Deployment("a"), Deployment("b")]
    first = started(folder, declared)
    first.deploy(Deployment("c", replicas=2, kv_type=KvType.Q8_0, context=512))
    assert first.remove("a")
    again = started(folder, declared)
    assert names(again) == ["b", "c"]
    assert again.get("c") == Deployment("c", replicas=2, kv_type=KvType.Q8_0, context=512)


def test_an_edited_configuration_entry_wins_over_an_older_decision(folder):
    started(folder, [Deployment("a")]).remove("a")
    assert names(started(folder, [Deployment("a")])) == []
    assert names(started(folder, [Deployment("a", context=512)])) == ["a"]
    assert started(folder, [Deployment("a", context=512)]).get("a") == Deployment("a", context=512)


def test_an_entry_that_was_taken_out_takes_its_wish_with_it(folder):
    started(folder, [Deployment("a"), Deployment("b")])
    assert names(started(folder, [Deployment("b")])) == ["b"]
    assert names(started(folder, [Deployment("a"), Deployment("b")])) == ["a", "b"]


def test_an_entry_that_no_node_would_take_stops_the_start(folder):
    with pytest.raises(InvalidParams, match="replicas"):
        started(folder, [Deployment("a", replicas=10**9)])


def test_an_entry_that_was_taken_out_leaves_what_somebody_decided_since(folder):
    started(folder, [Deployment("a")]).deploy(Deployment("a", replicas=3))
    assert started(folder, []).wanted() == (Deployment("a", replicas=3),)


def test_removing_what_is_not_wanted_changes_nothing(folder):
    deployments = started(folder, [])
    assert not deployments.remove("a")
    assert not (folder.path / DURABLE_FILE).exists()


def test_a_full_disk_changes_nothing(folder, monkeypatch):
    deployments = started(folder, [Deployment("a")])
    monkeypatch.setattr(state_folder.os, "fsync", full)
    with pytest.raises(DiskFull):
        deployments.deploy(Deployment("b"))
    with pytest.raises(DiskFull):
        deployments.remove("a")
    assert names(deployments) == ["a"]


def test_a_node_starts_on_a_full_disk_and_declares_again_when_it_is_not(folder, monkeypatch, caplog):
    with monkeypatch.context() as patch:
        patch.setattr(state_folder.os, "fsync", full)
        assert names(started(folder, [Deployment("a")])) == ["a"]
        assert "a is in force, but was not saved yet" in caplog.text
    assert names(started(folder, [Deployment("a")])) == ["a"]
    assert names(started(folder, [])) == []


def test_a_decision_reaches_another_node_and_its_configuration_joins_in(folder):
    here = MemoryStore(NODE)
    there = MemoryStore(PEER)
    first = Deployments(here, [Deployment("a")])
    second = Deployments(there, [Deployment("b")])
    there.map.merge(here.map.records(), wall_ms())
    here.map.merge(there.map.records(), wall_ms())
    assert (names(first), names(second)) == (["a", "b"], ["b", "a"])
    assert second.remove("a")
    here.map.merge(there.map.records(), wall_ms())
    assert names(first) == ["b"]


def test_what_peers_decided_while_this_node_was_down_outlives_its_start(folder):
    started(folder, [Deployment("a")])
    store = ReplicatedStore(folder, NODE)
    peer = MemoryStore(PEER)
    peer.map.merge(store.map.records(), wall_ms())
    Deployments(peer).remove("a")
    store.map.merge(peer.map.records(), wall_ms())
    store.save()
    assert names(started(folder, [Deployment("a")])) == []


def test_after_a_damaged_file_the_configuration_counts_as_old_as_it_is(folder):
    """The peers' removal is newer than the entry of the file, also when this node has forgotten both."""
    store = ReplicatedStore(folder, NODE)
    Deployments(store, [Deployment("a"), Deployment("b")], folder)
    peer = MemoryStore(PEER)
    peer.map.merge(store.map.records(), wall_ms())
    Deployments(peer).remove("a")
    (folder.path / DURABLE_FILE).write_bytes(b"{")
    again = ReplicatedStore(folder, NODE)
    deployments = Deployments(again, [Deployment("a"), Deployment("b")], folder)
    assert names(deployments) == ["a", "b"]
    again.map.merge(peer.map.records(), wall_ms())
    assert names(deployments) == ["b"]


def test_a_removal_that_was_forgotten_is_not_undone_by_a_restart(folder):
    now = [1_000]
    store = ReplicatedStore(folder, NODE, clock=lambda: now[0])
    Deployments(store, [Deployment("a")], folder).remove("a")
    now[0] += (TOMBSTONE_SECONDS + SETTLED_SECONDS) * 1000 + 1
    assert store.collect({}) == ["deployment/a"]
    store.save()
    assert names(started(folder, [Deployment("a")])) == []


def test_a_model_of_this_nodes_own_travels_with_its_entry():
    entry = ModelEntry("mine", ModelKind.CHAT, ())
    store = MemoryStore(NODE)
    deployments = Deployments(store, [Deployment("mine")], entry_of={"mine": entry}.get)
    deployments.deploy(Deployment("other"))
    assert store.map.get("deployment/mine") == Wish(Deployment("mine"), entry)
    assert store.map.get("deployment/other") == Wish(Deployment("other"))


def plain(deployment):
    return (
        None if deployment is None else {"model": deployment.model, "replicas": deployment.replicas, "kv_type": "f16"}
    )


def write_old(folder, **decided):
    """`deployments.json` as TARS wrote it before the mesh: model -> (wanted, what the configuration had then)."""
    content = {
        "version": 1,
        "decided": {
            model: {"wanted": plain(wanted), "declared": plain(basis)} for model, (wanted, basis) in decided.items()
        },
    }
    (folder.path / OLD_FILE).write_bytes(orjson.dumps(content))


def test_a_single_nodes_decisions_are_taken_over(folder):
    write_old(
        folder,
        removed=(None, Deployment("removed")),
        changed=(Deployment("changed", replicas=2), Deployment("changed")),
        edited=(Deployment("edited", replicas=2), Deployment("edited", replicas=3)),
        added=(Deployment("added"), None),
        dropped=(Deployment("dropped", replicas=2), Deployment("dropped")),
    )
    declared = [Deployment("removed"), Deployment("changed"), Deployment("edited")]
    expected = (Deployment("changed", replicas=2), Deployment("edited"), Deployment("added"))
    assert started(folder, declared).wanted() == expected
    assert not (folder.path / OLD_FILE).exists()
    assert (folder.path / f"{OLD_FILE}.old").exists()
    assert started(folder, declared).wanted() == expected


@pytest.mark.parametrize("name", [OLD_FILE, FILE])
@pytest.mark.parametrize(
    "content",
    [
        b"[]",
        b'{"decided": {"x": 5}, "declared": [5]}',
        b'{"decided": {"x": {"wanted": {"model": 1, "no": 2}}}, "declared": [{"deployment": {"model": 1}, "stamp": 5}]}',
        b'{"decided": 5, "declared": {"a": 5}}',
    ],
)
def test_a_file_of_another_version_is_ignored(folder, name, content):
    (folder.path / name).write_bytes(content)
    assert names(started(folder, [Deployment("a")])) == ["a"]
