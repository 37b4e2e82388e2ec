"""`scripts/bench first-byte`: what the node adds to the first byte of a streamed chat answer, over the same engine called directly.

Law of this file: the same file, settings and questions on both sides, one call each in turn, so that heat and neighbours meet both.
Directly: from `submit` to the engine's first delta, in this process. Through the node: from the request's last byte written to the
first `data:` byte read, on a kept-alive loopback connection (client -> HTTP -> dispatcher -> router -> worker's pipe -> engine, and
back).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from tars.catalogue import Catalogue
from tars.config import DevicesSection
from tars.core.tuning import settings_for
from tars.core.types import NodeId
from tars.devices.inventory import Inventory
from tars.messages.inference import ChatMessage, ChatParams, Delta
from tars.workers.engine import Event, LoadSpec, Submission
from tars.workers.llama_engine import LlamaEngine

AIM_MS = 3.0
"""Issue 2: less than 3 ms added at the median."""
QUESTIONS = (
    "What is TARS?",
    "How do I add a second PC?",
    "What happens when a node dies?",
    "Which port does tars-node use?",
    "How do I stream an answer?",
    "What does the coordinator do?",
    "Can I use the OpenAI client?",
)
NEW_TOKENS = 4


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running_node(model: Path | None) -> Iterator[int]:
    """A node's port, once its models are ready."""
    port = free_port()
    with tempfile.TemporaryDirectory() as state:
        command = [sys.executable, "-m", "tars.node", "--listen", f"127.0.0.1:{port}", "--state-dir", state]
        if model is not None:
            command += ["--model", str(model)]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert process.stdout is not None
        said = []
        try:
            for line in process.stdout:
                said.append(line)
                if re.search(r"models? ready after", line):
                    break
            else:
                raise SystemExit("bench: the node ended before it was ready:\n" + "".join(said))
            # What it says from now on must not fill the pipe.
            threading.Thread(target=process.stdout.read, daemon=True).start()
            yield port
        finally:
            process.terminate()
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


class NodeCaller:
    """One kept-alive connection."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=60)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._port = port

    def call(self, method: str, params: dict[str, Any], accept: str) -> tuple[float, bytes]:
        """Seconds until the first byte of data, and the whole answer."""
        body = json.dumps({"jsonrpc": "2.0", "method": method, "params": params, "id": 1}).encode()
        head = (
            f"POST /rpc HTTP/1.1\r\nHost: 127.0.0.1:{self._port}\r\nContent-Type: application/json\r\n"
            f"Accept: {accept}\r\nContent-Length: {len(body)}\r\n\r\n"
        ).encode()
        began = time.perf_counter()
        self._socket.sendall(head + body)
        read = b""
        first = 0.0
        # Chunked: the stream ends with an empty chunk; a plain answer has a length.
        while True:
            read += self._receive()
            if not first and (b"data:" in read or b"\r\n\r\n{" in read):
                first = time.perf_counter() - began
            if read.endswith(b"0\r\n\r\n"):
                return first, read
            length = re.search(rb"(?i)content-length: *(\d+)", read)
            if length and len(read.partition(b"\r\n\r\n")[2]) == int(length[1]):
                return first, read

    def _receive(self) -> bytes:
        received = self._socket.recv(65536)
        if not received:
            raise SystemExit("bench: the node closed the connection")
        return received


class DirectCaller:
    """The engine in this process, in a thread of its own as in a worker."""

    def __init__(self, spec: LoadSpec) -> None:
        self._engine = LlamaEngine()
        self._sequence = 0
        self._first = 0.0
        self._outcome: Event | Exception | None = None
        self._ended = threading.Event()
        loaded = threading.Event()
        problem: list[BaseException] = []

        def work() -> None:
            try:
                self._engine.load(spec, lambda stage, percent: None, self._emit)
            except BaseException as fault:
                problem.append(fault)
                raise
            finally:
                loaded.set()
            self._engine.run()

        self._thread = threading.Thread(target=work, daemon=True)
        self._thread.start()
        loaded.wait()
        if problem:
            raise SystemExit(f"bench: the engine does not load the model: {problem[0]}")

    def call(self, params: ChatParams) -> float:
        """Seconds until the first delta."""
        self._sequence += 1
        self._first = 0.0
        self._ended.clear()
        began = time.perf_counter()
        self._engine.submit(Submission(self._sequence, params, None))
        if not self._ended.wait(60) or isinstance(self._outcome, Exception):
            raise SystemExit(f"bench: the engine does not answer: {self._outcome}")
        return self._first - began

    def close(self) -> None:
        self._engine.unload()
        self._thread.join(10)

    def _emit(self, events: Sequence[tuple[int, Event | Exception]]) -> None:
        for _, event in events:
            self._first = self._first or time.perf_counter()
            if not isinstance(event, Delta):
                self._outcome = event
                self._ended.set()


def spec_like_the_nodes(plan: dict[str, Any], model: Path | None) -> LoadSpec:
    """The node's own chat replica, as its coordinator would load it."""
    catalogue = Catalogue.load(extra=[])
    if model is not None:
        catalogue.add_file(model)
    assignments = plan["assignments"]
    for assignment in assignments:
        entry = catalogue.resolve(assignment["model"])
        variant = next(each for each in entry.variants if each.name == assignment["variant"])
        path = catalogue.path_of(entry, variant)
        if path is not None and path.is_file():
            break
    else:
        raise SystemExit("bench: the node serves no chat model here")
    inventory = Inventory(NodeId(assignment["node"]), DevicesSection())
    try:
        device = next(one for one in inventory.snapshot({}) if one.id == assignment["device"])
    finally:
        inventory.close()
    settings = settings_for(device, entry.kind, variant.shape, context=assignment["context"], slots=assignment["slots"])
    return LoadSpec(
        replica="direct",
        model=entry.name,
        engine="llama",
        path=str(path),
        cuda_device=None if device.index is None else str(device.index),
        context=settings.context,
        slots=settings.slots,
        gpu_layers=settings.gpu_layers,
        threads=settings.threads,
        batch=settings.batch,
        micro_batch=settings.micro_batch,
        flash_attention=settings.flash_attention,
        kv_type=settings.kv_type.value,
        mmap=settings.mmap,
        precision=settings.precision.value,
    )


def measure(model: Path | None, calls: int) -> tuple[str, list[float], list[float]]:
    with running_node(model) as port:
        node = NodeCaller(port)
        plan = json.loads(node.call("mesh.plan", {}, "application/json")[1].partition(b"\r\n\r\n")[2])["result"]
        spec = spec_like_the_nodes(plan, model)
        direct = DirectCaller(spec)
        through: list[float] = []
        directly: list[float] = []
        for number in range(calls + len(QUESTIONS)):
            role: Literal["user"] = "user"
            params = ChatParams(
                model=spec.model,
                messages=[ChatMessage(role=role, content=QUESTIONS[number % len(QUESTIONS)])],
                max_tokens=NEW_TOKENS,
                temperature=0,
            )
            sent = params.model_dump(exclude_unset=True)
            # Whoever is first finds cold caches: they take turns.
            if number % 2:
                first_direct = direct.call(params)
                first_node, answer = node.call("inference.chat", sent, "text/event-stream")
            else:
                first_node, answer = node.call("inference.chat", sent, "text/event-stream")
                first_direct = direct.call(params)
            if b'"result"' not in answer or b"inference.delta" not in answer:
                raise SystemExit(f"bench: the node does not answer rightly: {answer.decode(errors='replace')}")
            # The first round warms both up.
            if number >= len(QUESTIONS):
                through.append(first_node * 1000)
                directly.append(first_direct * 1000)
        direct.close()
    return spec.model, through, directly


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench first-byte", description=__doc__)
    parser.add_argument("--calls", type=int, default=200, help="measured on each side (default: 200)")
    parser.add_argument("--model", type=Path, help="a GGUF file instead of the demo's chat model")
    parser.add_argument("--json", type=Path, help="also write everything measured to this file")
    options = parser.parse_args()
    if options.calls < 1:
        parser.error("--calls must be at least 1")
    name, through, directly = measure(options.model, options.calls)
    added = statistics.median(through) - statistics.median(directly)
    table = Table(title=f"first byte of a streamed chat answer, ms, {name}, {options.calls} calls each")
    for heading in ("", "median", "10 %", "90 %"):
        table.add_column(heading, justify="right" if heading else "left")
    for label, values in (("through the node", through), ("engine directly", directly)):
        ordered = sorted(values)
        tenth, ninetieth = ordered[len(ordered) // 10], ordered[len(ordered) * 9 // 10]
        table.add_row(label, f"{statistics.median(values):.2f}", f"{tenth:.2f}", f"{ninetieth:.2f}")
    console = Console()
    console.print(table)
    verdict = "reached" if added < AIM_MS else "NOT reached"
    console.print(f"added at the median: {added:.2f} ms; aim: less than {AIM_MS:g} ms, {verdict}")
    if options.json is not None:
        result = {
            "benchmark": "first-byte",
            "model": name,
            "added_ms": added,
            "node_ms": through,
            "engine_ms": directly,
        }
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
