"""`scripts/bench chaos`: three real nodes under a steady mixed load while a nemesis kills, freezes, cuts off and drowns them, by a seed.

Law of this file: the order of a run. First every different call of the deck is made once in an undisturbed mesh: its answer is the right
one. Then some calm minutes of the same load, which say what a call takes; then the faults, spread over the calls. Every answer is checked.
It ends by itself and leaves no process and no network behind.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections.abc import Awaitable
from contextlib import suppress
from pathlib import Path
from typing import Any

from chaos_answers import Heard, judge
from chaos_batch import BatchTimes, frozen_batch
from chaos_callers import PATIENCE_SECONDS, Callers, CallRecord, Gateway, undisturbed
from chaos_deck import Call, Kind, deck
from chaos_faults import Fault, FaultKind, schedule
from chaos_mesh import ChaosMesh, running_mesh
from chaos_nemesis import Nemesis
from chaos_picture import page
from chaos_results import Summary, summarise
from engine_results import Aim, verdict
from network_namespaces import why_not
from rich.console import Console
from rich.table import Table
from server_process import end_on_signals

from tars.demo.help_desk import load_help_desk

MOST_DIFFERENT, LEAST_DIFFERENT = 150, 30
"""Calls; a short run asks each of its own about four times, too."""
KEYED_SHARE, TWIN_SHARE = 0.5, 0.15
"""Of the calls: those with an idempotency key; of these, those that are sent a second time under the same key."""
TWIN_LATER_SECONDS = 3.0
"""How much later at most, through the other gateway: while the first runs, or afterwards."""
CAPACITY_CALLERS, CAPACITY_SECONDS = 16, 10.0
STEADY_SHARE, OVERLOAD = 0.3, 5.0
"""Of what the mesh was measured to answer: with one of two replicas gone the other one still keeps up."""
CALM_SECONDS = 30.0
MOST_IN_FLIGHT = 1500
"""Calls; more would measure the callers' own PC."""


class Load:
    """Calls that come at a rate, whatever becomes of those before them (exponential gaps, by the seed)."""

    def __init__(self, callers: Callers, calls: list[Call], seed: int) -> None:
        self._callers = callers
        self._calls = calls
        self._draw = random.Random(f"load {seed}")
        self._order: list[Call] = []
        self._tasks: set[asyncio.Task[CallRecord]] = set()
        self._keys = 0
        self.sent = 0
        self._grew = asyncio.Event()

    def _next(self) -> Call:
        if not self._order:
            self._order = self._draw.sample(self._calls, len(self._calls))
        return self._order.pop()

    def _one(self, phase: str) -> asyncio.Task[CallRecord]:
        call, gateways = self._next(), self._callers.gateways
        number = self._draw.randrange(len(gateways))
        face = self._draw.choice(("rpc", "openai"))
        key = twin = None
        if self._draw.random() < KEYED_SHARE:
            self._keys += 1
            key = f"chaos {self._keys}"
            # Only JSON-RPC's answers tell one computation from another one.
            if self._draw.random() < TWIN_SHARE:
                face, twin = "rpc", self._keys
        task = self._task(self._callers.make(call, gateways[number], face=face, key=key, phase=phase, twin=twin))
        if twin is not None:
            later = self._draw.uniform(0.0, TWIN_LATER_SECONDS)
            self._task(self._later(later, call, gateways[1 - number], key, phase, twin))
        return task

    async def _later(
        self, seconds: float, call: Call, gateway: Gateway, key: str | None, phase: str, twin: int
    ) -> CallRecord:
        await asyncio.sleep(seconds)
        return await self._callers.make(call, gateway, face="rpc", key=key, phase=phase, twin=twin)

    def _task(self, making: Awaitable[CallRecord]) -> asyncio.Task[CallRecord]:
        task = asyncio.ensure_future(making)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self.sent += 1
        self._grew.set()
        return task

    async def reached(self, count: int) -> None:
        """Wait until so many were sent."""
        while self.sent < count:
            self._grew.clear()
            await self._grew.wait()

    async def steady(self, rate: float, seconds: float, phase: str) -> None:
        """`rate` calls a second for so long."""
        ends = at = time.monotonic()
        ends += seconds
        while (at := at + self._draw.expovariate(rate)) < ends:
            await asyncio.sleep(max(0.0, at - time.monotonic()))
            if len(self._tasks) < MOST_IN_FLIGHT:
                self._one(phase)
        await asyncio.sleep(max(0.0, ends - time.monotonic()))

    async def capacity(self, callers: int, seconds: float) -> float:
        """Calls a second that the mesh answers when so many callers ask again at once."""
        ends = time.monotonic() + seconds
        answered = 0

        async def caller() -> None:
            nonlocal answered
            while time.monotonic() < ends:
                await self._one("warm")
                answered += time.monotonic() < ends

        await asyncio.gather(*(caller() for _ in range(callers)))
        return answered / seconds

    async def drained(self) -> None:
        """Wait until every call has ended; none takes longer than its patience."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=PATIENCE_SECONDS + 15)
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)


class Run:
    """One whole run; `summary` and `batch` are there at its end."""

    def __init__(self, options: argparse.Namespace, console: Console) -> None:
        self._options = options
        self._console = console
        self._right: dict[int, Heard] = {}
        self.callers: Callers | None = None
        self.nemesis: Nemesis | None = None
        self.began = 0.0
        self.links = False
        self.rates: dict[str, float] = {}
        self.cut_short = False
        self.batch: BatchTimes | None = None

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _judged(self, call: Call, heard: Heard) -> tuple[tuple[str, ...], bool]:
        found = judge(call, self._right[call.number], heard, exact=self._options.mode == "exact")
        return found.problems, found.parted

    async def run(self) -> None:
        """Everything, in its order."""
        questions = [question for question, _ in load_help_desk().lessons()]
        size = min(max(self._options.calls // 4, LEAST_DIFFERENT), MOST_DIFFERENT)
        calls = deck(self._options.seed, size, questions)
        with tempfile.TemporaryDirectory(prefix="tars-chaos-") as folder:
            if self._options.calls:
                (home := Path(folder) / "mesh").mkdir()
                async with running_mesh(
                    home, self._options.mode, slots=4, loopback=self._options.loopback, logs=self._options.logs
                ) as mesh:
                    await self._with(mesh, calls)
            if self._options.batch:
                (home := Path(folder) / "batch").mkdir()
                chats = [call for call in calls if call.kind is Kind.CHAT_STREAM and "logit_bias" in call.params]
                self.batch = await frozen_batch(
                    home, self._options.mode, chats, self._options.batch, self.say, loopback=self._options.loopback
                )

    async def _with(self, mesh: ChaosMesh, calls: list[Call]) -> None:
        self.links = mesh.links
        if not self.links:
            why = "as asked" if self._options.loopback else why_not()
            self.say(f"the nodes are on loopback, and no cable is pulled: {why}")
        self.say(f"three nodes are up, every replica is ready; {len(calls)} different calls are made undisturbed")
        for call in calls:
            self._right[call.number] = await undisturbed(mesh.gateways[call.number % 2], call)
        for gateway in mesh.gateways:
            gateway.watch(mesh.gateways)
        self.callers = Callers(mesh.gateways, self._judged)
        load = Load(self.callers, calls, self._options.seed)
        capacity = await load.capacity(CAPACITY_CALLERS, CAPACITY_SECONDS)
        rate = max(0.5, STEADY_SHARE * capacity)
        self.rates = {"capacity": capacity, "steady": rate}
        self.say(
            f"the mesh answers {capacity:.1f} calls a second; the steady load is {rate:.1f}, an overload {OVERLOAD * capacity:.0f}"
        )
        self.began = time.monotonic()
        await load.steady(rate, min(CALM_SECONDS, self._options.minutes * 60 / 4), "calm")
        self.callers.records = [
            record for record in self.callers.records if record.phase != "warm" or record.outcome != "right"
        ]
        await self._chaos(mesh, load, rate, capacity)

    def _faults(self, links: bool) -> list[Fault]:
        only = [FaultKind[name.upper()] for name in self._options.only] or None
        return schedule(self._options.seed, self._options.faults, links=links, only=only)

    async def _chaos(self, mesh: ChaosMesh, load: Load, rate: float, capacity: float) -> None:
        first, faults = load.sent, self._faults(mesh.links)
        a_fault = self._options.calls / max(1, len(faults))

        async def burst(seconds: float) -> None:
            await load.steady(OVERLOAD * capacity, seconds, "burst")

        async def due(number: int) -> None:
            await load.reached(first + int(number * a_fault))

        self.nemesis = Nemesis(mesh, faults, burst, due, self.say)
        steady = asyncio.create_task(load.steady(rate, 1e9, "chaos"))
        try:
            began = time.monotonic()
            self.cut_short = not await self.nemesis.run(self._options.minutes * 60)
            async with asyncio.timeout(max(1.0, began + self._options.minutes * 60 - time.monotonic())):
                await load.reached(first + (0 if self.cut_short else self._options.calls))
        except TimeoutError:
            self.cut_short = True
        finally:
            steady.cancel()
            with suppress(asyncio.CancelledError):
                await steady
        if self.cut_short:
            self.say(
                f"it ends here, with {len(self.nemesis.records)} of {len(faults)} faults and {load.sent - first} calls"
            )
        # What was struck last is mended, so that every call can end as it should.
        with suppress(TimeoutError):
            await mesh.well(60.0)
        await load.drained()

    def summary(self) -> Summary | None:
        """None where no call was made."""
        if self.callers is None or self.nemesis is None:
            return None
        calm = [record for record in self.callers.records if record.phase in ("calm", "warm")]
        chaos = [record for record in self.callers.records if record.phase in ("chaos", "burst")]
        return summarise(calm, chaos, self.nemesis.records)


def show(summary: Summary, console: Console) -> None:
    """The tables of what happened."""
    table = Table(title="faults, seconds from the moment it struck (median, most)")
    for heading in ("fault", "times", "others know", "streams go on", "all replicas ready", "longest gap"):
        table.add_column(heading, justify="left" if heading == "fault" else "right")

    def pair(one: float | None, most: float | None) -> str:
        return "-" if one is None or most is None else f"{one:.2f}  {most:.2f}"

    for each in summary.faults:
        table.add_row(
            each.kind,
            str(each.count),
            pair(each.detected, each.detected_most),
            pair(each.recovered, each.recovered_most),
            pair(each.mended, each.mended_most),
            "-" if each.longest_gap is None else f"{each.longest_gap:.2f}",
        )
    console.print(table)
    loaded = ""
    if summary.overload_added_p50 is not None and summary.overload_added_p99 is not None:
        loaded = f"; during overloads {summary.overload_added_p50:.3f} and {summary.overload_added_p99:.3f}"
    outcomes = ", ".join(f"{count} {name}" for name, count in sorted(summary.by_outcome.items()))
    for line in (
        f"calls: {summary.sent} sent, {outcomes}; {summary.duplicated} computed twice of {summary.twins} sent twice under one key",
        f"refused for want of room: {summary.refusals} times, each told when to come back",
        f"sent again by their callers, because the gateway itself was gone: {summary.sent_again}",
        f"answered by another replica than the first one tried: {summary.attempted_elsewhere}, "
        f"of them {summary.continued} after the first token",
        f"attempts a call: {summary.attempts_a_call:.2f}"
        + (
            ""
            if summary.overload_attempts_a_call is None
            else f"; during overloads {summary.overload_attempts_a_call:.2f}"
        ),
        f"right, but another text than the undisturbed one since a near tie: {summary.parted}",
        f"added latency, seconds: p50 {summary.added_p50:.3f}, p99 {summary.added_p99:.3f}{loaded}",
        f"longest gap inside a stream, seconds: {summary.longest_gap:.2f} where its gateway lived, {summary.calm_gap:.2f} in calm; "
        f"{summary.longest_gap_cut_off:.2f} where its gateway was cut off itself, {summary.longest_gap_sent_again:.2f} where its caller "
        "had to send it again",
        *(f"  {problem}" for problem in summary.problems),
    ):
        console.print(line, markup=False, soft_wrap=True)


def as_json(run: Run, summary: Summary | None, options: argparse.Namespace) -> dict[str, Any]:
    """Everything measured; times of calls and faults in seconds since the calm minutes began."""
    result: dict[str, Any] = {
        "benchmark": "chaos",
        "mode": options.mode,
        "seed": options.seed,
        "links": run.links,
        "rates": run.rates,
        "cut_short": run.cut_short,
        "summary": None if summary is None else summary.to_json(),
        "batch": None if run.batch is None else run.batch.to_json(),
    }
    if run.callers is not None and run.nemesis is not None:

        def since(at: float | None) -> float | None:
            return None if at is None else round(at - run.began, 4)

        result["faults"] = [
            {
                "kind": fault.kind, "node": fault.node, "model": fault.model, "struck": since(fault.struck),
                "over": since(fault.over), "detected": since(fault.detected), "mended": since(fault.mended),
                "problems": fault.problems,
            }
            for fault in run.nemesis.records
        ]  # fmt: skip
        result["calls"] = [
            {
                "call": record.call, "kind": record.kind, "face": record.face, "phase": record.phase,
                "gateway": record.gateway, "keyed": record.keyed, "twin": record.twin, "sent": since(record.sent),
                "ended": since(record.ended), "outcome": record.outcome, "parted": record.parted,
                "first": since(record.pieces[0]) if record.pieces else None, "gap": record.longest_gap and record.longest_gap[1],
                "sent_again": len(record.sent_again), "refusals": record.refusals, "attempts": record.attempts,
                "run": record.run, "problems": record.problems,
            }
            for record in run.callers.records
        ]  # fmt: skip
    return result


def all_aims(summary: Summary | None, batch: BatchTimes | None) -> list[Aim]:
    """Of the parts that ran."""
    return [*(summary.aims if summary is not None else ()), *(batch.aims if batch is not None else ())]


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench chaos", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--calls", type=int, default=10_000, help="at least so many (default: 10000); 0: only the batch"
    )
    parser.add_argument("--faults", type=int, default=100, help="spread over the calls (default: 100)")
    parser.add_argument("--seed", type=int, default=1, help="of the calls, their order and the faults (default: 1)")
    parser.add_argument("--mode", choices=("fast", "exact"), default="fast", help="of continuation (default: fast)")
    parser.add_argument("--minutes", type=float, default=120.0, help="the faults end after so many (default: 120)")
    parser.add_argument(
        "--batch",
        type=int,
        default=60,
        metavar="N",
        help="chats of the batch with one of two nodes frozen (default: 60); 0: none",
    )
    kinds = [kind.name.lower() for kind in FaultKind]
    parser.add_argument("--only", choices=kinds, nargs="+", default=[], metavar="KIND", help=f"of {', '.join(kinds)}")
    parser.add_argument(
        "--loopback", action="store_true", help="no networks of their own for the nodes, also where they can be made"
    )
    parser.add_argument("--logs", type=Path, metavar="FOLDER", help="keep what the nodes print in this folder")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured to this file")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with a picture to this file")
    options = parser.parse_args()
    if options.calls < 0 or options.faults < 0 or options.batch < 0 or options.minutes <= 0:
        parser.error("--calls, --faults and --batch must not be negative, and --minutes must be more than 0")
    if options.logs is not None:
        options.logs.mkdir(parents=True, exist_ok=True)
    end_on_signals()
    console = Console(width=130, highlight=False)
    run = Run(options, console)
    try:
        asyncio.run(run.run())
    except KeyboardInterrupt:
        console.print("interrupted: every node is ended")
        return 130
    summary = run.summary()
    if summary is not None:
        show(summary, console)
    aims = all_aims(summary, run.batch)
    for aim in aims:
        console.print(str(aim), markup=False)
    console.print(verdict(aims))
    result = as_json(run, summary, options)
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if options.html is not None:
        options.html.write_text(page(result), encoding="utf-8")
    return 0 if summary is None or summary.nothing_lost else 1


if __name__ == "__main__":
    sys.exit(main())
