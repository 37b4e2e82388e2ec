"""How models write down a call of a tool, and reading one back.

Law of this file: pure; the text between two marks in, calls out. `None` is "this is not a call": whoever asked shows the text instead, so
nothing here guesses. Notations as the models' own chat templates print them (llama.cpp, `models/templates/`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tars.messages.inference import Tool


@dataclass(frozen=True, slots=True)
class WrittenCall:
    """`arguments` is JSON text of an object, as the model wrote it where the model writes JSON."""

    name: str
    arguments: str


Tools = Mapping[str, Tool]
Read = Callable[[str, Tools], "list[WrittenCall] | None"]
"""`read(body, tools)`: the calls in a block's body, or None where it does not hold calls of these tools and nothing else."""


@dataclass(frozen=True, slots=True)
class CallBlock:
    """Marks around calls. Without `close` the block ends with the JSON value that follows `open`."""

    open: str
    close: str | None
    read: Read
    inner: tuple[str, ...] = ()
    """Marks within the body that may be control tokens."""
    named: bool = False
    """The tool's name stands before the JSON value of a block without `close`."""
    begins: tuple[str, ...] = ()
    """How the body of a block with `close` begins, where that is not JSON."""
    by_name: bool = False
    """The body may also begin with a tool's name."""

    @property
    def marks(self) -> tuple[str, ...]:
        """Every mark of the block."""
        return (self.open, *self.inner, *((self.close,) if self.close else ()))


_OUTSIDE_STRING = re.compile(r'[^"{}\[\]]*')
_NOT_JSON = re.compile(r"[^\s:,0-9A-Za-z+\-.]")
_IN_STRING = re.compile(r'(?:[^"\\]|\\.)*', re.DOTALL)


@dataclass(slots=True)
class JsonEnd:
    """Finds where a JSON object or array that grows by pieces ends. Each character is looked at once."""

    at: int
    """Up to here the text was looked at; at first the index of its opening bracket."""
    _open: list[str] = field(default_factory=list)
    _in_string: bool = False
    _end: int | None = None

    def find(self, text: str) -> int | None:
        """Index after the value, -1 where the text cannot be JSON, None while more has to come. `text` is the same text, grown."""
        while self._end is None and self.at < len(text):
            if self._in_string:
                match = _IN_STRING.match(text, self.at)
                assert match is not None
                self.at = match.end()
                if self.at == len(text) or text[self.at] == "\\":
                    return None
                self.at += 1
                self._in_string = False
                continue
            match = _OUTSIDE_STRING.match(text, self.at)
            assert match is not None
            if _NOT_JSON.search(match.group()):
                return -1
            self.at = match.end()
            if self.at == len(text):
                return None
            mark = text[self.at]
            self.at += 1
            if mark == '"':
                self._in_string = True
            elif mark in "{[":
                self._open.append("}" if mark == "{" else "]")
            elif not self._open or self._open.pop() != mark:
                return -1
            if not self._open:
                self._end = self.at
        return self._end


_SPACE = re.compile(r"[\s]*")
_BETWEEN = re.compile(r"[\s,;]*")


def _refuse_constant(name: str) -> None:
    raise ValueError(name)


# strict=False: models put raw line ends into strings; such arguments are written anew below.
_DECODER = json.JSONDecoder(strict=False, parse_constant=_refuse_constant)


def _value(text: str, at: int) -> tuple[Any, int]:
    """A JSON value and the index after it. Raises `ValueError`, also for what nests too deep."""
    try:
        return _DECODER.raw_decode(text, at)
    except RecursionError:
        raise ValueError("too deep") from None


def _skip(pattern: re.Pattern[str], text: str, at: int) -> int:
    match = pattern.match(text, at)
    assert match is not None
    return match.end()


def _members(text: str, at: int) -> tuple[dict[str, tuple[Any, str]], int]:
    """A JSON object's members as (value, its own text), and the index after the object. Raises `ValueError`."""
    members: dict[str, tuple[Any, str]] = {}
    at = _skip(_SPACE, text, at + 1)
    while text[at : at + 1] != "}":
        key, at = _value(text, at)
        at = _skip(_SPACE, text, at)
        if not isinstance(key, str) or text[at : at + 1] != ":":
            raise ValueError("no member")
        start = _skip(_SPACE, text, at + 1)
        value, at = _value(text, start)
        members[key] = (value, text[start:at])
        at = _skip(_SPACE, text, at)
        if text[at : at + 1] == ",":
            at = _skip(_SPACE, text, at + 1)
            if text[at : at + 1] == "}":
                raise ValueError("no member")
        elif text[at : at + 1] != "}":
            raise ValueError("no end")
    return members, at + 1


def _arguments(value: Any, text: str) -> str | None:
    """JSON text of an object, or None. Some models write the object as a JSON string, some leave it out."""
    if value is None:
        return "{}"
    if isinstance(value, str):
        try:
            inner = json.loads(value) if value.strip() else {}
        except (ValueError, RecursionError):
            return None
        return value if isinstance(inner, dict) and value.strip() else "{}" if inner == {} else None
    if not isinstance(value, dict):
        return None
    try:
        json.loads(text)
    except ValueError:
        return json.dumps(value, ensure_ascii=False)
    return text


def _object_call(text: str, at: int, tools: Tools) -> tuple[WrittenCall, int]:
    """The call that the JSON object at `at` says, and the index after it. Raises `ValueError`."""
    members, end = _members(text, at)
    if "name" not in members and isinstance(members.get("function", ("", ""))[0], dict):
        inner = members["function"][1]
        return _object_call(inner, 0, tools)[0], end
    name = (members.get("name") or members.get("tool_name") or members.get("function") or ("", ""))[0]
    if not isinstance(name, str) or name not in tools:
        raise ValueError("no tool of that name")
    value, written = members.get("arguments") or members.get("parameters") or (None, "")
    arguments = _arguments(value, written)
    if arguments is None:
        raise ValueError("the arguments are no object")
    return WrittenCall(name, arguments), end


def json_calls(body: str, tools: Tools) -> list[WrittenCall] | None:
    """`{"name": ..., "arguments": {...}}`, one or several, also in arrays, nothing but blanks, commas and semicolons between them."""
    calls: list[WrittenCall] = []
    at = _skip(_BETWEEN, body, 0)
    try:
        while at < len(body):
            if body[at] == "[":
                at = _skip(_BETWEEN, body, at + 1)
                while body[at : at + 1] != "]":
                    call, at = _object_call(body, _object_at(body, at), tools)
                    calls.append(call)
                    at = _skip(_BETWEEN, body, at)
                at += 1
            else:
                call, at = _object_call(body, _object_at(body, at), tools)
                calls.append(call)
            at = _skip(_BETWEEN, body, at)
    except ValueError:
        return None
    return calls or None


def _object_at(text: str, at: int) -> int:
    if text[at : at + 1] != "{":
        raise ValueError("no object")
    return at


def _named(name: str, arguments: str, tools: Tools) -> WrittenCall | None:
    name, arguments = name.strip(), arguments.strip()
    if name not in tools:
        return None
    text = json_object(arguments) if arguments else "{}"
    return None if text is None else WrittenCall(name, text)


_MISTRAL = re.compile(r"\s*([A-Za-z0-9_.-]+)\s*(?:\[CALL_ID\]\s*[A-Za-z0-9]*\s*)?(?:\[ARGS\])?\s*(\{.*)", re.DOTALL)


def mistral_calls(body: str, tools: Tools) -> list[WrittenCall] | None:
    """`[{"name", "arguments"}]`, or since tokenizer v11 `name[ARGS]{...}` (Magistral and Small 3.2: `name[CALL_ID]id[ARGS]{...}`)."""
    if body.lstrip().startswith("["):
        return json_calls(body, tools)
    match = _MISTRAL.fullmatch(body)
    call = match and _named(match[1], match[2], tools)
    return [call] if call else None


def json_object(text: str) -> str | None:
    """The JSON object that `text` is, as text; None where it is none."""
    text = text.strip()
    try:
        members, end = _members(text, _object_at(text, 0))
    except ValueError:
        return None
    return None if text[end:] else _arguments({key: value for key, (value, _) in members.items()}, text)


_DEEPSEEK = re.compile(
    r"\s*<｜tool▁call▁begin｜>(?:function<｜tool▁sep｜>([^<\n]+)\n```json\n(.*?)\n```|([^<]+)<｜tool▁sep｜>(.*?))\s*<｜tool▁call▁end｜>",
    re.DOTALL,
)
_KIMI = re.compile(
    r"\s*<\|tool_call_begin\|>\s*(?:functions\.)?([A-Za-z0-9_.-]+?)(?::\d+)?\s*<\|tool_call_argument_begin\|>(.*?)<\|tool_call_end\|>()()",
    re.DOTALL,
)


def _marked_calls(pattern: re.Pattern[str]) -> Read:
    def read(body: str, tools: Tools) -> list[WrittenCall] | None:
        calls: list[WrittenCall] = []
        at = 0
        while body[at:].strip():
            match = pattern.match(body, at)
            call = match and _named(match[1] or match[3], match[2] if match[1] else match[4], tools)
            if not match or not call:
                return None
            calls.append(call)
            at = match.end()
        return calls or None

    return read


deepseek_calls = _marked_calls(_DEEPSEEK)
"""R1: a fenced block after `function<｜tool▁sep｜>name`; V3.1: `name<｜tool▁sep｜>{...}`."""

kimi_calls = _marked_calls(_KIMI)
"""`<|tool_call_begin|>functions.name:0<|tool_call_argument_begin|>{...}<|tool_call_end|>`."""


def _typed(tool: Tool, name: str, text: str) -> Any:
    """A parameter's value: text where the tool declares a string or what stands there is no JSON."""
    properties = tool.parameters.get("properties")
    declared = properties.get(name) if isinstance(properties, dict) else None
    if isinstance(declared, dict) and declared.get("type") == "string":
        return text
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return text


_FUNCTION = re.compile(r"\s*<function=([^>\s]+)>(.*?)</function>", re.DOTALL)
_FUNCTION_PARAMETER = re.compile(r"\s*<parameter=([^>]+)>(.*?)</parameter>", re.DOTALL)
_INVOKE = re.compile(r"\s*<invoke name=\"([^\"]+)\">(.*?)</invoke>", re.DOTALL)
_INVOKE_PARAMETER = re.compile(r"\s*<parameter name=\"([^\"]+)\">(.*?)</parameter>", re.DOTALL)
_GLM = re.compile(r"\s*([A-Za-z0-9_.-]+)(\s*(?:<arg_key>.*)?)", re.DOTALL)
_GLM_PARAMETER = re.compile(r"\s*<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", re.DOTALL)


def _tagged_calls(call: re.Pattern[str], parameter: re.Pattern[str]) -> Read:
    def read(body: str, tools: Tools) -> list[WrittenCall] | None:
        calls: list[WrittenCall] = []
        at = 0
        while body[at:].strip():
            match = call.match(body, at)
            tool = tools.get(match[1]) if match else None
            if not match or not tool:
                return None
            given: dict[str, Any] = {}
            inside, inner = match[2], 0
            while inside[inner:].strip():
                pair = parameter.match(inside, inner)
                if not pair:
                    return None
                # One line end belongs to the notation on either side; the others are the value's own.
                text = pair[2].removeprefix("\n").removesuffix("\n")
                given[pair[1].strip()] = _typed(tool, pair[1].strip(), text)
                inner = pair.end()
            calls.append(WrittenCall(tool.name, json.dumps(given, ensure_ascii=False)))
            at = match.end()
        return calls or None

    return read


function_calls = _tagged_calls(_FUNCTION, _FUNCTION_PARAMETER)
"""`<function=name><parameter=key>value</parameter></function>` (Qwen3-Coder, Nemotron 3, Seed-OSS)."""

invoke_calls = _tagged_calls(_INVOKE, _INVOKE_PARAMETER)
"""`<invoke name="..."><parameter name="...">value</parameter></invoke>` (MiniMax-M2)."""

_glm_calls = _tagged_calls(_GLM, _GLM_PARAMETER)


def tagged_calls(body: str, tools: Tools) -> list[WrittenCall] | None:
    """What stands within `<tool_call>`: JSON (Hermes, Qwen), `<function=...>` (Qwen3-Coder) or name and `<arg_key>`s (GLM)."""
    start = body.lstrip()[:10]
    if start.startswith(("{", "[")):
        return json_calls(body, tools)
    return (function_calls if start == "<function=" else _glm_calls)(body, tools)
