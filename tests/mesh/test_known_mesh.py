"""What a node plans from: its own word before the map's, live peers only, entries from wherever they are known."""

from dataclasses import replace

import pytest

from tars.catalogue import Catalogue
from tars.core.mesh_events import MemberView, MeshView
from tars.core.mesh_messages import MemberState
from tars.core.records import HeldFile, NodeAdvert, Orders, Wish
from tars.core.replicated_map import DEPLOYMENT, NODE, ORDERS
from tars.core.types import Bytes, Deployment, NodeId, NodeSnapshot
from tars.errors import ModelFileMissing, UnknownModel
from tars.mesh.known_mesh import KnownMesh
from tars.mesh.measured_memory import MeasuredMemory
from tars.mesh.replicated_store import MemoryStore, wall_ms

OWN, PEER, DEAD = (NodeId(f"00000000-0000-4000-8000-00000000000{number}") for number in (1, 2, 3))


class Known(KnownMesh):
    """`tiny` has a file here, and two peers told of themselves, one of which is dead."""

    def __init__(self, file):
        store = MemoryStore(OWN)
        catalogue = Catalogue.load(builtin=False)
        self.entry = catalogue.add_file(file, name="tiny")
        self.view_of_peers = MeshView(
            {
                PEER: MemberView(PEER, MemberState.ALIVE, 0, (), 0.0),
                DEAD: MemberView(DEAD, MemberState.DEAD, 0, (), 0.0),
            },
            OWN,
        )
        self.exactly = False
        super().__init__(
            OWN,
            catalogue,
            store,
            MeasuredMemory(store),
            mesh=lambda: self.view_of_peers,
            exact=lambda: self.exactly,
            hub=False,
            now=lambda: 7.0,
        )
        self.store = store
        self.stores = {OWN: store, PEER: MemoryStore(PEER), DEAD: MemoryStore(DEAD)}
        for node in self.stores:
            self.tells(node, name="as it was")

    def tells(self, node, *, name="pc", **more):
        """What a node says of itself arrives here."""
        record = self.stores[node].put(f"{NODE}{node}", NodeAdvert(NodeSnapshot(node, name), **more))
        self.store.map.merge([record], wall_ms())

    def wish(self, model, **more):
        self.store.put(DEPLOYMENT + model, Wish(Deployment(model, **more)))


@pytest.fixture
def known(tiny_gguf):
    return Known(tiny_gguf)


def theirs(known, name):
    """A model that only a peer knows."""
    return replace(known.entry, name=name, aliases=())


def test_the_dead_are_left_out_and_its_own_word_is_the_latest_and_first(known):
    assert [advert.node.id for advert in known.adverts()] == [PEER]
    known.own = NodeAdvert(NodeSnapshot(OWN, "as it is"))
    assert [(advert.node.id, advert.node.name) for advert in known.adverts()] == [
        (OWN, "as it is"),
        (PEER, "as it was"),
    ]
    known.view_of_peers = None
    assert known.adverts() == [known.own]


def test_a_model_that_only_a_live_peer_knows_is_found_and_one_of_the_dead_is_not(known):
    for node, name in ((PEER, "theirs"), (DEAD, "gone")):
        known.tells(node, models=(theirs(known, name),))
    assert set(known.entries()) == {"tiny", "theirs"}
    assert known.resolve("theirs").name == "theirs"
    assert known.find("gone") is None
    with pytest.raises(UnknownModel):
        known.resolve("gone")


def test_on_disk_is_what_has_a_file_somewhere_and_nobody_wants(known):
    held = tuple(HeldFile(name, known.entry.variants[0].name, Bytes(1), None) for name in ("tiny", "theirs"))
    known.tells(PEER, files=held, models=(theirs(known, "theirs"), theirs(known, "bare")))
    assert set(known.on_disk()) == {"tiny", "theirs"}
    known.wish("tiny")
    assert set(known.on_disk()) == {"theirs"}


def test_a_view_has_orders_and_versions_of_what_is_wanted_and_one_more_wish_where_it_is_asked_for(known):
    known.own = NodeAdvert(
        NodeSnapshot(OWN, "pc"), files=(HeldFile("tiny", known.entry.variants[0].name, Bytes(1), None),)
    )
    known.wish("other")
    known.store.put(f"{ORDERS}{PEER}", Orders(PEER, OWN, ()))
    known.store.put(f"{ORDERS}{DEAD}", Orders(DEAD, OWN, ()))
    view = known.view()
    assert view.now == 7.0
    assert set(view.orders) == {PEER}
    assert view.versions == {"other": known.store.map.record(DEPLOYMENT + "other").stamp}
    more = known.view_with(Deployment("tiny", replicas=2))
    assert [(wish.deployment.model, wish.deployment.replicas) for wish in more.wishes] == [("other", 1), ("tiny", 2)]
    assert known.view() == view


def test_what_has_a_file_nowhere_cannot_be_wanted(known):
    with pytest.raises(ModelFileMissing):
        known.view_with(Deployment("tiny"))


def test_in_exact_mode_slots_do_not_share_unless_somebody_says_so(known):
    known.wish("tiny")
    known.wish("other", slots=3)
    known.exactly = True
    assert {wish.deployment.model: wish.deployment.slots for wish in known.wishes()} == {"tiny": 1, "other": 3}
