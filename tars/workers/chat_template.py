"""Chat messages to one prompt, by the Jinja template that a GGUF carries.

Law of this file: text in, text out; no model and no tokenizer. A template is a stranger's program: it runs in jinja2's immutable sandbox,
and whatever it throws becomes an error of this tree. Where it has no place for tools, they are told to the model in a system text. The
globals are those that Hugging Face's templates expect (transformers, `utils/chat_template_utils.py`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tars.errors import BadModelFile, InvalidParams
from tars.messages.inference import ChatMessage, ChatParams, Tool, ToolCall
from tars.workers.answer_format import AnswerFormat

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""For a GGUF without a template: what llama.cpp falls back to. https://github.com/openai/openai-python/blob/v0.28.1/chatml.md"""

OWN_WORDS = (
    "You may call functions to answer the user. Their signatures, one a line:\n<tools>\n{tools}\n</tools>\n\n"
    "To call a function, write a JSON object with its name and its arguments within <tool_call></tool_call>, and nothing after it:\n"
    '<tool_call>\n{{"name": <function-name>, "arguments": <arguments-object>}}\n</tool_call>\n'
    "The results come in the next turn within <tool_response></tool_response>. Where no function is needed, just answer."
)
"""What a model whose template has no place for tools is told: the wording and form of Hermes and Qwen 2.5, which many were trained on."""

REASON_MOST = 200
"""Characters of a template's own refusal that a caller sees."""


class _Refused(Exception):
    """The template called `raise_exception`: its text is meant for the caller."""


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks training data in Hugging Face's templates; here it is what it holds."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """Drop the tag, keep its content."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A compiled template. Raises `BadModelFile` where it is not one.

    `own_tools` is True where the template has no place for tools, or asks for calls in a notation that `answer_format` cannot read: then
    tools, calls and their results are told to the model in TARS's own words instead.
    """

    def __init__(self, source: str, bos_token: str = "", eos_token: str = "") -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals.update(raise_exception=_refuse, strftime_now=_strftime_now)
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        # Mistral's templates take only ids of nine characters; https://github.com/mistralai/mistral-common, validator.
        self._short_ids = "length != 9" in source
        self._format = AnswerFormat.of(source)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError:
            raise BadModelFile(
                "The model's chat template is not a valid Jinja template. Get the file again, or another conversion of the model."
            ) from None
        self._arguments_as_text = False
        self.own_tools = not (self._format.native_tools and self._knows_tools())

    def prompt(self, params: ChatParams) -> str:
        """`render` of a call, and what `AnswerFormat.answer_prefix` puts after it."""
        text = self.render(
            params.messages, tools=params.tools, tool_choice=params.tool_choice, reasoning=params.reasoning
        )
        return text + self._format.answer_prefix(params, text)

    def render(
        self,
        messages: Sequence[ChatMessage],
        *,
        tools: Sequence[Tool] = (),
        tool_choice: str = "auto",
        reasoning: bool | None = None,
    ) -> str:
        """The prompt, ending where the assistant's turn begins.

        Templates that refuse a system message (Mistral 7B v0.2, Gemma) get it at the head of the first user message instead.
        With `tool_choice` "none" the model is not told of any tool, with a tool's name of that one only.
        Raises `InvalidParams` with the template's reason where it refuses the messages, such as two user turns in a row.
        """
        offered = [tool for tool in tools if tool_choice in ("auto", "required", tool.name)]
        given = [_tool(tool) for tool in offered]
        switches: dict[str, Any] = {}
        if reasoning is not None:
            switches = {"enable_thinking": reasoning, "thinking": reasoning}
            if not reasoning:
                # gpt-oss cannot leave thinking out, only be brief about it.
                switches["reasoning_effort"] = "low"
        if self.own_tools:
            turns, given = _in_own_words(messages, given), []
        else:
            turns = [self._turn(message) for message in messages]
        try:
            return self._render(turns, given, switches)
        except _Refused as refusal:
            merged = _system_into_user(turns)
            if merged is None:
                raise _invalid(refusal) from None
        try:
            return self._render(merged, given, switches)
        except _Refused as refusal:
            raise _invalid(refusal) from None

    def _turn(self, message: ChatMessage) -> dict[str, Any]:
        """A turn in the shape that Hugging Face's templates take; keys that say nothing are left out, because templates ask `in`."""
        turn: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.reasoning is not None:
            turn["reasoning_content"] = message.reasoning
            # gpt-oss's name of it; it refuses thoughts beside a text in a turn that calls.
            if not (message.tool_calls and message.content):
                turn["thinking"] = message.reasoning
        if message.tool_calls:
            turn["tool_calls"] = [
                {
                    "id": self._id(call.id),
                    "type": "function",
                    "function": {
                        "name": call.name,
                        "arguments": call.arguments if self._arguments_as_text else _arguments(call),
                    },
                }
                for call in message.tool_calls
            ]
        if message.tool_call_id is not None:
            turn["tool_call_id"] = self._id(message.tool_call_id)
        return turn

    def _id(self, given: str) -> str:
        if not self._short_ids or len(given) == 9:
            return given
        return hashlib.sha256(given.encode("utf-8", "surrogatepass")).hexdigest()[:9]

    def _knows_tools(self) -> bool:
        """True where tools, a call and its result all come out in a prompt. Found by trying, as llama.cpp does."""
        tool = Tool(name="probe_tool", description="d", parameters=_PROBE_PARAMETERS)
        call = ToolCall(id="probe0000", name="probe_tool", arguments='{"probe_key": "probe_value"}')
        question = ChatMessage(role="user", content="q")
        answered = [
            question,
            ChatMessage(role="assistant", content="", tool_calls=[call]),
            ChatMessage(role="tool", content="probe_result", tool_call_id="probe0000"),
        ]
        for as_text in (False, True):
            self._arguments_as_text = as_text
            try:
                asked = self._render([self._turn(question)], [_tool(tool)], {})
                told = self._render([self._turn(turn) for turn in answered], [_tool(tool)], {})
            except (_Refused, InvalidParams):
                continue
            # An object handed to a template that wants text comes out in Python's notation; text handed to one that wants an
            # object is written as JSON once more, with its quotes escaped.
            garbled = '\\"probe_key' in told or "'probe_key'" in told
            if "probe_tool" in asked and "probe_result" in told and "probe_value" in told and not garbled:
                return True
        self._arguments_as_text = False
        return False

    def _render(self, turns: list[dict[str, Any]], tools: list[dict[str, Any]], switches: dict[str, Any]) -> str:
        # Without tools it is None, as from Hugging Face; the templates that go through them all the same (Hermes) get an empty list then.
        for handed in (tools,) if tools else (None, []):
            try:
                return self._template.render(
                    messages=turns, add_generation_prompt=True, tools=handed, documents=None, **switches, **self._tokens
                )
            except _Refused:
                raise
            except Exception:  # noqa: BLE001  # a stranger's program may throw anything; its text stays in here
                continue
        raise InvalidParams(
            "The model's chat template cannot render these messages. Try them without system or tool turns, "
            "user and assistant taking turns."
        )


_PROBE_PARAMETERS = {"type": "object", "properties": {"probe_key": {"type": "string", "description": "d"}}}


def _tool(tool: Tool) -> dict[str, Any]:
    return {
        "type": "function",
        "function": {"name": tool.name, "description": tool.description, "parameters": tool.parameters},
    }


def _arguments(call: ToolCall) -> dict[str, Any]:
    try:
        value = json.loads(call.arguments) if call.arguments.strip() else {}
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise InvalidParams(
            f"The arguments of the tool call {call.id[:60]!r} in messages are not the JSON text of an object. "
            "Send them as the model gave them."
        )
    return value


def _in_own_words(messages: Sequence[ChatMessage], tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Turns of system, user and assistant only: tools explained, calls and results as text."""
    turns: list[dict[str, Any]] = []
    for message in messages:
        if message.role == "tool":
            result = f"<tool_response>\n{message.content}\n</tool_response>"
            if turns and turns[-1]["role"] == "user" and turns[-1].get("results"):
                turns[-1]["content"] += "\n" + result
            else:
                turns.append({"role": "user", "content": result, "results": True})
            continue
        calls = [
            "<tool_call>\n"
            + json.dumps({"name": call.name, "arguments": _arguments(call)}, ensure_ascii=False)
            + "\n</tool_call>"
            for call in message.tool_calls
        ]
        turn: dict[str, Any] = {
            "role": message.role,
            "content": "\n".join([message.content] * bool(message.content) + calls),
        }
        if message.reasoning is not None:
            turn["reasoning_content"] = turn["thinking"] = message.reasoning
        turns.append(turn)
    for turn in turns:
        turn.pop("results", None)
    if tools:
        listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        explained = OWN_WORDS.format(tools=listed)
        if turns and turns[0]["role"] == "system":
            turns[0]["content"] += "\n\n" + explained
        else:
            turns.insert(0, {"role": "system", "content": explained})
    return turns


def _invalid(refusal: _Refused) -> InvalidParams:
    return InvalidParams(f"The model's chat template refuses these messages: {str(refusal)[:REASON_MOST]}")


def _system_into_user(turns: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
    if len(turns) < 2 or turns[0]["role"] != "system" or turns[1]["role"] != "user":
        return None
    return [{"role": "user", "content": f"{turns[0]['content']}\n\n{turns[1]['content']}"}, *turns[2:]]


def _refuse(text: object) -> NoReturn:
    raise _Refused(str(text))


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(value: Any, **options: Any) -> str:
    # Hugging Face's own filter: options as json.dumps has them, text left as it is.
    return json.dumps(value, **{"ensure_ascii": False, **options})
