"""When a peer is asked whether it lives, and when its silence counts."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tars.core.pulse import (
    BUSY_HALF_LIFE,
    BUSY_MOST,
    FIRST,
    INITIAL_TIMEOUT,
    INTERVAL,
    TIMEOUT_LEAST,
    TIMEOUT_MOST,
    Cut,
    Pulse,
    Restore,
    SendPing,
)


class Peer:
    """A peer in made-up time: answers each ping after `delay(now)` seconds (None: never), as long as it is not frozen.

    `watch` runs the clock as the driver does: it ticks when `wake` says so, or `late(now)` seconds later.
    """

    def __init__(self, delay=lambda now: 0.001, late=lambda now: 0.0):
        self.now = 0.0
        self.pulse = Pulse(0.0)
        self.delay, self.late = delay, late
        self.frozen = False
        self.waiting = []
        self.seen = []

    def take(self, effects):
        for effect in effects:
            match effect:
                case SendPing(number):
                    self.seen.append((self.now, "ping"))
                    if (delay := self.delay(self.now)) is not None:
                        self.waiting.append((self.now + delay, number))
                case Cut(seconds):
                    self.seen.append((self.now, "cut"))
                    assert seconds > 0
                case Restore():
                    self.seen.append((self.now, "restore"))

    def watch(self, until):
        while True:
            due = []
            if self.pulse.wake is not None:
                due.append((max(self.now, self.pulse.wake + self.late(self.pulse.wake)), "tick", 0))
            if not self.frozen:
                due += [(max(self.now, at), "answer", number) for at, number in self.waiting]
            if not due or (soonest := min(due))[0] > until:
                self.now = until
                return self
            self.now, what, number = soonest
            if what == "tick":
                self.take(self.pulse.tick(self.now))
            else:
                self.waiting = [each for each in self.waiting if each[1] != number]
                self.take(self.pulse.answered(number, self.now))

    def times(self, what):
        return [at for at, each in self.seen if each == what]


def test_nobody_is_asked_without_a_call_and_a_short_call_costs_nothing():
    peer = Peer().watch(10.0)
    assert peer.pulse.wake is None
    for _ in range(100):
        peer.take(peer.pulse.call_began(peer.now))
        peer.watch(peer.now + 0.02)
        peer.take(peer.pulse.call_ended(peer.now))
        peer.watch(peer.now + 0.5)
    assert peer.seen == []
    assert peer.pulse.wake is None


def test_a_peer_with_calls_is_asked_regularly_however_many_calls_there_are():
    peer = Peer()
    for _ in range(50):
        peer.take(peer.pulse.call_began(0.0))
    peer.watch(20.0)
    assert 40 <= len(peer.times("ping")) <= 41
    assert not peer.times("cut")
    assert (
        max(two - one for one, two in zip(peer.times("ping"), peer.times("ping")[1:], strict=False)) <= INTERVAL + 1e-6
    )


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("moment", [5.0, 5.1, 5.2, 5.3, 5.4])
def test_a_frozen_peer_is_known_in_time_and_restored_with_its_first_word(streaming, moment):
    peer = Peer()
    peer.take(peer.pulse.call_began(0.0))
    at = 0.0
    while streaming and at < moment:
        at += 0.02
        peer.watch(min(at, moment))
        peer.take(peer.pulse.heard(peer.now))
    peer.watch(moment)
    peer.frozen = True
    peer.watch(12.0)
    (cut,) = peer.times("cut")
    assert TIMEOUT_LEAST - 0.01 <= cut - moment <= INTERVAL + TIMEOUT_LEAST + 0.01
    assert len([at for at in peer.times("ping") if at > cut]) >= 10, "it is asked on"
    peer.frozen = False
    peer.watch(12.001)
    assert peer.times("restore") == [pytest.approx(12.0)], (
        "the answers that waited come in the moment in which it thaws"
    )
    peer.watch(20.0)
    assert len(peer.times("cut")) == 1


def test_a_peer_that_is_frozen_when_the_call_comes_is_known_too():
    peer = Peer()
    peer.frozen = True
    peer.watch(100.0)
    peer.take(peer.pulse.call_began(100.0))
    peer.watch(110.0)
    assert peer.times("cut") == [pytest.approx(100.0 + FIRST + INITIAL_TIMEOUT)]


def test_a_silent_peer_is_asked_on_without_calls_until_it_is_back():
    peer = Peer()
    peer.take(peer.pulse.call_began(0.0))
    peer.frozen = True
    peer.watch(3.0)
    assert peer.pulse.silent
    peer.take(peer.pulse.call_ended(3.0))
    peer.watch(10.0)
    assert len([at for at in peer.times("ping") if at > 3.0]) >= 13
    peer.frozen = False
    peer.watch(10.6)
    assert peer.times("restore")
    assert not peer.pulse.silent
    peer.watch(20.0)
    assert peer.pulse.wake is None, "nobody waits for it any more"


def test_a_slow_busy_peer_is_not_taken_for_frozen():
    rng = random.Random(7)
    peer = Peer(delay=lambda now: rng.uniform(0.05, 0.9))
    for _ in range(4):
        peer.take(peer.pulse.call_began(0.0))
    peer.watch(300.0)
    assert not peer.times("cut")
    assert TIMEOUT_LEAST <= peer.pulse.patience(peer.now) <= TIMEOUT_MOST


def test_a_peer_that_drowns_is_taken_for_frozen_once_at_most_and_forgets_that_again():
    peer = Peer(delay=lambda now: 2.8 if 10.0 < now < 60.0 else 0.01)
    peer.take(peer.pulse.call_began(0.0))
    peer.watch(60.0)
    assert len(peer.times("cut")) == 1
    assert peer.pulse.patience(60.0) > 2.8
    peer.watch(60.0 + 3 * BUSY_HALF_LIFE)
    assert peer.pulse.patience(peer.now) == TIMEOUT_LEAST
    assert len(peer.times("cut")) == 1


def test_as_much_as_a_tick_comes_late_so_much_more_time_a_peer_has():
    peer = Peer(delay=lambda now: None, late=lambda wake: 0.25)
    peer.take(peer.pulse.call_began(0.0))
    peer.watch(20.0)
    (cut,) = peer.times("cut")
    assert cut > FIRST + INITIAL_TIMEOUT + 3 * 0.25


def test_a_tick_that_comes_late_is_never_the_one_that_cuts():
    peer = Peer(delay=lambda now: None, late=lambda wake: 3.0 if wake > 1.7 else 0.0)
    peer.take(peer.pulse.call_began(0.0))
    peer.watch(FIRST + INITIAL_TIMEOUT + 3.0)
    assert not peer.times("cut"), "an answer may lie here unread"
    peer.late = lambda wake: 0.03
    peer.watch(20.0)
    assert len(peer.times("cut")) == 1, "a node that is always a little late finds it, too"


def test_pieces_of_answers_are_signs_of_life_where_pings_are_lost():
    peer = Peer(delay=lambda now: None)
    peer.take(peer.pulse.call_began(0.0))
    while peer.now < 30.0:
        peer.watch(peer.now + 0.2)
        peer.take(peer.pulse.heard(peer.now))
    assert not peer.times("cut")


def test_a_node_that_did_not_listen_itself_blames_nobody():
    peer = Peer(late=lambda wake: 4.0 if 5.2 < wake < 5.3 else 1.9 if 11.7 < wake < 11.8 else 0.0)
    peer.take(peer.pulse.call_began(0.0))
    for heard, deaf in ((4.9, 9.3), (11.3, 13.7)):
        peer.watch(heard)
        peer.frozen = True  # its answers lie in a socket that nobody reads; they are read after the tick that came late
        peer.watch(deaf)
        peer.frozen = False
    peer.watch(30.0)
    assert not peer.times("cut")
    assert peer.pulse.patience(peer.now) == TIMEOUT_LEAST, "and its way is as short as it was"


def test_how_long_a_frozen_peer_slept_is_not_how_slow_it_is():
    peer = Peer()
    peer.take(peer.pulse.call_began(0.0))
    peer.watch(5.0)
    peer.frozen = True
    peer.watch(60.0)
    peer.frozen = False
    peer.watch(60.1)
    assert peer.pulse.patience(peer.now) == TIMEOUT_LEAST


def test_a_ping_that_found_no_way_is_no_sign_of_life():
    peer = Peer(delay=lambda now: None)
    peer.take(peer.pulse.call_began(0.0))
    for step in range(1, 40):
        peer.watch(step * 0.1)
        for number in list(peer.pulse._sent):
            peer.pulse.unanswered(number)
    assert peer.times("cut") == [pytest.approx(FIRST + INITIAL_TIMEOUT)]
    assert peer.pulse.answered(99, 4.0) != [], "but an answer is, whatever it answers"


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.sampled_from(["begin", "end", "freeze", "thaw", "heard"]), st.floats(0, 3.0)), max_size=40)
)
def test_whatever_happens_silence_is_found_within_bounds_and_only_where_there_is_some(events):
    peer, frozen_since, calls = Peer(), None, 0
    for what, pause in events:
        peer.watch(peer.now + pause)
        match what:
            case "begin":
                calls += 1
                peer.take(peer.pulse.call_began(peer.now))
            case "end" if calls:
                calls -= 1
                peer.take(peer.pulse.call_ended(peer.now))
            case "freeze" if frozen_since is None:
                frozen_since, peer.frozen = peer.now, True
            case "thaw":
                frozen_since, peer.frozen = None, False
                peer.watch(peer.now)
                if peer.pulse.silent:
                    peer.watch(peer.now + INTERVAL + 0.01)
                assert not peer.pulse.silent
            case "heard" if frozen_since is None:
                peer.take(peer.pulse.heard(peer.now))
        assert peer.pulse.calls == calls
        if frozen_since is None:
            assert not peer.pulse.silent
        assert (peer.pulse.wake is None) == (not calls and not peer.pulse.silent)
    if calls:
        peer.frozen = True
        peer.watch(peer.now + INTERVAL + BUSY_MOST + 0.01)
        assert peer.pulse.silent


@pytest.mark.parametrize("began", [number * 0.1 + 7.3 for number in range(60)])
def test_a_tick_at_the_very_moment_of_its_wake_leaves_nothing_due(began):
    pulse = Pulse(began)
    pulse.call_began(began)
    for _ in range(12):
        now = pulse.wake
        pulse.tick(now)
        assert pulse.wake > now
    assert pulse.silent
