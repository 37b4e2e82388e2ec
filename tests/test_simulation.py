"""The simulated mesh: many seeds, the same history every time, and the proof that its invariants can fail."""

import hashlib
import os
import random
import subprocess
import sys
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import simulate as command
from breach import Breach
from invariants import OperatorsWrites, why_not_settled
from scenario import OVERLOAD_EVERY, simulate
from virtual_executor import Conditions, VirtualExecutor
from virtual_fleet import CARDS, MOST_ERROR, models, pc, really_taken
from virtual_network import VirtualNetwork, Weather
from virtual_time import VirtualTime
from virtual_wire import Wire
from world import World

from tars.core.call_effects import Failure
from tars.core.call_machine import CallMachine
from tars.core.mesh_messages import Envelope, News, Ping, Record, Stamp
from tars.core.placement import plan
from tars.core.records import Wish
from tars.core.replicated_map import DEPLOYMENT
from tars.core.retry_budget import RetryBudget
from tars.core.types import Bytes, Deployment, ModelKind, NodeId, NodeSnapshot, ReplicaState

ROOT = Path(__file__).parents[1]
FAST_SEEDS, FAST_BLOCK, SEEDS, BLOCK = 16, 8, 2000, 50


def run_block(first: int, count: int) -> None:
    total = command.run_block(first, count)
    lines = [f"{why}\n{command.replay_line(seed)}" for seed, why in total.failures]
    assert not lines, "\n".join(lines)
    assert total.seeds == count
    assert total.packets > 100 * count


@pytest.mark.parametrize("first", range(0, FAST_SEEDS, FAST_BLOCK))
def test_some_seeds_hold_every_invariant(first):
    run_block(first, FAST_BLOCK)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(FAST_SEEDS, SEEDS, BLOCK))
def test_many_seeds_hold_every_invariant(first):
    run_block(first, min(BLOCK, SEEDS - first))


# --- the same history every time ---------------------------------------------------------------------------------------


def digest(seed: int) -> str:
    return hashlib.sha256("\n".join(simulate(seed, packets=True).history).encode()).hexdigest()


@pytest.mark.slow
def test_a_seed_has_one_history_in_every_process():
    here = digest(3)
    assert here == digest(3)
    assert here != digest(4)
    elsewhere = subprocess.run(
        [sys.executable, "-c", "import test_simulation as t; print(t.digest(3))"],
        env={
            **os.environ,
            "PYTHONHASHSEED": "4242",
            "PYTHONPATH": os.pathsep.join((str(ROOT / "tests"), str(ROOT / "scripts/simulation"), str(ROOT))),
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert elsewhere.stdout.split() == [here]


# --- what seeds are too rare for ---------------------------------------------------------------------------------------


def test_a_node_whose_clock_was_set_back_over_a_crash_is_believed_again():
    world = World(1)
    first, second = world.new_node(), world.new_node()
    second.skew = 7200.0
    first.found()
    world.time.run_until(1.0)
    second.join(first)
    world.time.run_until(16.0)
    second.set_draining(True)
    world.time.run_until(18.0)
    second.crash()  # before the advert that says so is on its disk
    second.skew, second.disk.draining = 0.0, False
    world.time.run_until(19.0)
    second.start()
    world.time.run_until(40.0)
    assert why_not_settled(world.nodes) is None


# --- the command -------------------------------------------------------------------------------------------------------


def test_the_command_names_a_failing_seed_with_the_line_that_shows_it(monkeypatch, capsys):
    monkeypatch.setattr(command, "ProcessPoolExecutor", lambda jobs: InThisProcess())
    monkeypatch.setattr(command, "simulate", failing_simulation)
    monkeypatch.setattr(sys, "argv", ["simulate", "--seeds", "3", "--first", "7", "--jobs", "1"])
    assert command.main() == 1
    said = capsys.readouterr().out
    assert "scripts/simulate --seed 8 --trace" in said
    assert "two loads at once" in said
    assert "1 seeds FAILED" in said
    assert "3 seeds" in said


def test_the_command_shows_the_history_of_one_seed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["simulate", "--seed", "3", "--trace"])
    assert command.main() == 0
    said = capsys.readouterr().out
    assert "starts as" in said
    assert "seed 3: every invariant held" in said


@pytest.mark.parametrize("arguments", [["--trace"], ["--seeds", "0"], ["--jobs", "0"], ["--seeds", "many"]])
def test_the_command_refuses_what_it_cannot_do(monkeypatch, capsys, arguments):
    monkeypatch.setattr(sys, "argv", ["simulate", *arguments])
    with pytest.raises(SystemExit) as refused:
        command.main()
    assert refused.value.code == 2
    assert "error" in capsys.readouterr().err


class InThisProcess:
    """As much of an executor as the command uses."""

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None

    def submit(self, work, *args):
        done = Future()
        done.set_result(work(*args))
        return done


def failing_simulation(seed):
    outcome = simulate(3)
    return replace(outcome, seed=seed, failure="pc0/gpu-0 has two loads at once") if seed == 8 else outcome


# --- time and network --------------------------------------------------------------------------------------------------


def test_things_happen_in_the_order_of_their_time_and_then_of_their_asking():
    time, happened = VirtualTime(), []
    time.at(2.0, lambda: happened.append("late"))
    time.at(1.0, lambda: (happened.append("first"), time.after(0.0, lambda: happened.append("then"))))
    time.at(1.0, lambda: happened.append("second"))
    time.run_until(1.5)
    assert happened == ["first", "second", "then"]
    assert time.now == 1.5
    time.run_until(2.0)
    assert happened[-1] == "late"


class Talk:
    """Two listeners, a and b, and what came of what they said."""

    def __init__(self, **weather):
        self.time = VirtualTime()
        self.network = VirtualNetwork(self.time, random.Random(1), patience=1.0)
        self.network.weather = Weather(**weather)
        self.heard = []
        for name in "ab":
            self.network.listen(name, lambda envelope, answer, name=name: self.serve(name, envelope, answer))

    def serve(self, name, envelope, answer):
        self.heard.append((name, envelope.body.number, self.time.now))
        answer([Envelope(NodeId(name), 0, News())])

    def ask(self, sender, receiver, number=1):
        answers = []
        self.network.exchange(sender, receiver, Envelope(NodeId(sender), 0, Ping(number)), answers.append)
        return answers


def test_an_exchange_brings_the_answers_back():
    talk = Talk()
    answers = talk.ask("a", "b")
    talk.time.run_until(0.5)
    assert answers == [[Envelope(NodeId("b"), 0, News())]]


def test_where_nobody_listens_the_asker_hears_so_at_once():
    talk = Talk()
    talk.network.listen("b", None)
    answers = talk.ask("a", "b")
    talk.time.run_until(0.1)
    assert answers == [None]


def test_a_cut_in_one_direction_loses_requests_that_way_and_answers_the_other():
    talk = Talk()
    talk.network.cut(["a"], ["b"])
    forth, back = talk.ask("a", "b"), talk.ask("b", "a")
    talk.time.run_until(0.9)
    assert [name for name, *_ in talk.heard] == ["a"]
    assert forth == back == []
    talk.time.run_until(1.1)
    assert forth == back == [None]
    talk.network.heal()
    again = talk.ask("a", "b")
    talk.time.run_until(2.0)
    assert again[0] is not None


def test_who_cannot_dial_still_gets_answers_through():
    talk = Talk()
    talk.network.cut(["a"], ["b"], dial_only=True)
    forth, back = talk.ask("a", "b"), talk.ask("b", "a")
    talk.time.run_until(1.5)
    assert forth == [None]
    assert back[0] is not None


def test_packets_are_lost_doubled_and_overtaken():
    assert not Talk(loss=1.0).ask("a", "b")
    talk = Talk(jitter=0.5, duplication=0.5)
    for number in range(40):
        talk.ask("a", "b", number)
    talk.time.run_until(3.0)
    numbers = [number for _, number, _ in talk.heard]
    assert set(numbers) == set(range(40))
    assert len(numbers) > 40
    assert numbers != sorted(numbers)


# --- the executor's accounts -------------------------------------------------------------------------------------------


def executor(time, **conditions):
    device = pc(random.Random(4), 0).devices[0]
    told = []
    ran = VirtualExecutor(
        [device],
        time,
        Conditions(
            load_seconds=lambda assignment: 1.0,
            stop_seconds=lambda: 0.5,
            fails=conditions.get("fails", lambda assignment: None),
            takes=conditions.get("takes", lambda assignment, device: assignment.memory.total),
            kind=lambda model: ModelKind.CHAT,
        ),
        changed=told.append,
        loaded=lambda running, device: None,
    )
    return ran, device, told


def assignments(device, *names, replicas=1):
    node = NodeSnapshot(device.node, "pc0", (device,))
    wanted = [Deployment(name, replicas=replicas) for name in names]
    return list(plan([node], models(), wanted, orders=8).assignments)


def test_a_load_for_which_other_programs_leave_too_little_is_at_rest_until_they_leave_more():
    time = VirtualTime()
    device = executor(time)[1]
    (wanted,) = assignments(device, "minilm")
    ran, device, told = executor(time, takes=lambda assignment, device: Bytes(assignment.memory.total + 10 * 2**20))
    ran.foreign(device.id, device.memory_total - wanted.memory.total)
    ran.obey([wanted])
    time.run_until(2.0)
    (running,) = ran.all()
    assert told[-1].endswith("out of memory: 10 MiB are missing")
    assert ran.short_of_memory(running)
    began = ran.activity
    time.run_until(7.0)
    ran.obey([wanted])
    assert (running.state, ran.activity) == (ReplicaState.LOADING, began), "it is tried again, which is no unrest"
    time.run_until(9.0)
    ran.foreign(device.id, 0)
    assert running.state is ReplicaState.FAILED
    assert not ran.short_of_memory(running), "nothing is in its way any more"
    time.run_until(14.0)
    ran.obey([wanted])
    time.run_until(16.0)
    assert running.state is ReplicaState.READY


def test_a_load_that_failed_for_another_reason_is_not_at_rest():
    time = VirtualTime()
    ran, device, _ = executor(time, fails=lambda assignment: "the file is damaged")
    ran.obey(assignments(device, "minilm"))
    time.run_until(2.0)
    (running,) = ran.all()
    assert running.state is ReplicaState.FAILED
    assert not ran.short_of_memory(running)


def test_a_load_takes_time_and_memory_and_ends_ready():
    time = VirtualTime()
    ran, device, _ = executor(time)
    (wanted,) = assignments(device, "minilm")
    ran.obey([wanted])
    assert [each.state for each in ran.all()] == [ReplicaState.LOADING]
    assert ran.devices()[0].memory_free == device.memory_free  # as it was before
    time.run_until(1.5)
    assert [each.state for each in ran.all()] == [ReplicaState.READY]
    assert ran.devices()[0].memory_held == wanted.memory.total
    assert ran.devices()[0].memory_free == device.memory_free - wanted.memory.total
    ran.obey([])
    time.run_until(2.5)
    assert ran.all() == []
    assert ran.devices()[0].memory_free == device.memory_free


def test_one_load_at_a_time():
    time = VirtualTime()
    ran, device, _ = executor(time)
    wanted = assignments(device, "minilm", "nomic")
    assert len(wanted) == 2
    ran.obey(wanted)
    assert len(ran.all()) == 1
    time.run_until(1.5)
    ran.obey(wanted)
    assert sorted(each.state for each in ran.all()) == [ReplicaState.LOADING, ReplicaState.READY]


def test_two_loads_at_once_are_a_breach():
    time = VirtualTime()
    ran, device, _ = executor(time)
    first, second = assignments(device, "minilm", "nomic")
    card = ran.cards[device.id]
    ran._load(card, first)
    with pytest.raises(Breach, match="another one loads"):
        ran._load(card, second)


def test_orders_beyond_a_device_are_a_breach():
    ran, device, _ = executor(VirtualTime())
    (wanted,) = assignments(device, "minilm")
    huge = replace(wanted, memory=replace(wanted.memory, weights=Bytes(device.memory_total)))
    with pytest.raises(Breach, match="more than"):
        ran.obey([huge])


def test_a_load_that_does_not_fit_beside_a_foreign_program_fails_and_frees_its_memory():
    time = VirtualTime()
    ran, device, told = executor(time)
    (wanted,) = assignments(device, "minilm")
    ran.foreign(device.id, device.memory_total)
    ran.obey([wanted])
    time.run_until(1.5)
    assert [each.state for each in ran.all()] == [ReplicaState.FAILED]
    assert "out of memory" in told[-1]
    assert ran.cards[device.id].held == 0


def test_what_a_load_really_takes_is_near_its_estimate_and_the_same_for_its_kind():
    taken = {really_taken(7, card, "phi-3-mini", "Q8_0", 10**10) for card in CARDS}
    assert len(taken) == len(CARDS)
    assert all(abs(each - 10**10) <= MOST_ERROR * 10**10 for each in taken)
    assert really_taken(7, "RTX 3060", "phi-3-mini", "Q8_0", 10**10) in taken


# --- what operators did ------------------------------------------------------------------------------------------------


class Believer:
    """As much of a node as the check looks at."""

    def __init__(self, *records):
        self.name, self.runs = "pc0", True
        self.map = self
        self.disk = self
        self.records = {record.key: record for record in records}

    def record(self, key):
        return self.records.get(key)

    def items(self, prefix):
        return [(key, record.value) for key, record in self.records.items() if record.value is not None]


def write(wall_ms, value="deployed"):
    key = DEPLOYMENT + "minilm"
    return Record(key, Stamp(wall_ms, 0, NodeId("a")), Wish(Deployment("minilm")) if value else None)


def test_a_lost_and_a_resurrected_deployment_are_breaches():
    writes = OperatorsWrites()
    first, removed = write(1), write(2, value=None)
    writes.note(first)
    writes.check(Believer(first))
    with pytest.raises(Breach, match="lost"):
        writes.check(Believer())
    writes.note(removed)
    writes.check(Believer(removed))
    with pytest.raises(Breach, match="overwritten"):
        writes.check(Believer(first))
    with pytest.raises(Breach, match="nobody wrote"):
        writes.check(Believer(write(3)))


def test_what_was_only_on_a_lost_disk_may_be_gone():
    writes = OperatorsWrites()
    first, second = write(1), write(2)
    writes.note(first)
    writes.note(second)
    writes.disk_lost(Believer(second), [Believer(first)])
    writes.check(Believer(first))
    writes.check(Believer(second))  # a packet with it was still under way
    with pytest.raises(Breach, match="lost"):
        writes.check(Believer())


# --- calls -------------------------------------------------------------------------------------------------------------


def mesh(seed=1, nodes=2, model="qwen-0.5b"):
    """A mesh of `nodes` PCs with cards, each with a replica of `model`, at rest."""
    world = World(seed)
    chosen = [world.new_node_with_card() for _ in range(nodes)]
    chosen[0].found()
    world.time.run_until(1.0)
    for node in chosen[1:]:
        node.join(chosen[0])
    world.time.run_until(3.0)
    chosen[0].write(DEPLOYMENT + model, Wish(Deployment(model, replicas=nodes)))
    world.time.run_until(20.0)
    assert [len(node.executor.all()) for node in chosen] == [1] * nodes
    return world, chosen


def ask(world, gateway, length=20, model="qwen-0.5b", **more):
    """A chat call at one gateway, whose tokens its caller sees."""
    world.callers.dice = SimpleNamespace(choice=lambda nodes: gateway, random=lambda: 0.5, uniform=min, randint=max)
    return world.callers.call(model, world.models[model].kind, length=length, **more)


def serving(world, caller):
    """The node whose engine works on the call."""
    return next(node for node in world.running() if node.engine.busy())


@pytest.mark.parametrize("how", ["crash", "pause", "worker dies", "worker freezes", "drained", "cut off"])
def test_a_stream_goes_on_elsewhere_whatever_happens_to_who_served_it(how):
    world, nodes = mesh(nodes=3)
    gateway = nodes[0]
    for _ in range(6):  # so that it is known how fast they are
        ask(world, gateway, length=12)
        world.time.run_until(world.time.now + 2.0)
    gateway.set_draining(True)  # its own replica is asked last
    world.time.run_until(world.time.now + 0.2)
    gateway.executor.obey([])
    world.time.run_until(world.time.now + 1.0)
    caller = ask(world, gateway, length=40)
    world.time.run_until(world.time.now + 0.7)
    there = serving(world, caller)
    assert there is not gateway
    assert 0 < len(caller.got[0]) < 30
    running = next(each for each in there.executor.all() if there.engine.load(each.assignment.replica)[0])
    match how:
        case "crash":
            there.crash()
        case "pause":
            there.pause()
        case "worker dies":
            there.executor.worker_dies(running)
        case "worker freezes":
            there.engine.freeze(running.assignment.replica, 60.0)
        case "drained":
            there.executor.obey([])
        case _:
            world.network.cut([there.pc.address], [node.pc.address for node in nodes])
    broke = world.time.now
    while caller.outcome is None:
        world.time.run_until(world.time.now + 0.05)
    assert caller.outcome == "answered"
    assert world.time.now - broke < 2.5 + 2.0  # the longest silence, the rest of the answer
    assert world.callers.tally.continuations == 1


def test_a_gateway_that_dies_leaves_nothing_computing_and_its_caller_asks_another_one():
    world, nodes = mesh()
    caller = ask(world, nodes[1], key="a key")
    world.time.run_until(world.time.now + 0.3)
    nodes[1].crash()
    world.callers.dice.choice = lambda running: nodes[0]
    world.time.run_until(world.time.now + 12.0)
    assert caller.outcome == "answered"
    assert not nodes[0].engine.busy()


@pytest.mark.parametrize("change", [lambda ids: ids[1:], lambda ids: [*ids, ids[-1]]], ids=["loses", "doubles"])
def test_an_answer_that_loses_or_doubles_a_token_is_a_breach(change):
    world, nodes = mesh()
    caller = ask(world, nodes[0])
    gave = caller.gave
    caller.gave = lambda index, ids, file: gave(index, change(ids), file)
    with pytest.raises(Breach, match="token"):
        world.time.run_until(world.time.now + 5.0)


def test_a_second_answer_is_a_breach():
    world, nodes = mesh()
    caller = ask(world, nodes[0], length=1)
    world.time.run_until(world.time.now + 2.0)
    assert caller.outcome == "answered"
    with pytest.raises(Breach, match="was answered"):
        caller.answered()


def test_a_call_that_nobody_takes_up_is_a_breach(monkeypatch):
    monkeypatch.setattr(CallMachine, "fleet_changed", lambda self, now: ())
    monkeypatch.setattr(CallMachine, "_next", lambda self, because, now: ())
    world, nodes = mesh()
    ask(world, nodes[0])
    with pytest.raises(Breach, match="was not answered for"):
        world.time.run_until(world.time.now + 20.0)


def test_a_call_that_fails_though_somebody_could_answer_is_a_breach(monkeypatch):
    world, nodes = mesh()
    world.time.run_until(world.time.now + 5.0)
    caller = ask(world, nodes[0])
    caller.began = caller.live_since = world.callers.amiss_until = 1.0
    with pytest.raises(Breach, match="failed"):
        caller.failed(Failure("internal", retryable=False))


def test_two_answers_under_one_key_are_a_breach():
    world, nodes = mesh()
    caller = ask(world, nodes[0], length=2, key="a key")
    world.time.run_until(world.time.now + 3.0)
    again = ask(world, nodes[1], key="a key", work=caller.work)
    world.time.run_until(world.time.now + 3.0)
    assert (caller.outcome, again.outcome, world.callers.tally.joined) == ("answered", "answered", 1)
    with pytest.raises(Breach, match="another answer"):
        again.same_answer(b"another one")


def test_more_retries_than_the_budget_gives_are_a_storm(monkeypatch):
    def call(self):
        self._saved = min(100.0, self._saved + 0.5)

    monkeypatch.setattr(RetryBudget, "call", call)
    assert "retry storm" in simulate(OVERLOAD_EVERY - 1).failure


def test_a_slow_embedding_is_hedged_and_the_loser_frees_its_slot():
    world, nodes = mesh(model="minilm")
    for node in nodes:
        node.engine_dice = SimpleNamespace(random=lambda: 1.0)
    nodes[0].engine_dice = SimpleNamespace(random=lambda: 0.0)  # every answer of the first one is slow
    for _ in range(8):
        ask(world, nodes[0], model="minilm", length=4)
        world.time.run_until(world.time.now + 2.0)
    assert world.callers.tally.hedges >= 1
    assert world.callers.tally.answered == 8
    assert not any(node.engine.busy() for node in nodes)


@pytest.mark.parametrize("power", [True, False])
def test_a_connection_keeps_its_order_and_hears_of_a_process_that_ended_but_not_of_a_dead_pc(power):
    time = VirtualTime()
    network = VirtualNetwork(time, random.Random(1))
    network.weather = Weather(jitter=0.5, loss=0.3)
    wire = Wire(time, network, random.Random(2))
    heard, lost, ends = [], [], []
    wire.serve("b", lambda end, request: ends.append(end), lambda question, reply: None)
    wire.connect("a", "b", "hello", heard.append, lost.append)
    time.run_until(20.0)
    for number in range(30):
        ends[0].say(number)
    time.run_until(40.0)
    assert heard == list(range(30))
    wire.ended("b", power=power)
    time.run_until(60.0)
    assert lost == ([True] if power else [])


def test_who_cannot_be_reached_is_said_to_be_so():
    time = VirtualTime()
    network = VirtualNetwork(time, random.Random(1))
    wire = Wire(time, network, random.Random(2))
    lost = []
    wire.connect("a", "b", "hello", lambda body: None, lost.append)  # nobody listens
    time.run_until(1.0)
    assert lost == [False]
    wire.serve("b", lambda end, request: None, lambda question, reply: None)
    network.cut(["b"], ["a"])
    wire.connect("a", "b", "hello", lambda body: None, lost.append)
    time.run_until(5.0)
    assert lost == [False]
    time.run_until(8.0)
    assert lost == [False, False]
