"""Threads wait briefly for each other only while others need the processors, by the scheduler's own word."""

import ctypes
import ctypes.util
import os
import subprocess
import sys
import time

import pytest

from tars.workers.thread_waiting import (
    REST_SECONDS,
    WINDOW_SECONDS,
    SleepingTeam,
    ThreadWaiting,
    loaded_libgomp,
    waited_seconds,
)


class Bench:
    """A machine of which the share that others take is set; time passes by decoding and by resting."""

    def __init__(self, threads=2):
        self.share = 0.0
        self.now = self.decoded = self.waited = 0.0
        self.threads = threads
        self.teams = []
        self.waiting = ThreadWaiting(threads, lambda: self.waited, self.shorten)

    def shorten(self):
        self.teams.append("short")
        return self

    def end(self):
        self.teams.append("long")

    def decode(self, seconds, step=0.01):
        for _ in range(round(seconds / step)):
            self.waiting.look(self.decoded, self.now)
            self.decoded += step
            self.now += step * 1.1
            self.waited += step * self.threads * self.share


def test_the_wait_is_brief_until_it_is_known_that_the_processors_are_free():
    bench = Bench()
    bench.decode(WINDOW_SECONDS)
    assert bench.teams == ["short"]
    assert bench.waiting.brief
    bench.decode(2 * WINDOW_SECONDS)
    assert bench.teams == ["short", "long"]
    assert not bench.waiting.brief


def test_it_stays_long_while_the_processors_are_somewhat_used():
    bench = Bench()
    bench.decode(1.0)
    for bench.share in (0.25, 0.36):
        bench.decode(5.0)
    assert bench.teams == ["short", "long"]


def test_crowded_processors_shorten_the_wait_and_free_ones_lengthen_it_again():
    bench = Bench()
    bench.decode(1.0)
    bench.share = 0.5
    bench.decode(2 * WINDOW_SECONDS)
    assert bench.teams == ["short", "long", "short"]
    bench.share = 0.36  # a little less, now that the wait is brief
    bench.decode(60.0)
    assert bench.waiting.brief
    bench.share = 0.1
    bench.decode(2 * WINDOW_SECONDS)
    assert bench.teams == ["short", "long", "short", "long"]


def test_after_a_rest_nothing_is_known_and_what_others_threads_did_meanwhile_does_not_count():
    bench = Bench()
    bench.decode(1.0)
    assert not bench.waiting.brief
    bench.now += REST_SECONDS * 2
    bench.waited += 50.0
    bench.decode(0.01)
    assert bench.waiting.brief
    bench.decode(2 * WINDOW_SECONDS)
    assert not bench.waiting.brief


def test_a_step_that_takes_long_is_no_rest():
    bench = Bench()
    bench.decode(1.0)
    bench.decode(40.0, step=REST_SECONDS * 4)
    assert bench.teams == ["short", "long"]


def test_one_thread_waits_for_nobody():
    bench = Bench(threads=1)
    bench.share = 0.9
    bench.decode(5.0)
    assert not bench.teams


def test_where_nobody_counts_or_the_library_is_another_one_nothing_is_done():
    bench = Bench()
    uncounted = ThreadWaiting(2, lambda: None, bench.shorten)
    for second in range(10):
        uncounted.look(float(second), float(second))
    assert not uncounted.brief
    assert bench.teams == ["short", "long"]
    asked = []

    def refuse():
        asked.append(1)
        raise OSError("no libgomp")

    other = ThreadWaiting(2, lambda: 5.0, refuse)
    for second in range(10):
        other.look(float(second), float(second))
    assert len(asked) == 1
    assert not other.brief
    other.close()


def test_close_ends_what_sleeps():
    bench = Bench()
    bench.share = 0.9
    bench.decode(1.0)
    bench.waiting.close()
    bench.waiting.close()
    assert bench.teams == ["short", "long"]


def test_the_schedulers_word_is_read(tmp_path):
    assert waited_seconds(tmp_path / "none") is None
    (tmp_path / "11").mkdir()
    assert waited_seconds(tmp_path) is None  # a kernel that does not count
    for task, waited in (("11", 2_500_000_000), ("12", 500_000_000)):
        (tmp_path / task).mkdir(exist_ok=True)
        (tmp_path / task / "schedstat").write_text(f"99 {waited} 7\n")
    (tmp_path / "13").mkdir()  # ended
    assert waited_seconds(tmp_path) == pytest.approx(3.0)
    (tmp_path / "14").mkdir()
    (tmp_path / "14" / "schedstat").write_text("nonsense\n")
    assert waited_seconds(tmp_path) is None


SHARING = """
import os, subprocess, sys, time
from tars.workers.thread_waiting import waited_seconds

os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
before, ends = waited_seconds(), time.monotonic() + 20
try:
    while time.monotonic() < ends and waited_seconds() < before + 0.02:
        pass
finally:
    other.kill()
    other.wait()
print(waited_seconds() - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/schedstat"), reason="this kernel does not count")
def test_a_thread_that_shares_its_processor_waits_by_the_kernels_own_count():
    ended = subprocess.run([sys.executable, "-c", SHARING], capture_output=True, text=True, timeout=60, check=True)
    assert float(ended.stdout) >= 0.02


def libgomp():
    try:
        return ctypes.CDLL("libgomp.so.1")
    except OSError:
        pytest.skip("no libgomp on this machine")


def tasks():
    return len(os.listdir("/proc/self/task"))


def test_the_team_is_larger_than_the_machine_sleeps_and_ends():
    gomp = libgomp()
    before = tasks()
    team = SleepingTeam(gomp)
    assert tasks() - before > (os.cpu_count() or 1)
    cpu = time.process_time()
    time.sleep(0.2)
    assert time.process_time() - cpu < 0.15, "they are to sleep"
    team.end()
    ends = time.monotonic() + 10
    while tasks() > before and time.monotonic() < ends:
        time.sleep(0.01)
    assert tasks() <= before


def test_a_library_that_only_has_the_name_is_refused_before_anybody_waits_for_it():
    # The C library: this process itself has GOMP_parallel once anybody loaded libgomp for all.
    library = ctypes.CDLL(ctypes.util.find_library("c"))
    with pytest.raises(OSError, match="is none"):
        SleepingTeam(library)


def test_a_process_with_no_libgomp_or_with_two_is_left_alone(tmp_path):
    maps = tmp_path / "maps"
    maps.write_text("7f-80 r-xp 00000000 08:01 1   /usr/lib/libc.so.6\n7f-80 r-xp 0 00:00 0\n")
    with pytest.raises(OSError, match="0 libraries"):
        loaded_libgomp(maps)
    maps.write_text(
        "7f-80 r-xp 0 08:01 1 /usr/lib/libgomp.so.1.0.0\n81-82 r-xp 0 08:01 2 /torch libs/libgomp-a3.so.1\n"
    )
    with pytest.raises(OSError, match="2 libraries"):
        loaded_libgomp(maps)
