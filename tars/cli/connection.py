"""What every command shares: where the node is, how it is asked, and how a failure becomes a message and an exit code.

Law of this file: no command and no rendering of answers. Nothing that a command raises leaves as a traceback: `report_failure` knows each
branch of the error tree, and what is not in it is a bug that is named as one.
"""

from __future__ import annotations

import asyncio
import math
import os
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, TypeVar
from urllib.parse import urlsplit

import click
import orjson
from click.core import ParameterSource
from pydantic import BaseModel
from rich.console import Console, RenderableType

from tars.cli.output import plain
from tars.client import Client
from tars.config import state_folder_of
from tars.core.types import Bytes
from tars.errors import ConfigError, TarsError
from tars.mesh.operator_key import operator_key_for
from tars.rpc.http_client import NodeNotReachable

Answer = TypeVar("Answer")
Command = TypeVar("Command", bound=Callable[..., Any])

DEFAULT_URL = "http://127.0.0.1:8000"
"""Where `tars-node` listens without arguments."""

DEFAULT_TIMEOUT_SECONDS = 120.0
"""A long answer of a 7B model on a CPU (5 tokens/s, 500 tokens) ends within it."""

PIPE_WIDTH = 120
"""Columns where standard output is no terminal: a plan's row fits, and it is the same on every machine, so that outputs compare."""

HINTS = {
    "transfer_failed": "the same command goes on where it was",
    "still_loading": "`tars status --wait` waits until it is loaded",
    "unauthorized": "give the key with --api-key or in TARS_API_KEY; on the node's own PC none is needed: `tars` reads the operator "
    "key in the node's state folder (TARS_STATE_DIR, where that is not the default)",
    "unknown_model": "`tars models` lists the models that this node knows",
    "does_not_fit": "`tars explain MODEL` says why, device by device",
    "replica_failed": "`tars status` shows the reason",
    "worker_crashed": "`tars status` shows when it is back",
}
"""What to do next on this command line, by the error's kind; the message itself already says what happened."""


class Exit(IntEnum):
    """Exit codes. 130 is the shell's own for a command that Ctrl-C ended (128 + SIGINT)."""

    OK = 0
    FAILED = 1
    USAGE = 2
    NOT_REACHABLE = 3
    INTERRUPTED = 130


@dataclass
class Connection:
    """The options that every command shares. They may stand before or after the command's name; after wins."""

    url: str = DEFAULT_URL
    api_key: str | None = None
    timeout: float = DEFAULT_TIMEOUT_SECONDS
    as_json: bool = False
    given: set[str] = field(default_factory=set)
    """Names that stood on the command line, so that an environment variable never overrides them."""

    def client(self) -> Client:
        """A client for this node; use it as an async context manager. Without a key: the operator key of this PC's node."""
        key = self.api_key if self.api_key is not None else operator_key_for(self.url, state_folder_of(os.environ))
        return Client(self.url, api_key=key, timeout=self.timeout)

    def console(self, *, stderr: bool = False) -> Console:
        """A console for the answer (standard output) or for everything beside it (standard error)."""
        console = Console(stderr=stderr, highlight=False, markup=False, emoji=False, soft_wrap=False)
        if not console.is_terminal:
            console = Console(stderr=stderr, highlight=False, markup=False, emoji=False, width=PIPE_WIDTH)
        return console


def connection_options(command: Command) -> Command:
    """`--url`, `--api-key`, `--timeout` and `--json`, on the group and on every command."""
    options = [
        click.option(
            "--url", envvar="TARS_URL", default=DEFAULT_URL, show_default=True, callback=_url, expose_value=False,
            help="The node's address [env: TARS_URL].",
        ),
        click.option(
            "--api-key", envvar="TARS_API_KEY", default=None, callback=_keep, expose_value=False,
            help="API key, where the node asks for one [env: TARS_API_KEY].",
        ),
        click.option(
            "--timeout", type=float, default=DEFAULT_TIMEOUT_SECONDS, show_default=True, metavar="SECONDS",
            callback=_timeout, expose_value=False, help="How long a call may take.",
        ),
        click.option(
            "--json", "as_json", is_flag=True, default=False, callback=_keep, expose_value=False,
            help="Print the answer as the JSON message itself, and nothing else.",
        ),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def _keep(context: click.Context, parameter: click.Parameter, value: Any) -> Any:
    name = parameter.name
    assert name is not None
    connection = context.find_object(Connection)
    assert connection is not None  # `run` puts it there
    source = context.get_parameter_source(name)
    on_the_line = source is ParameterSource.COMMANDLINE
    if on_the_line or (source is not ParameterSource.DEFAULT and name not in connection.given):
        setattr(connection, name, value)
    if on_the_line:
        connection.given.add(name)
    return value


def _url(context: click.Context, parameter: click.Parameter, value: str) -> str:
    address = value if "://" in value else f"http://{value}"
    try:
        parts = urlsplit(address)
        usable = parts.scheme in {"http", "https"} and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        usable = False
    if not usable:
        raise click.BadParameter(f"{plain(value)!r} is no address; write it like {DEFAULT_URL}", context, parameter)
    return str(_keep(context, parameter, address.rstrip("/")))


def _timeout(context: click.Context, parameter: click.Parameter, value: float) -> float:
    if not (math.isfinite(value) and value > 0):
        raise click.BadParameter("a number of seconds above 0", context, parameter)
    return float(_keep(context, parameter, value))


pass_connection = click.make_pass_decorator(Connection)


def ask(connection: Connection, use: Callable[[Client], Awaitable[Answer]]) -> Answer:
    """Open a client, let `use` call it, close it. Ctrl-C cancels the call, on the node too."""

    async def session() -> Answer:
        async with connection.client() as client:
            return await use(client)

    return asyncio.run(session())


def checked_text(text: str, where: str) -> str:
    """`text`, or wrong usage: bytes that are no UTF-8 arrive as lone surrogates, which JSON cannot carry."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise click.UsageError(f"{where} is not UTF-8 text") from None
    return text


def read_standard_input() -> str:
    """All of standard input as text; wrong usage where it is none."""
    try:
        return checked_text(sys.stdin.read(), "standard input")
    except UnicodeDecodeError:
        raise click.UsageError("standard input is not UTF-8 text") from None


def print_json(value: BaseModel | dict[str, Any]) -> None:
    """One JSON document on one line of standard output."""
    document = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
    click.echo(orjson.dumps(document).decode())


def print_answer(
    connection: Connection, message: BaseModel | dict[str, Any], view: Callable[[], RenderableType]
) -> None:
    """The answer on standard output: with `--json` the message itself and nothing else, otherwise what `view` makes of it for people.

    A text is written as it is; anything else is laid out for the width of the terminal.
    """
    if connection.as_json:
        print_json(message)
    elif isinstance(shown := view(), str):
        click.echo(shown)
    else:
        connection.console().print(shown)


def report_failure(error: Exception, connection: Connection) -> Exit:
    """Say on standard error what happened and what to do; with `--json` also `{"error": ...}` on standard output. Returns the exit code."""
    console = connection.console(stderr=True)

    def say(line: str) -> None:
        # Not folded: an error is searched for, and pasted.
        console.print(plain(line), soft_wrap=True)

    if isinstance(error, TarsError):
        if connection.as_json:
            print_json({"error": error.to_json(trace_id=error.trace_id)})
        say(f"error: {error.message}")
        for line in _details(error):
            say(f"  {line}")
        if isinstance(error, NodeNotReachable):
            say("`tars-node` starts a node on this machine; --url or TARS_URL names another address.")
            return Exit.NOT_REACHABLE
        if error.kind in HINTS:
            say(HINTS[error.kind])
        if error.retryable and error.retry_after_ms:
            say(f"it is worth trying again in {error.retry_after_ms / 1000:.1f} s")
        if error.trace_id and "attempts" in error.details:
            say(f"`tars explain call {error.trace_id}` says what was tried")
        return Exit.USAGE if isinstance(error, ConfigError) else Exit.FAILED
    # What is left is a file that cannot be read, or a bug. Neither shows a traceback; TARS_DEBUG asks for one.
    if isinstance(error, OSError):
        say(f"error: {error.strerror or type(error).__name__}: {error.filename or ''}")
        return Exit.FAILED
    say(
        f"error: this is a bug in TARS ({type(error).__name__}); please report it with the output of TARS_DEBUG=1 tars ..."
    )
    return Exit.FAILED


def _details(error: TarsError) -> list[str]:
    """The rows that some errors carry beside their message."""
    lines: list[str] = []
    if isinstance(error, ConfigError):  # its message holds them already
        return lines
    for entry in error.details.get("errors", []) if isinstance(error.details.get("errors"), list) else []:
        lines.append(" ".join(str(value) for value in entry.values()) if isinstance(entry, dict) else str(entry))
    for entry in error.details.get("devices", []) if isinstance(error.details.get("devices"), list) else []:
        if isinstance(entry, dict) and isinstance(entry.get("needed_bytes"), int):
            lines.append(
                f"{entry.get('device_name', entry.get('device', 'device'))}: needs {Bytes(entry['needed_bytes'])}, "
                f"{Bytes(entry.get('free_bytes') or 0)} free"
            )
    return lines
