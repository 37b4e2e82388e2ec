"""`tars token`, `tars key` and `tars node`: who belongs to the mesh, and who may call it.

Law of this file: what is printed once (a token, a key) goes to standard output alone on its line, so that it can be copied or piped;
everything about it goes to standard error. Nothing is computed here but how long ago something was.
"""

from __future__ import annotations

import re
import time

import click
from rich.console import Group, RenderableType
from rich.text import Text

from tars.cli.connection import Connection, Exit, ask, connection_options, pass_connection, print_answer, print_json
from tars.cli.mesh_output import ISOLATED
from tars.cli.output import cell, duration, plain, table_of
from tars.messages.admission import KeysResult, TokenNewResult, TokensResult
from tars.messages.node import PeersResult

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_STATES = {
    "open": "green",
    "ALIVE": "green",
    "DRAINING": "yellow",
    "SUSPECT": "yellow",
    "DEAD": "red",
    "revoked": "dim",
    "expired": "dim",
}
"""Colours of a token's or a peer's state; others have none."""
SHOWN_ID = 8
"""Characters of a NodeId in a table: enough to name it to `tars node remove`, and two of ten nodes never share them."""


def _lifetime(context: click.Context, parameter: click.Parameter, value: str) -> int:
    """Seconds, from one second to 30 days."""
    match = re.fullmatch(r"([0-9]{1,7})([smhd]?)", value.strip().lower())
    seconds = int(match[1]) * _SECONDS[match[2] or "s"] if match else 0
    if not 1 <= seconds <= 30 * 86_400:
        raise click.BadParameter(
            f"{plain(value)!r} is no time from 1s to 30d; write it like 90s, 30m, 1h or 7d", context, parameter
        )
    return seconds


# --- tokens -------------------------------------------------------------------------------------------------------------


@click.group()
def token() -> None:
    """Join tokens: each lets one more PC into the mesh, once. Needs an admin key, or this PC's own user."""


@token.command("new")
@click.option(
    "--ttl",
    default="1h",
    show_default=True,
    metavar="TIME",
    callback=_lifetime,
    help="How long it can be used: 90s, 30m, 1h, 7d.",
)
@connection_options
@pass_connection
def new_token(connection: Connection, ttl: int) -> int:
    """Make a token and print the command for the next PC."""
    made = ask(connection, lambda client: client.new_token(ttl))
    if connection.as_json:
        print_json(made)
        return Exit.OK
    for line in join_lines(made):
        click.echo(line)
    connection.console(stderr=True).print(
        Text(
            f"Run that on the PC that is to join. It works once, within {duration(ttl)}; `tars token revoke "
            f"{plain(made.id)}` ends it earlier."
        ),
        soft_wrap=True,
    )
    return Exit.OK


def join_lines(made: TokenNewResult) -> list[str]:
    """The command for the next PC, with this node's best address; further addresses as comments."""
    if not made.addresses:
        return [f"tars-node --join {plain(made.token)}@HOST:PORT"]
    first, *others = (f"tars-node --join {plain(made.token)}@{plain(address)}" for address in made.addresses)
    return [first, *(f"# or, where that address cannot be reached: {other}" for other in others)]


@token.command("list")
@connection_options
@pass_connection
def list_tokens(connection: Connection) -> int:
    """List the tokens that this node made, newest first."""
    result = ask(connection, lambda client: client.tokens())
    print_answer(connection, result, lambda: tokens_view(result, time.time()))
    return Exit.OK


def tokens_view(result: TokensResult, now: float) -> RenderableType:
    """`tars token list`; `now` is Unix time, seconds."""
    if not result.tokens:
        return Text("this node has made no join token within the last week; `tars token new` makes one")
    table = table_of("id", "state", "made", "ends", "used by")
    for each in result.tokens:
        left = each.expires_ms / 1000 - now
        ends = f"in {duration(left)}" if each.state == "open" and left > 0 else "-"
        used_by = "-" if each.used_by is None else f"{each.used_by_name or 'a node'} ({each.used_by[:SHOWN_ID]})"
        table.add_row(
            cell(each.id),
            cell(each.state, _STATES.get(each.state, "")),
            cell(_ago(each.created_ms, now)),
            cell(ends),
            cell(used_by),
        )
    return table


@token.command("revoke")
@click.argument("token_id", metavar="ID")
@connection_options
@pass_connection
def revoke_token(connection: Connection, token_id: str) -> int:
    """End a token early, by its ID from `tars token list`."""
    result = ask(connection, lambda client: client.revoke_token(token_id))
    unusable = "could no longer be used anyway; `tars token list` shows why"
    said = "opens nothing any more" if result.revoked else unusable
    print_answer(connection, result, lambda: f"token {plain(result.id)} {said}")
    return Exit.OK


# --- keys ---------------------------------------------------------------------------------------------------------------


@click.group()
def key() -> None:
    """API keys of clients, good on every node of the mesh. Needs an admin key, or this PC's own user."""


FIRST_KEY = (
    "\nIt is the first one: from now on every node refuses calls without a key, but those of `tars` on the node's own PC "
    "(with TARS_STATE_DIR, where its state folder is not the default)."
)


@key.command("new")
@click.argument("name")
@click.option("--admin", is_flag=True, help="It may also make tokens and keys, and remove nodes.")
@connection_options
@pass_connection
def new_key(connection: Connection, name: str, admin: bool) -> int:
    """Make a key for NAME and print it, once."""
    made = ask(connection, lambda client: client.new_key(name, admin=admin))
    if connection.as_json:
        print_json(made)
        return Exit.OK
    click.echo(made.key)
    connection.console(stderr=True).print(
        Text(
            f"That is the {'admin ' if made.admin else ''}key of {plain(made.name)}. It is kept nowhere and not shown again. Send it as "
            f"Authorization: Bearer KEY, or set TARS_API_KEY; `tars key revoke {plain(made.name)}` ends it."
            + (FIRST_KEY if made.first else "")
        ),
        soft_wrap=True,
    )
    return Exit.OK


@key.command("list")
@connection_options
@pass_connection
def list_keys(connection: Connection) -> int:
    """List who has a key."""
    result = ask(connection, lambda client: client.keys())
    print_answer(connection, result, lambda: keys_view(result, time.time()))
    return Exit.OK


def keys_view(result: KeysResult, now: float) -> RenderableType:
    """`tars key list`; `now` is Unix time, seconds."""
    if not result.keys:
        return Text("there is no API key; `tars key new NAME` makes one")
    table = table_of("name", "may", "works on", "made")
    for each in result.keys:
        table.add_row(
            cell(each.name),
            cell("everything" if each.admin else "call"),
            cell("every node" if each.source == "mesh" else "this node (its configuration)"),
            cell("-" if each.created_ms is None else _ago(each.created_ms, now)),
        )
    return table


@key.command("revoke")
@click.argument("name")
@connection_options
@pass_connection
def revoke_key(connection: Connection, name: str) -> int:
    """End the key of NAME on every node."""
    result = ask(connection, lambda client: client.revoke_key(name))
    print_answer(connection, result, lambda: f"the key of {plain(result.name)} works nowhere any more")
    return Exit.OK


# --- nodes --------------------------------------------------------------------------------------------------------------


@click.group()
def node() -> None:
    """The nodes of the mesh."""


@node.command("list")
@connection_options
@pass_connection
def list_nodes(connection: Connection) -> int:
    """List the nodes that this node sees, itself included."""
    result = ask(connection, lambda client: client.peers())
    print_answer(connection, result, lambda: nodes_view(result))
    return Exit.OK


def nodes_view(result: PeersResult) -> RenderableType:
    """`tars node list`."""
    table = table_of("name", "id", "state", "role", "version", "addresses", "page")
    for peer in result.peers:
        table.add_row(
            cell(peer.name),
            cell(peer.node[:SHOWN_ID]),
            cell(peer.state, _STATES.get(peer.state, "")),
            cell("coordinates" if peer.coordinator else "-"),
            cell(peer.version or "-"),
            cell(", ".join(peer.addresses) or "-"),
            cell(peer.client_url or "-"),
        )
    return Group(table, ISOLATED) if result.isolated else table


@node.command("remove")
@click.argument("node")
@click.option("--yes", is_flag=True, help="Do not ask.")
@connection_options
@pass_connection
def remove_node(connection: Connection, node: str, yes: bool) -> int:
    """Throw NODE (a name, an id, or the beginning of one) out of the mesh for ever.

    Its certificate stops working everywhere, and its connections are closed at once. It can join again with a new token, as a new node.
    """
    if not yes and not connection.as_json and connection.console().is_terminal:
        click.confirm(f"Remove {plain(node)} from the mesh?", abort=True)
    result = ask(connection, lambda client: client.remove_node(node))
    said = "is no longer in the mesh" if result.removed else "was removed before"
    print_answer(connection, result, lambda: f"{plain(result.name)} ({plain(result.node)}) {said}")
    return Exit.OK


def _ago(created_ms: int, now: float) -> str:
    return f"{duration(max(0.0, now - created_ms / 1000))} ago"
