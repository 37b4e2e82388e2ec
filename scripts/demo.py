"""The demo's work: start a node, wait for it, one chat call and one embedding call over JSON-RPC, then stay up. `scripts/demo` calls it.

Law of this file: it uses TARS as any service would, through the Python client; and whatever happens (an answer, a failure, Ctrl-C,
SIGTERM, a closed terminal, SIGKILL on Linux), the node that it started does not outlive it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.text import Text

from tars.cli.chat import Written, answer
from tars.cli.connection import Connection
from tars.cli.output import cosine, plain
from tars.cli.waiting import wait_until_ready
from tars.client import Client, GenerationOptions
from tars.core.types import Bytes
from tars.errors import TarsError
from tars.messages.inference import ChatMessage
from tars.messages.node import NodeDescription

Result = TypeVar("Result")

PORT = 8000
"""`tars-node`'s own default, so that every example works as printed."""

QUESTION = "How do I add a second PC?"
SENTENCES = (
    "How do I add a second PC?",
    "Joining another computer to the mesh",
    "My cat sleeps on the radiator",
)
"""Two that mean the same in other words, and one that does not."""

MOST_TOKENS = 200
"""The help desk's answers have a few dozen tokens and end by themselves; a demo must end in any case."""

LOAD_SECONDS = 300.0
"""Both demo models load in seconds; the first import of torch from a cold, slow disk has taken a minute and more."""

GRACE_SECONDS = 20.0
"""A node's own grace time is 10 s; twice that before the hard end."""

DIE_WITH_PARENT = """
import ctypes, os, signal, sys

ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: this signal when the parent dies; it outlives exec
if os.getppid() != int(sys.argv[1]):  # it died before that: no signal will come
    sys.exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""
"""What becomes the node on Linux, so that it gets SIGTERM even when the demo is killed hard. A `preexec_fn` would do it between fork
and exec, where Python code may deadlock."""


def free_port(wanted: int) -> int:
    """`wanted` where nothing listens on it, else a free one of the system's choice."""
    for port in (wanted, 0):
        with socket.socket() as listener:
            # As servers do: a port that only waits for old connections to time out counts as free.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                listener.bind(("127.0.0.1", port))
                return int(listener.getsockname()[1])
    raise SystemExit("demo: this machine has no free port on 127.0.0.1")


def state_folder() -> Path:
    """The demo's own: a real node's deployments are not touched. `TARS_STATE_DIR` names another one."""
    given = os.environ.get("TARS_STATE_DIR")
    if given:
        return Path(given).expanduser().absolute()
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "tars-demo"


def node_environment() -> dict[str, str]:
    """This environment without TARS_*: the demo is the same for everybody, whatever the reader's own node is set to."""
    return {name: value for name, value in os.environ.items() if not name.startswith("TARS_")}


def dying_with(parent: int, command: list[str]) -> list[str]:
    """`command`, such that it gets SIGTERM when process `parent` (which starts it) dies. Linux only; elsewhere `command` itself."""
    if sys.platform != "linux":
        return command
    return [sys.executable, "-c", DIE_WITH_PARENT, str(parent), *command]


class DemoNode:
    """A `tars-node` process that ends with this `async with`, come what may."""

    def __init__(self, port: int, state: Path, further: tuple[str, ...] = ()) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.log = state / "demo-node.log"
        self._command = [
            str(Path(sys.executable).parent / "tars-node"),
            *("--listen", f"127.0.0.1:{port}", "--state-dir", str(state)),
            *further,
        ]

    async def __aenter__(self) -> DemoNode:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as log:
            # A session of its own: Ctrl-C reaches only this process, which then ends the node in order.
            self._process = await asyncio.create_subprocess_exec(
                *dying_with(os.getpid(), self._command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=node_environment(),
            )
        return self

    async def __aexit__(self, *_: object) -> None:
        # Shielded: a second Ctrl-C must not leave the node behind.
        await asyncio.shield(self._end())

    async def _end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        try:
            await asyncio.wait_for(self._process.wait(), GRACE_SECONDS)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            await self._process.wait()

    async def kill(self) -> None:
        """As a power cut would: no goodbye. Its workers end with it."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()

    async def while_it_runs(self, work: Coroutine[None, None, Result]) -> Result:
        """`work`'s result; raises `NodeEnded` as soon as the node dies under it."""
        task = asyncio.create_task(work)
        await while_up(self, task)
        return task.result()

    async def ended(self) -> int:
        """The exit code, once the node ended by itself."""
        return await self._process.wait()

    def last_lines(self, count: int = 15) -> str:
        """The end of its log, for the reader of a failure."""
        with contextlib.suppress(OSError):
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-count:])
        return ""


class NodeEnded(Exception):
    """The node ended before it was told to."""


async def while_up(node: DemoNode, work: asyncio.Task[Result]) -> None:
    """Run `work` to its end; raises `NodeEnded` as soon as the node dies under it."""
    ended = asyncio.create_task(node.ended())
    try:
        await asyncio.wait({work, ended}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise NodeEnded(f"the node ended with exit code {ended.result()}")
        await work
    finally:
        for task in (work, ended):
            task.cancel()
        await asyncio.gather(work, ended, return_exceptions=True)


async def chat_once(client: Client, console: Console) -> None:
    """Ask `QUESTION`, showing the answer as it streams."""
    console.print(Text.assemble(("\ninference.chat   ", "bold"), QUESTION))
    question = [ChatMessage(role="user", content=QUESTION)]
    settings: GenerationOptions = {"temperature": 0.0, "max_tokens": MOST_TOKENS}
    written = Written()
    try:
        result = await answer(client, question, settings, written)
    finally:
        written.end_line()
    if not result.message.content.strip():
        raise TarsError("the chat model answered nothing")
    first = result.timings.first_token_ms
    console.print(
        f"  [{result.model} on {plain(result.served_by.device)}: {result.usage.completion_tokens} tokens"
        + (f", first after {first:.0f} ms" if first is not None else "")
        + "]",
        style="dim",
    )


async def embed_once(client: Client, console: Console) -> None:
    """Embed `SENTENCES` and show how alike they are."""
    console.print(Text.assemble(("\ninference.embed  ", "bold"), f"{len(SENTENCES)} sentences"))
    result = await client.embed(SENTENCES)
    vectors = [[float(value) for value in vector] for vector in result.embeddings]
    if len(vectors) != len(SENTENCES) or not result.dimensions:
        raise TarsError("the embedding model answered with too few vectors")
    for other, vector in zip(SENTENCES[1:], vectors[1:], strict=True):
        console.print(f"  {cosine(vectors[0], vector):5.2f}  “{SENTENCES[0]}” and “{other}”")
    console.print(
        f"  [{result.model} on {plain(result.served_by.device)}: {result.dimensions} dimensions]", style="dim"
    )


def next_steps(url: str) -> str:
    """What to try, as commands that work when pasted."""
    option = "" if url.endswith(f":{PORT}") else f" --url {url}"
    tars = shlex.quote(os.path.relpath(Path(sys.executable).parent / "tars"))
    return f"""
The node is up. Status page: {url}/

Ask it over JSON-RPC:
  curl {url}/rpc -H 'Content-Type: application/json' -d '
    {{"jsonrpc": "2.0", "id": 1, "method": "inference.chat",
     "params": {{"messages": [{{"role": "user", "content": "What is a replica?"}}]}}}}'

The same, streamed: add  -N -H 'Accept: text/event-stream'
OpenAI clients: base URL {url}/v1, any API key

On the command line:
  {tars} chat{option}
  {tars} status{option} --watch
  {tars} plan --node node_configs/pc1-rtx3060.toml --node node_configs/pc2-gtx1660s.toml

Your own model: tars-node --model /path/to/any.gguf
"""


def summary(description: NodeDescription) -> str:
    """One line a replica: what was loaded where, and what it took."""
    lines = []
    for replica in description.replicas:
        took = f", {Bytes(replica.info.memory_bytes)} in {replica.info.load_seconds:.1f} s" if replica.info else ""
        lines.append(
            f"  {plain(replica.model)} ({plain(replica.variant)}) on {plain(replica.device_name)}: {replica.state}{took}"
        )
    return "\n".join(lines)


async def demo(node: DemoNode, console: Console) -> None:
    """Both calls; raises `TarsError` where one of them does not answer."""
    connection = Connection(url=node.url, timeout=LOAD_SECONDS)
    async with connection.client() as client:
        description = await wait_until_ready(client, connection, LOAD_SECONDS)
        console.print(summary(description))
        await chat_once(client, console)
        await embed_once(client, console)


async def run(arguments: argparse.Namespace, console: Console) -> int:
    """The whole demo, with the node's life around it; returns the exit code."""
    main = asyncio.current_task()
    assert main is not None
    stopped_by: list[signal.Signals] = []

    def stop(number: signal.Signals) -> None:
        stopped_by.append(number)
        if len(stopped_by) == 1:  # the node is being ended; asking again does not make it faster
            main.cancel()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, stop, number)

    answered = False
    try:
        if arguments.mesh:
            return await run_mesh(arguments.port, console)
        port = free_port(arguments.port)
        if port != arguments.port:
            console.print(f"port {arguments.port} is busy (another node?); using {port}")
        async with DemoNode(port, state_folder()) as node:
            console.print(f"starting tars-node on {node.url}; its log: {node.log}")
            try:
                await while_up(node, asyncio.create_task(demo(node, console)))
                answered = True
                if not arguments.once:
                    console.print(next_steps(node.url), soft_wrap=True)
                    console.print("Ctrl-C ends the node.")
                    raise NodeEnded(f"the node ended with exit code {await node.ended()}")
            except (TarsError, NodeEnded) as error:
                console.print(f"\ndemo: {plain(str(error))}\nthe end of the node's log:", style="red")
                console.print(plain(node.last_lines()))
                return 1
    except asyncio.CancelledError:
        if not stopped_by:
            raise
        main.uncancel()
        console.print("\nthe node has ended")
        return 0 if answered else 128 + stopped_by[0]
    console.print("\nboth calls answered; the node has ended")
    return 0


async def run_mesh(port: int, console: Console) -> int:
    """`--mesh`; returns the exit code."""
    from demo_mesh import demo_mesh  # it uses this file

    try:
        await demo_mesh(console, state_folder() / "mesh", port)
    except (TarsError, NodeEnded) as error:
        console.print(f"\ndemo: {plain(str(error))}", style="red")
        return 1
    console.print("\nthe nodes have ended")
    return 0


def main() -> int:
    """Parse the command line and run the demo."""
    parser = argparse.ArgumentParser(
        prog="scripts/demo", description="A node with two real models, a chat call and an embedding call."
    )
    parser.add_argument("--once", action="store_true", help="end after the calls; exit 0 only if both answered")
    parser.add_argument(
        "--mesh",
        action="store_true",
        help="two nodes with pretended 12 GB and 6 GB cards, calls through each, then one is killed",
    )
    parser.add_argument("--port", type=int, default=PORT, help=f"port on 127.0.0.1 (default {PORT})")
    arguments = parser.parse_args()
    if not 1 <= arguments.port <= 65_535:
        parser.error("a port is a number from 1 to 65535")
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, emoji=False, width=120)
    return asyncio.run(run(arguments, console))


if __name__ == "__main__":
    # `demo_mesh` imports this file by its name: it must not be made a second time.
    sys.modules["demo"] = sys.modules["__main__"]
    sys.exit(main())
