"""`scripts/bench overload`: a real tars-node under 1, 2 and 5 times the calls that it can answer. Does it answer as many as before?

Law of this file: the capacity is measured first, on the same node, with callers who wait for their answers; then calls come when they come
(Poisson), whether or not earlier ones were answered. Three callers with a key each: a greedy one whose calls are most of the load, a modest
one who asks for less than a fair share, and a job whose calls are `batch`. Every call ends as an answer, as a refusal that came at once, or
as one that came too late; nothing else may happen.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import psutil
from engine_prompts import text_of
from engine_results import Aim, quantile, verdict
from engine_servers import Deployed, tars_node
from rich.console import Console
from rich.table import Table
from server_process import Server, end_on_signals

CHAT, EMBED = "tars-help-desk", "all-minilm-l6-v2"
MODELS = {"tokens": CHAT, "texts": EMBED}
FACTORS = (1.0, 2.0, 5.0)
KEYS = {name: f"{name}-key-of-the-benchmark" for name in ("greedy", "modest", "batch")}
MODEST_PART, BATCH_PART = 0.2, 0.5
"""Of the capacity: what these two ask for, whatever the load is."""
TOKENS = 96
"""Of an answer: so many that the engine is what is short, not the loop that takes the calls."""
TEXTS, WORDS = 16, 24
"""Of a call for embeddings, and words of a text or a prompt."""
VOCABULARY = (
    "the of and to in a is that for it as was with be by on not he his but at are this have from or had an they which one you were all "
    "her she there would their we him been has when who will no more if out so up said what its about than into them can only other time"
)
DEADLINE_PART = 3.0
"""Time-out of a call, in times that of an answer at full capacity."""
CLOSED_CALLERS = 12
AIM_FLAT, AIM_MODEST, AIM_LATE, AIM_BATCH = 0.9, 0.95, 0.05, 0.05
REFUSED_SECONDS = 0.25
"""A refusal after more than this did not come at once: some wait, because their turn was expected sooner than it came."""


@dataclass(frozen=True, slots=True)
class Seen:
    """One call: `kind` is `answered`, or the kind of its error."""

    caller: str
    kind: str
    seconds: float
    units: float = 0.0


@dataclass(slots=True)
class Load:
    """What came of one load. Rates a second."""

    factor: float
    offered: float
    answered: float
    units: float
    kinds: dict[str, int]
    accepted_p50_ms: float
    accepted_p99_ms: float
    refused_p50_ms: float
    refused_p99_ms: float
    late_part: float
    part_answered: dict[str, float] = field(default_factory=dict)
    """By caller: of its calls."""
    part_of_all: dict[str, float] = field(default_factory=dict)
    """By caller: of all answers."""
    node_ms: float = 0.0
    """Processor time of the node (without its worker) for each call, answered or refused."""


def summarise(factor: float, seconds: float, seen: Sequence[Seen]) -> Load:
    """Of the calls that were sent in `seconds`."""
    answered = [each for each in seen if each.kind == "answered"]
    refused = [each.seconds * 1000 for each in seen if each.kind == "overloaded"]
    sent, good = Counter(each.caller for each in seen), Counter(each.caller for each in answered)
    # One that was let in and had no answer in time: what it cost the engine was for nothing.
    late = sum(each.kind == "deadline_exceeded" for each in seen)
    return Load(
        factor=factor,
        offered=len(seen) / seconds,
        answered=len(answered) / seconds,
        units=sum(each.units for each in answered) / seconds,
        kinds=dict(Counter(each.kind for each in seen)),
        accepted_p50_ms=quantile([each.seconds * 1000 for each in answered] or [0.0], 0.5),
        accepted_p99_ms=quantile([each.seconds * 1000 for each in answered] or [0.0], 0.99),
        refused_p50_ms=quantile(refused or [0.0], 0.5),
        refused_p99_ms=quantile(refused or [0.0], 0.99),
        late_part=late / max(1, len(answered) + late),
        part_answered={caller: good[caller] / sent[caller] for caller in sorted(sent)},
        part_of_all={caller: good[caller] / max(1, len(answered)) for caller in sorted(sent)},
    )


def aims_of(what: str, capacity: float, loads: Sequence[Load]) -> list[Aim]:
    """What the loads are to show; `capacity` in units a second."""
    most = loads[-1]
    usual = {"overloaded", "deadline_exceeded", "answered"}
    odd = {kind for load in loads for kind in load.kinds} - usual
    return [
        Aim(
            f"{what}: throughput at {most.factor:g} times the capacity, of the capacity",
            most.units / capacity,
            at_least=AIM_FLAT,
        ),
        Aim(f"{what}: of the modest caller's calls answered", most.part_answered["modest"], at_least=AIM_MODEST),
        Aim(f"{what}: let in and not answered in time", most.late_part, at_most=AIM_LATE),
        Aim(f"{what}: the batch job's part of the answers", most.part_of_all["batch"], at_least=AIM_BATCH),
        Aim(f"{what}: half of the refusals come within, ms", most.refused_p50_ms, at_most=REFUSED_SECONDS * 1000),
        Aim(f"{what}: other ends of calls ({', '.join(sorted(odd)) or 'none'})", float(len(odd)), at_most=0.0),
    ]


class Caller:
    """Sends calls of one kind to one node."""

    def __init__(self, url: str, http: aiohttp.ClientSession, embeds: bool) -> None:
        self._url = url
        self._http = http
        self._embeds = embeds
        self._words = VOCABULARY.split()
        self._number = 0

    async def call(self, caller: str, timeout_seconds: float) -> Seen:
        """One call, to its end."""
        self._number += 1
        meta: dict[str, Any] = {"timeout_ms": max(1, int(timeout_seconds * 1000))}
        if caller == "batch":
            meta["priority"] = "batch"
        method, params = self._work()
        body = {"jsonrpc": "2.0", "id": self._number, "method": method, "params": {**params, "_meta": meta}}
        headers = {"Authorization": f"Bearer {KEYS[caller]}", "Content-Type": "application/json"}
        began = time.perf_counter()
        async with self._http.post(f"{self._url}/rpc", data=orjson.dumps(body), headers=headers) as response:
            answer = orjson.loads(await response.read())
        seconds = time.perf_counter() - began
        if "error" in answer:
            return Seen(caller, answer["error"]["data"]["kind"], seconds)
        usage = answer["result"]["usage"]
        return Seen(caller, "answered", seconds, usage["completion_tokens"] or usage["prompt_tokens"])

    def _work(self) -> tuple[str, dict[str, Any]]:
        """Method and params of the next call, unlike the ones before."""
        count = TEXTS if self._embeds else 1
        texts = [text_of(self._words, WORDS, f"{self._number}/{index}") for index in range(count)]
        if self._embeds:
            return "inference.embed", {"model": EMBED, "input": texts, "encoding_format": "base64"}
        return "inference.complete", {"model": CHAT, "prompt": texts[0], "max_tokens": TOKENS}


async def capacity_of(caller: Caller, seconds: float) -> tuple[float, float, float]:
    """Answers and units a second with callers who wait, and the seconds of an answer: what the node does at its best."""
    ends_at = time.perf_counter() + seconds
    seen: list[Seen] = []

    async def one() -> None:
        while time.perf_counter() < ends_at:
            seen.append(await caller.call("greedy", 60.0))

    await asyncio.gather(*(one() for _ in range(CLOSED_CALLERS)))
    wrong = [each.kind for each in seen if each.kind != "answered"]
    if wrong:
        raise SystemExit(f"bench: a call failed while the capacity was measured: {wrong[0]}")
    took = seconds + seen[-1].seconds / 2
    typical = sorted(each.seconds for each in seen)[len(seen) // 2]
    return len(seen) / took, sum(each.units for each in seen) / took, typical


async def offered(
    caller: Caller, factor: float, capacity: float, timeout_seconds: float, seconds: float, process: psutil.Process
) -> Load:
    """`factor` times the capacity for so long. `process`: the node's."""
    rates = {"modest": MODEST_PART * capacity, "batch": BATCH_PART * capacity}
    rates["greedy"] = max(0.0, factor * capacity - sum(rates.values()))
    dice = random.Random(int(factor * 1000))
    arrivals = sorted(arrival for name, rate in rates.items() for arrival in _poisson(dice, name, rate, seconds))
    began, spent = time.perf_counter(), _spent(process)
    tasks: list[asyncio.Task[Seen]] = []
    for at, name in arrivals:
        if (wait := began + at - time.perf_counter()) > 0:
            await asyncio.sleep(wait)
        tasks.append(asyncio.create_task(caller.call(name, timeout_seconds)))
    load = summarise(factor, seconds, await asyncio.gather(*tasks))
    load.node_ms = (_spent(process) - spent) * 1000 / max(1, len(tasks))
    return load


def _spent(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _poisson(dice: random.Random, name: str, rate: float, seconds: float) -> Iterator[tuple[float, str]]:
    at = dice.expovariate(rate) if rate > 0 else seconds
    while at < seconds:
        yield at, name
        at += dice.expovariate(rate)


def node(models: Sequence[str]) -> AbstractContextManager[Server]:
    """A node with these models and a key for each caller, once all are ready."""
    keys = "".join(f'[[security.api_key]]\nname = "{name}"\nkey = "{key}"\n' for name, key in KEYS.items())
    more = f"[limits]\nmax_concurrent_calls = 1024\n{keys}"
    return tars_node([Deployed(model) for model in models], more=more, api_key=KEYS["greedy"])


async def measure(server: Server, seconds: float, console: Console, what: Sequence[str]) -> dict[str, Any]:
    """All loads; what was seen."""
    url, process = server.url, psutil.Process(server.pid)
    found: dict[str, Any] = {}
    aims: list[Aim] = []
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=120)) as http:
        for each in what:
            caller = Caller(url, http, each == "texts")
            await capacity_of(caller, 2.0)
            capacity, units, typical = await capacity_of(caller, seconds)
            timeout = DEADLINE_PART * typical
            console.print(f"{each}: {capacity:.1f} answers/s, {units:.0f} tokens/s; time-out {timeout * 1000:.0f} ms")
            loads = []
            for factor in FACTORS:
                loads.append(await offered(caller, factor, capacity, timeout, seconds, process))
                await asyncio.sleep(min(2.0, timeout))
            _, after, _ = await capacity_of(caller, seconds)
            console.print(table_of(each, loads))
            # Machines get slower and faster: the capacity is what it was before and after.
            aims += aims_of(each, (units + after) / 2, loads)
            found[each] = {
                "capacity_per_second": capacity, "tokens_per_second": [units, after], "timeout_seconds": timeout,
                "loads": [asdict(load) for load in loads],
            }  # fmt: skip
    for aim in aims:
        console.print(str(aim))
    console.print(verdict(aims))
    return {**found, "aims": [aim.to_json() for aim in aims]}


def table_of(what: str, loads: Sequence[Load]) -> Table:
    """For people."""
    table = Table(title=what)
    for column in (
        "load",
        "sent/s",
        "answered/s",
        "tokens/s",
        "p50 ms",
        "p99 ms",
        "refused",
        "in ms (p50, p99)",
        "late",
        "node ms/call",
    ):
        table.add_column(column, justify="right")
    for caller in KEYS:
        table.add_column(f"{caller} answered", justify="right")
    for load in loads:
        table.add_row(
            f"{load.factor:g}x", f"{load.offered:.1f}", f"{load.answered:.1f}", f"{load.units:.0f}",
            f"{load.accepted_p50_ms:.0f}", f"{load.accepted_p99_ms:.0f}", str(load.kinds.get("overloaded", 0)),
            f"{load.refused_p50_ms:.0f}, {load.refused_p99_ms:.0f}", f"{load.late_part:.1%}", f"{load.node_ms:.1f}",
            *(f"{load.part_answered.get(caller, 0):.0%}" for caller in KEYS),
        )  # fmt: skip
    return table


def main() -> None:
    end_on_signals()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each load")
    parser.add_argument("--only", default="tokens,texts", help="tokens, texts, or both with a comma")
    parser.add_argument("--json", type=Path, help="write everything here")
    given = parser.parse_args()
    console = Console(width=160)
    what = given.only.split(",")
    if unknown := [each for each in what if each not in MODELS]:
        parser.error(f"--only knows {', '.join(MODELS)}, and not {unknown[0]}")
    with node([MODELS[each] for each in what]) as server:
        found = asyncio.run(measure(server, given.seconds, console, what))
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
