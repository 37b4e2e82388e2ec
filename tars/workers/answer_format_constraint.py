"""The grammar under which a model can only call a tool: `tool_choice: "required"`, or a tool's name.

Law of this file: pure; params and a notation in, GBNF text out. Thoughts are let through before the call where the model has them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tars.errors import InvalidParams
from tars.messages.inference import ChatParams, Tool
from tars.workers.answer_format_stream import Thinking
from tars.workers.json_schema_grammar import GRAMMAR_MOST, schemas_grammar
from tars.workers.pattern_grammar import literal


@dataclass(frozen=True, slots=True)
class CallSyntax:
    """`first`, then calls (`open` name `middle` arguments `close`) with `between` between them, then `last`.

    `parameter`: not one JSON object, but `parameter[0]` key `parameter[1]` value `parameter[2]` for each.
    """

    open: str
    middle: str
    close: str
    first: str = ""
    last: str = ""
    between: str = ""
    single: bool = False
    parameter: tuple[str, str, str] | None = None


HARMONY_SYNTAX = CallSyntax("<|channel|>commentary to=functions.", " <|constrain|>json<|message|>", "", single=True)


def tool_grammar(
    params: ChatParams, syntax: CallSyntax, thinking: Thinking | None, *, opened: bool, closed: bool
) -> str:
    """The grammar, beginning at rule `root`. `opened`, `closed`: what the prompt did to the thoughts.

    Raises `InvalidParams` and `BadGrammar` as `AnswerFormat.constraint`.
    """
    if params.json_schema is not None or params.grammar is not None:
        raise InvalidParams(
            "A forced tool call leaves no room for another form of the answer. Give tool_choice (required or a tool's name), "
            "or json_schema or grammar, not both."
        )
    tools = [tool for tool in params.tools if params.tool_choice in ("required", tool.name)]
    schemas: dict[str, Any] = {}
    rules = []
    for number, tool in enumerate(tools):
        inside = _arguments(number, tool, syntax, schemas)
        rules.append(
            f"call{number} ::= {_literal(syntax.open + tool.name + syntax.middle)} {inside} {_literal(syntax.close)}"
        )
    one = "(" + " | ".join(f"call{number}" for number in range(len(tools))) + ")"
    further = "" if syntax.single else f" ({_literal(syntax.between)} {one})*"
    rules.insert(
        0,
        f"root ::= {_thoughts(params, thinking, opened, closed)}{_literal(syntax.first)} {one}{further} {_literal(syntax.last)}",
    )
    text = "\n".join(rules) + "\n" + schemas_grammar(schemas)
    if len(text) > GRAMMAR_MOST:
        raise InvalidParams(
            f"The tools make a grammar of more than {GRAMMAR_MOST} characters. Give fewer or smaller ones."
        )
    return text


def _literal(text: str) -> str:
    return literal(text) if text else '""'


def _arguments(number: int, tool: Tool, syntax: CallSyntax, schemas: dict[str, Any]) -> str:
    schema = (
        {"type": "object", "properties": {}, **tool.parameters}
        if tool.parameters.keys() <= {"description", "title"}
        else tool.parameters
    )
    if syntax.parameter is None:
        name = f"tool{number}"
        schemas[name] = schema
        return name
    before, middle, after = syntax.parameter
    required = schema.get("required", [])
    parts = []
    for place, (key, value) in enumerate(_properties(tool, schema).items()):
        inside = _value(f"tool{number}p{place}", value, schema, after, schemas)
        part = f"{_literal(before + key + middle)} {inside} {_literal(after)}"
        parts.append(part if key in required else f"({part})?")
    return " ".join(parts)


def _properties(tool: Tool, schema: dict[str, Any]) -> dict[str, Any]:
    properties = schema.get("properties", {})
    if schema.get("type") != "object" or not isinstance(properties, dict):
        raise InvalidParams(
            f"This model writes a call's arguments one by one, and the parameters of {tool.name} are no object with properties. "
            "Describe them so, or leave tool_choice at auto."
        )
    return properties


def _value(name: str, value: Any, schema: dict[str, Any], after: str, schemas: dict[str, Any]) -> str:
    if isinstance(value, dict) and value.get("type") == "string":
        choices = value.get("enum")
        if isinstance(choices, list) and choices and all(isinstance(choice, str) for choice in choices):
            return "(" + " | ".join(_literal(choice) for choice in choices) + ")"
        return until(after.lstrip("\n"))
    shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    schemas[name] = {**value, **shared} if isinstance(value, dict) else value
    return name


def _thoughts(params: ChatParams, thinking: Thinking | None, opened: bool, closed: bool) -> str:
    if thinking is None or closed:
        return ""
    end = f"{until(thinking.close)} {_literal(thinking.close)} "
    blanks = "[ \\n]* "
    if opened:
        return end + blanks
    return "" if params.reasoning is False else f"({_literal(thinking.open)} {end}{blanks})? "


def until(close: str) -> str:
    """A GBNF expression for text without `close` in it; it also leaves out texts in which the mark's first character repeats within it."""
    ways = [f"[^{_character(close[0])}]"]
    ways += [
        f"{_literal(close[:length])} [^{_character(close[length])}{_character(close[0])}]"
        for length in range(1, len(close))
    ]
    return "(" + " | ".join(ways) + ")*"


def _character(one: str) -> str:
    return f"\\U{ord(one):08X}"
