"""One probe's life: the peer itself, then others, then the verdict; and what this node thinks of its own health."""

import random

import pytest

from tars.core.mesh_messages import Ack, Nack, Ping, PingRequest
from tars.core.probe_order import ProbeOrder
from tars.core.probing import Prober, ProbeSettings
from tars.core.timers import Timers


class Host:
    def __init__(self):
        self.told, self.verdicts, self.heards = [], [], {}

    def tell(self, to, body, about=None):
        self.told.append((to, body, about))

    def is_suspect(self, node):
        return False

    def heard(self, node):
        return self.heards.get(node, float("-inf"))

    def answered(self, node, now):
        self.verdicts.append((node, "answered", now))

    def failed(self, node, started, now):
        self.verdicts.append((node, "failed", now))

    def take(self):
        told, self.told = self.told, []
        return told


class Bench:
    """A prober of node m; times are quarters so that sums are exact."""

    def __init__(self, *peers, **settings):
        self.host, self.timers = Host(), Timers()
        order = ProbeOrder("m", random.Random(1))
        for peer in peers:
            order.add(peer)
        defaults = {"interval": 100.0, "direct": 0.25, "whole": 1.0, "first_burst": 0}
        self.prober = Prober(ProbeSettings(**defaults | settings), order, self.timers, self.host)

    def probe(self, target, now=0.0):
        self.prober.probe(target, now)
        ((to, body, _),) = self.host.take()
        assert to == target
        assert isinstance(body, Ping)
        return body.number


def test_an_answer_in_time_is_the_end_of_it():
    bench = Bench("n")
    number = bench.probe("n")
    bench.prober.got_ack(number, "n", 0.1)
    bench.timers.run(50)
    assert bench.host.verdicts == [("n", "answered", 0.1)]


def test_others_are_asked_when_it_does_not_answer_and_their_answer_counts():
    bench = Bench("n", "a", "b", "c", "d")
    number = bench.probe("n")
    bench.timers.run(0.25)
    asked = bench.host.take()
    assert len(asked) == 3
    assert {body for _, body, _ in asked} == {PingRequest(number, "n")}
    assert "n" not in {to for to, _, _ in asked}
    bench.prober.got_ack(number, asked[0][0], 0.5)
    bench.timers.run(50)
    assert bench.host.verdicts == [("n", "answered", 0.5)]


def test_a_late_answer_of_its_own_counts_until_the_end():
    bench = Bench("n", "a")
    number = bench.probe("n")
    bench.timers.run(0.25)
    bench.prober.got_ack(number, "n", 0.75)
    assert bench.host.verdicts == [("n", "answered", 0.75)]


def test_it_fails_when_its_time_is_over():
    bench = Bench("n", "a")
    bench.probe("n")
    bench.timers.run(0.25)
    bench.timers.run(0.9)
    assert bench.host.verdicts == []
    bench.timers.run(1.0)
    assert bench.host.verdicts == [("n", "failed", 1.0)]


def test_it_fails_as_soon_as_all_helpers_say_no():
    bench = Bench("n", "a", "b")
    number = bench.probe("n")
    bench.timers.run(0.25)
    for sender in ("a", "a", "stranger"):
        bench.prober.got_nack(number, sender, 0.5)
    assert bench.host.verdicts == []
    bench.prober.got_nack(number, "b", 0.5)
    assert bench.host.verdicts == [("n", "failed", 0.5)]
    assert bench.prober.health == 0, "its own network is well: all helpers spoke"


def test_others_are_asked_at_once_when_it_refuses():
    bench = Bench("n", "a")
    number = bench.probe("n")
    bench.prober.not_sent("n", number, 0.1)
    assert bench.host.take() == [("a", PingRequest(number, "n"), None)]
    bench.prober.not_sent("n", number, 0.1)
    assert bench.host.take() == []


def test_whoever_spoke_meanwhile_does_not_fail():
    bench = Bench("n")
    bench.probe("n")
    bench.host.heards["n"] = 0.5
    bench.timers.run(0.25)
    bench.timers.run(50)
    assert bench.host.verdicts == []


@pytest.mark.parametrize("sender", ["a", "stranger"])
def test_an_answer_from_whoever_was_not_asked_is_none(sender):
    bench = Bench("n", "a")
    number = bench.probe("n")
    bench.prober.got_ack(number, sender, 0.1)
    bench.prober.got_ack(number + 7, "n", 0.1)
    assert bench.host.verdicts == []


def test_nobody_is_probed_twice_at_a_time():
    bench = Bench("n")
    bench.probe("n")
    bench.prober.probe("n", 0.1)
    assert bench.host.take() == []


# --- helping others -----------------------------------------------------------------------------------------------------


def test_a_helper_asks_and_passes_the_answer_on_with_what_it_knows_of_the_target():
    bench = Bench("n", "a")
    bench.prober.load = (("r", 1, 2),)
    bench.prober.asked("a", PingRequest(77, "n"), 0.0, True)
    ((to, ping, _),) = bench.host.take()
    assert to == "n"
    bench.prober.got_ack(ping.number, "a", 0.1)
    assert bench.host.take() == [], "only the target can answer for itself"
    bench.prober.got_ack(ping.number, "n", 0.1)
    assert bench.host.take() == [("a", Ack(77, (("r", 1, 2),)), "n")]
    bench.timers.run(50)
    assert bench.host.take() == []


@pytest.mark.parametrize("how", ["silence", "refusal"])
def test_a_helper_says_when_it_gets_no_answer_either(how):
    bench = Bench("n", "a")
    bench.prober.asked("a", PingRequest(77, "n"), 0.0, True)
    ((_, ping, _),) = bench.host.take()
    if how == "refusal":
        bench.prober.not_sent("n", ping.number, 0.1)
    else:
        bench.timers.run(0.25)
    assert bench.host.take() == [("a", Nack(77), None)]
    bench.timers.run(50)
    assert bench.host.take() == []


def test_a_helper_that_does_not_know_the_target_says_so_at_once():
    bench = Bench("a")
    bench.prober.asked("a", PingRequest(77, "n"), 0.0, False)
    assert bench.host.take() == [("a", Nack(77), None)]


# --- its own health -----------------------------------------------------------------------------------------------------


def test_missed_nacks_make_it_doubt_itself_and_answers_take_that_back():
    bench = Bench("n", "a", "b", "c")
    bench.probe("n")
    bench.timers.run(0.25)
    bench.timers.run(1.0)
    assert bench.prober.health == 3
    bench.host.take()
    for health in (2, 1, 0, 0):
        bench.prober.got_ack(bench.probe("a", 2.0), "a", 2.0)
        assert bench.prober.health == health


def test_who_doubts_itself_gives_others_more_time_and_probes_less():
    bench = Bench("n", "a", interval=1.0)
    bench.prober.doubt(9)
    assert bench.prober.health == 3
    bench.prober.start(0.0, 0.5)
    bench.timers.run(0.5)
    assert len(bench.host.take()) == 1
    bench.timers.run(1.0)
    assert bench.host.take() == [], "not asked others yet: four times 0.25"
    bench.timers.run(1.5)
    assert len(bench.host.take()) == 1
    bench.timers.run(4.4)
    assert bench.host.verdicts == []
    assert bench.host.take() == []
    bench.timers.run(4.5)
    assert [verdict[1] for verdict in bench.host.verdicts] == ["failed"]


def test_time_in_which_it_could_not_listen_counts_against_nobody():
    bench = Bench("n")
    number = bench.probe("n")
    bench.prober.excuse(10.0)
    bench.timers.run(10.0)
    assert bench.host.take() == []
    bench.prober.got_ack(number, "n", 10.0)
    assert bench.host.verdicts == [("n", "answered", 10.0)]


def test_at_the_start_a_few_are_asked_at_once_and_after_the_end_nobody():
    bench = Bench("a", "b", "c", "d", "e", first_burst=3, interval=1.0)
    bench.prober.start(0.0, 0.25)
    assert len({to for to, _, _ in bench.host.take()}) == 3
    bench.prober.stop()
    bench.timers.run(50)
    assert bench.host.take() == []
    assert bench.host.verdicts == []
