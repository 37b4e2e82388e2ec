"""Every transition of one node's view of a peer, as rows; and what it then says to whom."""

import random

import pytest

from tars.core.membership import Membership, MembershipSettings, Tell
from tars.core.mesh_events import MemberChanged
from tars.core.mesh_messages import Ack, Envelope, MemberState, News, Ping, PingRequest, Update
from tars.core.timers import NEVER, Timers
from tars.core.types import NodeId

ALIVE, SUSPECT, DEAD, DRAINING, LEFT = (
    MemberState.ALIVE,
    MemberState.SUSPECT,
    MemberState.DEAD,
    MemberState.DRAINING,
    MemberState.LEFT,
)
LONG_AGO = MembershipSettings().shortest_suspicion
"""Who was last heard then may be dead by now."""
M, N, T = NodeId("m"), NodeId("n"), NodeId("t")
"""This node, the peer it is about, and who tells of it."""


class Bench:
    def __init__(self, *peers, me=M):
        self.timers = Timers()
        self.membership = Membership(me, MembershipSettings(), random.Random(1), self.timers, addresses=(f"{me}:1",))
        for peer in peers:
            self.membership.admit(peer, (f"{peer}:1",), 0.0)
        self.membership.take()

    def hear(self, sender, *updates, now=0.0, incarnation=1, body=None, gone=None):
        gone = self.membership.gone_hash if gone is None else gone
        self.membership.received(Envelope(sender, incarnation, body or News(), updates=updates, gone=gone), now)
        return self.membership.take()

    def hold(self, state, incarnation, now=0.0):
        """Bring the peer N into a state by what others say, as a mesh does: nobody is dead who was not suspected."""
        if state is DRAINING:
            self.hear(N, Update(N, incarnation, DRAINING), incarnation=incarnation, now=now)
        else:
            self.hear(N, incarnation=incarnation, now=now - LONG_AGO)
            for step in {SUSPECT: [SUSPECT], DEAD: [SUSPECT, DEAD], LEFT: [LEFT]}.get(state, []):
                self.hear(T, Update(N, incarnation, step, accuser=T), now=now)
        assert self.membership.state_of(N) is state

    def run(self, now):
        while (due := self.timers.next_due()) <= now:
            self.timers.run(due)
        return self.membership.take()

    def news(self, to=T):
        """What rides along in the next packet to `to`, without this node's own state."""
        return [each for each in self.membership.updates_for(Tell(to, (), News())) if each.node != M]


def changes(outbox):
    return [(each.node, each.after) for each in outbox if isinstance(each, MemberChanged)]


def told(outbox):
    return [(each.to, each.body) for each in outbox if isinstance(each, Tell)]


# --- what is said of a peer ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("held", "claim", "after"),
    [
        ((ALIVE, 3), (ALIVE, 4), ALIVE),
        ((ALIVE, 3), (DRAINING, 4), DRAINING),
        ((DRAINING, 3), (ALIVE, 4), ALIVE),
        ((ALIVE, 3), (DRAINING, 2), ALIVE),
        ((ALIVE, 3), (SUSPECT, 3), SUSPECT),
        ((ALIVE, 3), (SUSPECT, 2), ALIVE),
        ((DRAINING, 3), (SUSPECT, 3), SUSPECT),
        ((SUSPECT, 3), (ALIVE, 3), SUSPECT),
        ((SUSPECT, 3), (ALIVE, 4), ALIVE),
        ((SUSPECT, 3), (DRAINING, 4), DRAINING),
        ((SUSPECT, 3), (SUSPECT, 4), SUSPECT),
        ((SUSPECT, 3), (DEAD, 3), DEAD),
        ((SUSPECT, 3), (DEAD, 2), SUSPECT),
        # Who was not suspected here is looked at first: the news may come from the other side of a partition that heals.
        ((ALIVE, 3), (DEAD, 3), SUSPECT),
        ((DRAINING, 3), (DEAD, 4), SUSPECT),
        ((ALIVE, 3), (DEAD, 2), ALIVE),
        ((ALIVE, 3), (LEFT, 4), LEFT),
        ((SUSPECT, 3), (LEFT, 3), LEFT),
        ((DEAD, 3), (LEFT, 3), LEFT),
        ((DEAD, 3), (ALIVE, 3), DEAD),
        ((DEAD, 3), (ALIVE, 4), ALIVE),
        ((DEAD, 3), (SUSPECT, 3), DEAD),
        ((DEAD, 3), (SUSPECT, 4), SUSPECT),
        ((LEFT, 3), (DEAD, 3), LEFT),
        ((LEFT, 3), (ALIVE, 3), LEFT),
        ((LEFT, 3), (ALIVE, 4), ALIVE),
    ],
)
def test_what_others_say(held, claim, after):
    bench = Bench(N, T)
    bench.hold(*held)
    outbox = bench.hear(T, Update(N, claim[1], claim[0], accuser=T))
    assert bench.membership.state_of(N) is after
    assert changes(outbox) == ([] if after is held[0] else [(N, after)])


def test_a_death_of_a_peer_that_was_heard_just_now_is_not_believed_though_it_was_suspected():
    bench = Bench(N, T)
    bench.hold(SUSPECT, 3)
    bench.hear(N, incarnation=3, now=1.0)
    just = 1.0 + LONG_AGO - 0.01
    assert changes(bench.hear(T, Update(N, 3, DEAD, accuser=T), now=just)) == []
    assert [each.state for each in bench.news(to=N)] == [SUSPECT]  # so that it can refute
    assert changes(bench.hear(T, Update(N, 3, DEAD, accuser=T), now=just + 0.02)) == [(N, DEAD)]


@pytest.mark.parametrize("state", [SUSPECT, DEAD, LEFT])
@pytest.mark.parametrize(
    ("incarnation", "comes_back"), [(2, False), (3, False), (4, True)], ids=["earlier life", "same", "refuted"]
)
def test_who_is_held_for_gone_and_speaks_is_told_so_until_it_refutes(state, incarnation, comes_back):
    bench = Bench(N, T)
    bench.hold(state, 3)
    outbox = bench.hear(N, incarnation=incarnation, body=Ping(9), now=5.0)
    assert (bench.membership.state_of(N) is ALIVE) is comes_back
    (answer,) = [each for each in outbox if isinstance(each, Tell) and isinstance(each.body, Ack)]
    about_it = [each for each in bench.membership.updates_for(answer) if each.node == N]
    if comes_back:
        assert about_it == []
    else:
        assert [(each.state, each.incarnation) for each in about_it] == [(state, 3)]


@pytest.mark.parametrize(("before", "now"), [(ALIVE, DRAINING), (DRAINING, ALIVE)])
def test_who_says_another_thing_after_a_restart_with_the_number_that_it_had_is_told_so_and_corrects_it(before, now):
    bench, peer = Bench(N), Bench(M, me=N)
    bench.hear(N, Update(N, 1, before), incarnation=1)
    peer.membership.state, peer.membership.incarnation = now, 1
    outbox = bench.hear(N, Update(N, 1, now), incarnation=1, body=Ping(1), now=5.0)
    assert bench.membership.state_of(N) is before
    (answer,) = [each for each in outbox if isinstance(each, Tell) and isinstance(each.body, Ack)]
    peer.hear(M, *bench.membership.updates_for(answer), body=Ack(1), incarnation=0)
    assert (peer.membership.state, peer.membership.incarnation) == (now, 2)
    bench.hear(N, *peer.membership.updates_for(Tell(M, (), News())), incarnation=2, now=5.1)
    assert bench.membership.state_of(N) is now
    assert bench.news(to=N) == []


def test_what_says_nothing_to_answer_is_corrected_too_but_not_each_time():
    bench = Bench(N, T)
    bench.hold(DEAD, 3)
    assert told(bench.hear(N, incarnation=3, now=5.0)) == [(N, News())]
    assert told(bench.hear(N, incarnation=3, now=5.1)) == []
    bench.membership.traffic(N, 6.0)
    assert told(bench.membership.take()) == [(N, News())]


def test_a_node_that_said_itself_that_it_leaves_is_not_corrected():
    bench = Bench(N, T)
    outbox = bench.hear(N, Update(N, 2, LEFT), incarnation=2)
    assert changes(outbox) == [(N, LEFT)]
    assert told(outbox) == []


def test_whoever_tells_old_news_of_a_death_is_told_the_newer():
    bench = Bench(N, T)
    bench.hold(ALIVE, 5)
    outbox = bench.hear(T, Update(N, 4, DEAD))
    (tell,) = [each for each in outbox if isinstance(each, Tell)]
    assert (tell.to, tell.more) == (T, (Update(N, 5, ALIVE),))


def test_only_members_are_heard_and_talked_about():
    bench = Bench(T)
    assert bench.hear(N, body=Ping(1)) == []
    assert bench.hear(T, Update(N, 1, ALIVE)) == []
    assert bench.membership.state_of(N) is None


@pytest.mark.parametrize("incarnation", [-1, 2**48 + 1, 10**30])
def test_an_incarnation_that_no_node_has_is_damage_and_changes_nothing(incarnation):
    bench = Bench(N, T)
    bench.hear(T, Update(N, incarnation, DEAD), Update(M, incarnation, DEAD))
    assert bench.hear(N, incarnation=incarnation, body=Ping(1)) == []
    assert (bench.membership.state_of(N), bench.membership.incarnation) == (ALIVE, 0)


def test_an_expelled_node_is_no_member_any_more_and_nothing_waits_for_it():
    bench = Bench(N, T)
    bench.hold(SUSPECT, 3)
    bench.membership.expel(N)
    assert bench.membership.take() == [MemberChanged(N, SUSPECT, None)]
    assert changes(bench.run(60.0)) == []
    assert bench.news() == []
    assert N not in bench.membership.members()


# --- suspicion ----------------------------------------------------------------------------------------------------------


def dead_after(bench, witness=None, now=0.0, step=0.05):
    """When N is held for dead. `witness` speaks all the time: the network is well."""
    while bench.membership.state_of(N) is not DEAD:
        now += step
        bench.run(now)
        if witness is not None:
            bench.hear(witness, now=now)
        assert now < 60
    return now


def fail(bench, now=0.0):
    bench.membership.failed(N, now, now)
    return bench.membership.take()


def test_with_one_peer_it_lasts_the_shortest_time():
    bench = Bench(N)
    assert changes(fail(bench)) == [(N, SUSPECT)]
    assert dead_after(bench) == pytest.approx(1.8, abs=0.06)


def test_alone_among_many_it_lasts_the_longest_and_each_accuser_shortens_it():
    peers = [NodeId(each) for each in "pqrst"]
    expected = {0: 2.6, 1: 2.2, 2: 1.97, 3: 1.8}
    for accusers, seconds in expected.items():
        bench = Bench(N, *peers)
        bench.hear(peers[0], now=-1.0)
        fail(bench)
        for accuser in peers[:accusers]:
            bench.hear(peers[0], Update(N, 0, SUSPECT, accuser=accuser), Update(N, 0, SUSPECT, accuser=accuser))
        assert dead_after(bench, peers[-1]) == pytest.approx(seconds, abs=0.06), accusers


def test_who_only_heard_of_it_asks_itself_before_it_declares_anybody_dead():
    bench = Bench(N, T)
    bench.hold(SUSPECT, 1)
    bench.run(2.6)
    outbox = bench.run(2.8)
    assert [to for to, body in told(outbox) if isinstance(body, Ping)] == [N]
    assert bench.membership.state_of(N) is SUSPECT
    # Heard of: 1.5 * 1.8. The probe fails after 0.8; the time to refute begins.
    assert dead_after(bench, T, now=2.8) == pytest.approx(2.7 + 0.8 + 1.8, abs=0.06)


def test_a_suspect_is_asked_again_and_again_and_told_that_it_is_one():
    bench = Bench(N, T)
    fail(bench)
    outbox = bench.run(1.3)
    pings = [each for each in outbox if isinstance(each, Tell) and isinstance(each.body, Ping)]
    assert [each.to for each in pings] == [N, N, N]
    for ping in pings:
        assert Update(N, 0, SUSPECT, accuser=M) in bench.membership.updates_for(ping)


def test_a_sign_of_life_gives_it_its_whole_time_again():
    bench = Bench(N)
    fail(bench)
    bench.run(1.7)
    bench.membership.traffic(N, 1.7)
    bench.run(3.4)
    assert bench.membership.state_of(N) is SUSPECT
    bench.run(3.6)
    assert bench.membership.state_of(N) is DEAD


def test_time_in_which_it_could_not_listen_is_not_counted():
    bench = Bench(N)
    fail(bench)
    bench.membership.excuse(5.0)
    bench.run(6.7)
    assert bench.membership.state_of(N) is SUSPECT
    bench.run(6.9)
    assert bench.membership.state_of(N) is DEAD


# --- cut off ------------------------------------------------------------------------------------------------------------


def test_who_sees_all_vanish_suspects_itself_and_waits_longer():
    bench = Bench(N, T)
    bench.hear(T, now=-1.0)
    bench.membership.failed(N, 0.0, 0.8)
    assert not bench.membership.isolated
    bench.membership.failed(T, 0.5, 1.3)
    assert bench.membership.isolated
    bench.run(0.8 + 3 * 1.8 - 0.1)
    assert not [each for each in bench.membership.members().values() if each.state is DEAD]
    outbox = bench.run(0.8 + 3 * 1.8 + 0.1)
    assert {each for each in changes(outbox) if each[1] is DEAD} == {(N, DEAD), (T, DEAD)}
    assert not bench.membership.isolated, "it has decided that it is alone"


def test_one_word_from_anybody_ends_that_and_the_others_get_their_time():
    bench = Bench(N, T)
    bench.hear(T, now=-1.0)
    bench.membership.failed(N, 0.0, 0.8)
    bench.membership.failed(T, 0.5, 1.3)
    bench.hear(T, now=5.0)
    assert not bench.membership.isolated
    bench.run(6.7)
    assert bench.membership.state_of(N) is SUSPECT
    bench.run(6.9)
    assert bench.membership.state_of(N) is DEAD


def test_while_others_are_heard_it_is_the_peer_and_not_this_node():
    bench = Bench(N, T, NodeId("u"))
    bench.membership.failed(N, 0.0, 0.8)
    bench.hear(T, now=1.0)
    bench.membership.failed(NodeId("u"), 0.5, 1.3)
    assert not bench.membership.isolated


# --- this node itself ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("claim", "incarnation"),
    [
        ((SUSPECT, 0), 1),
        ((DEAD, 0), 1),
        ((LEFT, 0), 1),
        ((ALIVE, 0), 0),
        ((DEAD, 7), 8),
        ((ALIVE, 7), 8),
        ((LEFT, 7), 8),
    ],
)
def test_it_refutes_what_is_not_so(claim, incarnation):
    bench = Bench(N, T)
    outbox = bench.hear(T, Update(M, claim[1], claim[0], accuser=N))
    assert bench.membership.incarnation == incarnation
    # The accuser and the teller hear it at once, the others as news.
    assert {to for to, _ in told(outbox)} == (set() if incarnation == 0 else {N, T})
    assert bench.membership.updates_for(Tell(T, (), News()))[0] == Update(M, incarnation, ALIVE, ("m:1",))
    assert bench.membership.has_news is (incarnation > 0)


def test_old_claims_about_it_are_not_worth_a_word():
    bench = Bench(N, T)
    bench.hear(T, Update(M, 7, DEAD))
    assert told(bench.hear(T, Update(M, 7, DEAD))) == []
    assert bench.membership.incarnation == 8


def test_drain_resume_and_new_addresses_are_new_incarnations():
    bench = Bench(N)
    for act, expected in [
        (lambda: bench.membership.drain(True), Update(M, 1, DRAINING, ("m:1",))),
        (lambda: bench.membership.drain(True), Update(M, 1, DRAINING, ("m:1",))),
        (lambda: bench.membership.drain(False), Update(M, 2, ALIVE, ("m:1",))),
        (lambda: bench.membership.readdress(("m:2", "m:3")), Update(M, 3, ALIVE, ("m:2", "m:3"))),
        (lambda: bench.membership.readdress(("m:2", "m:3")), Update(M, 3, ALIVE, ("m:2", "m:3"))),
    ]:
        act()
        assert bench.membership.updates_for(Tell(N, (), News()))[0] == expected


def test_whoever_drains_stays_so_through_a_refutation():
    bench = Bench(N, T)
    bench.membership.drain(True)
    bench.hear(T, Update(M, 1, SUSPECT))
    assert bench.membership.updates_for(Tell(N, (), News()))[0] == Update(M, 2, DRAINING, ("m:1",))


def test_who_leaves_says_so_asks_nobody_and_refutes_nothing():
    bench = Bench(N, T)
    bench.membership.start(0.0)
    fail(bench)
    bench.membership.leave()
    assert {to for to, body in told(bench.membership.take()) if isinstance(body, News)} == {N, T}
    assert told(bench.run(60.0)) == []
    assert bench.timers.next_due() == NEVER
    bench.hear(T, Update(M, 5, DEAD))
    assert bench.membership.state is LEFT
    assert told(bench.hear(T, body=Ping(4))) == [(T, Ack(4))]


# --- who is gone, compared ----------------------------------------------------------------------------------------------


def test_two_that_hold_others_for_gone_tell_each_other_whom_until_they_agree():
    bench = Bench(N, T)
    bench.hold(DEAD, 3)
    (tell,) = [each for each in bench.hear(T, body=Ack(1), now=9.0, gone=0) if isinstance(each, Tell)]
    assert (tell.to, tell.more) == (T, (Update(N, 3, DEAD),))
    assert told(bench.hear(T, body=Ack(1), now=9.1, gone=0)) == [], "not more often than every other second"
    other = Bench(N, M, me=T)
    other.hear(M, *tell.more, now=9.0)
    assert other.membership.state_of(N) is DEAD
    assert other.membership.gone_hash == bench.membership.gone_hash != 0
    assert told(bench.hear(T, body=Ack(1), now=20.0, gone=other.membership.gone_hash)) == []


def test_the_hash_is_of_who_is_gone_and_of_nothing_else():
    bench = Bench(N, T)
    before = bench.membership.gone_hash
    bench.hold(SUSPECT, 3)
    assert bench.membership.gone_hash == before
    bench.hear(T, Update(N, 3, DEAD))
    dead = bench.membership.gone_hash
    bench.hear(T, Update(N, 3, LEFT))
    assert bench.membership.gone_hash == dead != before
    bench.hear(N, incarnation=4)
    assert bench.membership.gone_hash == before


# --- addresses, seeds, the dead -----------------------------------------------------------------------------------------


def test_what_a_node_says_of_itself_goes_before_its_record_and_is_passed_on():
    bench = Bench(N, T)
    bench.hear(N, Update(N, 1, ALIVE, ("n:2",)), incarnation=1)
    assert bench.membership.addresses_of(N) == ("n:2", "n:1")
    assert Update(N, 1, ALIVE, ("n:2",)) in bench.news()
    bench.hear(T, Update(N, 2, ALIVE, ("n:3",)))
    assert bench.membership.addresses_of(N) == ("n:3", "n:1")
    bench.hear(T, Update(N, 2, SUSPECT, ("elsewhere:1",), accuser=T))
    assert bench.membership.addresses_of(N) == ("n:3", "n:1"), "only of itself does a node say where it is"


def test_a_seed_is_asked_until_somebody_answers_there():
    bench = Bench(N)
    bench.membership.start(0.0)
    bench.membership.seed("n:7", 0.0)
    asked = [each for each in bench.membership.take() if isinstance(each, Tell) and each.to is None]
    assert [each.addresses for each in asked] == [("n:7",)]
    assert bench.membership.updates_for(asked[0]) == (Update(M, 0, ALIVE, ("m:1",)),), "a stranger hears no news"
    again = [each for each in bench.run(4.0) if isinstance(each, Tell) and each.to is None]
    assert again
    bench.hear(N, body=Ack(again[-1].body.number), now=4.0)
    assert bench.membership.addresses_of(N) == ("n:1", "n:7")
    later = [each for each in bench.run(4.5) if isinstance(each, Tell) and each.to is None]
    bench.hear(N, now=4.5)
    assert later == []


def test_the_dead_are_tried_now_and_then():
    bench = Bench(N)
    bench.membership.start(0.0)
    fail(bench)
    bench.run(1.9)
    assert bench.membership.state_of(N) is DEAD
    pings = [to for to, body in told(bench.run(22.0)) if isinstance(body, Ping)]
    assert 9 <= len(pings) <= 11


def test_a_helper_hands_on_where_the_target_says_it_is():
    bench = Bench(N, T)
    bench.hear(N, Update(N, 1, ALIVE, ("n:2",)), incarnation=1)
    ((_, ping),) = told(bench.hear(T, body=PingRequest(5, N)))
    outbox = bench.hear(N, body=Ack(ping.number))
    (answer,) = [each for each in outbox if isinstance(each, Tell) and each.to == T]
    assert Update(N, 1, ALIVE, ("n:2",)) in bench.membership.updates_for(answer)
