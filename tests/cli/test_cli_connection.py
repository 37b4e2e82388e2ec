from __future__ import annotations

import errno
import io
from types import SimpleNamespace
from typing import Any

import click
import orjson
import pytest
from rich.text import Text

from tars.cli.connection import (
    HINTS,
    PIPE_WIDTH,
    Connection,
    Exit,
    ask,
    checked_text,
    print_answer,
    read_standard_input,
    report_failure,
)
from tars.errors import (
    ConfigError,
    DoesNotFit,
    InvalidParams,
    PeerUnreachable,
    StillLoading,
    TarsError,
    from_json,
)
from tars.messages.node import PingResult
from tars.rpc.http_client import NodeNotReachable

UNTIDY = "text\x1b[31m"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (NodeNotReachable("away"), 3),
        (PeerUnreachable("pc2 is away"), 1),
        (StillLoading("loading"), 1),
        (ConfigError("line 2"), 2),
        (TarsError("of a newer node"), 1),
        (PermissionError(errno.EACCES, "Permission denied", "schema.json"), 1),
        (ZeroDivisionError("secret"), 1),
    ],
)
def test_each_branch_of_failures_has_its_exit_code_and_one_line(
    capsys: pytest.CaptureFixture[str], error: Exception, code: int
) -> None:
    assert report_failure(error, Connection()) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert "Traceback" not in captured.err


def test_an_answer_is_the_message_for_programs_and_words_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    message = {"models": 1}
    print_answer(Connection(as_json=True), message, lambda: pytest.fail("nobody reads it"))
    assert capsys.readouterr().out == '{"models":1}\n'
    print_answer(Connection(), message, lambda: "word " * 60)
    assert capsys.readouterr().out == "word " * 60 + "\n"
    print_answer(Connection(), message, lambda: Text("word " * 60))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert max(map(len, lines)) <= PIPE_WIDTH


def test_an_errors_rows_are_shown_below_it_and_not_twice(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"place": "temperature", "problem": "must be at most 5"}, "another"]
    report_failure(InvalidParams("2 wrong params", details={"errors": rows}), Connection())
    assert capsys.readouterr().err == "error: 2 wrong params\n  temperature must be at most 5\n  another\n"
    report_failure(ConfigError("line 2: wrong", details={"errors": ["line 2: wrong"]}), Connection())
    assert capsys.readouterr().err == "error: line 2: wrong\n"


@pytest.mark.parametrize("details", [{"devices": "none"}, {"devices": [{"device": "x"}]}, {"errors": None}])
def test_details_of_another_shape_are_left_out(capsys: pytest.CaptureFixture[str], details: dict[str, Any]) -> None:
    report_failure(DoesNotFit("fits nowhere", details=details), Connection())
    assert capsys.readouterr().err.splitlines() == ["error: fits nowhere", HINTS["does_not_fit"]]


def test_a_message_is_neither_folded_nor_trusted(capsys: pytest.CaptureFixture[str]) -> None:
    report_failure(TarsError("word " * 60 + UNTIDY), Connection())
    assert capsys.readouterr().err == "error: " + "word " * 60 + "text[31m\n"


def test_a_json_failure_is_one_document(capsys: pytest.CaptureFixture[str]) -> None:
    report_failure(StillLoading("loading", retry_after_ms=500), Connection(as_json=True))
    error = orjson.loads(capsys.readouterr().out)["error"]
    assert error["data"]["kind"] == "still_loading"
    assert error["data"]["retry_after_ms"] == 500


def test_every_hint_belongs_to_an_error_that_exists() -> None:
    for kind in HINTS:
        assert type(from_json({"code": 1, "message": "m", "data": {"kind": kind}})) is not TarsError


def test_output_that_is_no_terminal_has_the_same_width_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "33")
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    assert Connection().console().width == PIPE_WIDTH


def test_asking_opens_a_client_and_returns_what_it_gave(node: Any) -> None:
    node.answers["node.ping"] = PingResult(node="n1", version="0.1.0", state="ready")
    connection = Connection(url=node.url, api_key="key-of-sixteen-characters", timeout=7.0)
    assert ask(connection, lambda client: client.ping()).state == "ready"
    _, params, headers = node.calls[-1]
    assert params["_meta"]["timeout_ms"] == 7000
    assert headers["Authorization"] == "Bearer key-of-sixteen-characters"


@pytest.mark.parametrize("text", ["", "plain", "é 漢 🎉"])
def test_text_that_json_can_carry_passes(text: str) -> None:
    assert checked_text(text, "an argument") == text


def test_text_with_lone_surrogates_is_wrong_usage() -> None:
    with pytest.raises(click.UsageError, match="an argument is not UTF-8 text"):
        checked_text("\udcff", "an argument")


def test_standard_input_that_is_no_text_is_wrong_usage(monkeypatch: pytest.MonkeyPatch) -> None:
    stdin = io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), encoding="utf-8")
    monkeypatch.setattr("sys.stdin", SimpleNamespace(read=stdin.read))
    with pytest.raises(click.UsageError, match="standard input is not UTF-8 text"):
        read_standard_input()


def test_exit_codes_are_the_documented_ones() -> None:
    assert [code.value for code in Exit] == [0, 1, 2, 3, 130]
