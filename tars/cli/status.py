"""`tars status`: the node that is asked, and the mesh as it sees it.

Law of this file: it asks and hands the messages to `output` and `mesh_output`; nothing is computed here.
"""

from __future__ import annotations

import contextlib
import sys
import time
from dataclasses import dataclass
from typing import Any

import click
from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from tars.cli.connection import Connection, Exit, ask, connection_options, pass_connection, print_answer, print_json
from tars.cli.mesh_output import one_node_view
from tars.cli.output import not_served, not_served_view, plain
from tars.cli.status_output import status_view
from tars.cli.waiting import WAIT_SECONDS, seen_mesh, wait_until_ready
from tars.client import Client
from tars.errors import PeerUnreachable
from tars.messages.mesh_state import MeshDescription
from tars.messages.node import NodeDescription

WATCH_SECONDS = 1.0
"""How often `tars status --watch` asks: devices are probed once a second, so asking oftener shows nothing new."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What a node says of itself and of its mesh; `mesh` None: it is older than meshes."""

    node: NodeDescription
    mesh: MeshDescription | None
    missing: tuple[str, ...] = ()

    def document(self) -> dict[str, Any]:
        """The node's description as it is, and the mesh beside it."""
        mesh = {} if self.mesh is None else {"mesh": self.mesh.model_dump(mode="json")}
        return {**self.node.model_dump(mode="json"), **mesh}

    def view(self) -> Group:
        """For people."""
        return Group(status_view(self.node, self.mesh, time.time()), not_served_view(self.missing))


@click.command()
@click.option("--node", metavar="NAME", help="Of another node of the mesh, by its name or id: what it told of itself.")
@click.option("--watch", is_flag=True, help="Show it live until Ctrl-C.")
@click.option(
    "--wait", is_flag=True, help="Wait until every model is ready, with progress; exit code 1 if one cannot be served."
)
@click.option(
    "--wait-timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=WAIT_SECONDS,
    show_default=True,
    metavar="SECONDS",
    help="How long --wait waits.",
)
@connection_options
@pass_connection
def status(connection: Connection, node: str | None, watch: bool, wait: bool, wait_timeout: float) -> int:
    """Show the node's devices, memory and recent errors, and the nodes and replicas of its mesh.

    With --json: the message of node.describe, with that of mesh.describe under "mesh".
    """
    if watch and wait:
        raise click.UsageError("--watch and --wait exclude each other")
    if node is not None and (watch or wait):
        raise click.UsageError("--node shows one node once: it goes with neither --watch nor --wait")
    if node is not None:
        return _one(connection, node)
    if watch:
        return _watch(connection)

    async def look(client: Client) -> Seen:
        description = await (wait_until_ready(client, connection, wait_timeout) if wait else client.describe())
        return Seen(description, await seen_mesh(client), tuple(not_served(await client.models())))

    seen = ask(connection, look)
    print_answer(connection, seen.document(), seen.view)
    return Exit.FAILED if wait and seen.missing else Exit.OK


def _one(connection: Connection, node: str) -> int:
    mesh = ask(connection, lambda client: client.describe_mesh(node=node))
    print_answer(connection, mesh, lambda: Group(*(one_node_view(each, time.time()) for each in mesh.nodes)))
    return Exit.OK


def _watch(connection: Connection) -> int:
    console = connection.console()
    answered = False

    async def look(client: Client) -> Seen:
        return Seen(await client.describe(), await seen_mesh(client))

    with contextlib.ExitStack() as stack:
        live = None
        if console.is_terminal and not connection.as_json:
            live = stack.enter_context(Live(console=console, auto_refresh=False))
        while True:
            try:
                # Each round has a connection of its own: a node that was restarted in between is simply asked again.
                seen = ask(connection, look)
                answered = True
            except PeerUnreachable as error:
                if not answered:
                    raise
                shown: RenderableType = Text(f"{plain(error.message)} Still watching.")
            else:
                shown = seen.view()
                if connection.as_json:
                    print_json(seen.document())
            if live is not None:
                live.update(shown, refresh=True)
            elif not connection.as_json:
                console.print(shown)
            sys.stdout.flush()
            time.sleep(WATCH_SECONDS)
