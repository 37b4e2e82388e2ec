"""Which piece of whom: simulated sources of any speed, dying and lying in wait; every byte is asked for, none for ever of the slow."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tars.core.transfer import (
    PATIENCE,
    PIECE,
    STRIKES,
    Abandon,
    Arrived,
    Broke,
    Completed,
    Fetch,
    Finished,
    Joined,
    PieceScheduler,
    Starved,
    Tick,
    TokenBucket,
    liars,
)


@dataclass
class Pretended:
    rate: float
    """Bytes a second; 0: it takes the request and sends nothing."""
    dies_at: float = float("inf")


def run(size, piece, sources, done=(), limit=10_000.0):
    """Play it on virtual time; (seconds, last effect, bytes by source)."""
    scheduler = PieceScheduler(size, piece, set(done))
    queue, number, now = [], 0, 0.0
    under_way, brought = {}, dict.fromkeys(sources, 0)

    def push(at, event):
        nonlocal number
        number += 1
        heapq.heappush(queue, (at, number, event))

    for name in sources:
        push(0.0, Joined(name))
    push(0.25, Tick())
    while queue and now < limit:
        now, _, event = heapq.heappop(queue)
        if isinstance(event, Completed):
            if under_way.get(event.source) != event.piece:
                continue
            del under_way[event.source]
            brought[event.source] += scheduler.span(event.piece)[1] - scheduler.span(event.piece)[0]
        if isinstance(event, Broke):
            if under_way.get(event.source) != event.piece:
                continue
            del under_way[event.source]
        if isinstance(event, Arrived) and under_way.get(event.source) != event.piece:
            continue
        if isinstance(event, Tick):
            push(now + 0.25, Tick())
        for effect in scheduler.handle(event, now):
            match effect:
                case Fetch(name, number_of, start, stop):
                    assert name not in under_way, "a source does one piece at a time"
                    assert number_of not in scheduler.done
                    under_way[name] = number_of
                    source = sources[name]
                    if source.rate:
                        takes = (stop - start) / source.rate
                        for part in range(1, 4):
                            push(now + takes * part / 4, Arrived(name, number_of, (stop - start) // 4))
                        end = now + takes
                    else:
                        end = float("inf")
                    if end <= source.dies_at:
                        push(end, Completed(name, number_of))
                    else:
                        push(max(now, source.dies_at), Broke(name, number_of))
                case Abandon(name, number_of):
                    assert under_way.pop(name) == number_of
                case Finished() | Starved():
                    assert not queue or scheduler.handle(Tick(), now) == []
                    return now, effect, brought
    return now, None, brought


def test_two_sources_share_the_work_by_their_speed():
    seconds, end, brought = run(100_000, 1000, {"quick": Pretended(3000), "slow": Pretended(1000)})
    assert end == Finished()
    assert brought["quick"] + brought["slow"] == 100_000
    assert 2.5 < brought["quick"] / brought["slow"] < 3.5
    assert seconds == pytest.approx(25, rel=0.1)


def test_the_last_piece_is_not_left_to_the_slowest():
    """100 pieces at 1,000 a second; the other source would take 100 s for its one."""
    seconds, end, brought = run(100_000, 1000, {"quick": Pretended(1000), "snail": Pretended(10)})
    assert end == Finished()
    assert seconds < 105
    assert brought["snail"] <= 1000


def test_a_source_that_sends_nothing_holds_nobody_up():
    seconds, end, brought = run(10_000, 1000, {"quick": Pretended(1000), "frozen": Pretended(0)})
    assert (end, brought) == (Finished(), {"quick": 10_000, "frozen": 0})
    assert seconds < 13


def test_what_a_dying_source_had_goes_to_the_others():
    seconds, end, brought = run(10_000, 1000, {"a": Pretended(1000, dies_at=3.5), "b": Pretended(1000)})
    assert (end, brought) == (Finished(), {"a": 3000, "b": 7000})
    assert seconds < 8.5


def test_without_any_source_left_it_says_so():
    _, end, brought = run(10_000, 1000, {"a": Pretended(1000, dies_at=2.5), "b": Pretended(1000, dies_at=1.5)})
    assert end == Starved()
    assert brought == {"a": 2000, "b": 1000}
    assert PieceScheduler(10).handle(Tick(), 0.0) == [Starved()]


def test_what_is_done_is_not_fetched_again():
    _, end, brought = run(10_000, 1000, {"a": Pretended(1000)}, done={0, 1, 2, 99, -1})
    assert (end, brought) == (Finished(), {"a": 7000})


def test_an_empty_file_is_finished_at_once():
    assert PieceScheduler(0).handle(Joined("a"), 0.0) == [Finished()]


def test_the_last_piece_is_as_long_as_what_is_left():
    scheduler = PieceScheduler(2500, 1000)
    assert [scheduler.span(each) for each in range(scheduler.pieces)] == [(0, 1000), (1000, 2000), (2000, 2500)]
    scheduler.handle(Joined("a"), 0.0)
    scheduler.handle(Arrived("a", 0, 400), 0.1)
    assert scheduler.bytes_done == 400
    scheduler.handle(Completed("a", 0), 0.2)
    scheduler.handle(Completed("a", 1), 0.3)
    scheduler.handle(Completed("b", 2), 0.4)
    assert scheduler.bytes_done == 2500


def test_a_source_that_breaks_is_asked_again_later_and_given_up_after_three_times():
    scheduler = PieceScheduler(1000, 1000)
    assert scheduler.handle(Joined("a"), 0.0) == [Fetch("a", 0, 0, 1000)]
    now = 0.0
    for strike in range(1, STRIKES):
        assert scheduler.handle(Broke("a", 0), now) == []
        assert scheduler.handle(Tick(), now + 0.4) == []
        now += 0.5 * 2 ** (strike - 1)
        assert scheduler.handle(Tick(), now) == [Fetch("a", 0, 0, 1000)]
    assert scheduler.handle(Broke("a", 0), now) == [Starved()]


def test_a_busy_source_has_no_strike_but_is_not_waited_for_for_ever():
    scheduler = PieceScheduler(1000, 1000)
    scheduler.handle(Joined("a"), 0.0)
    now = 0.0
    while now < PATIENCE:
        assert scheduler.handle(Broke("a", 0, pause=50.0), now) == []
        now += 50.0
        assert scheduler.handle(Tick(), now) == [Fetch("a", 0, 0, 1000)]
    assert scheduler.handle(Broke("a", 0, pause=50.0), now + 1) == [Starved()]


def test_what_a_source_says_of_a_piece_that_it_was_told_to_leave_means_nothing():
    scheduler = PieceScheduler(2000, 1000)
    scheduler.handle(Joined("a"), 0.0)
    scheduler.handle(Joined("b"), 0.0)
    assert scheduler.handle(Completed("b", 0), 1.0) == [Abandon("a", 0)]
    assert scheduler.active == ("b",)
    assert scheduler.handle(Broke("a", 0), 1.1) == []
    # b still has piece 1, and a, idle and quick, is no worse for it.
    assert scheduler.handle(Completed("b", 1), 2.0) == [Finished()]


def slow_and_three_idle(slow_got):
    """One piece at `slow` since a second, and three others idle, quick as they are; what each of them was told."""
    scheduler = PieceScheduler(4000, 1000)
    for name in ("slow", "x", "y", "z"):
        scheduler.handle(Joined(name), 0.0)
    if slow_got:
        scheduler.handle(Arrived("slow", 0, slow_got), 1.0)
    return scheduler, [scheduler.handle(Completed(name, piece), 1.0) for piece, name in enumerate("xyz", start=1)]


def test_a_slow_piece_is_fetched_by_a_second_one_and_by_no_third():
    scheduler, told = slow_and_three_idle(slow_got=1)
    assert told == [[Fetch("x", 0, 0, 1000)], [], []]
    assert scheduler.handle(Tick(), 2.0) == []
    assert scheduler.handle(Completed("x", 0), 2.5) == [Abandon("slow", 0), Finished()]


def test_a_piece_that_is_in_silent_hands_only_goes_to_one_more_at_a_time():
    scheduler, told = slow_and_three_idle(slow_got=0)
    assert told == [[], [], []]
    assert len(scheduler.handle(Tick(), 20.0)) == 1
    assert scheduler.handle(Tick(), 20.5) == []
    assert len(scheduler.handle(Tick(), 30.0)) == 1


def test_lanes_of_one_source_take_nothing_from_each_other():
    scheduler = PieceScheduler(2000, 1000)
    scheduler.handle(Joined("a#0", "a"), 0.0)
    scheduler.handle(Joined("a#1", "a"), 0.0)
    assert scheduler.handle(Completed("a#0", 0), 1.0) == []
    assert scheduler.handle(Tick(), 100.0) == []
    assert scheduler.handle(Joined("b", "b"), 100.0) == [Fetch("b", 1, 1000, 2000)]


@given(
    size=st.integers(0, 3000),
    piece=st.integers(1, 700),
    rates=st.lists(st.tuples(st.sampled_from([0.0, 5.0, 300.0, 2000.0]), st.floats(0.1, 40)), min_size=1, max_size=4),
    done=st.sets(st.integers(0, 20)),
)
def test_with_one_good_source_every_byte_arrives_whatever_the_others_do(size, piece, rates, done):
    sources = {f"s{number}": Pretended(rate, dies) for number, (rate, dies) in enumerate(rates)}
    sources["good"] = Pretended(100.0)
    seconds, end, _ = run(size, piece, sources, done)
    assert end == Finished()
    # Never much slower than the good one alone, whatever it wastes on others' pieces.
    assert seconds <= 3 * size / 100.0 + 2 * piece / 100.0 + 4 + 3 * (1 + len(rates))


def test_a_size_below_zero_is_a_bug_of_the_caller():
    with pytest.raises(ValueError, match="at least"):
        PieceScheduler(-1)
    assert PIECE == 16 * 2**20


def test_the_bucket_lets_a_burst_pass_and_then_holds_to_the_rate():
    bucket = TokenBucket(1000.0, burst=500.0)
    assert bucket.take(500, 0.0) == 0.0
    assert bucket.take(1000, 0.0) == 1.0
    assert bucket.take(1000, 0.0) == 2.0  # behind the first
    assert bucket.take(0, 10.0) == 0.0
    assert bucket.take(500, 10.0) == 0.0  # no more than the burst was saved up
    assert bucket.take(100, 10.0) == pytest.approx(0.1)
    assert TokenBucket(None).take(10**12, 0.0) == 0.0


def test_a_source_lied_where_its_digest_is_not_the_verified_pieces():
    truth = {0: "x", 1: "y"}
    claims = [("a", 0, "x"), ("b", 1, "bad"), ("c", 1, "y"), ("d", 7, "of no piece")]
    assert liars(claims, truth) == ("b",)
