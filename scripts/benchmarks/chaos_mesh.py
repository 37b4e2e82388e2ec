"""The three PCs of `scripts/bench chaos`: real `tars-node` processes with the demo models, two of them gateways for the callers.

Law of this file: it starts them and always ends them, with their workers and their network. `a` has room for the chat model alone, `b` and
`c` for both, and there are two replicas of each: where one is lost for long, a chat is loaded elsewhere. The tests' PCs and networks are
used: they do all of this already.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path

import psutil
from chaos_callers import Gateway
from chaos_deck import CHAT_MODEL, EMBEDDING_MODEL, MODELS
from chaos_faults import NodeView

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
import network_namespaces
from mesh_processes import Pc, converge
from running_node import send_all
from soak import worker_name

from tars.errors import TarsError
from tars.messages.node import NodeDescription

NAMES, GATEWAYS = ("a", "b", "c"), ("a", "b")
REPLICAS = 2
MEMORY_MIB = {"a": 600, "b": 4000, "c": 4000}
READY_SECONDS = 240.0
LOOK_SECONDS = 0.25
_ENGINE_OF = {CHAT_MODEL: "chat worker", EMBEDDING_MODEL: "embedding worker"}


def configuration(mode: str) -> str:
    """What the PCs' files say of engines. Embeddings in float32: what is computed elsewhere has to be the same to 1e-5."""
    return f'[engines]\nembedding_backend = "torch-fp32"\ncontinuation = "{mode}"\n'


@contextmanager
def lan(count: int, *, loopback: bool) -> Iterator[network_namespaces.Network | None]:
    """A bridge with so many PCs; None where that is not wanted, or cannot be made here (`network_namespaces.why_not` says why)."""
    if loopback or network_namespaces.why_not() is not None:
        yield None
        return
    with network_namespaces.network(count) as made:
        yield made


class ChaosMesh:
    """The PCs, their callers' connections, and what is known of each. Make one with `running_mesh`."""

    def __init__(
        self, pcs: dict[str, Pc], callers_host: network_namespaces.Host | None, models: Sequence[str] = MODELS
    ) -> None:
        self.pcs = pcs
        self.models = models
        self.callers_host = callers_host
        self.gateways: list[Gateway] = []
        self.observers: dict[str, Gateway] = {}
        self.harmed: set[str] = set()
        """Nodes at which a fault is in force."""
        self.described: dict[str, NodeDescription] = {}
        self.coordinator: str | None = None
        self._seen: set[psutil.Process] = set()
        self._looked = asyncio.Event()

    @property
    def links(self) -> bool:
        """Whether cables can be pulled."""
        return self.callers_host is not None

    def url(self, name: str) -> str:
        """Where callers reach it."""
        pc = self.pcs[name]
        return f"http://{pc.host.address if pc.host else '127.0.0.1'}:{pc.client_port}"

    def views(self) -> list[NodeView]:
        """As `victims` wants them."""
        views = []
        for name in self.pcs:
            told = self.described.get(name)
            ready = frozenset(each.model for each in told.replicas if each.state == "ready") if told else frozenset()
            healthy = name not in self.harmed and told is not None
            views.append(NodeView(name, healthy, name in GATEWAYS, name == self.coordinator, ready))
        return views

    def all_well(self) -> bool:
        """Every wanted replica is ready, and no fault is in force."""
        views = self.views()
        return all(view.healthy for view in views) and all(
            sum(model in view.ready for view in views) >= REPLICAS for model in self.models
        )

    async def look(self) -> None:
        """Ask every PC that nothing is wrong with for its replicas, and one for the coordinator."""

        async def one(name: str) -> None:
            try:
                async with asyncio.timeout(3.0):
                    self.described[name] = await self.observers[name].client.describe(timeout=3.0)
            except (TarsError, TimeoutError):
                self.described.pop(name, None)

        for name in self.harmed:
            self.described.pop(name, None)
        asked = [name for name in self.pcs if name not in self.harmed]
        await asyncio.gather(*map(one, asked))
        for name in asked:
            with suppress(TarsError, TimeoutError):
                async with asyncio.timeout(3.0):
                    peers = (await self.observers[name].client.peers(timeout=3.0)).peers
                self.coordinator = next((each.name for each in peers if each.coordinator), None)
                break

    async def keep_looking(self) -> None:
        """Until it is cancelled."""
        while True:
            await self.look()
            self._looked.set()
            if not self.links:  # a network's own end takes every process in it along
                for name in self.pcs:
                    self.processes(name)
            await asyncio.sleep(LOOK_SECONDS)

    async def well(self, seconds: float = READY_SECONDS) -> None:
        """Wait for it; needs `keep_looking`. Raises TimeoutError."""
        async with asyncio.timeout(seconds):
            while True:
                # Not by what was seen before: a worker that was just killed is ready in that.
                await self._next_look()
                if self.all_well():
                    return

    async def _next_look(self) -> None:
        """Wait for one that begins from now on."""
        for _ in range(2):
            self._looked.clear()
            await self._looked.wait()

    def worker(self, name: str, model: str) -> psutil.Process | None:
        """The process that computes the model there."""
        node = self.pcs[name].node
        if node is None:
            return None
        with suppress(psutil.Error):
            for process in node.workers():
                if worker_name(process).startswith(_ENGINE_OF[model]):
                    return process
        return None

    def processes(self, name: str) -> list[psutil.Process]:
        """The node's own and its workers'."""
        node = self.pcs[name].node
        if node is None:
            return []
        try:
            found: list[psutil.Process] = node.processes()
        except psutil.Error:
            return []
        self._seen.update(found)
        return found

    def thaw(self) -> None:
        """Whoever was stopped goes on, so that it can end."""
        for name in self.pcs:
            send_all(self.processes(name), signal.SIGCONT)

    def end_what_is_left(self) -> list[int]:
        """Workers of nodes that were killed while they themselves were frozen, say; their process ids."""
        left = [process for process in self._seen if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
        for process in left:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(left, 10)
        return [process.pid for process in left]


@asynccontextmanager
async def running_mesh(
    folder: Path,
    mode: str,
    slots: int,
    *,
    names: Sequence[str] = NAMES,
    models: Sequence[str] = MODELS,
    cores: Mapping[str, set[int]] | None = None,
    loopback: bool = False,
    logs: Path | None = None,
) -> AsyncIterator[ChaosMesh]:
    """All PCs started, in one mesh, with every replica ready; ended again whatever happens.

    `cores`: the processors of each. `logs`: a folder in which what each printed is kept.
    """
    with ExitStack() as networks:
        network = networks.enter_context(lan(len(names) + 1, loopback=loopback))
        hosts = network.hosts if network is not None else [None] * (len(names) + 1)
        pcs = {
            name: Pc(
                folder,
                name,
                host=host,
                priority=10 - 3 * number,
                memory_mib=MEMORY_MIB[name],
                more=configuration(mode),
                mesh="" if host else "mdns = false",
            )
            for number, (name, host) in enumerate(zip(names, hosts, strict=False))
        }
        mesh = ChaosMesh(pcs, hosts[-1], models)
        try:
            async with AsyncExitStack() as stack:
                await _assemble(mesh, stack, cores or {}, slots)
                yield mesh
        finally:
            mesh.thaw()
            # Also where the benchmark itself was interrupted: shielded by a task of its own.
            ending = asyncio.gather(*(_ended(pc) for pc in pcs.values()), return_exceptions=True)
            try:
                await asyncio.shield(ending)
            except asyncio.CancelledError:
                await ending
                raise
            finally:
                mesh.end_what_is_left()
                for pc in pcs.values() if logs is not None else ():
                    (logs / f"{pc.name}.log").write_text(pc.output, encoding="utf-8")


async def _ended(pc: Pc) -> None:
    try:
        await pc.stop(signal.SIGTERM, 20.0)
    except (AssertionError, TimeoutError):
        await pc.stop(signal.SIGKILL, 10.0)


@contextmanager
def _on(cores: set[int] | None) -> Iterator[None]:
    """What is started meanwhile computes on these only."""
    before = os.sched_getaffinity(0) if cores else set()
    if cores:
        os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        if cores:
            os.sched_setaffinity(0, before)


async def _assemble(mesh: ChaosMesh, stack: AsyncExitStack, cores: Mapping[str, set[int]], slots: int) -> None:
    first, *others = mesh.pcs.values()
    with _on(cores.get(first.name)):
        await first.start()
    mesh.processes(first.name)
    for pc in others:
        with _on(cores.get(pc.name)):
            await pc.start(await first.invitation())
        mesh.processes(pc.name)
    await converge(list(mesh.pcs.values()), 60.0)
    # Only now: a node alone would take both replicas, and nothing moves without a reason.
    for model in mesh.models:
        await first.client.deploy(model, replicas=REPLICAS, slots=slots if model == CHAT_MODEL else None)
    key = (await first.client.new_key("chaos")).key
    connect = None if mesh.callers_host is None else mesh.callers_host.socket_factory
    for name in mesh.pcs:
        mesh.observers[name] = await stack.enter_async_context(Gateway(name, mesh.url(name), key, connect))
        if name in GATEWAYS:
            mesh.gateways.append(await stack.enter_async_context(Gateway(name, mesh.url(name), key, connect)))
        mesh.processes(name)
    looking = asyncio.create_task(mesh.keep_looking())
    stack.push_async_callback(_cancelled, looking)
    await mesh.well()


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait([task])
