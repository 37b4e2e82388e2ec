"""PCs of a mesh as users have them: a real `tars-node` process each, with a state folder, on loopback or in a namespace of its own."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import re
import signal
import ssl
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import orjson
import psutil
from network_namespaces import Host, Network
from running_node import RunningNode, node_command

from tars.client import Client
from tars.core.replicated_map import range_of
from tars.core.types import NodeId
from tars.errors import TarsError
from tars.mesh.identity import IDENTITY_FILE, Identity
from tars.messages.node import PeerDescription
from tars.rpc.http_client import RpcConnection
from tars.rpc.listener import bind

Seen = TypeVar("Seen")

HELP_DESK = "tars-help-desk"
ENDLESS = {"0": -100.0, "1": -100.0, "2": -100.0}
"""A `logit_bias` for it: without the tokens that end a text or a turn an answer is as long as it may be."""
MINILM = "all-minilm-l6-v2"
START_SECONDS = 90.0
"""Imports take 2 s of processor time, many times that on a busy machine."""
LOAD_SECONDS = 90.0
"""For a model of a few MB, likewise; MiniLM's libraries are 10 s of imports alone."""
CLIENT_PORT, MESH_PORT = 8000, 8001
"""In a namespace, where nobody else has them."""


def free_port() -> int:
    """One of loopback's that was free a moment ago."""
    with bind("127.0.0.1", 0) as found:
        port: int = found.getsockname()[1]
        return port


class Connection(RpcConnection):
    """From within a PC's namespace, where it has one."""

    def __init__(
        self, host: Host | None, url: str, api_key: str | None = None, tls: ssl.SSLContext | None = None
    ) -> None:
        super().__init__(url, api_key=api_key, timeout=60.0, tls=tls)
        factory = None if host is None else host.socket_factory
        connector = aiohttp.TCPConnector(limit=0, ssl=True if tls is None else tls, socket_factory=factory)
        self._session = aiohttp.ClientSession(headers=self._headers, connector=connector)


class Pc:
    """One PC. `start` and `stop` as often as the story needs; the state folder stays."""

    def __init__(
        self,
        folder: Path,
        name: str,
        *,
        host: Host | None = None,
        memory_mib: int = 4000,
        priority: int = 0,
        more: str = "",
        mesh: str = "",
        demo: bool = False,
    ) -> None:
        self.name, self.host = name, host
        self.folder = folder / name
        self.folder.mkdir()
        self.state = self.folder / "state"
        self.client_port = CLIENT_PORT if host else free_port()
        self.mesh_port = MESH_PORT if host else free_port()
        where = "0.0.0.0" if host else "127.0.0.1"
        self.mesh_address = f"{host.address if host else where}:{self.mesh_port}"
        self.config = self.folder / f"{name}.toml"
        self.config.write_text(
            f'[node]\nname = "{name}"\npriority = {priority}\nlisten = "{where}:{self.client_port}"\n'
            f'[mesh]\nlisten = "{where}:{self.mesh_port}"\n{mesh}\n'
            f"[demo]\nmodels = {str(demo).lower()}\n"
            "[devices]\nnvml = false\ncpu = false\n"
            f'[[devices.simulated]]\nname = "Card of {name}"\nmemory_mib = {memory_mib}\n{more}\n'
        )
        self.node: RunningNode | None = None
        self._connection: Connection | None = None
        self._client: Client | None = None
        self._further = itertools.count(1)
        self.lines: list[str] = []
        """Everything that its earlier runs printed."""

    # --- its process --------------------------------------------------------------------------------------------------

    async def start(self, join: str | None = None, *arguments: object) -> Pc:
        """Returns when the node answers clients; its models still load."""
        join_option = () if join is None else ("--join", join)
        options = ("--config", self.config, "--state-dir", self.state, "--log-format", "json", *join_option, *arguments)
        command = node_command(*options)
        process = await asyncio.create_subprocess_exec(
            *(self.host.command(*command) if self.host else command),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
        )
        self.node = RunningNode(process, self.state)
        await self.node.printed(r"mesh +peers reach this node at", START_SECONDS)
        key = orjson.loads((self.state / "operator.key").read_bytes())["key"]
        url = f"http://127.0.0.1:{self.client_port}"
        self._connection = Connection(self.host, url, key)
        self._client = Client(url, api_key=key)
        self._client._connection = self._connection
        return self

    @property
    def client(self) -> Client:
        """With this PC's operator key, from this very PC."""
        assert self._client is not None
        return self._client

    @property
    def output(self) -> str:
        """Of all its runs."""
        return "".join([*self.lines, "" if self.node is None else self.node.output])

    async def invitation(self) -> str:
        """`tars token new`, with this PC's address."""
        return f"{(await self.client.new_token()).token}@{self.mesh_address}"

    def node_id(self) -> str:
        """As its state folder has it."""
        text: str = orjson.loads((self.state / "node.json").read_bytes())["id"]
        return text

    def identity(self) -> Identity:
        """As whoever can read its state folder has it: its certificate and key, and the CA's."""
        found = Identity.load_or_none(self.state, NodeId(self.node_id()))
        assert found is not None
        return found

    def peer_call(self, other: Pc, identity: Identity | None = None) -> Connection:
        """From this PC to another one's port for peers, with this node's certificate or another one; close it."""
        shown = self.identity() if identity is None else identity
        return Connection(self.host, f"https://{other.mesh_address}", tls=shown.client_context(lambda peer: None))

    async def cli(self, *words: object, status: int = 0, seconds: float = 60.0) -> str:
        """What `tars WORDS` prints on this PC, both streams together."""
        command = [
            str(Path(sys.executable).with_name("tars")),
            *map(str, words),
            "--url",
            f"http://127.0.0.1:{self.client_port}",
        ]
        process = await asyncio.create_subprocess_exec(
            *(self.host.command(*command) if self.host else command),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={**os.environ, "TARS_STATE_DIR": str(self.state)},
        )
        try:
            async with asyncio.timeout(seconds):
                output, _ = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        assert process.returncode == status, output.decode()
        return output.decode()

    async def record_at(self, other: Pc, key: str) -> dict[str, Any] | None:
        """A record as another PC has it, which this one asks as a peer; None where it has none."""
        wanted = {"is": "want", "ranges": [range_of(key)]}
        envelope = {"sender": self.node_id(), "incarnation": 0, "body": wanted}
        async with self.peer_call(other) as connection:
            answer = await connection.call("mesh.gossip", {"envelope": envelope})
        told = [record for each in answer["envelopes"] for record in each["records"]]
        return next((record for record in told if record["key"] == key), None)

    async def refused(self, *arguments: object, seconds: float = START_SECONDS) -> str:
        """Start a further node here, with a state folder of its own, that must end by itself with exit status 2; what it printed."""
        folder = self.folder / f"refused-{next(self._further)}"
        folder.mkdir()
        command = node_command("--listen", "0.0.0.0:9000", "--state-dir", folder, *arguments)
        process = await asyncio.create_subprocess_exec(
            *(self.host.command(*command) if self.host else command),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        try:
            async with asyncio.timeout(seconds):
                output, _ = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        text = output.decode()
        assert process.returncode == 2, text
        assert "Traceback" not in text
        # What was refused has made it no member of anything.
        assert not (folder / IDENTITY_FILE).exists()
        return text

    def send(self, number: int) -> None:
        """A signal to the node, not to its workers."""
        assert self.node is not None
        self.node.send(number)

    async def stop(self, number: int = signal.SIGTERM, seconds: float = 60.0) -> int | None:
        """End the process and see it end, its workers too; its exit status. Idempotent."""
        if self._connection is not None:
            await self._connection.close()
            self._connection = self._client = None
        if self.node is None:
            return None
        node, self.node = self.node, None
        process = node.process
        workers = []
        if process.returncode is None:
            with suppress(psutil.NoSuchProcess):
                workers = node.workers()
            process.send_signal(signal.SIGCONT)
            process.send_signal(number)
        try:
            status: int = await node.ended(seconds)
        except TimeoutError:
            process.kill()
            await process.wait()
            raise AssertionError(f"{self.name} did not end within {seconds} s:\n{node.output}") from None
        finally:
            self.lines.append(node.output)
        _, alive = await asyncio.to_thread(psutil.wait_procs, workers, 15)
        for orphan in alive:
            orphan.kill()
        assert not alive, f"workers outlived {self.name}: {alive}"
        return status

    # --- what it sees -------------------------------------------------------------------------------------------------

    async def peer(self, other: Pc) -> PeerDescription | None:
        """Another PC as this one sees it."""
        found = [each for each in (await self.client.peers()).peers if each.node == other.node_id()]
        return found[0] if found else None

    async def state_of(self, other: Pc) -> str | None:
        """ALIVE, SUSPECT, DEAD, DRAINING or LEFT; None: no member."""
        seen = await self.peer(other)
        return None if seen is None else seen.state

    async def coordinator(self) -> str | None:
        """By name."""
        return next((each.name for each in (await self.client.peers()).peers if each.coordinator), None)

    async def sees(self, other: Pc, state: str, seconds: float = 30.0) -> float:
        """Wait until it is so; seconds that it took."""
        began = time.monotonic()
        await until(lambda: self.state_of(other), lambda seen: seen == state, seconds, f"{self.name} on {other.name}")
        return time.monotonic() - began

    async def plans_with(self, *names: str, seconds: float = 30.0) -> None:
        """Wait until this PC plans for the devices of exactly these nodes: a node may be known before it has said what it has."""

        async def planned() -> list[str]:
            return sorted({device.node_name for device in (await self.client.plan()).devices})

        await until(planned, lambda seen: seen == sorted(names), seconds, f"{self.name} plans with")

    async def ready_replicas(self) -> list[str]:
        """Models of this PC's own replicas that are ready."""
        return sorted(each.model for each in (await self.client.describe()).replicas if each.state == "ready")

    async def holds(self, *models: str, seconds: float = LOAD_SECONDS) -> float:
        """Wait until its ready replicas are exactly these; seconds that it took."""
        began = time.monotonic()
        await until(self.ready_replicas, lambda seen: seen == sorted(models), seconds, f"ready at {self.name}", gap=0.2)
        return time.monotonic() - began

    async def asks(self, text: str = "What is TARS?", model: str = HELP_DESK, timeout: float = 30.0) -> Any:
        """One chat, as a client of this PC."""
        return await self.client.chat(text, model=model, max_tokens=8, timeout=timeout)

    async def answered_by(self, *nodes: Pc, seconds: float = 15.0) -> None:
        """Wait until one of these answers a chat that this PC is asked: who is ready says so to its peers at most once a second."""
        wanted = {each.node_id() for each in nodes}
        await until(self.asks, lambda seen: seen.served_by.node in wanted, seconds, f"who answers {self.name}")

    async def printed_invitation(self) -> str:
        """What the first PC printed for the next one's --join."""
        assert self.node is not None
        found: re.Match[str] = await self.node.printed(r"tars-node --join ([\w-]+@[\d.]+:\d+)", 10)
        return found[1]


async def until(
    look: Callable[[], Awaitable[Seen]],
    right: Callable[[Seen], bool],
    seconds: float,
    what: str,
    gap: float = 0.03,
) -> Seen:
    """Look again and again until it is right; fails with what was seen last. There is no event to wait for: it is in other processes."""
    ends, seen = time.monotonic() + seconds, None
    while True:
        problem: object = None
        try:
            seen = await look()
            if right(seen):
                return seen
        except TarsError as error:
            problem = error
        if time.monotonic() > ends:
            raise AssertionError(f"{what}: after {seconds} s still {seen if problem is None else problem!r}")
        await asyncio.sleep(gap)


@contextmanager
def shown_if_it_fails(pcs: Sequence[Pc]) -> Iterator[None]:
    """What each printed last."""
    try:
        yield
    except BaseException:
        for pc in pcs:
            print(f"--- {pc.name} ---\n{pc.output[-6000:]}")
        raise


@asynccontextmanager
async def stopping(pcs: Sequence[Pc]) -> AsyncIterator[None]:
    """At the end every PC is stopped; where the test failed, what each printed is shown."""
    try:
        with shown_if_it_fails(pcs):
            yield
    finally:
        await asyncio.gather(*(pc.stop() for pc in pcs))


# --- several of them ------------------------------------------------------------------------------------------------


def fleet(folder: Path, lan: Network, *, largest: int = 2) -> list[Pc]:
    """`a` coordinates, after it `b`; a chat model goes to the PC with the largest card."""
    return [
        Pc(folder, name, host=host, priority=10 - 5 * number, memory_mib=4000 if number == largest else 2000)
        for number, (name, host) in enumerate(zip("abc", lan.hosts, strict=False))
    ]


async def assemble(pcs: Sequence[Pc]) -> None:
    """The first one begins the mesh; the others join at once, each with a token of its own."""
    first, *others = pcs
    await first.start()
    lines = [await first.invitation() for _ in others]
    await asyncio.gather(*(pc.start(line) for pc, line in zip(others, lines, strict=True)))
    await converge(pcs)


async def converge(pcs: Sequence[Pc], seconds: float = 40.0) -> float:
    """Wait until each sees each alive, plans with all, and the same one coordinates; seconds that it took."""
    began = time.monotonic()
    for pc in pcs:
        for other in pcs:
            if other is not pc:
                await pc.sees(other, "ALIVE", seconds)
        await pc.plans_with(*(each.name for each in pcs), seconds=seconds)
        await until(pc.coordinator, lambda seen: seen == pcs[0].name, seconds, f"{pc.name}'s coordinator")
    return time.monotonic() - began


def said(pc: Pc, pattern: str, after: float = 0.0) -> float | None:
    """When the node logged such a line for the first time since `after`, Unix time in seconds; None: not yet."""
    for line in pc.output.splitlines():
        if not line.startswith("{"):
            continue
        told: dict[str, Any] = json.loads(line)
        if told["time"] >= after and re.search(pattern, told["message"]):
            return float(told["time"])
    return None


async def told(pc: Pc, pattern: str, after: float, seconds: float) -> float:
    """Wait until the node has logged such a line; how long after `after` that was."""

    async def look() -> float | None:
        return said(pc, pattern, after)

    at = await until(look, lambda seen: seen is not None, seconds, f"{pc.name} says {pattern!r}")
    assert at is not None
    return at - after
