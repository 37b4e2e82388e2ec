"""`scripts/bench router`: what it costs to call through another node, over the same call sent straight to the one that answers.

Law of this file: two real nodes of one mesh, of which only one has the models; the same calls by turns, so that heat and neighbours meet
both. Median milliseconds at one connection; calls a second at 32. On loopback, with the mesh's TLS: what is measured is TARS, no network.
Client, gateway, serving node and engine share this machine's processor, where two PCs would not: with fewer than four cores the throughput
of calls that compute next to nothing says what the processor does, not the router; that of calls that compute says both.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from chaos_deck import CHAT_MODEL, EMBEDDING_MODEL
from engine_results import Aim, verdict
from rich.console import Console
from rich.table import Table
from server_process import end_on_signals

from tars.client import Client

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from mesh_processes import Pc, assemble, stopping

AIM_ADDED_MS, AIM_SHARE = 1.5, 0.9
CONNECTIONS = 32
WARM_CALLS = 40
READY_SECONDS = 240.0
"""For the models to be loaded, also where the machine has something else to do."""
TEXTS = [f"Which node answers question number {number}, and how does the caller know of it?" for number in range(16)]
QUESTION = [{"role": "user", "content": "What is TARS?"}]
CALLS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "tokenize": ("inference.tokenize", {"model": CHAT_MODEL, "text": "What is TARS?"}),
    "embed, one short text": ("inference.embed", {"model": EMBEDDING_MODEL, "input": "What is TARS?", "encoding_format": "base64"}),
    "embed, 16 texts": ("inference.embed", {"model": EMBEDDING_MODEL, "input": TEXTS, "encoding_format": "base64"}),
    "chat, 64 tokens": ("inference.chat", {"model": CHAT_MODEL, "messages": QUESTION, "max_tokens": 64, "temperature": 0.0}),
    "complete, one token": ("inference.complete", {"model": CHAT_MODEL, "prompt": "TARS is", "max_tokens": 1, "temperature": 0.0}),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Measured:
    """One kind of call. Rounds in their order: both ways were measured in each."""

    what: str
    straight_ms: list[float]
    through_ms: list[float]
    straight_rate: list[float]
    through_rate: list[float]

    @property
    def added_ms(self) -> float:
        """The median of the rounds' differences: what slowed a whole round down is in both of its medians."""
        return statistics.median(b - a for a, b in zip(self.straight_ms, self.through_ms, strict=True))

    @property
    def share(self) -> float:
        """Of the throughput."""
        return statistics.median(b / a for a, b in zip(self.straight_rate, self.through_rate, strict=True))

    @property
    def aims(self) -> list[Aim]:
        """The issue's."""
        return [
            Aim(f"ms added at the median, {self.what}", self.added_ms, at_most=AIM_ADDED_MS),
            Aim(f"of the throughput at {CONNECTIONS} connections, {self.what}", self.share, at_least=AIM_SHARE),
        ]


async def one_after_the_other(call: Callable[[], Awaitable[Any]], count: int) -> float:
    """The median of so many calls, ms."""
    taken = []
    for _ in range(count):
        began = time.perf_counter()
        await call()
        taken.append((time.perf_counter() - began) * 1000)
    return statistics.median(taken)


async def at_once(call: Callable[[], Awaitable[Any]], seconds: float) -> float:
    """Calls a second of `CONNECTIONS` callers that ask again at once."""
    began = time.monotonic()
    done = 0

    async def caller() -> None:
        nonlocal done
        while time.monotonic() - began < seconds:
            await call()
            done += 1

    await asyncio.gather(*(caller() for _ in range(CONNECTIONS)))
    return done / (time.monotonic() - began)


async def measure(folder: Path, rounds: int, calls: int, seconds: float, say: Callable[[str], None]) -> list[Measured]:
    """Start the two nodes, measure, end them."""
    deploy = "".join(f'[[deploy]]\nmodel = "{model}"\n' for model in (CHAT_MODEL, EMBEDDING_MODEL))
    # Too small for any model: it can only send its calls on.
    gateway = Pc(folder, "gateway", memory_mib=300, more=deploy, mesh="mdns = false", priority=10)
    serving = Pc(folder, "serving", memory_mib=4000, more=deploy, mesh="mdns = false")
    measured = []
    async with stopping([gateway, serving]):
        await assemble([gateway, serving])
        await serving.holds(CHAT_MODEL, EMBEDDING_MODEL, seconds=READY_SECONDS)
        await gateway.answered_by(serving, seconds=60.0)
        say("two nodes are up; one has the models")
        async with AsyncExitStack() as stack:
            ways = [
                await stack.enter_async_context(Client(f"http://127.0.0.1:{pc.client_port}"))
                for pc in (serving, gateway)
            ]
            for what, (method, params) in CALLS.items():
                straight_call, through_call = ((lambda way=way: way.call(method, params)) for way in ways)  # noqa: B023  # called in this turn
                ms: tuple[list[float], list[float]] = ([], [])
                rates: tuple[list[float], list[float]] = ([], [])
                both = list(enumerate((straight_call, through_call)))
                for _, call in both:
                    await one_after_the_other(call, WARM_CALLS)
                for number in range(rounds):
                    for way, call in both if number % 2 else reversed(both):
                        ms[way].append(await one_after_the_other(call, calls))
                        rates[way].append(await at_once(call, seconds))
                measured.append(Measured(what, *ms, *rates))
                say(f"{what}: {measured[-1].added_ms:+.2f} ms, {measured[-1].share:.0%} of the throughput")
    return measured


def report(measured: list[Measured]) -> Table:
    """Medians of the rounds."""
    table = Table(
        title=f"straight to the node that answers, and through another one; {CONNECTIONS} connections, {os.cpu_count()} cores"
    )
    for heading in ("", "straight, ms", "through, ms", "added, ms", "straight, calls/s", "through, calls/s", "share"):
        table.add_column(heading, justify="right" if heading else "left")
    for each in measured:
        table.add_row(
            each.what,
            f"{statistics.median(each.straight_ms):.2f}",
            f"{statistics.median(each.through_ms):.2f}",
            f"{each.added_ms:+.2f}",
            f"{statistics.median(each.straight_rate):,.0f}",
            f"{statistics.median(each.through_rate):,.0f}",
            f"{each.share:.0%}",
        )
    return table


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench router", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="of each call, each way (default: 5)")
    parser.add_argument("--calls", type=int, default=200, help="one after the other in each round (default: 200)")
    parser.add_argument(
        "--seconds", type=float, default=3.0, help=f"of {CONNECTIONS} connections in each round (default: 3)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything measured to this file")
    options = parser.parse_args()
    if options.rounds < 1 or options.calls < 1 or options.seconds <= 0:
        parser.error("--rounds and --calls must be at least 1, --seconds more than 0")
    end_on_signals()
    console = Console(width=130, highlight=False)
    with tempfile.TemporaryDirectory(prefix="tars-router-") as folder:
        measured = asyncio.run(measure(Path(folder), options.rounds, options.calls, options.seconds, console.print))
    console.print(report(measured))
    aims = [aim for each in measured for aim in each.aims]
    for aim in aims:
        console.print(str(aim), markup=False)
    console.print(verdict(aims))
    if options.json is not None:
        result = {
            "benchmark": "router",
            "cores": os.cpu_count(),
            "calls": [{**asdict(each), "added_ms": each.added_ms, "share": each.share} for each in measured],
            "aims": [aim.to_json() for aim in aims],
        }
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
