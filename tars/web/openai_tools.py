"""Tools and tool calls in the OpenAI API's shapes, both ways.

Law of this file: shapes and their translation, no HTTP. Only functions are tools; OpenAI's own (`web_search`, `custom`)
are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field, model_validator

from tars.messages.inference import Tool, ToolCall, ToolCallDelta, ToolName
from tars.web.openai_request import OpenAIRequest, refusal


class RequestFunction(OpenAIRequest):
    """`tools[].function`."""

    ignored = frozenset({"strict"})
    """TARS always keeps a call's arguments to their schema."""

    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None


class _OfFunctions(OpenAIRequest):
    """Something with a `type` that must be `function`."""

    type: str = "function"

    @model_validator(mode="before")
    @classmethod
    def _functions_only(cls, given: Any) -> Any:
        if isinstance(given, dict) and isinstance(given.get("type"), str) and given["type"] != "function":
            raise refusal("tools", f"TARS calls functions only, and this one is a {given['type'][:40]!r}; leave it out")
        return given


class RequestTool(_OfFunctions):
    """`tools[]`."""

    function: RequestFunction

    def to_tool(self) -> Tool:
        """The same as `inference.chat` takes it."""
        said = self.function
        given: dict[str, Any] = {"name": said.name, "description": said.description or ""}
        if said.parameters:
            given["parameters"] = said.parameters
        return Tool(**given)


class CalledFunction(OpenAIRequest):
    """`messages[].tool_calls[].function`."""

    name: str
    arguments: str


class RequestToolCall(_OfFunctions):
    """`messages[].tool_calls[]`: an earlier answer's call, given back. `index` is left from a stream's pieces."""

    ignored = frozenset({"index"})

    id: str = Field(min_length=1)
    function: CalledFunction

    def to_tool_call(self) -> ToolCall:
        """The same as `inference.chat` takes it."""
        return ToolCall(id=self.id, name=self.function.name, arguments=self.function.arguments)


def tool_choice_of(given: str | dict[str, Any] | None) -> str | None:
    """`none`, `auto`, `required` or a function's name, as `inference.chat` takes it; None where nothing was said.

    Raises `InvalidParams` for what is neither a word nor `{"type": "function", "function": {"name": ...}}`.
    """
    if given is None or (isinstance(given, str) and given in ("none", "auto", "required")):
        return given
    if isinstance(given, dict) and given.get("type") == "function":
        function = given.get("function")
        if isinstance(function, dict) and isinstance(function.get("name"), str) and function["name"]:
            return str(function["name"])
    raise refusal(
        "tool_choice", 'tool_choice is "none", "auto", "required" or {"type": "function", "function": {"name": "..."}}'
    )


def tool_calls_body(calls: Sequence[ToolCall]) -> list[dict[str, Any]]:
    """`message.tool_calls`."""
    return [
        {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in calls
    ]


def tool_call_pieces(pieces: Sequence[ToolCallDelta]) -> list[dict[str, Any]]:
    """`delta.tool_calls`: `id`, `type` and the name come with a call's first piece."""
    said = []
    for piece in pieces:
        function: dict[str, Any] = {} if piece.name is None else {"name": piece.name}
        function["arguments"] = piece.arguments
        opening: dict[str, Any] = {} if piece.id is None else {"id": piece.id, "type": "function"}
        said.append({"index": piece.index, **opening, "function": function})
    return said
