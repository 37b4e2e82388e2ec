"""Every peer is probed in every round, the ring's neighbour every second time, and helpers are drawn from the others."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from tars.core.probe_order import ProbeOrder


def order(*nodes, me="m", seed=0):
    found = ProbeOrder(me, random.Random(seed))
    for node in nodes:
        found.add(node)
    return found


def nobody(node):
    return False


def test_nobody_to_probe():
    assert order().next(nobody) is None
    assert order().sample(3) == []


@settings(max_examples=30)
@given(st.sets(st.text("abcdefgh", min_size=1, max_size=3), min_size=1, max_size=40), st.integers(0, 100))
def test_every_second_probe_is_the_neighbours_and_the_others_go_round_everybody(nodes, seed):
    probes = order(*sorted(nodes), seed=seed)
    turns = [probes.next(nobody) for _ in range(4 * len(nodes))]
    after = [node for node in sorted(nodes) if node > "m"]
    assert set(turns[::2]) == {after[0] if after else min(nodes)}
    for round_ in (turns[1 : 2 * len(nodes) : 2], turns[2 * len(nodes) + 1 :: 2]):
        assert sorted(round_) == sorted(nodes)


def test_suspects_are_passed_over_in_the_ring_only():
    probes = order("n", "o", "p")
    turns = [probes.next(lambda node: node == "n") for _ in range(12)]
    assert set(turns[::2]) == {"o"}
    assert sorted(turns[1::2]) == sorted("nop" * 2)


def test_whoever_comes_is_in_the_round_and_whoever_goes_is_not():
    probes = order("a", "b", "c")
    probes.next(nobody)
    probes.add("d")
    probes.add("d")
    probes.remove("b")
    probes.remove("b")
    assert len(probes) == 3
    assert "d" in probes
    assert "b" not in probes
    assert "b" not in {probes.next(nobody) for _ in range(50)}


@settings(max_examples=30)
@given(st.integers(0, 12), st.integers(0, 5), st.integers(0, 100))
def test_helpers_are_different_and_never_the_target(count, most, seed):
    nodes = [f"n{number}" for number in range(count)]
    drawn = order(*nodes, seed=seed).sample(most, ("n0",))
    assert len(set(drawn)) == len(drawn) == min(most, max(0, count - 1))
    assert "n0" not in drawn
