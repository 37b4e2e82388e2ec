"""A node's advert: what is in it, and when peers are told."""

from dataclasses import replace

from fleets import MODELS, gpu, node

from tars.catalogue import Catalogue
from tars.core.mesh_messages import Record
from tars.core.placement import plan
from tars.core.records import HeldFile, NodeAdvert, ReplicaReport, TransferReport
from tars.core.replicated_map import adverts
from tars.core.types import Bytes, Deployment, ModelKind, NodeId, ReplicaState
from tars.mesh.advertising import PACE_SECONDS, Advertising
from tars.mesh.replicated_store import MemoryStore
from tars.messages.files import TransferDescription

PC = node("a", gpu("a"))


class Bench:
    def __init__(self, tiny_gguf):
        self.now = 100.0
        self.held = []
        self.transfers = []
        self.catalogue = Catalogue.load()
        self.name = self.catalogue.add_file(tiny_gguf, name="tiny").name
        self.store = MemoryStore(NodeId("a"))
        self.advertising = Advertising(
            self.catalogue,
            self.store,
            held=lambda: self.held,
            client_url=lambda: "http://a:8000",
            transfers=lambda: self.transfers,
            now=lambda: self.now,
        )

    def tell(self, snapshot=PC, *replicas):
        return self.advertising.tell(self.advertising.advert(snapshot, replicas))

    @property
    def told(self):
        return adverts(self.store.map).get(NodeId("a"))


def free(gib):
    return replace(PC, devices=(replace(PC.devices[0], memory_free=Bytes.gib(gib)),))


def test_an_advert_has_the_node_its_own_models_and_where_clients_reach_it(tiny_gguf):
    bench = Bench(tiny_gguf)
    assert bench.tell() is None
    assert bench.told.node == PC
    assert [entry.name for entry in bench.told.models] == ["tiny"]
    assert bench.told.client_url == "http://a:8000"
    assert bench.told.version


def test_an_advert_has_the_files_that_are_on_their_way(tiny_gguf):
    bench = Bench(tiny_gguf)
    going = TransferDescription(
        model="mistral", variant="Q4_K_M", stage="fetch", bytes_done=10, bytes_total=100, bytes_per_second=2.5,
        sources=["b", "c"], note="d was slow",
    )  # fmt: skip
    bench.transfers.append(going)
    bench.tell()
    assert bench.told.transfers == (
        TransferReport("mistral", "Q4_K_M", "fetch", Bytes(10), Bytes(100), 2.5, ("b", "c"), "d was slow"),
    )


def of_tiny(advert):
    return [file for file in advert.files if file.model == "tiny"]


def test_a_file_counts_before_it_is_hashed_and_afterwards_with_its_hash(tiny_gguf):
    bench = Bench(tiny_gguf)
    variant = bench.catalogue.resolve("tiny").variants[0].name
    (file,) = of_tiny(bench.advertising.advert(PC, ()))
    assert (file.variant, file.sha256) == (variant, None)
    bench.held = [HeldFile("tiny", variant, Bytes(1), "ab" * 32)]
    assert of_tiny(bench.advertising.advert(PC, ())) == bench.held
    bench.held = []
    bench.catalogue._paths.pop(("tiny", variant))
    assert of_tiny(bench.advertising.advert(PC, ())) == []


def test_it_is_told_once_and_again_when_it_differs_enough_but_not_more_than_once_a_second(tiny_gguf):
    bench = Bench(tiny_gguf)
    bench.tell(free(10))
    bench.now += 10
    stamp = bench.store.map.record("node/a").stamp
    assert bench.tell(free(9.9)) is None
    assert bench.store.map.record("node/a").stamp == stamp
    assert bench.tell(free(8)) is None
    assert bench.told.node == free(8)
    bench.now += 0.25
    assert bench.tell(free(6)) == bench.now + PACE_SECONDS - 0.25
    assert bench.told.node == free(8)
    bench.now += 0.75
    assert bench.tell(free(6)) is None
    assert bench.told.node == free(6)


def test_a_drain_does_not_wait_for_its_turn(tiny_gguf):
    bench = Bench(tiny_gguf)
    bench.tell()
    assert bench.tell(replace(PC, draining=True)) is None
    assert bench.told.node.draining


def test_a_replica_that_is_ready_does_not_wait_for_its_turn_as_the_one_that_it_replaces_goes_at_once(tiny_gguf):
    bench = Bench(tiny_gguf)
    (assignment,) = plan([PC], MODELS, [Deployment("phi-2")]).assignments
    loading = ReplicaReport(assignment, ModelKind.CHAT, ReplicaState.LOADING, percent=93.0)
    ready = replace(loading, state=ReplicaState.READY, percent=None)
    bench.tell(PC, loading)
    assert bench.tell(PC, ready) is None
    assert bench.told.replicas == (ready,)
    # What it was before is no hurry.
    assert bench.tell(PC, loading) == bench.now + PACE_SECONDS


def test_an_advert_that_no_node_would_take_is_logged_and_stops_nothing(tiny_gguf, caplog):
    bench = Bench(tiny_gguf)
    bench.held = [HeldFile("m" * 10_000, "Q8_0", Bytes(1))]
    bench.tell()
    assert bench.told is None
    assert "cannot be told" in caplog.text


def test_an_older_word_that_comes_back_with_a_later_stamp_is_corrected(tiny_gguf):
    bench = Bench(tiny_gguf)
    bench.tell()
    # Of before a restart, when this PC's clock was an hour ahead.
    stamp = bench.store.map.record("node/a").stamp
    older = Record("node/a", replace(stamp, wall_ms=stamp.wall_ms + 3_600_000), NodeAdvert(replace(PC, draining=True)))
    assert bench.store.map.merge([older], stamp.wall_ms)
    bench.now += PACE_SECONDS
    bench.tell()
    assert bench.told.node == PC
