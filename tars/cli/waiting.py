"""Waiting for a node and its models, with progress on standard error.

Law of this file: it polls `node.describe` and `mesh.describe`; it decides nothing about loading. On a terminal it draws bars, elsewhere it
writes a line when something changed, so that a log stays short.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from tars.cli.connection import Connection
from tars.cli.mesh_output import is_mesh, peers_replicas
from tars.cli.output import plain, replica_progress
from tars.client import Client
from tars.errors import DeadlineExceeded, MethodNotFound, PeerUnreachable
from tars.messages.mesh_state import MeshDescription, MeshReplica
from tars.messages.node import NodeDescription, ReplicaDescription

WAIT_SECONDS = 600.0
"""A 40 GB file from a slow disk (100 MB/s) takes about 400 s to read."""

POLL_SECONDS = 0.25
"""Four looks a second: a bar that seems to move, and next to no work for the node."""

SETTLED = {"ready", "failed"}
"""States that waiting cannot change."""


Replica = ReplicaDescription | MeshReplica
"""On this node, or on a peer."""


class Shows(Protocol):
    """Where progress is shown."""

    def waiting(self, what: str) -> None:
        """The node does not answer yet, or has no replica yet."""
        ...

    def replicas(self, replicas: list[Replica]) -> None:
        """The replicas as they are now."""
        ...


class Lines:
    """A line for each change: for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.said: dict[str, str] = {}

    def waiting(self, what: str) -> None:
        """See `Shows`."""
        self._say("", what)

    def replicas(self, replicas: list[Replica]) -> None:
        """See `Shows`; a percentage alone is no change worth a line."""
        for replica in replicas:
            stage = replica.progress.stage if replica.progress else ""
            self._say(replica.id, f"{plain(replica.model)}: {replica_progress(replica)}", f"{replica.state} {stage}")

    def _say(self, key: str, line: str, change: str | None = None) -> None:
        if self.said.get(key) != (change or line):
            self.said[key] = change or line
            self.console.print(line)


class Bars:
    """A bar for each replica: for terminals."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.tasks: dict[str, TaskID] = {}

    def waiting(self, what: str) -> None:
        """See `Shows`."""
        if "" not in self.tasks:
            self.tasks[""] = self.progress.add_task(what, total=None, state="")
        self.progress.update(self.tasks[""], description=what, visible=True)

    def replicas(self, replicas: list[Replica]) -> None:
        """See `Shows`."""
        if "" in self.tasks:
            self.progress.update(self.tasks[""], visible=False)
        for replica in replicas:
            if replica.id not in self.tasks:
                self.tasks[replica.id] = self.progress.add_task(plain(replica.model), total=100, state="")
            done = 100.0 if replica.state == "ready" else replica.progress.percent if replica.progress else 0.0
            self.progress.update(self.tasks[replica.id], completed=done, state=replica_progress(replica))


async def seen_mesh(client: Client) -> MeshDescription | None:
    """The mesh as the node sees it; None where the node is older than meshes."""
    try:
        return await client.describe_mesh()
    except MethodNotFound:
        return None


async def wait_until_ready(client: Client, connection: Connection, seconds: float) -> NodeDescription:
    """The node's description once every replica of the mesh is ready or has failed.

    A node that does not answer yet is waited for too: it may just be starting. Raises `PeerUnreachable` when it never answered
    and `DeadlineExceeded` when something is still loading after `seconds`.
    """
    with _shown(connection) as shows:
        return (await watch_until_ready(client, shows, seconds))[0]


async def wait_for_model(client: Client, connection: Connection, seconds: float, model: str) -> list[Replica]:
    """The replicas of `model`, on whatever nodes, once each is ready or has failed. Raises as `wait_until_ready` does."""
    with _shown(connection) as shows:
        return (await watch_until_ready(client, shows, seconds, model=model))[1]


@contextlib.contextmanager
def _shown(connection: Connection) -> Iterator[Shows]:
    """Bars on a terminal, lines elsewhere."""
    console = connection.console(stderr=True)
    if not console.is_terminal:
        yield Lines(console)
        return
    bars = Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[state]}"), TimeElapsedColumn(),
        console=console, transient=True,
    )  # fmt: skip
    with bars:
        yield Bars(bars)


async def watch_until_ready(
    client: Client, shows: Shows, seconds: float, *, model: str | None = None
) -> tuple[NodeDescription, list[Replica]]:
    """`wait_until_ready` and `wait_for_model` without a console: progress goes to `shows`. Gives the replicas that were waited for, too."""
    give_up = time.monotonic() + seconds
    while True:
        late = time.monotonic() >= give_up
        try:
            description = await client.describe()
            mesh = await seen_mesh(client)
            coming = await _to_come(client) if is_mesh(mesh) and model is None else False
        except PeerUnreachable:
            if late:
                raise
            shows.waiting("waiting for the node to answer")
        else:
            replicas: list[Replica] = [*description.replicas, *peers_replicas(mesh)]
            watched = [replica for replica in replicas if model in (None, replica.model)]
            shows.replicas(watched)
            if not coming and _settled(description, watched, model):
                return description, watched
            if late:
                loading = ", ".join(plain(r.model) for r in watched if r.state not in SETTLED) or model or "the node"
                raise DeadlineExceeded(
                    f"{loading} is still loading after {seconds:.0f} s; it goes on, --wait-timeout waits longer"
                )
        await asyncio.sleep(POLL_SECONDS)


async def _to_come(client: Client) -> bool:
    """Whether some node of the mesh has yet to begin with a model: it has no replica to look at."""
    return any(each.deployed and each.state == "loading" for each in (await client.models()).models)


def _settled(description: NodeDescription, watched: list[Replica], model: str | None) -> bool:
    if not all(replica.state in SETTLED for replica in watched):
        return False
    if model is not None:  # a deployment that no node has begun to carry out has no replica yet
        return bool(watched)
    # A node says `loading` until all is well, also where a replica has failed for good.
    return description.state != "loading" or any(replica.state == "failed" for replica in description.replicas)
