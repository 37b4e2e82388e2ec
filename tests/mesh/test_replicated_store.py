"""The map on the disk: over restarts, full disks, damage and clocks that are set back."""

import asyncio
import errno
import threading

import orjson
import pytest

from tars import state_folder
from tars.core.hybrid_clock import MOST_AHEAD_MS
from tars.core.mesh_messages import Record, Stamp
from tars.core.records import Member, NodeAdvert, Orders, Wish
from tars.core.replicated_map import SETTLED_SECONDS, TOMBSTONE_SECONDS, wishes
from tars.core.types import Deployment, NodeId, NodeSnapshot
from tars.errors import DiskFull, InvalidParams
from tars.mesh import replicated_store
from tars.mesh.replicated_store import DURABLE_FILE, VOLATILE_FILE, MemoryStore, ReplicatedStore
from tars.state_folder import StateFolder

A, B = NodeId("a"), NodeId("b")
NOW = 1_700_000_000_000
DAY = 86_400_000


@pytest.fixture
def folder(tmp_path):
    return StateFolder(tmp_path)


def opened(folder, now=NOW):
    return ReplicatedStore(folder, A, clock=lambda: now)


def wish(model, replicas=1):
    return Wish(Deployment(model, replicas))


def advert(name="pc"):
    return NodeAdvert(NodeSnapshot(A, name))


def on_disk(folder, name=DURABLE_FILE):
    path = folder.path / name
    return {each["key"] for each in orjson.loads(path.read_bytes())["records"]} if path.exists() else set()


def full(descriptor):
    raise OSError(errno.ENOSPC, "full")


def everything(store):
    return sorted(store.map.records(), key=lambda record: record.key)


# --- writing ------------------------------------------------------------------------------------------------------------


def test_a_decision_is_on_the_disk_before_anybody_hears_of_it(folder):
    store = opened(folder)
    told = []
    store.subscribe(lambda records: told.append((records, on_disk(folder), store.map.get("deployment/m"))))
    record = store.put("deployment/m", wish("m"))
    assert told == [([record], {"deployment/m"}, wish("m"))]


def test_a_full_disk_changes_nothing(folder, monkeypatch):
    store = opened(folder)
    store.put("deployment/m", wish("m"))
    before, content = everything(store), (folder.path / DURABLE_FILE).read_bytes()
    told = []
    store.subscribe(told.append)
    monkeypatch.setattr(state_folder.os, "fsync", full)
    for write in (
        lambda: store.put("deployment/m", wish("m", 2)),
        lambda: store.put("deployment/n", wish("n")),
        lambda: store.remove("deployment/m"),
    ):
        with pytest.raises(DiskFull):
            write()
    assert (everything(store), told) == (before, [])
    assert (folder.path / DURABLE_FILE).read_bytes() == content


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("node/b", advert(), "only a node itself"),
        ("deployment/m", wish("n"), "holds the record of 'n'"),
        ("deployment/" + "m" * 600, wish("m" * 600), "611 characters"),
        ("deployment/m", wish("m", 10**9), "replicas: should be 0 to 64"),
        ("member/b", Member(B, "x" * 10_000, "f"), "10000 characters"),
    ],
)
def test_what_no_peer_would_take_is_not_written(folder, key, value, said):
    store = opened(folder)
    with pytest.raises(InvalidParams, match=said):
        store.put(key, value)
    assert len(store.map) == 0
    assert on_disk(folder) == set()


def test_it_comes_back_as_it_was(folder):
    store = opened(folder)
    store.put("deployment/m", wish("m"))
    store.put("deployment/n", wish("n"))
    store.remove("deployment/n")
    store.put("member/b", Member(B, "pc", "f", removed=True))
    store.put("node/a", advert())
    store.put("orders/a", Orders(A, A))
    store.close()
    again = opened(folder)
    assert everything(again) == everything(store)
    assert again.map.root == store.map.root
    assert not again.lost


def test_a_decision_survives_without_any_close(folder):
    opened(folder).put("deployment/m", wish("m"))
    assert opened(folder).map.get("deployment/m") == wish("m")


def test_a_clock_that_was_set_back_does_not_matter(folder):
    opened(folder).put("deployment/m", wish("m", 2))
    again = opened(folder, now=NOW - 900 * DAY)
    newer = again.put("deployment/m", wish("m", 3))
    assert newer.stamp > Stamp(NOW, 0, A)
    third = opened(folder, now=5)
    assert third.map.get("deployment/m") == wish("m", 3)
    assert third.put("deployment/m", wish("m", 4)).stamp > newer.stamp


def test_a_stamp_that_was_only_heard_counts_after_a_restart_too(folder):
    """It was not kept as a record: what was written in answer to it must still be later."""
    store = opened(folder)
    store.map.clock.observe(Stamp(NOW + 5 * DAY, 0, B))
    store.put("deployment/m", wish("m"))
    store.map.clock.observe(Stamp(NOW + 9 * DAY, 0, B))
    store.save()
    assert opened(folder).put("deployment/n", wish("n")).stamp.wall_ms == NOW + 9 * DAY


def test_adverts_wait_and_decisions_do_not(folder):
    store = opened(folder)
    store.put("node/a", advert())
    assert on_disk(folder, VOLATILE_FILE) == set()
    store.put("deployment/m", wish("m"), saved=False)
    assert on_disk(folder) == set()
    store.close()
    assert on_disk(folder, VOLATILE_FILE) == {"node/a"}
    assert on_disk(folder) == {"deployment/m"}


def test_a_memory_store_is_the_same_without_a_disk():
    store = MemoryStore(A, clock=lambda: NOW)
    told = []
    store.subscribe(told.append)
    record = store.put("deployment/m", wish("m"))
    assert store.remove("deployment/m").stamp > record.stamp
    assert [records[0].value for records in told] == [wish("m"), None]
    assert not store.lost


def test_what_was_lost_is_restored_as_old_as_it_was():
    store = MemoryStore(A, clock=lambda: NOW)
    store.put("deployment/n", wish("n", 2))
    told = []
    store.subscribe(told.append)
    for model in ("m", "n"):
        store.restore(Record(f"deployment/{model}", Stamp(NOW - DAY, 0, A), wish(model)))
    assert {model: each.deployment.replicas for model, each in wishes(store.map).items()} == {"m": 1, "n": 2}
    assert told == []


# --- what peers told ----------------------------------------------------------------------------------------------------


async def until(condition):
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110  # the condition is a file's: nothing sets an event
            await asyncio.sleep(0.005)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(replicated_store, "SAVE_SECONDS", 0.01)
    monkeypatch.setattr(replicated_store, "SAVE_VOLATILE_SECONDS", 0.05)


def hear(store, *records):
    changed = store.map.merge(records, NOW)
    store.changed(record.key for record in changed)


async def test_what_peers_told_is_saved_soon(folder, quick):
    store = opened(folder)
    saving = asyncio.create_task(store.run())
    hear(store, Record("deployment/m", Stamp(NOW, 0, B), wish("m")))
    await until(lambda: on_disk(folder) == {"deployment/m"})
    assert not (folder.path / VOLATILE_FILE).exists()
    hear(store, Record("node/b", Stamp(NOW, 0, B), NodeAdvert(NodeSnapshot(B, "pc"))))
    await until(lambda: on_disk(folder, VOLATILE_FILE) == {"node/b"})
    saving.cancel()
    store.close()
    assert everything(opened(folder)) == everything(store)


async def test_a_close_in_the_middle_of_a_write_waits_for_it_and_loses_nothing(folder, quick, monkeypatch):
    store = opened(folder)
    writing, go_on = threading.Event(), threading.Event()

    def slow(descriptor):
        writing.set()
        assert go_on.wait(5)

    with monkeypatch.context() as patch:
        patch.setattr(state_folder.os, "fsync", slow)
        saving = asyncio.create_task(store.run())
        hear(store, Record("deployment/m", Stamp(NOW, 0, B), wish("m")))
        assert await asyncio.to_thread(writing.wait, 5)
        saving.cancel()
        await asyncio.wait({saving})
        threading.Timer(0.1, go_on.set).start()
        store.close()
        assert not list(folder.path.glob("*.partial"))
        assert on_disk(folder) == {"deployment/m"}


async def test_what_was_to_be_written_when_it_was_cancelled_is_written_at_the_close(folder, quick, monkeypatch):
    store = opened(folder)
    asked = asyncio.Event()

    async def never(*_):
        asked.set()
        await asyncio.Event().wait()

    with monkeypatch.context() as patch:
        # As where all of the pool's threads are taken: cancelled before it began.
        patch.setattr(replicated_store.asyncio, "to_thread", never)
        saving = asyncio.create_task(store.run())
        hear(store, Record("deployment/m", Stamp(NOW, 0, B), wish("m")))
        await asked.wait()
        saving.cancel()
        await asyncio.wait({saving})
    assert on_disk(folder) == set()
    store.close()
    assert on_disk(folder) == {"deployment/m"}


async def test_a_full_disk_is_said_once_and_tried_again(folder, quick, monkeypatch, caplog):
    store = opened(folder)
    tries = []

    def counting(descriptor):
        tries.append(descriptor)
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(state_folder.os, "fsync", counting)
        saving = asyncio.create_task(store.run())
        hear(store, Record("deployment/m", Stamp(NOW, 0, B), wish("m")))
        await until(lambda: len(tries) >= 3)
    await until(lambda: on_disk(folder) == {"deployment/m"})
    saving.cancel()
    assert caplog.text.count("will be tried again") == 1


async def test_adverts_that_change_all_the_time_are_not_written_all_the_time(folder, quick, monkeypatch):
    monkeypatch.setattr(replicated_store, "SAVE_VOLATILE_SECONDS", 3_600.0)
    written = []
    really = replicated_store.write_atomically
    monkeypatch.setattr(
        replicated_store, "write_atomically", lambda path, content: (written.append(path.name), really(path, content))
    )
    store = opened(folder)
    saving = asyncio.create_task(store.run())
    for number in range(20):
        store.put("node/a", advert(f"pc{number}"))
        await asyncio.sleep(0.002)
    hear(store, Record("deployment/m", Stamp(NOW, 0, B), wish("m")))
    await until(lambda: written)
    saving.cancel()
    assert written == [DURABLE_FILE]


def test_an_older_state_never_replaces_a_newer_one(folder):
    """As where a thread that was given its content before a decision gets to write only after it."""
    store = opened(folder)
    older = store._content(DURABLE_FILE)
    store.put("deployment/m", wish("m"))
    store._write_file(DURABLE_FILE, *older)
    assert on_disk(folder) == {"deployment/m"}


def test_a_full_disk_at_the_end_is_said(folder, monkeypatch, caplog):
    store = opened(folder)
    store.put("node/a", advert())
    monkeypatch.setattr(state_folder.os, "fsync", full)
    store.close()
    assert "was not saved" in caplog.text


# --- joining, contact, tombstones ---------------------------------------------------------------------------------------


def test_joining_takes_the_meshs_map_and_saves_it(folder):
    mesh = MemoryStore(B, clock=lambda: NOW)
    mesh.put("deployment/m", wish("m"))
    mesh.put("member/b", Member(B, "pc", "f"))
    store = opened(folder)
    store.put("deployment/own", wish("own"))
    assert {record.key for record in store.adopt(list(mesh.map.records()))} == {"deployment/m", "member/b"}
    again = opened(folder)
    assert list(wishes(again.map)) == ["m", "own"]
    assert again.last_contact_ms == NOW


def test_a_former_member_forgets_what_the_mesh_forgot(folder):
    store = opened(folder)
    store.put("deployment/forgotten", wish("forgotten"))
    store.contact()
    store.close()
    later = opened(folder, now=NOW + 100 * DAY)
    assert later.last_contact_ms == NOW
    later.put("deployment/since", wish("since"))
    later.adopt([Record("deployment/m", Stamp(NOW + DAY, 0, B), wish("m"))])
    assert list(wishes(opened(folder, now=NOW + 100 * DAY).map)) == ["m", "since"]


def test_contact_costs_a_write_an_hour_at_most(folder):
    now = [NOW]
    store = ReplicatedStore(folder, A, clock=lambda: now[0])
    store.contact()
    assert store._dirty
    store.save()
    for _ in range(1_000):
        now[0] += 3_599
        store.contact()
    assert not store._dirty
    now[0] += 3_600_001
    store.contact()
    assert store._dirty


def test_a_forgotten_tombstone_is_forgotten_on_the_disk_too(folder):
    store = opened(folder)
    store.put("deployment/m", wish("m"))
    store.remove("deployment/m")
    later = opened(folder, now=NOW + TOMBSTONE_SECONDS * 1000 + 1)
    assert later.collect({}) == ["deployment/m"]
    later.close()
    assert on_disk(folder) == set()


def test_a_pc_that_slept_for_weeks_forgets_nothing_before_it_has_told(folder):
    """A clock that stands still in sleep says that its peers have been alive all the while."""
    now = [NOW]
    store = ReplicatedStore(folder, A, clock=lambda: now[0])
    store.put("member/b", Member(B, "pc", "f"))
    store.put("deployment/m", wish("m"))

    def among_peers(seconds):
        for _ in range(seconds // 30):
            now[0] += 30_000
            store.contact()

    store.contact()
    store.close()
    store = ReplicatedStore(folder, A, clock=lambda: now[0])  # a quick restart is no reason to wait for ever
    among_peers(2 * SETTLED_SECONDS)
    store.remove("deployment/m")
    now[0] += 40 * DAY
    store.contact()
    alive_all_the_while = {B: now[0] - 3 * SETTLED_SECONDS * 1000}
    assert store.collect(alive_all_the_while) == []
    among_peers(SETTLED_SECONDS - 60)
    assert store.collect(alive_all_the_while) == []
    among_peers(120)
    assert store.collect(alive_all_the_while) == ["deployment/m"]


# --- damage -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", [b"", b"{", b"\x00" * 100, b"[]", b'{"records": 5}', b"5"])
def test_a_damaged_file_is_kept_aside_and_peers_send_everything_back(folder, damage, caplog):
    store = opened(folder)
    store.put("deployment/m", wish("m"))
    peer = MemoryStore(B, clock=lambda: NOW)
    peer.map.merge(store.map.records(), NOW)
    (folder.path / DURABLE_FILE).write_bytes(damage)
    again = opened(folder)
    assert again.lost
    assert len(again.map) == 0
    assert "records.json in the state folder is damaged" in caplog.text
    (aside,) = folder.path.glob("records.damaged-*.json")
    assert aside.name in caplog.text
    assert aside.read_bytes() == damage
    hear(again, *peer.map.records())
    again.close()
    assert everything(opened(folder)) == everything(store)


def test_of_a_file_with_bad_records_the_good_ones_count(folder, caplog):
    store = opened(folder)
    for model in ("a", "b", "c", "d"):
        store.put(f"deployment/{model}", wish(model))
    path = folder.path / DURABLE_FILE
    content = orjson.loads(path.read_bytes())
    content["records"][0]["value"]["deployment"]["replicas"] = "many"
    content["records"][1]["stamp"][0] = NOW + 5 * MOST_AHEAD_MS
    content["records"][2]["value"] = {"deployment": {"model": "other"}}
    path.write_bytes(orjson.dumps(content))
    again = opened(folder)
    assert list(wishes(again.map)) == ["d"]
    assert again.lost
    assert "3 of its records cannot be read" in caplog.text
    (aside,) = folder.path.glob("records.damaged-*.json")
    assert orjson.loads(aside.read_bytes()) == content


def test_a_damaged_clock_is_no_reason_not_to_start(folder):
    opened(folder).put("deployment/m", wish("m"))
    path = folder.path / DURABLE_FILE
    path.write_bytes(orjson.dumps({**orjson.loads(path.read_bytes()), "clock": "noon", "last_contact_ms": "never"}))
    again = opened(folder, now=NOW - DAY)
    assert again.last_contact_ms is None
    assert again.put("deployment/m", wish("m", 2)).stamp > Stamp(NOW, 0, A)


def test_records_of_a_newer_version_outlive_a_run_of_this_one(folder, caplog):
    opened(folder).put("deployment/m", wish("m"))
    path = folder.path / DURABLE_FILE
    content = orjson.loads(path.read_bytes())
    newer = {"key": "lease/m", "stamp": [NOW, 0, "b"], "value": {"until": 5}}
    content["records"].append(newer)
    path.write_bytes(orjson.dumps(content))
    store = opened(folder)
    store.put("deployment/n", wish("n"))
    opened(folder).put("deployment/o", wish("o"))
    assert newer in orjson.loads(path.read_bytes())["records"]
    assert on_disk(folder) == {"deployment/m", "deployment/n", "deployment/o", "lease/m"}
    assert caplog.text == ""


def test_a_first_start_has_nothing_and_says_nothing(folder, caplog):
    store = opened(folder)
    assert (len(store.map), store.lost, store.last_contact_ms) == (0, True, None)
    store.close()
    assert caplog.text == ""
    assert list(folder.path.iterdir()) == []
