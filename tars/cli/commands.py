"""The `tars` command: its group, the small commands, and `run`, which turns whatever happens into an exit code.

Law of this file: a command asks the client and hands the message to `output`; nothing is computed here.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Sequence
from typing import Literal, TextIO

import click

import tars
from tars.cli.chat import chat
from tars.cli.connection import (
    Connection,
    Exit,
    ask,
    checked_text,
    connection_options,
    pass_connection,
    print_answer,
    read_standard_input,
    report_failure,
)
from tars.cli.draining import drain, resume
from tars.cli.mesh_commands import key, node, token
from tars.cli.output import embeddings_view, models_view, plain, rerank_view
from tars.cli.plan_output import deploy_view
from tars.cli.planning import explain, plan
from tars.cli.pull import pull
from tars.cli.status import status
from tars.cli.waiting import WAIT_SECONDS, wait_for_model
from tars.client import Client
from tars.messages.node import PingResult

MOST_TEXTS = 2048
"""Texts of one call, as `inference.embed` and `inference.rerank` bound them."""


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(tars.__version__, prog_name="tars")
@connection_options
def cli() -> None:
    """Ask a TARS node: what it serves, what it thinks, where a model would go.

    A node must run (`tars-node`) for everything but `tars plan --node FILE`.

    Exit codes: 0 done, 1 the call failed, 2 wrong usage or a bad file, 3 no node answers, 130 Ctrl-C.
    """


@cli.command()
@click.argument("texts", nargs=-1)
@click.option("--file", "file", type=click.File("r", encoding="utf-8"), help="One text a line; - is standard input.")
@click.option("--model", help="Model name; may be left out where the node serves only one embedding model.")
@click.option("--dimensions", type=click.IntRange(1, 65_536), help="Only the first so many values (Matryoshka models).")
@click.option(
    "--input-type", type=click.Choice(["query", "passage"]), help="Put the model's own prefix before each text."
)
@click.option("--no-truncate", is_flag=True, help="Refuse a text that is longer than the model's limit.")
@connection_options
@pass_connection
def embed(
    connection: Connection,
    texts: tuple[str, ...],
    file: TextIO | None,
    model: str | None,
    dimensions: int | None,
    input_type: Literal["query", "passage"] | None,
    no_truncate: bool,
) -> int:
    """Embed TEXTS (or - for standard input) and show how similar they are."""
    texts = _texts(texts, file, "texts", "tars embed 'one text' 'another'")
    with _busy(connection, f"embedding {len(texts)} texts"):
        result = ask(
            connection,
            lambda client: client.embed(
                texts, model=model, dimensions=dimensions, input_type=input_type, truncate=not no_truncate
            ),
        )
    print_answer(connection, result, lambda: embeddings_view(result, texts))
    return Exit.OK


@cli.command()
@click.argument("query")
@click.argument("documents", nargs=-1)
@click.option(
    "--file", "file", type=click.File("r", encoding="utf-8"), help="One document a line; - is standard input."
)
@click.option("--model", help="Model name; may be left out where the node serves only one rerank model.")
@click.option("--top", type=click.IntRange(min=1), help="Only the best so many.")
@click.option("--no-truncate", is_flag=True, help="Refuse a document that is longer than the model's limit.")
@connection_options
@pass_connection
def rerank(
    connection: Connection,
    query: str,
    documents: tuple[str, ...],
    file: TextIO | None,
    model: str | None,
    top: int | None,
    no_truncate: bool,
) -> int:
    """Sort DOCUMENTS (or - for standard input) by how relevant they are to QUERY."""
    documents = _texts(documents, file, "documents", "tars rerank 'a question' 'one text' 'another'")
    with _busy(connection, f"reranking {len(documents)} documents"):
        result = ask(
            connection,
            lambda client: client.rerank(query, documents, model=model, top_n=top, truncate=not no_truncate),
        )
    print_answer(connection, result, lambda: rerank_view(result, documents))
    return Exit.OK


def _texts(given: tuple[str, ...], file: TextIO | None, noun: str, example: str) -> tuple[str, ...]:
    """What was given as arguments, on standard input (`-`) or in a file, one a line."""
    if file is not None and given:
        raise click.UsageError(f"give {noun} or --file, not both")
    if given == ("-",):
        given = tuple(_lines(read_standard_input()))
    elif file is not None:
        try:
            given = tuple(_lines(file.read()))
        except UnicodeDecodeError:
            raise click.BadParameter("the file is not UTF-8 text", param_hint="--file") from None
    if not given:
        raise click.UsageError(f"no {noun}: {example}")
    if len(given) > MOST_TEXTS:
        raise click.UsageError(f"{len(given)} {noun}; one call takes at most {MOST_TEXTS}: split the file")
    return given


def _busy(connection: Connection, doing: str) -> contextlib.AbstractContextManager[object]:
    console = connection.console(stderr=True)
    return console.status(doing) if console.is_terminal else contextlib.nullcontext()


def _lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip()]


@cli.command()
@connection_options
@pass_connection
def models(connection: Connection) -> int:
    """List the models: deployed ones first, then what the catalogue knows."""
    result = ask(connection, lambda client: client.models())
    print_answer(connection, result, lambda: models_view(result))
    return Exit.OK


@cli.command()
@click.argument("model")
@click.option("--replicas", type=click.IntRange(1, 64), default=1, show_default=True, help="Loaded copies.")
@click.option("--context", type=click.IntRange(64, 1_048_576), help="Tokens of prompt and answer together.")
@click.option(
    "--slots",
    type=click.IntRange(1, 256),
    help="Sequences computed at once, each with its whole context; default: 4 that share the KV cache of one.",
)
@click.option("--kv-tokens", type=click.IntRange(64), help="Tokens in the KV cache in all, shared by the slots.")
@click.option("--kv-type", type=click.Choice(["f16", "q8_0", "q4_0"]), default="f16", show_default=True)
@click.option("--gpu-layers", type=click.IntRange(1), help="Only so many layers on the card; default: all.")
@click.option("--variant", help="Quantisation, such as Q4_K_M; default: the best that fits.")
@click.option("--device", help="A device's id or name, or cpu; default: where the planner says.")
@click.option("--wait", is_flag=True, help="Wait until it is loaded, with progress.")
@connection_options
@pass_connection
def deploy(
    connection: Connection,
    model: str,
    replicas: int,
    context: int | None,
    slots: int | None,
    kv_tokens: int | None,
    kv_type: Literal["f16", "q8_0", "q4_0"],
    gpu_layers: int | None,
    variant: str | None,
    device: str | None,
    wait: bool,
) -> int:
    """Have the node load MODEL where the planner puts it; it stays deployed over restarts."""
    result = ask(
        connection,
        lambda client: client.deploy(
            model,
            replicas=replicas,
            context=context,
            slots=slots,
            kv_tokens=kv_tokens,
            kv_type=kv_type,
            gpu_layers=gpu_layers,
            variant=variant,
            device=device,
        ),
    )
    print_answer(connection, result, lambda: deploy_view(result))
    if not result.accepted:
        return Exit.FAILED
    if wait:
        loaded = ask(connection, lambda client: wait_for_model(client, connection, WAIT_SECONDS, result.model))
        if any(replica.state == "failed" for replica in loaded):
            return Exit.FAILED
    elif not connection.as_json:
        connection.console(stderr=True).print("loading goes on; `tars status --wait` shows it")
    return Exit.OK


@cli.command()
@click.argument("model")
@connection_options
@pass_connection
def undeploy(connection: Connection, model: str) -> int:
    """Have the node unload MODEL and free its memory; the file stays."""
    result = ask(connection, lambda client: client.remove(model))
    said = "is no longer deployed" if result.removed else "was not deployed"
    print_answer(connection, result, lambda: f"{plain(result.model)} {said}")
    return Exit.OK


@cli.command()
@connection_options
@pass_connection
def ping(connection: Connection) -> int:
    """Ask whether the node is there, and how long the way takes."""

    async def timed(client: Client) -> tuple[PingResult, float]:
        started = time.perf_counter()
        return await client.ping(), (time.perf_counter() - started) * 1000

    result, elapsed_ms = ask(connection, timed)
    print_answer(
        connection,
        result,
        lambda: f"{connection.url}: TARS {plain(result.version)}, {plain(result.state)}, {elapsed_ms:.1f} ms",
    )
    return Exit.OK


cli.add_command(status)
cli.add_command(chat)
cli.add_command(plan)
cli.add_command(explain)
cli.add_command(token)
cli.add_command(key)
cli.add_command(node)
cli.add_command(pull)
cli.add_command(drain)
cli.add_command(resume)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; raises nothing. `arguments` None takes the process's."""
    connection = Connection()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        for argument in arguments:
            checked_text(argument, "an argument")
        code = cli.main(arguments, prog_name="tars", standalone_mode=False, obj=connection)
        sys.stdout.flush()
        return int(code or Exit.OK)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return Exit.INTERRUPTED
    except BrokenPipeError:
        # The reader left (`tars models | head -1`). Nothing more can be said there; the interpreter's last flush must not fail again.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.FAILED
    except Exception as error:  # the outermost frame: whatever it is, the operator gets a line, not a traceback
        if os.environ.get("TARS_DEBUG"):
            raise
        return report_failure(error, connection)


def main() -> None:
    """Entry point of the `tars` script."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot draw a bar (LANG=C, an old console) gets `?` for it instead of an error.
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]  # a TextIOWrapper in a process; suppressed otherwise
    sys.exit(run())
