from __future__ import annotations

import io
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import orjson
import pytest

from tars.errors import PromptTooLong, StillLoading
from tars.messages.inference import ChatMessage, ChatResult

IN_A_PROCESS = [sys.executable, "-c", "from tars.cli import main; main()"]


def says(node: Any) -> list[tuple[str, str]]:
    """The turns of the last chat call."""
    return [(turn["role"], turn["content"]) for turn in node.params("inference.chat")["messages"]]


def test_an_answer_is_streamed_and_nothing_else_is_written(node: Any, tars: Callable[..., Any]) -> None:
    ran = tars("chat", "How do I add a second PC?")
    assert (ran.code, ran.out, ran.err) == (0, "Start `tars-node --join`.\n", "")
    assert says(node) == [("user", "How do I add a second PC?")]
    assert "text/event-stream" in node.calls[-1][2]["Accept"]


def test_options_become_params_and_what_is_not_given_stays_the_nodes_default(
    node: Any, tars: Callable[..., Any], tmp_path: Path
) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object"}')
    ran = tars(
        "chat", "--system", "Be short.", "--temperature", "0", "--max-tokens", "5", "--seed", "7", "--model", "m",
        "--json-schema", str(schema), "hello",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    sent = node.params("inference.chat")
    assert says(node) == [("system", "Be short."), ("user", "hello")]
    assert (sent["temperature"], sent["max_tokens"], sent["seed"], sent["model"]) == (0, 5, 7, "m")
    assert sent["json_schema"] == {"type": "object"}
    tars("chat", "hello")
    assert set(node.params("inference.chat")) == {"messages"} or node.params("inference.chat")["temperature"] == 0.8


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"{not json", "not readable JSON"), (b"[1]", "must hold a JSON object"), (b"\xff\xfe", "not readable JSON")],
)
def test_a_schema_file_that_is_none_is_wrong_usage(
    node: Any, tars: Callable[..., Any], tmp_path: Path, content: bytes, words: str
) -> None:
    schema = tmp_path / "schema.json"
    schema.write_bytes(content)
    ran = tars("chat", "--json-schema", str(schema), "hello")
    assert ran.code == 2
    assert words in " ".join(ran.err.split())
    assert not node.calls


def test_json_is_the_result_alone(tars: Callable[..., Any]) -> None:
    ran = tars("chat", "--json", "hello")
    assert ChatResult.model_validate_json(ran.out).message.content == "Start `tars-node --join`."
    assert ran.out.count("\n") == 1
    assert ran.err == ""


def test_the_question_is_read_from_a_pipe(node: Any, tars: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("from a file\nof two lines\n"))
    assert tars("chat").code == 0
    assert says(node) == [("user", "from a file\nof two lines")]


def test_an_empty_pipe_is_wrong_usage(node: Any, tars: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(" \n"))
    assert tars("chat").code == 2
    assert not node.calls


@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
@pytest.mark.slow
def test_a_pipe_without_text_is_wrong_usage(node: Any, locale: str) -> None:
    ran = subprocess.run(
        [*IN_A_PROCESS, "chat", "--url", node.url],
        input=b"\xff\xfe\x00", capture_output=True, timeout=30, env={**os.environ, "LC_ALL": locale}, check=False,
    )  # fmt: skip
    assert ran.returncode == 2
    assert b"not UTF-8" in ran.stderr
    assert b"Traceback" not in ran.stderr
    assert not node.calls


def test_an_error_of_the_node_is_told_with_what_to_do(node: Any, tars: Callable[..., Any]) -> None:
    node.answers["inference.chat"] = StillLoading("help-desk is loading (read, 40 %)", retry_after_ms=1500)
    ran = tars("chat", "hello")
    assert ran.code == 1
    assert ran.out == ""
    assert "help-desk is loading (read, 40 %)" in ran.err
    assert "tars status --wait" in ran.err
    assert "1.5 s" in ran.err
    assert "Traceback" not in ran.err


def test_an_error_with_json_is_a_document_too(node: Any, tars: Callable[..., Any]) -> None:
    node.answers["inference.chat"] = StillLoading("loading", retry_after_ms=1500)
    error = orjson.loads(tars("chat", "--json", "hello").out)["error"]
    assert (error["code"], error["data"]["kind"], error["data"]["retry_after_ms"]) == (1003, "still_loading", 1500)


@pytest.mark.parametrize(("variable", "dim"), [("", True), ("1", False)])
@pytest.mark.slow
def test_on_a_terminal_the_reasoning_is_shown_dim_before_the_answer(node: Any, variable: str, dim: bool) -> None:
    node.thoughts = ["Let me ", "see\x1b[2J."]
    terminal, side = pty.openpty()
    process = subprocess.Popen(
        [*IN_A_PROCESS, "chat", "--url", node.url, "hello"],
        stdin=subprocess.DEVNULL, stdout=side, stderr=subprocess.PIPE, env={**os.environ, "NO_COLOR": variable},
    )  # fmt: skip
    os.close(side)
    try:
        _, err = process.communicate(timeout=30)
        out = os.read(terminal, 65536).decode().replace("\r\n", "\n")
    finally:
        process.kill()
        os.close(terminal)
    assert process.returncode == 0, err
    thought = "".join(f"\x1b[2m{piece}\x1b[0m" if dim else piece for piece in ("Let me ", "see[2J."))
    assert out == f"{thought}\n\nStart `tars-node --join`.\n"


def test_in_a_pipe_the_answer_stands_without_its_reasoning_and_json_says_both(
    node: Any, tars: Callable[..., Any]
) -> None:
    node.thoughts = ["Let me see."]
    assert tars("chat", "hello").out == "Start `tars-node --join`.\n"
    said = ChatResult.model_validate_json(tars("chat", "--json", "hello").out)
    thought = said.message.model_copy(update={"reasoning": "Let me see."})
    node.answers["inference.chat"] = said.model_copy(update={"message": thought})
    assert orjson.loads(tars("chat", "--json", "hello").out)["message"]["reasoning"] == "Let me see."


# --- a conversation -------------------------------------------------------------------------------------------------


@pytest.fixture
def conversation(node: Any, tars: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Run `tars chat` with lines that a person types; the end of the lines is Ctrl-D, an exception in them is raised at the prompt."""

    def talk(*typed: str | type[BaseException], options: tuple[str, ...] = ()) -> Any:
        lines = iter(typed)

        def read(_prompt: str) -> str:
            line = next(lines, EOFError)
            if isinstance(line, str):
                return line
            raise line

        monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
        monkeypatch.setattr("builtins.input", read)
        return tars("chat", *options)

    return talk


def test_the_history_goes_with_each_question(node: Any, conversation: Callable[..., Any]) -> None:
    ran = conversation("first", "", "second", options=("--system", "Be short."))
    assert ran.code == 0
    answer = "".join(node.pieces)
    assert says(node) == [("system", "Be short."), ("user", "first"), ("assistant", answer), ("user", "second")]
    assert ran.out == f"{answer}\n{answer}\n"
    assert "tokens/s" in ran.err


def test_new_forgets_the_history(node: Any, conversation: Callable[..., Any]) -> None:
    conversation("first", "/new", "second")
    assert says(node) == [("user", "second")]


def test_ctrl_c_at_the_prompt_does_not_leave(node: Any, conversation: Callable[..., Any]) -> None:
    ran = conversation(KeyboardInterrupt, "still here")
    assert ran.code == 0
    assert "Ctrl-D leaves" in ran.err
    assert says(node) == [("user", "still here")]


def test_a_failed_question_is_told_and_not_remembered(node: Any, conversation: Callable[..., Any]) -> None:
    def answers(params: dict[str, Any]) -> Any:
        last = params["messages"][-1]["content"]
        return PromptTooLong("300 tokens do not fit 256") if last == "long" else None

    node.answers["inference.chat"] = answers
    ran = conversation("long", "short")
    assert ran.code == 0
    assert "300 tokens do not fit 256" in ran.err
    assert says(node) == [("user", "short")]


def test_a_conversation_without_a_node_ends_with_its_own_code(conversation: Callable[..., Any], free_port: int) -> None:
    ran = conversation("hello", "again", options=("--url", f"http://127.0.0.1:{free_port}"))
    assert ran.code == 3
    assert "tars-node" in ran.err


def test_json_needs_a_question(conversation: Callable[..., Any]) -> None:
    assert conversation("hello", options=("--json",)).code == 2


# --- Ctrl-C, in a process of its own ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_ctrl_c_ends_a_question_and_the_work_on_the_node(node: Any) -> None:
    node.hold_after = 1
    process = subprocess.Popen(
        [*IN_A_PROCESS, "chat", "--url", node.url, "hello"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert node.held.wait(30)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 130
    assert out in ("", "Start \n")  # the first piece may or may not have arrived before the signal
    assert "Traceback" not in err
    assert node.left.wait(10)


@pytest.mark.slow
def test_ctrl_c_cancels_an_answer_and_the_conversation_goes_on(node: Any) -> None:
    node.hold_after = 2
    terminal, side = pty.openpty()
    process = subprocess.Popen(
        [*IN_A_PROCESS, "chat", "--url", node.url],
        stdin=side, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        os.write(terminal, b"first\n")
        assert node.held.wait(30)
        assert process.stdout is not None
        process.stdout.read(len("> Start `tars-node "))  # both pieces are shown
        process.send_signal(signal.SIGINT)
        assert node.left.wait(10)
        node.hold_after = None
        os.write(terminal, b"second\n\x04")
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
        process.communicate()
        os.close(terminal)
        os.close(side)
    assert process.returncode == 0, err
    assert "cancelled" in err
    assert "--join`." in out
    assert [ChatMessage(**turn).content for turn in node.params("inference.chat")["messages"]] == [
        "first", "Start `tars-node ", "second",
    ]  # fmt: skip
