"""Runs seeds, many at once, and says what failed: see `scripts/simulate`.

Law of this file: the command line of the simulation and nothing of what it simulates. A failing seed is named with the line that shows it.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import os
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field

from scenario import simulate
from virtual_callers import Tally
from world import Outcome

BLOCK = 50
"""Seeds that one process runs before it reports."""
SHOWN = 20
"""Failing seeds that are written out; the others are counted."""


@dataclass(slots=True)
class Total:
    """What many seeds came to."""

    seeds: int = 0
    virtual_seconds: float = 0.0
    cpu_seconds: float = 0.0
    steps: int = 0
    packets: int = 0
    decisions: int = 0
    loads: int = 0
    calls: Tally = field(default_factory=Tally)
    settled: list[float] = field(default_factory=list)
    failures: list[tuple[int, str]] = field(default_factory=list)

    def add(self, other: Total) -> None:
        """Together with these."""
        self.seeds += other.seeds
        self.virtual_seconds += other.virtual_seconds
        self.cpu_seconds += other.cpu_seconds
        self.steps += other.steps
        self.packets += other.packets
        self.decisions += other.decisions
        self.loads += other.loads
        self.calls.add(other.calls)
        self.settled += other.settled
        self.failures += other.failures

    def take(self, outcome: Outcome) -> None:
        """One more seed."""
        self.seeds += 1
        self.virtual_seconds += outcome.virtual_seconds
        self.steps += outcome.steps
        self.packets += outcome.packets
        self.decisions += outcome.decisions
        self.loads += outcome.loads
        self.calls.add(outcome.calls)
        if outcome.failure is None:
            self.settled.append(outcome.settled_after)
        else:
            self.failures.append((outcome.seed, outcome.failure))


def run_block(first: int, count: int) -> Total:
    """Seeds `first` to `first + count - 1`, in this process."""
    total = Total()
    began = time.process_time()
    gc.freeze()  # what was there before need not be looked through again and again
    try:
        for seed in range(first, first + count):
            total.take(simulate(seed))
    finally:
        gc.unfreeze()
    total.cpu_seconds = time.process_time() - began
    return total


def replay_line(seed: int) -> str:
    """What a person types to see this seed."""
    return f"scripts/simulate --seed {seed} --trace"


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1]


def _many(first: int, seeds: int, jobs: int) -> int:
    total, began = Total(), time.monotonic()
    blocks = [(start, min(BLOCK, first + seeds - start)) for start in range(first, first + seeds, BLOCK)]
    with ProcessPoolExecutor(jobs) as pool:
        running = [pool.submit(run_block, start, count) for start, count in blocks]
        for done in as_completed(running):
            block = done.result()
            shown = len(total.failures)
            total.add(block)
            for seed, why in block.failures[: max(0, SHOWN - shown)]:
                print(f"FAILED  {_last_line(why)}\n        {replay_line(seed)}", flush=True)
            if sys.stderr.isatty():
                print(f"\r{total.seeds}/{seeds}", end="", file=sys.stderr, flush=True)
    wall = time.monotonic() - began
    print(
        f"{total.seeds} seeds, {total.virtual_seconds / 3600:.1f} virtual hours, {total.packets} packets, {total.decisions} decisions, "
        f"{total.loads} loads and unloads in {wall:.0f} s: {total.seeds / wall:.1f} seeds/s, "
        f"{1000 * total.cpu_seconds / max(1, total.seeds):.0f} ms of CPU a seed"
    )
    calls = total.calls
    print(
        f"{calls.sent} calls: {calls.answered} answered ({calls.joined} by an earlier answer under their key), {calls.shed} shed, "
        f"{calls.failed} failed or left; {calls.attempts} attempts for {calls.calls}, {calls.continuations} of them continuations, "
        f"{calls.hedges} hedges, {calls.late} given up as late; {calls.gateways_lost} gateways lost"
    )
    if total.settled:
        settled = sorted(total.settled)
        print(
            f"settled {settled[len(settled) // 2]:.0f} s after the last fault (median), {settled[int(len(settled) * 0.99)]:.0f} s (p99), "
            f"{settled[-1]:.0f} s (most)"
        )
    if not total.failures:
        print("every invariant held")
        return 0
    print(f"{len(total.failures)} seeds FAILED")
    for why, count in Counter(" ".join(_last_line(why).split()[:6]) for _, why in total.failures).most_common(12):
        print(f"{count:6}  {why} ...")
    return 1


def _one(seed: int, *, trace: bool, packets: bool, digest: bool) -> int:
    outcome = simulate(seed, trace=trace or digest, packets=packets)
    if digest:
        print(hashlib.sha256("\n".join(outcome.history).encode()).hexdigest())
    elif trace or packets:
        print("\n".join(outcome.history))
    if outcome.failure is not None:
        print(f"FAILED  {outcome.failure}\n        {replay_line(seed)}")
        return 1
    if not digest:
        print(f"seed {seed}: every invariant held; settled {outcome.settled_after:.0f} s after the last fault")
    return 0


def main() -> int:
    """The command line; its exit status is 1 where a seed failed."""
    parser = argparse.ArgumentParser(prog="scripts/simulate", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=2000, metavar="N", help="how many (2000)")
    parser.add_argument("--first", type=int, default=0, metavar="K", help="the first one (0)")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, metavar="J", help="processes (one for each core)"
    )
    parser.add_argument("--seed", type=int, metavar="K", help="only this one")
    parser.add_argument("--trace", action="store_true", help="with --seed: its history")
    parser.add_argument("--packets", action="store_true", help="with --seed: its history with every envelope")
    parser.add_argument(
        "--digest", action="store_true", help="with --seed: the SHA-256 of its history, to compare two runs"
    )
    asked = parser.parse_args()
    if asked.seed is None and (asked.trace or asked.packets or asked.digest):
        parser.error("--trace, --packets and --digest show one seed: name it with --seed K")
    if min(asked.seeds, asked.jobs) < 1:
        parser.error("--seeds and --jobs are at least 1")
    if asked.seed is not None:
        return _one(asked.seed, trace=asked.trace, packets=asked.packets, digest=asked.digest)
    return _many(asked.first, asked.seeds, asked.jobs)


if __name__ == "__main__":
    raise SystemExit(main())
