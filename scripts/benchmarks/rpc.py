"""`scripts/bench rpc`: node.ping on a real tars-node against a bare aiohttp handler and three JSON-RPC servers, in one run.

Law of this file: every server in its own process on loopback, the same load on each, rounds interleaved so that whatever else the
machine does meets all of them, medians compared. Before anything is measured each server must give the right answer.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import load
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
CONNECTIONS = (1, 32, 256)
COMPETITORS = ("fastapi-jsonrpc", "pjrpc", "aiohttp-rpc")
SERVERS = ("bare", "tars", *COMPETITORS)
AIM_OF_BARE = 0.70
AIM_OF_FASTEST = 1.25
"""Issue 2's aims, at 32 connections."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def served(name: str, competitors_python: str) -> Iterator[int]:
    """A server's port, once it answers rightly; ended afterwards."""
    port = free_port()
    with tempfile.TemporaryDirectory() as state, tempfile.TemporaryFile("w+") as said:
        if name == "tars":
            # No models: a ping needs none, and nothing else may use the processor.
            command = [sys.executable, "-m", "tars.node", "--listen", f"127.0.0.1:{port}", "--state-dir", state]
            environment = {**os.environ, "TARS_DEMO_MODELS": "false"}
        else:
            python = sys.executable if name == "bare" else competitors_python
            command = [python, str(HERE / "rpc_servers.py"), name, str(port)]
            environment = dict(os.environ)
        process = subprocess.Popen(command, env=environment, stdout=said, stderr=subprocess.STDOUT)
        try:
            wait_for_the_right_answer(name, port, process, said)
            yield port
        finally:
            process.terminate()
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_for_the_right_answer(name: str, port: int, process: subprocess.Popen[bytes], said: Any) -> None:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/rpc", data=load.BODY, headers={"Content-Type": "application/json"}
    )
    ends_at = time.monotonic() + 30
    while True:
        try:
            with urllib.request.urlopen(request, timeout=5) as response:
                answer = json.loads(response.read())
            break
        except OSError:
            if process.poll() is not None or time.monotonic() > ends_at:
                said.seek(0)
                raise SystemExit(f"bench: {name} does not answer. It said:\n{said.read()}") from None
            time.sleep(0.05)
    if answer.get("id") != 1 or set(answer.get("result", ())) != {"node", "version", "state"}:
        raise SystemExit(f"bench: {name} gives the wrong answer: {answer}")


def measure(competitors_python: str, seconds: int, rounds: int, console: Console) -> dict[str, dict[int, list[float]]]:
    rates: dict[str, dict[int, list[float]]] = {name: {count: [] for count in CONNECTIONS} for name in SERVERS}
    with ExitStack() as stack:
        ports = {name: stack.enter_context(served(name, competitors_python)) for name in SERVERS}
        for port in ports.values():
            load.requests_per_second(port, 32, 1)  # caches and branch predictors warm
        for number in range(rounds):
            for count in CONNECTIONS:
                console.print(f"round {number + 1} of {rounds}, {count} connections", style="dim")
                # Another first one each round: a neighbour's burst of work must not always meet the same server.
                turn = number % len(SERVERS)
                for name in (*SERVERS[turn:], *SERVERS[:turn]):
                    rates[name][count].append(load.requests_per_second(ports[name], count, seconds))
    return rates


def report(rates: dict[str, dict[int, list[float]]], console: Console) -> dict[str, Any]:
    medians = {name: {count: statistics.median(rates[name][count]) for count in CONNECTIONS} for name in SERVERS}
    table = Table(title=f"node.ping, requests/s (median, lowest-highest), load by {load.generator()}")
    table.add_column("server")
    for count in CONNECTIONS:
        table.add_column(f"{count} connections", justify="right")
    for name in SERVERS:
        cells = [
            f"{medians[name][count]:,.0f}  ({min(rates[name][count]):,.0f}-{max(rates[name][count]):,.0f})"
            for count in CONNECTIONS
        ]
        table.add_row(name, *cells)
    ratios: dict[int, dict[str, Any]] = {}
    for count in CONNECTIONS:
        fastest = max(COMPETITORS, key=lambda name: medians[name][count])
        # Round by round, so that what slowed one round down does not become a ratio.
        to_bare = statistics.median(
            ours / bare for ours, bare in zip(rates["tars"][count], rates["bare"][count], strict=True)
        )
        to_fastest = statistics.median(
            ours / theirs for ours, theirs in zip(rates["tars"][count], rates[fastest][count], strict=True)
        )
        ratios[count] = {"of_bare": to_bare, "of_fastest": to_fastest, "fastest": fastest}
    table.add_section()
    table.add_row("tars / bare", *(f"{ratios[count]['of_bare']:.2f}" for count in CONNECTIONS))
    table.add_row(
        "tars / fastest of the three",
        *(f"{ratios[count]['of_fastest']:.2f}  ({ratios[count]['fastest']})" for count in CONNECTIONS),
    )
    console.print(table)
    for aim, key, of in (
        (AIM_OF_BARE, "of_bare", "the bare handler"),
        (AIM_OF_FASTEST, "of_fastest", "the fastest of the three"),
    ):
        reached = ratios[32][key]
        verdict = "reached" if reached >= aim else "NOT reached"
        console.print(f"aim at 32 connections: at least {aim:g} x {of}: {reached:.2f}, {verdict}")
    return {
        "benchmark": "rpc",
        "load": load.generator(),
        "machine": {"processors": os.cpu_count(), "python": platform.python_version(), "system": platform.system()},
        "requests_per_second": rates,
        "ratios": ratios,
        "aims": {"of_bare": AIM_OF_BARE, "of_fastest": AIM_OF_FASTEST},
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench rpc", description=__doc__)
    parser.add_argument("--seconds", type=int, default=3, help="of load for each measurement (default: 3)")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each; the median counts (default: 5)")
    parser.add_argument("--json", type=Path, help="also write everything measured to this file")
    parser.add_argument("--competitors-python", default=sys.executable, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.seconds < 1 or options.rounds < 1:
        parser.error("--seconds and --rounds must be at least 1")
    console = Console()
    result = report(measure(options.competitors_python, options.seconds, options.rounds, console), console)
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
