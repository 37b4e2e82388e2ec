"""`tars chat`: one question, or a conversation.

Law of this file: the history lives here, for the session, and nowhere else. An answer is written as it comes; Ctrl-C while it comes
cancels it (closing the stream stops the work on the node), Ctrl-D leaves.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import click
import orjson
from rich.console import Console

from tars.cli.connection import (
    Connection,
    Exit,
    ask,
    connection_options,
    pass_connection,
    print_json,
    read_standard_input,
    report_failure,
)
from tars.cli.output import chat_footer, plain
from tars.client import Client, GenerationOptions
from tars.errors import TarsError
from tars.messages.inference import ChatMessage, ChatResult, Progress
from tars.rpc.http_client import NodeNotReachable

GREETING = "Ask; Ctrl-C cancels an answer, Ctrl-D leaves, /new forgets the conversation."


class Conversation:
    """The turns so far and the sampling that each answer uses."""

    def __init__(self, system: str | None, settings: GenerationOptions) -> None:
        self.system = system
        self.settings = settings
        self.turns: list[ChatMessage] = []

    def messages(self, question: str) -> list[ChatMessage]:
        """What asks `question` after everything said so far."""
        first = [ChatMessage(role="system", content=self.system)] if self.system else []
        return [*first, *self.turns, ChatMessage(role="user", content=question)]

    def add(self, question: str, answer: str) -> None:
        """Remember a question and its answer, also one that was cancelled half-way: the next question may be about it."""
        self.turns += [ChatMessage(role="user", content=question), ChatMessage(role="assistant", content=answer)]

    def forget(self) -> None:
        """Start over; the system message stays."""
        self.turns.clear()


async def answer(
    client: Client, messages: list[ChatMessage], settings: GenerationOptions, written: Written
) -> ChatResult:
    """Stream one answer, handing each piece to `written`. Cancelling it stops the work on the node. Raises `TarsError`."""
    async with client.chat_stream(messages, **settings) as stream:
        stream.on_progress = written.wait
        async for delta in stream:
            written.think(delta.reasoning)
            written(delta.text)
    return stream.result


def _write(text: str) -> None:
    # On a terminal, a model's control codes could move the cursor or set the title; in a file they are its business.
    sys.stdout.write(plain(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


@click.command()
@click.argument("question", required=False)
@click.option("--model", help="Model name; may be left out where the node serves only one chat model.")
@click.option("--system", help="System message that stands before the conversation.")
@click.option("--temperature", type=click.FloatRange(0, 5), help="0 always takes the likeliest token.")
@click.option("--max-tokens", type=click.IntRange(1, 1_048_576), help="At most so many new tokens.")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), help="Same seed, same answer.")
@click.option(
    "--json-schema",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="File with a JSON schema that the answer will follow.",
)
@connection_options
@pass_connection
def chat(
    connection: Connection,
    question: str | None,
    model: str | None,
    system: str | None,
    temperature: float | None,
    max_tokens: int | None,
    seed: int | None,
    json_schema: Path | None,
) -> int:
    """Ask QUESTION and show the answer as it comes; without QUESTION, start a conversation.

    Where standard input is no terminal, the question is read from it: `tars chat < question.txt`.
    """
    given: dict[str, Any] = {
        "model": model,
        "temperature": temperature,
        "max_tokens": max_tokens,
        "seed": seed,
        "json_schema": _read_schema(json_schema),
    }
    settings = cast(GenerationOptions, {name: value for name, value in given.items() if value is not None})
    conversation = Conversation(system, settings)
    if question is None and not sys.stdin.isatty():
        question = read_standard_input().strip()
    if question is None:
        if connection.as_json:
            raise click.UsageError("--json needs a question: tars chat --json 'How do I add a second PC?'")
        return converse(connection, conversation, input)
    if not question.strip():
        raise click.UsageError("the question is empty")
    return _ask_once(connection, conversation, question)


def _read_schema(path: Path | None) -> dict[str, Any] | None:
    if path is None:
        return None
    try:
        schema = orjson.loads(path.read_bytes())
    except (OSError, orjson.JSONDecodeError) as error:
        raise click.BadParameter(f"{path} is not readable JSON: {error}", param_hint="--json-schema") from None
    if not isinstance(schema, dict):
        raise click.BadParameter(
            f'{path} must hold a JSON object like {{"type": "object"}}', param_hint="--json-schema"
        )
    return schema


def _ask_once(connection: Connection, conversation: Conversation, question: str) -> int:
    wrote = Written(silent=connection.as_json)
    try:
        result = ask(
            connection, lambda client: answer(client, conversation.messages(question), conversation.settings, wrote)
        )
    finally:
        wrote.end_line()
    if connection.as_json:
        print_json(result)
    elif sys.stdout.isatty():
        connection.console(stderr=True).print(chat_footer(result))
    return Exit.OK


class Written:
    """Writes pieces to standard output and remembers them, so that a cancelled answer still ends its line and enters the history.

    What a model thinks is shown to a person only, dim and before the answer: in a file or a pipe the answer stands alone.
    """

    def __init__(self, *, silent: bool = False) -> None:
        self.text = ""
        self.silent = silent
        self._thought = ""
        self._waits = False

    def wait(self, progress: Progress) -> None:
        """How far the load is that the answer waits for; only for a person, on the line where the answer will begin."""
        if self.silent or not (sys.stdout.isatty() and sys.stderr.isatty()):
            return
        where = f" on {plain(progress.node)}" if progress.node else ""
        sys.stderr.write(f"\r\x1b[Kloading{where}: {plain(progress.stage)}, {progress.percent:.0f} %")
        sys.stderr.flush()
        self._waits = True

    def _begin(self) -> None:
        """Something is written: what was said of the load makes room."""
        if self._waits:
            self._waits = False
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()

    def think(self, text: str) -> None:
        """A piece of reasoning."""
        if not text or self.silent or not sys.stdout.isatty():
            return
        self._begin()
        self._thought += text
        # https://no-color.org: any value but an empty one. Each piece ends its own style: Ctrl-C may come between two.
        shown = plain(text)
        sys.stdout.write(shown if os.environ.get("NO_COLOR") else click.style(shown, dim=True))
        sys.stdout.flush()

    def __call__(self, text: str) -> None:
        """A piece of the answer."""
        self._begin()
        if text and not self.text and self._thought:
            _write("\n\n")
        self.text += text
        if not self.silent:
            _write(text)

    def end_line(self) -> None:
        """Leave the cursor where the next line begins."""
        self._begin()
        if (shown := self.text or self._thought) and not self.silent and not shown.endswith("\n"):
            _write("\n")


def converse(connection: Connection, conversation: Conversation, read: Callable[[str], str]) -> int:
    """The conversation until Ctrl-D. `read` shows a prompt and returns a line, or raises `EOFError` (tests script it)."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # importing it is what gives `input` line editing; Windows has none
    console = connection.console(stderr=True)
    console.print(GREETING, style="dim")
    with asyncio.Runner() as runner:
        client = connection.client()
        runner.run(client.__aenter__())
        try:
            return _turns(runner, client, connection, conversation, read, console)
        finally:
            runner.run(client.__aexit__(None, None, None))


def _turns(
    runner: asyncio.Runner,
    client: Client,
    connection: Connection,
    conversation: Conversation,
    read: Callable[[str], str],
    console: Console,
) -> int:
    while True:
        try:
            question = read("> ").strip()
        except EOFError:
            console.print()
            return Exit.OK
        except KeyboardInterrupt:
            console.print("\nCtrl-D leaves", style="dim")
            continue
        if question == "/new":
            conversation.forget()
            console.print("forgotten", style="dim")
        elif question:
            code = _one_turn(runner, client, connection, conversation, question, console)
            if code is not None:
                return code


def _one_turn(
    runner: asyncio.Runner,
    client: Client,
    connection: Connection,
    conversation: Conversation,
    question: str,
    console: Console,
) -> Exit | None:
    """Ask and remember; an exit code only where going on makes no sense."""
    wrote = Written()
    try:
        result = runner.run(answer(client, conversation.messages(question), conversation.settings, wrote))
    except KeyboardInterrupt:
        wrote.end_line()
        console.print("cancelled", style="dim")
        if wrote.text:
            conversation.add(question, wrote.text)
        return None
    except NodeNotReachable as error:
        wrote.end_line()
        return report_failure(error, connection)
    except TarsError as error:
        # The question is not remembered, so that asking again does not say it twice.
        wrote.end_line()
        report_failure(error, connection)
        return None
    wrote.end_line()
    console.print(chat_footer(result))
    conversation.add(question, result.message.content)
    return None
