from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tars.messages.inference import Tool
from tars.workers.answer_format_calls import (
    JsonEnd,
    function_calls,
    json_calls,
    json_object,
    mistral_calls,
    tagged_calls,
)

TOOLS = {
    "f": Tool(
        name="f", parameters={"type": "object", "properties": {"s": {"type": "string"}, "n": {"type": "integer"}}}
    ),
    "g": Tool(name="g"),
}

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(
    value=st.dictionaries(st.text(), JSON_VALUES, max_size=4) | st.lists(JSON_VALUES, max_size=4),
    rest=st.text(max_size=20),
    escape=st.booleans(),
    cuts=st.lists(st.integers(0, 500), max_size=8),
)
def test_the_end_of_a_json_value_is_found_however_it_comes(
    value: object, rest: str, escape: bool, cuts: list[int]
) -> None:
    text = json.dumps(value, ensure_ascii=escape)
    finder = JsonEnd(0)
    for cut in sorted(cuts):
        if cut < len(text):
            assert finder.find(text[:cut]) is None
    assert finder.find(text + rest) == len(text)
    assert finder.find(text + rest + "more") == len(text)


@pytest.mark.parametrize("text", ["{<", "[}", "{]", '{"a": é}', "{'a'}"])
def test_what_cannot_be_json_is_seen_at_once(text: str) -> None:
    assert JsonEnd(0).find(text) == -1


@given(arguments=st.dictionaries(st.text(), JSON_VALUES, max_size=4), indent=st.sampled_from([None, 2]))
def test_arguments_come_out_as_the_model_wrote_them(arguments: dict[str, object], indent: int | None) -> None:
    written = json.dumps(arguments, indent=indent, ensure_ascii=False)
    calls = json_calls(f'{{"name": "f", "arguments": {written}}}', TOOLS)
    assert calls is not None
    assert (calls[0].name, calls[0].arguments) == ("f", written)


SHAPES = [
    ('{"name": "f", "arguments": {"n": 1}}', [("f", '{"n": 1}')]),
    ('{"arguments": {"n": 1}, "name": "f"}', [("f", '{"n": 1}')]),
    ('{"name": "f", "parameters": {"n": 1}}', [("f", '{"n": 1}')]),
    ('{"tool_call_id": "0", "tool_name": "f", "parameters": {}}', [("f", "{}")]),
    ('{"type": "function", "function": {"name": "f", "arguments": {"n": 1}}}', [("f", '{"n": 1}')]),
    ('{"type": "function", "function": "f", "parameters": {}}', [("f", "{}")]),
    ('{"name": "g"}', [("g", "{}")]),
    ('{"name": "g", "arguments": null}', [("g", "{}")]),
    ('{"name": "g", "arguments": ""}', [("g", "{}")]),
    ('{"name": "f", "arguments": "{\\"n\\": 1}"}', [("f", '{"n": 1}')]),
    ('{"name": "f", "arguments": {"s": "a\nb"}}', [("f", '{"s": "a\\nb"}')]),
    ('[{"name": "f"}, {"name": "g"}]', [("f", "{}"), ("g", "{}")]),
    ('{"name": "f"}\n{"name": "g"}', [("f", "{}"), ("g", "{}")]),
    ("", None),
    ("[]", None),
    ("1", None),
    ('{"name": "f"', None),
    ('{"name": "f",}', None),
    ('{"name": "h"}', None),
    ('{"name": 1}', None),
    ('{"name": "f", "arguments": 1}', None),
    ('{"name": "f", "arguments": "text"}', None),
    ('{"name": "f", "arguments": {"n": NaN}}', None),
    ('{"name": "f", "arguments": ' + "[" * 100_000, None),
    ('[{"name": "f"}, 1]', None),
    ('[{"name": "f"}', None),
]


@pytest.mark.parametrize(("body", "expected"), SHAPES, ids=range(len(SHAPES)))
def test_json_calls_in_the_shapes_that_models_write(body: str, expected: list[tuple[str, str]] | None) -> None:
    calls = json_calls(body, TOOLS)
    assert (None if calls is None else [(call.name, call.arguments) for call in calls]) == expected


def test_a_parameter_is_a_string_where_the_tool_says_so_and_json_where_it_is_json() -> None:
    body = (
        "<function=f>\n<parameter=s>\n12\n</parameter>\n<parameter=n>\n12\n</parameter>\n"
        "<parameter=x>\nno json\n</parameter>\n</function>"
    )
    calls = function_calls(body, TOOLS)
    assert calls is not None
    assert json.loads(calls[0].arguments) == {"s": "12", "n": 12, "x": "no json"}


def test_a_value_keeps_its_own_line_ends() -> None:
    calls = function_calls("<function=f><parameter=s>\n\na\n b\n\n</parameter></function>", TOOLS)
    assert calls is not None
    assert json.loads(calls[0].arguments) == {"s": "\na\n b\n"}


@pytest.mark.parametrize(
    "body",
    [
        "<function=h></function>",
        "<function=f>text</function>",
        "<function=f></function> text",
        "<function=f>",
        "f text",
        "h",
        "",
    ],
)
def test_what_is_no_tagged_call_is_none(body: str) -> None:
    assert tagged_calls(body, TOOLS) is None


@pytest.mark.parametrize(
    ("body", "arguments"),
    [
        ('f[ARGS]{"n": 1}', '{"n": 1}'),
        ('f{"n": 1}', '{"n": 1}'),
        ("f[CALL_ID]abcdefghi[ARGS]{}", "{}"),
        ('[{"name": "f"}]', "{}"),
    ],
)
def test_mistrals_calls_old_and_new(body: str, arguments: str) -> None:
    calls = mistral_calls(body, TOOLS)
    assert calls is not None
    assert (calls[0].name, calls[0].arguments) == ("f", arguments)
    assert mistral_calls(body.replace("f", "h"), TOOLS) is None


def test_only_an_object_is_an_object() -> None:
    assert json_object(' {"a": 1} ') == '{"a": 1}'
    assert [json_object(text) for text in ("", "[]", "{} x", '{"a"}', "{1: 2}", "{")] == [None] * 6
