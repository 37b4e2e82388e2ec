"""`tars drain` and `tars resume`: a node's memory back for its owner, and for TARS again.

Law of this file: the node's own words are printed; nothing is computed here.
"""

from __future__ import annotations

import click

from tars.cli.connection import Connection, Exit, ask, connection_options, pass_connection, print_answer
from tars.cli.output import plain
from tars.messages.node import DrainResult


@click.command()
@connection_options
@pass_connection
def drain(connection: Connection) -> int:
    """Give the node's memory back, for a game for example: models go to other PCs where they fit. Until `tars resume`."""
    _say(connection, ask(connection, lambda client: client.drain()))
    return Exit.OK


@click.command()
@connection_options
@pass_connection
def resume(connection: Connection) -> int:
    """Undo `tars drain`: the node serves models again."""
    _say(connection, ask(connection, lambda client: client.resume()))
    return Exit.OK


def _say(connection: Connection, result: DrainResult) -> None:
    print_answer(connection, result, lambda: plain(result.message) or plain(result.state))
