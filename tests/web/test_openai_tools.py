"""Tools and tool calls in OpenAI's shapes."""

from __future__ import annotations

import pytest
from openai.types.chat import ChatCompletionMessageToolCall
from openai.types.chat.chat_completion_chunk import ChoiceDeltaToolCall
from pydantic import ValidationError

from tars.errors import InvalidParams
from tars.messages.inference import Tool, ToolCall, ToolCallDelta
from tars.web.exchange import validated
from tars.web.openai_messages import ChatRequest
from tars.web.openai_tools import (
    RequestTool,
    RequestToolCall,
    tool_call_pieces,
    tool_calls_body,
    tool_choice_of,
)

CALL = ToolCall(id="call_1", name="weather", arguments='{"city": "Rome"}')


def test_a_tool_keeps_its_name_its_words_and_its_schema():
    schema = {"type": "object", "properties": {"city": {"type": "string"}}}
    given = {"name": "weather", "description": "d", "parameters": schema, "strict": True}
    tool = RequestTool.model_validate({"type": "function", "function": given}).to_tool()
    assert tool == Tool(name="weather", description="d", parameters=schema)


@pytest.mark.parametrize("more", [{}, {"description": None, "parameters": None}, {"parameters": {}}])
def test_a_tool_without_a_schema_takes_nothing(more):
    assert RequestTool.model_validate({"function": {"name": "f", **more}}).to_tool() == Tool(name="f")


@pytest.mark.parametrize("kind", ["custom", "web_search"])
def test_only_functions_are_called(kind):
    with pytest.raises(InvalidParams, match="functions only"):
        RequestTool.model_validate({"type": kind, kind: {}})


def test_a_call_comes_back_as_it_was_given():
    (said,) = tool_calls_body([CALL])
    assert ChatCompletionMessageToolCall.model_validate(said, strict=True).function.name == "weather"
    assert RequestToolCall.model_validate(said).to_tool_call() == CALL
    assert RequestToolCall.model_validate({**said, "index": 0}).to_tool_call() == CALL


def test_a_call_without_an_id_or_with_arguments_that_are_no_text_is_refused():
    (said,) = tool_calls_body([CALL])
    for wrong in ({**said, "id": ""}, {**said, "function": {"name": "weather", "arguments": {"city": "Rome"}}}):
        with pytest.raises(ValidationError):
            RequestToolCall.model_validate(wrong)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (None, None),
        ("none", "none"),
        ("auto", "auto"),
        ("required", "required"),
        ({"type": "function", "function": {"name": "f"}}, "f"),
    ],
)
def test_a_choice_is_a_word_or_a_name(given, meant):
    assert tool_choice_of(given) == meant


@pytest.mark.parametrize(
    "given",
    ["f", {}, {"type": "function"}, {"type": "function", "function": {"name": ""}}, {"type": "allowed_tools"}],
)
def test_any_other_choice_is_refused(given):
    with pytest.raises(InvalidParams) as refused:
        tool_choice_of(given)
    assert refused.value.details["errors"][0]["at"] == "tool_choice"


def test_a_calls_pieces_open_with_its_id_and_name():
    opening, rest = tool_call_pieces(
        [ToolCallDelta(index=1, id="call_1", name="weather"), ToolCallDelta(index=1, arguments="{}")]
    )
    assert opening == {
        "index": 1,
        "id": "call_1",
        "type": "function",
        "function": {"name": "weather", "arguments": ""},
    }
    assert rest == {"index": 1, "function": {"arguments": "{}"}}
    for piece in (opening, rest):
        ChoiceDeltaToolCall.model_validate(piece, strict=True)


@pytest.mark.parametrize("name", ["", "a b", "x" * 65])
def test_a_name_that_no_function_may_have_is_said_with_its_place(name):
    hello = {"messages": [{"role": "user", "content": "Hi"}]}
    with pytest.raises(InvalidParams, match=r"^tools\[0\]\.function\.name: "):
        validated(ChatRequest, {**hello, "tools": [{"type": "function", "function": {"name": name}}]})
