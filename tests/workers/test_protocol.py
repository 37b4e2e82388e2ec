from __future__ import annotations

from typing import get_args

from tars.errors import BadGrammar, StillLoading, from_json
from tars.messages.inference import Delta, TokenLogprob
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


def test_a_delta_survives_the_pipe() -> None:
    logprob = TokenLogprob(token="é", token_id=3, logprob=-0.5, top=[("é", -0.5), ("x", -2.0)])
    delta = Delta(text="é", token_ids=[3], logprobs=[logprob])
    [message] = Framer().feed(frame(protocol.notification(protocol.DELTA, {"id": 1, "delta": delta.model_dump()})))
    assert Delta.model_validate(message["params"]["delta"]) == delta
