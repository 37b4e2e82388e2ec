from __future__ import annotations

from typing import get_args

from tars.errors import BadGrammar, StillLoading, from_json
from tars.messages.inference import Delta, TokenLogprob, ToolCallDelta
from tars.workers import protocol
from tars.workers.engine import Finished, Work
from tars.workers.stdio import Framer, frame


def test_every_kind_of_work_has_one_method_and_one_result() -> None:
    assert set(protocol.METHOD_OF) == set(get_args(Work)) == set(protocol.RESULT_OF)
    assert set(protocol.RESULT_OF.values()) == set(get_args(Finished))


def test_an_error_survives_the_pipe_with_its_kind_and_details() -> None:
    error = StillLoading("wait", retry_after_ms=7, details={"stage": "load", "percent": 3.5})
    [message] = Framer().feed(frame(protocol.failure(5, error)))
    back = from_json(message["error"])
    assert type(back) is StillLoading
    assert (back.message, back.retry_after_ms, back.details) == ("wait", 7, error.details)


def test_what_is_no_error_of_the_tree_loses_its_text() -> None:
    assert "secret" not in str(protocol.failure(1, ValueError("secret /path")))
    assert protocol.failure(1, BadGrammar("said"))["error"]["message"] == "said"


def test_deltas_of_every_kind_survive_the_pipe() -> None:
    logprob = TokenLogprob(token="é", token_id=3, logprob=-0.5, top=[("é", -0.5), ("x", -2.0)])
    delta = Delta(text="é", token_ids=[3], logprobs=[logprob])
    call = ToolCallDelta(index=1, id="a", name="b", arguments="{")
    deltas = [
        Delta(text="", token_ids=[]),
        Delta(text=" tok", token_ids=[5, 6], index=3),
        delta,
        Delta(text="", reasoning="hm", index=1),
        Delta(text="", token_ids=[1], tool_calls=[call]),
        Delta(text="", index=2, ended=True),
    ]
    rows = [protocol.row_of(number, each) for number, each in enumerate(deltas)]
    [message] = Framer().feed(frame(protocol.notification(protocol.STEP, rows)))
    assert [row[0] for row in message["params"]] == [0, 1, 2, 3, 4, 5]
    assert [protocol.delta_of(row) for row in message["params"]] == deltas


def test_a_plain_token_travels_without_names() -> None:
    row = protocol.row_of(12, Delta(text=" tok", token_ids=[345]))
    assert len(frame(protocol.notification(protocol.STEP, [row] * 16))) < 16 * 24 + 100
