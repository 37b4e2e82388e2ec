"""`tars pull MODEL`: have the node fetch a model's file, with its progress on standard error.

Law of this file: the node does it; this command asks, and shows what `models.transfers` says meanwhile. Ctrl-C ends the call; what came
stays on the node, and the same command goes on from there.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from tars.cli.connection import Connection, Exit, ask, connection_options, pass_connection, print_answer
from tars.cli.output import plain, transfer_progress
from tars.client import Client
from tars.core.types import Bytes
from tars.errors import TarsError
from tars.messages.base import MAX_TIMEOUT_MS
from tars.messages.files import PullResult, TransferDescription

POLL_SECONDS = 0.25
"""Four looks a second: a bar that seems to move, and next to no work for the node."""
STEP_PERCENT = 10
"""In a log: a line for each tenth."""

Shows = Callable[[TransferDescription], None]


@click.command()
@click.argument("model")
@click.option("--variant", help="Quantisation, such as Q4_K_M; default: what a peer holds, else Q4_K_M, else the best.")
@click.option(
    "--from-file",
    "from_file",
    type=click.Path(exists=True, path_type=Path),
    help="Take this file (or folder) of the node's own PC: linked where it can be, else copied.",
)
@connection_options
@pass_connection
def pull(connection: Connection, model: str, variant: str | None, from_file: Path | None) -> int:
    """Have the node fetch the file of MODEL: from its peers, else from Hugging Face.

    MODEL is a name that `tars models` lists, or a file there: hf.co/OWNER/REPO/FILE.gguf or OWNER/REPO:FILE.gguf. A command that was
    interrupted goes on where it was.
    """
    # Gigabytes take longer than a call; but who names a time means it.
    seconds = connection.timeout if "timeout" in connection.given else MAX_TIMEOUT_MS / 1000

    path = None if from_file is None else str(from_file.absolute())

    async def pulled(client: Client) -> PullResult:
        if path is not None:
            return await client.add_file(model, path, variant=variant, timeout=seconds)
        return await client.pull(model, variant=variant, timeout=seconds)

    result = ask(connection, lambda client: watched(client, pulled(client), connection.console(stderr=True)))
    print_answer(connection, result, lambda: said(result))
    return Exit.OK


async def watched(client: Client, pulling: Coroutine[None, None, PullResult], console: Console) -> PullResult:
    """The result of `pulling`; meanwhile what is on its way to the node is shown."""
    task = asyncio.ensure_future(pulling)
    try:
        with contextlib.ExitStack() as stack:
            show = _lines(console)
            if console.is_terminal:
                show = _bars(stack.enter_context(_progress(console)))
            while True:
                await asyncio.wait({task}, timeout=POLL_SECONDS)
                if task.done():
                    return await task
                # A look that fails says nothing of the call itself.
                with contextlib.suppress(TarsError):
                    for transfer in (await client.transfers()).transfers:
                        show(transfer)
    finally:
        task.cancel()
        await asyncio.wait({task})


def said(result: PullResult) -> str:
    """The result in a line."""
    model = f"{plain(result.model)} {plain(result.variant)} ({Bytes(result.size_bytes)})"
    if not result.sources:
        return f"{model} is on the node already"
    sources = ", ".join(plain(source) for source in result.sources)
    return f"{model} is on the node: from {sources}, in {result.seconds:.1f} s, verified (sha256 {plain(result.sha256)[:12]}...)"


def _name(transfer: TransferDescription) -> str:
    return f"{plain(transfer.model)} {plain(transfer.variant)}"


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:3.0f} %"),
        TextColumn("{task.fields[state]}"), TimeRemainingColumn(), console=console, transient=True,
    )  # fmt: skip


def _bars(progress: Progress) -> Shows:
    tasks: dict[str, TaskID] = {}

    def show(transfer: TransferDescription) -> None:
        name = _name(transfer)
        if name not in tasks:
            tasks[name] = progress.add_task(name, total=None, state="")
        progress.update(
            tasks[name],
            total=transfer.bytes_total or None,
            completed=transfer.bytes_done,
            state=transfer_progress(transfer),
        )

    return show


def _lines(console: Console) -> Shows:
    last: dict[str, tuple[str, int]] = {}

    def show(transfer: TransferDescription) -> None:
        percent = 100 * transfer.bytes_done // max(1, transfer.bytes_total)
        step = (transfer.stage, percent // STEP_PERCENT if transfer.stage == "fetch" else 0)
        if last.get(_name(transfer)) != step:
            last[_name(transfer)] = step
            console.print(f"{_name(transfer)}: {transfer_progress(transfer)}", soft_wrap=True)
            sys.stderr.flush()

    return show
