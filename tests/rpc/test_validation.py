"""A wrong parameter is named with its place and what is wrong, and nothing else is said."""

from __future__ import annotations

from typing import Any

import pytest

from tars.errors import InvalidParams
from tars.messages.base import Message, NoParams
from tars.messages.inference import ChatParams, EmbedParams
from tars.rpc.method_table import METHODS, MethodSpec
from tars.rpc.validation import NO_PARAMS, validated

CHAT = METHODS["inference.chat"]
EMBED = METHODS["inference.embed"]
USER = {"role": "user", "content": "hello"}


def refusal(spec: MethodSpec, params: Any) -> InvalidParams:
    with pytest.raises(InvalidParams) as refused:
        validated(spec, params)
    return refused.value


def test_right_params_become_the_rows_message() -> None:
    params = validated(CHAT, {"messages": [USER], "temperature": 0})
    assert isinstance(params, ChatParams)
    assert params.temperature == 0


@pytest.mark.parametrize("params", [None, {}, []])
def test_a_method_that_takes_nothing_may_be_given_nothing_in_any_form(params: Any) -> None:
    assert validated(METHODS["node.ping"], params) is NO_PARAMS


@pytest.mark.parametrize(
    ("spec", "params", "errors"),
    [
        (CHAT, {}, [("messages", "required, but not given")]),
        (CHAT, None, [("messages", "required, but not given")]),
        (CHAT, {"messages": [USER], "max_token": 5}, [("max_token", "unknown parameter; did you mean 'max_tokens'?")]),
        (CHAT, {"messages": [USER], "zzz": 5}, [("zzz", "unknown parameter")]),
        (CHAT, {"messages": [USER, {"role": "user"}]}, [("messages[1].content", "required, but not given")]),
        (CHAT, {"messages": [USER], "seed": "1"}, [("seed", "should be a valid integer")]),
        (CHAT, {"messages": [USER], "seed": 2**32}, [("seed", "should be less than or equal to 4294967295")]),
        (CHAT, {"messages": [USER], "stop": [""]}, [("", "stop must not contain an empty string")]),
        (EMBED, {"input": ["a", 5]}, [("input[1]", "should be a valid string")]),
        (EMBED, {"input": []}, [("", "input needs 1 to 2048 texts")]),
        (METHODS["node.ping"], {"a": 1}, [("a", "unknown parameter")]),
    ],
)
def test_each_fault_is_named_with_its_place(spec: MethodSpec, params: Any, errors: list[tuple[str, str]]) -> None:
    error = refusal(spec, params)
    assert [(one["at"], one["problem"]) for one in error.details["errors"]] == errors
    assert spec.name in error.message
    assert errors[0][1] in error.message


@pytest.mark.parametrize(
    ("key", "value"), [("json_schema", {}), ("temperature", "hot-secret"), ("grammar", ["hot-secret"])]
)
def test_what_was_sent_is_not_said_back(key: str, value: object) -> None:
    error = refusal(CHAT, {"messages": "hot-secret", key: value})
    assert "hot-secret" not in str(error.to_json())


def test_thousands_of_faults_are_ten_lines() -> None:
    error = refusal(CHAT, {"messages": [{"role": "nobody"}] * 5000})
    assert len(error.details["errors"]) == 10
    assert len(error.message) < 400


def test_a_huge_unknown_name_is_cut() -> None:
    error = refusal(CHAT, {"messages": [USER], "x" * 100_000: 1})
    assert len(str(error.to_json())) < 1000


class Two(Message):
    first: int
    second: int = 2
    rest: list[int] = []


def test_by_position_the_params_take_their_names_in_order() -> None:
    spec = MethodSpec("m", "", Two, positional=("first", "second", "*rest"))
    assert validated(spec, [1]) == Two(first=1, rest=[])
    assert validated(spec, [1, 3, 4, 5]) == Two(first=1, second=3, rest=[4, 5])
    fixed = MethodSpec("m", "", Two, positional=("first", "second"))
    assert "takes 2 params" in refusal(fixed, [1, 2, 3]).message
    assert "named params only" in refusal(MethodSpec("m", "", Two), [1]).message
    assert "named params only" in refusal(MethodSpec("m", "", NoParams), [1]).message


def test_params_are_strict() -> None:
    for wrong in ({"input": "a", "truncate": 1}, {"input": "a", "truncate": "yes"}, {"input": 5}, {"input": {"a": 1}}):
        refusal(EMBED, wrong)
    assert validated(EMBED, {"input": "a"}) == EmbedParams(input="a")
