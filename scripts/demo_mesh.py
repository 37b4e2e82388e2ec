"""The demo of a mesh: two nodes on this machine with pretended cards of 12 and 6 GB, calls through each, then the death of one.

Law of this file: as `demo.py`'s, whose parts it uses: TARS is used as any service would use it, and no node outlives the demo.
"""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from demo import LOAD_SECONDS, MOST_TOKENS, QUESTION, SENTENCES, DemoNode, NodeEnded, free_port
from rich.console import Console
from rich.text import Text

from tars.cli.output import plain
from tars.client import Client
from tars.errors import CallerError, TarsError
from tars.messages.inference import ServedBy
from tars.messages.node import ModelsResult

Answer = TypeVar("Answer")

ROOT = Path(__file__).resolve().parent.parent
SEED_CONFIGURATIONS = ("node_configs/pc1-rtx3060.toml", "node_configs/pc2-gtx1660s.toml")
"""The fleet that TARS was made for. Its model files are not here, so it is only planned; the same planner places the demo's models."""

CONFIGURATION = """\
[node]
name = "{name}"
priority = {priority}

[mesh]
listen = "127.0.0.1:{mesh_port}"
mdns = false            # both are on this machine; the second one is told where the first one is

# Declared memory that computes on this machine's processor: the planner sees a card.
[devices]
nvml = false
cpu = false

[[devices.simulated]]
name = "{card}"
memory_mib = {memory_mib}
compute_capability = "{capability}"
"""

AGAIN_SECONDS = 0.5
"""Between two tries of a call that may be sent again."""


@dataclass(frozen=True, slots=True)
class Pc:
    """One of the two."""

    name: str
    card: str
    memory_mib: int
    capability: str
    priority: int


PCS = (
    Pc("pc1", "Pretended RTX 3060", 11_909, "8.6", 10),
    Pc("pc2", "Pretended GTX 1660 SUPER", 5_930, "7.5", 0),
)


def plan_of_the_seed() -> str:
    """What `tars plan` says of a real 3060 and a real 1660 Super."""
    command = [str(Path(sys.executable).parent / "tars"), "plan"]
    for file in SEED_CONFIGURATIONS:
        command += ["--node", file]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT, check=False)
    if done.returncode:
        raise TarsError(f"tars plan failed: {done.stderr.strip()}")
    return done.stdout


def demo_node(pc: Pc, folder: Path, port: int, join: str | None) -> DemoNode:
    """Not started yet; its state begins anew."""
    state = folder / pc.name
    shutil.rmtree(state, ignore_errors=True)
    state.mkdir(parents=True)
    file = state / "node.toml"
    written = CONFIGURATION.format(
        name=pc.name,
        priority=pc.priority,
        mesh_port=free_port(port + 1),
        card=pc.card,
        memory_mib=pc.memory_mib,
        capability=pc.capability,
    )
    file.write_text(written, encoding="utf-8")
    return DemoNode(port, state, ("--config", str(file), *(("--join", join) if join else ())))


async def again_until(seconds: float, call: Callable[[], Awaitable[Answer]]) -> Answer:
    """`call`'s answer; while it says that it may be sent again it is, for so long. Raises its last error."""
    ends = time.monotonic() + seconds
    while True:
        try:
            return await call()
        except CallerError:
            raise
        except TarsError as error:
            if not error.retryable or time.monotonic() > ends:
                raise
        await asyncio.sleep(AGAIN_SECONDS)


def _ready(models: ModelsResult) -> bool:
    deployed = [model for model in models.models if model.deployed]
    return bool(deployed) and all(model.replicas_ready >= model.replicas_wanted for model in deployed)


async def all_ready(client: Client) -> None:
    """Wait until every wanted replica is ready, wherever it is."""
    ends = time.monotonic() + LOAD_SECONDS
    while not _ready(await again_until(LOAD_SECONDS, client.models)):
        if time.monotonic() > ends:
            raise TarsError(f"the models were not ready after {LOAD_SECONDS:.0f} s; `tars explain MODEL` says why")
        await asyncio.sleep(AGAIN_SECONDS)


class Talk:
    """Calls through a node, each shown with who answered it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._names: dict[str, str] = {}

    async def learn_names(self, client: Client) -> None:
        self._names = {peer.node: peer.name for peer in (await client.peers()).peers}

    async def both(self, client: Client, through: str, seconds: float = LOAD_SECONDS) -> None:
        """A chat and an embedding; each is tried again for so long, where it may be."""
        began = time.monotonic()
        chat = await again_until(seconds, lambda: client.chat(QUESTION, temperature=0.0, max_tokens=MOST_TOKENS))
        text = chat.message.content or ""
        if not text.strip():
            raise TarsError("the chat model answered nothing")
        self._show("inference.chat", through, chat.served_by, began, f"“{text.strip()[:60]}...”")
        began = time.monotonic()
        embedded = await again_until(seconds, lambda: client.embed(SENTENCES))
        if len(embedded.embeddings) != len(SENTENCES):
            raise TarsError("the embedding model answered with too few vectors")
        shown = f"{len(embedded.embeddings)} vectors of {embedded.dimensions}"
        self._show("inference.embed", through, embedded.served_by, began, shown)

    def _show(self, method: str, through: str, served_by: ServedBy, began: float, what: str) -> None:
        seconds = time.monotonic() - began
        by = self._names.get(served_by.node, served_by.node)
        line = Text.assemble(
            (f"  {method:<16}", "bold"), f"asked {through}, answered by {by} on {plain(served_by.device)}"
        )
        self._console.print(line)
        self._console.print(f"                  {plain(what)}  [{seconds:.1f} s]", style="dim")


async def demo_mesh(console: Console, folder: Path, port: int) -> None:
    """The whole of it; raises `TarsError` or `NodeEnded` where something does not go as it should."""
    console.print(
        Text("The fleet that TARS was made for, planned (its model files are not on this machine):\n", "bold")
    )
    console.print(plan_of_the_seed(), soft_wrap=True)
    console.print(Text("The same with two pretended cards and the demo's models, for real:\n", "bold"))
    async with AsyncExitStack() as stack:
        first, second = PCS
        ports = [free_port(port)]
        ports.append(free_port(ports[0] + 10))
        began = time.monotonic()
        one = await stack.enter_async_context(demo_node(first, folder, ports[0], None))
        console.print(f"{first.name}  {one.url}  {first.card}, {first.memory_mib} MiB; its log: {one.log}")
        through_one = await stack.enter_async_context(Client(one.url, timeout=LOAD_SECONDS))
        token = await one.while_it_runs(again_until(LOAD_SECONDS, through_one.new_token))
        join = f"{token.token}@{token.addresses[0]}"
        two = await stack.enter_async_context(demo_node(second, folder, ports[1], join))
        console.print(
            f"{second.name}  {two.url}  {second.card}, {second.memory_mib} MiB; joined by  tars-node --join TOKEN@{token.addresses[0]}"
        )
        through_two = await stack.enter_async_context(Client(two.url, timeout=LOAD_SECONDS))
        await two.while_it_runs(again_until(LOAD_SECONDS, through_two.ping))
        await one.while_it_runs(all_ready(through_one))
        plan = await through_two.plan()
        console.print(f"\nplaced and loaded after {time.monotonic() - began:.0f} s:")
        for each in plan.assignments:
            console.print(
                f"  {each.model} ({each.variant}) on {plain(each.device_name)} of {each.node_name}: {plain(each.reason)}"
            )
        console.print()
        talk = Talk(console)
        await talk.learn_names(through_two)
        await one.while_it_runs(talk.both(through_one, first.name))
        await two.while_it_runs(talk.both(through_two, second.name))

        coordinator = next(peer.name for peer in (await through_two.peers()).peers if peer.coordinator)
        console.print(
            Text(
                f"\n{first.name} is killed (SIGKILL){'; it was the coordinator' if coordinator == first.name else ''}:",
                "bold",
            )
        )
        await one.kill()
        began = time.monotonic()
        await two.while_it_runs(talk.both(through_two, second.name))
        console.print(f"\nboth models answer without {first.name}, {time.monotonic() - began:.1f} s after its death:")
        for peer in (await through_two.peers()).peers:
            role = ", coordinates" if peer.coordinator else ""
            console.print(f"  {peer.name}: {peer.state}{role}")


__all__ = ["NodeEnded", "demo_mesh"]
