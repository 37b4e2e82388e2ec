"""Several nodes' coordinators over one map: who decides, who obeys, and what a drain, a death and a partition do. Workers are fake."""

import asyncio
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from coordinator_bench import Bench, card

from tars.core.mesh_events import MemberView, MeshView
from tars.core.mesh_messages import MemberState
from tars.core.records import Orders
from tars.core.replicated_map import ORDERS, orders_for
from tars.core.taking_over import ISOLATED_SECONDS, TAKE_OVER_SECONDS
from tars.core.types import Bytes, Deployment, NodeId, NodeSnapshot, ReplicaState
from tars.errors import BadModelFile, InvalidParams
from tars.mesh.draining import Draining
from tars.mesh.replicated_store import wall_ms
from tars.messages.node import DeployParams
from tars.serving.local_service import LocalNodeService
from tars.state_folder import StateFolder


class Mesh:
    """Nodes whose records reach each other at once, unless they are cut off. The first alive by id coordinates."""

    def __init__(self, folder, tiny_gguf, names):
        self.now = 1000.0
        self.cut = set()
        self.isolated = set()
        self.benches = {}
        for name in names:
            home = folder / name
            home.mkdir()
            files = [Path(shutil.copy(tiny_gguf, home / each)) for each in ("first.gguf", "second.gguf")]
            state = StateFolder(home)
            node = NodeSnapshot(NodeId(f"{name:0<36}"), name)
            bench = Bench(
                state,
                [card(node=node)],
                files,
                node=node,
                builtin=False,  # three catalogues a test would take longer than the rest of it
                mesh=lambda node=node: self.view(node.id),
                draining=Draining(state),
                now=lambda: self.now,
            )
            bench.store.subscribe(lambda records, sender=node.id: self.tell(sender, records))
            self.benches[node.id] = bench
        self.ids = dict(zip(names, self.benches, strict=True))

    def __getitem__(self, name):
        return self.benches[self.ids[name]]

    def sees(self, one, other):
        return one == other or not ({one, other} & self.cut)

    def view(self, node):
        others = [other for other in self.benches if other != node]
        members = {
            other: MemberView(other, MemberState.ALIVE if self.sees(node, other) else MemberState.DEAD, 0, (), 0.0)
            for other in others
        }
        alive = sorted([node, *(other for other in others if self.sees(node, other))])
        return MeshView(members, alive[0], isolated=node in self.isolated)

    def tell(self, sender, records):
        for node, bench in self.benches.items():
            if node != sender and self.sees(sender, node):
                bench.store.map.merge(records, wall_ms())

    def heal(self):
        self.cut.clear()
        self.isolated.clear()
        for sender, bench in self.benches.items():
            self.tell(sender, bench.store.map.records())

    async def rounds(self, count=6, *, load=True):
        """Everybody's rounds in turn, a second apart; loads end at once."""
        for _ in range(count):
            for bench in self.benches.values():
                await bench.coordinator.reconcile()
                await asyncio.sleep(0)
                await asyncio.sleep(0)
            for bench in self.benches.values():
                for worker in bench.workers if load else ():
                    if worker.state is ReplicaState.LOADING:
                        worker.loaded(100 * 2**20)
            self.now += 1.0

    def ready(self, model="tiny"):
        return [
            name
            for name, node in self.ids.items()
            for live in self.benches[node].coordinator.replicas.values()
            if live.assignment.model == model and live.worker.state is ReplicaState.READY
        ]

    def service(self, name):
        return LocalNodeService(
            self[name].coordinator,
            name=name,
            redacted_config={},
            wsl2=False,
            addresses=list,
            now=lambda: self.now,
        )


@pytest.fixture
def mesh(tmp_path, tiny_gguf):
    return Mesh(tmp_path, tiny_gguf, ["aa", "bb", "cc"])


async def test_the_first_node_decides_and_every_node_carries_its_own_orders_out(mesh):
    mesh["cc"].deployments.deploy(Deployment("tiny", replicas=3))
    await mesh.rounds()
    assert mesh.ready() == ["aa", "bb", "cc"]
    for node in mesh.benches:
        for bench in mesh.benches.values():
            assert orders_for(bench.store.map, node).coordinator == mesh.ids["aa"]
    assert all(len(bench.workers) == 1 for bench in mesh.benches.values())


async def test_every_node_answers_for_the_plan_and_why(mesh):
    mesh["bb"].deployments.deploy(Deployment("tiny", replicas=2))
    await mesh.rounds()
    plans = [[each.replica for each in bench.coordinator.plan.assignments] for bench in mesh.benches.values()]
    assert plans[0] == plans[1] == plans[2]
    explained = await mesh.service("cc").explain("tiny")
    assert {each.node_name for each in explained.verdicts} == {"aa", "bb", "cc"}
    assert all(f" of {each.node_name}" in explained.text for each in explained.assignments)
    plan = await mesh.service("cc").plan()
    assert {device.node_name for device in plan.devices} == {"aa", "bb", "cc"}


async def test_a_deploy_that_fits_only_elsewhere_is_accepted_by_any_node(mesh):
    for name in ("aa", "bb"):
        mesh[name].devices = [card(node=NodeSnapshot(mesh.ids[name], name), mib=50)]
    await mesh.rounds(3)
    accepted = await mesh.service("aa").deploy(DeployParams(model="tiny"))
    assert [each.node_name for each in accepted.assignments] == ["cc"]
    await mesh.rounds()
    assert mesh.ready() == ["cc"]
    assert mesh["aa"].coordinator.problems == {}


async def test_a_deploy_that_another_model_is_in_the_way_of_is_accepted_and_says_what_moves(mesh):
    mesh["bb"].devices = [card(node=NodeSnapshot(mesh.ids["bb"], "bb"), mib=700)]
    mesh["cc"].devices = [card(node=NodeSnapshot(mesh.ids["cc"], "cc"), mib=50)]
    mesh["aa"].devices = [card(node=NodeSnapshot(mesh.ids["aa"], "aa"), mib=1000)]
    await mesh.rounds(2)
    mesh["aa"].deployments.deploy(Deployment("second", device=f"{mesh.ids['aa']}/gpu-a"))
    await mesh.rounds(4)
    mesh["aa"].deployments.deploy(Deployment("second"))
    await mesh.rounds(2)
    assert mesh.ready("second") == ["aa"]
    service = mesh.service("aa")
    for tokens in range(20_000, 400_000, 20_000):
        plan = await mesh["aa"].coordinator.preview(Deployment("tiny", context=tokens, slots=1))
        if plan.refusals:
            break
    result = await service.deploy(DeployParams(model="tiny", context=tokens, slots=1))
    assert result.accepted
    assert result.message.startswith("No device has room for tiny now. If it is still so in a minute, room is made: ")
    assert "second moves to Card gpu-a of bb" in result.message
    await mesh.rounds(4)
    assert mesh.ready("second") == ["aa"], "not at once"
    mesh.now += 60
    await mesh.rounds(6)
    assert mesh.ready("second") == ["bb"]
    assert mesh.ready() == ["aa"]


async def test_the_next_node_takes_over_when_the_coordinator_dies_and_loads_what_it_had(mesh):
    mesh["aa"].deployments.deploy(Deployment("tiny", replicas=3))
    mesh["aa"].deployments.deploy(Deployment("second"))
    await mesh.rounds(8)
    (home,) = mesh.ready("second")
    before = {name: len(mesh[name].workers) for name in mesh.ids}
    mesh.cut.add(mesh.ids["aa"])
    await mesh.rounds(1)
    assert {name: len(mesh[name].workers) for name in ("bb", "cc")} == {name: before[name] for name in ("bb", "cc")}
    assert TAKE_OVER_SECONDS <= 1
    await mesh.rounds(5)
    assert orders_for(mesh["cc"].store.map, mesh.ids["cc"]).coordinator == mesh.ids["bb"]
    for name in ("bb", "cc"):
        assert mesh[name].workers[0].stopped_with is None, "no survivor moves"
    if home == "aa":
        assert {"bb", "cc"} & set(mesh.ready("second"))


async def test_without_a_coordinators_orders_what_runs_is_kept(mesh):
    mesh["cc"].deployments.deploy(Deployment("tiny", replicas=3))
    await mesh.rounds()
    mesh["cc"].coordinator.mesh = lambda: MeshView({}, None)
    mesh["cc"].deployments.remove("tiny")
    await mesh["cc"].coordinator.reconcile()
    assert "cc" in mesh.ready()


async def test_a_partition_gives_each_side_its_own_and_the_surplus_goes_when_it_heals(mesh):
    mesh["aa"].deployments.deploy(Deployment("tiny"))
    await mesh.rounds()
    (first,) = mesh.ready()
    mesh.cut.add(mesh.ids[first])
    await mesh.rounds(8)
    assert len(mesh.ready()) == 2
    mesh.heal()
    await mesh.rounds(6)
    assert mesh.ready() == [first], "the one that was held longest"


@pytest.mark.parametrize("cut", ["aa", "bb"])
async def test_a_node_that_lost_sight_of_everybody_waits_before_it_takes_their_work(mesh, cut):
    """Whether it coordinated before or not."""
    mesh["aa"].deployments.deploy(Deployment("tiny", device=f"{mesh.ids['cc']}/gpu-a"))
    await mesh.rounds()
    mesh["aa"].deployments.deploy(Deployment("tiny"))
    await mesh.rounds(2)
    assert mesh.ready() == ["cc"]
    mesh.cut.add(mesh.ids[cut])
    mesh.isolated.add(mesh.ids[cut])
    assert [name for name in ("aa", "bb", "cc") if mesh.service(name).peers().isolated] == [cut]
    workers = len(mesh[cut].workers)
    await mesh.rounds(int(ISOLATED_SECONDS))
    assert len(mesh[cut].workers) == workers
    await mesh.rounds(4)
    assert len(mesh[cut].workers) > workers


async def test_a_drain_moves_what_fits_elsewhere_unloads_the_rest_says_so_and_outlives_a_restart(mesh, tmp_path):
    await mesh.rounds(1)
    mesh["aa"].deployments.deploy(Deployment("tiny"))
    mesh["aa"].deployments.deploy(Deployment("second", device=f"{mesh.ids['bb']}/gpu-a"))
    await mesh.rounds()
    (home,) = mesh.ready()
    if home != "bb":
        mesh["aa"].deployments.deploy(Deployment("tiny", device=f"{mesh.ids['bb']}/gpu-a"))
        await mesh.rounds(8)
        mesh["aa"].deployments.deploy(Deployment("tiny"))
        await mesh.rounds(3)
    assert mesh.ready() == ["bb"]
    service = mesh.service("bb")
    result = await service.drain()
    assert result.state == "draining"
    assert [each.model for each in result.moved] == ["tiny"]
    assert result.unloaded == ["second"]
    assert result.freed_bytes > 0
    assert "second fits nowhere else and is unloaded" in result.message
    assert "tiny goes to" in result.message
    await mesh.rounds(1, load=False)
    assert mesh.ready() == ["bb"], "it answers until the other one does"
    await mesh.rounds(6)
    assert len(mesh.ready()) == 1
    assert mesh.ready() != ["bb"]
    assert mesh["bb"].coordinator.replicas == {}
    assert Draining(StateFolder(tmp_path / "bb")).on
    moved_to = mesh.ready()
    await service.resume()
    await mesh.rounds(6)
    assert mesh.ready("second") == ["bb"], "what fits nowhere else comes back"
    assert mesh.ready() == moved_to, "what moved stays"


async def test_a_lone_node_that_drains_frees_its_memory_and_says_what_answers_no_more(tmp_path, tiny_gguf):
    mesh = Mesh(tmp_path, tiny_gguf, ["aa"])
    mesh["aa"].deployments.deploy(Deployment("tiny"))
    await mesh.rounds(3)
    result = await mesh.service("aa").drain()
    assert (result.moved, result.unloaded) == ([], ["tiny"])
    assert result.freed_bytes == 100 * 2**20 + mesh["aa"].coordinator.replicas.popitem()[1].assignment.memory.overhead


async def test_a_failed_load_goes_to_another_node(mesh):
    await mesh.rounds(1)
    mesh["bb"].deployments.deploy(Deployment("tiny"))
    await mesh.rounds(3, load=False)
    (worker,) = [worker for bench in mesh.benches.values() for worker in bench.workers]
    failed = next(name for name in mesh.ids if mesh[name].workers)
    worker.failed(BadModelFile("broken"))
    await mesh.rounds(4)
    assert len(mesh.ready()) == 1
    assert mesh.ready() != [failed]
    verdicts = (await mesh.service("aa").explain("tiny")).verdicts
    assert ["broken" in each.reason for each in verdicts if each.node_name == failed] == [True]


async def test_a_model_of_one_nodes_configuration_is_planned_for_by_all(mesh, tmp_path, tiny_gguf):
    own = Path(shutil.copy(tiny_gguf, tmp_path / "own.gguf"))
    name = mesh["cc"].catalogue.add_file(own, name="house-model").name
    await mesh.rounds(2)
    service = mesh.service("aa")
    assert mesh["aa"].catalogue.find(name) is None
    explained = await service.explain(name)
    assert not explained.deployed
    (await service.deploy(DeployParams(model=name)))
    assert mesh["aa"].deployments.get(name) is not None
    await mesh.rounds(1)
    assert [each.model for each in mesh["aa"].coordinator.plan.assignments] == [name]


async def test_free_memory_of_a_peer_is_used_and_small_changes_are_not_told(mesh):
    node = NodeSnapshot(mesh.ids["cc"], "cc")
    for name in ("aa", "bb", "cc"):
        mesh[name].devices = [card(node=NodeSnapshot(mesh.ids[name], name), mib=50)]
    mesh["aa"].deployments.deploy(Deployment("tiny"))
    await mesh.rounds()
    assert mesh.ready() == []
    stamp = mesh["cc"].store.map.record(f"node/{node.id}").stamp
    mesh["cc"].devices = [replace(card(node=node, mib=50), memory_free=Bytes.mib(40))]
    await mesh.rounds(2)
    assert mesh["cc"].store.map.record(f"node/{node.id}").stamp == stamp
    mesh["cc"].devices = [card(node=node, mib=2000)]
    await mesh.rounds(4)
    assert mesh.ready() == ["cc"]


async def test_orders_that_the_map_refuses_are_said_once_and_stop_no_others(mesh, caplog, monkeypatch):
    mesh["aa"].deployments.deploy(Deployment("tiny", replicas=3))
    put = mesh["aa"].store.put

    def refusing(key, value, *, saved=True):
        if key == f"orders/{mesh.ids['bb']}":
            raise InvalidParams("it was removed")
        return put(key, value, saved=saved)

    monkeypatch.setattr(mesh["aa"].store, "put", refusing)
    await mesh.rounds(4)
    assert mesh.ready() == ["aa", "cc"]
    assert caplog.text.count("it was removed") == 1


@pytest.mark.slow
async def test_a_coordinator_that_hears_of_anothers_orders_puts_them_right_soon(mesh, monkeypatch):
    """One that stood still while another one decided; without that it would see it in its next round of every ten seconds."""
    monkeypatch.setattr("tars.mesh.coordinator.OVERRULED_SECONDS", 0.05)
    mesh["cc"].deployments.deploy(Deployment("tiny", replicas=2))
    await mesh.rounds(load=False)
    here, other = mesh["aa"], mesh.ids["bb"]
    given = orders_for(here.store.map, other)
    assert given is not None
    assert given.coordinator == mesh.ids["aa"]
    running = asyncio.create_task(here.coordinator.run())
    await here.coordinator.changed()
    mesh["cc"].store.put(f"{ORDERS}{other}", Orders(other, mesh.ids["cc"]), saved=False)
    rounds = here.coordinator.rounds
    for _ in range(5):  # packets: one round for all of them
        here.coordinator.heard([f"{ORDERS}{other}"])
    async with asyncio.timeout(5):
        while orders_for(here.store.map, other) != given:
            await here.coordinator.changed()
    await asyncio.sleep(0.2)
    assert here.coordinator.rounds == rounds + 1
    here.coordinator.heard([f"{ORDERS}{other}"])  # its own
    await asyncio.sleep(0.2)
    assert here.coordinator.rounds == rounds + 1
    running.cancel()
