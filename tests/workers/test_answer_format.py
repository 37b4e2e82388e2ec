"""Which format a template's text shows; reading and forcing are tested beside their own modules."""

from __future__ import annotations

import pytest

from tars.messages.inference import ChatMessage, ChatParams, Tool
from tars.workers.answer_format import AnswerFormat, offered_tools


def params(**fields: object) -> ChatParams:
    return ChatParams.model_validate({"messages": [ChatMessage(role="user", content="q")], **fields})


SHOWN = [
    (None, "own", False, False),
    ("{{ messages }}", "own", False, False),
    ('<tool_call>\n{"name": <function-name>, "arguments": <args>}\n</tool_call>', "hermes", True, False),
    ('<tool_call> "arguments" </think>', "hermes", True, True),
    ("<tool_call><function=a><parameter=b>", "function-tags", True, False),
    ("<tool_call>{name}<arg_key>", "glm", True, False),
    ("[TOOL_CALLS][", "mistral", True, False),
    ("[TOOL_CALLS]name[ARGS] [/THINK]", "mistral-v11", True, True),
    ('{"name": function name, "parameters": dictionary of argument name and its value}', "llama-3", True, False),
    ("<｜tool▁calls▁begin｜>\n```json", "deepseek-r1", True, False),
    ("<|channel|>final<|message|>", "harmony", True, True),
]


@pytest.mark.parametrize(("template", "name", "native", "thinks"), SHOWN)
def test_a_template_shows_its_format(template: str | None, name: str, native: bool, thinks: bool) -> None:
    form = AnswerFormat.of(template)
    assert (form.name, form.native_tools, form.thinks) == (name, native, thinks)


def test_marks_that_may_be_control_tokens_are_named() -> None:
    assert AnswerFormat.of("[TOOL_CALLS]").markers == {
        "[TOOL_CALLS]",
        "[CALL_ID]",
        "[ARGS]",
        "<tool_call>",
        "</tool_call>",
    }
    assert {"<think>", "</think>"} <= AnswerFormat.of("</think>").markers
    assert "<|python_tag|>" in AnswerFormat.of(SHOWN[8][0]).markers
    assert {"<|channel|>", "<|message|>", "<|end|>", "<|start|>"} <= AnswerFormat.of("<|channel|><|message|>").markers


PREFIXES = [
    ("</think>", {"reasoning": False}, "<|im_start|>assistant\n", "<think>\n\n</think>\n\n"),
    ("</think>", {"reasoning": False}, "<think>\n", "\n</think>\n\n"),
    ("</think> enable_thinking", {"reasoning": False}, "assistant\n", ""),
    ("</think> enable_thinking", {"reasoning": False}, "<think>\n", "\n</think>\n\n"),
    ("</think>", {"reasoning": False}, "<think>\n\n</think>\n\n", ""),
    ("</think>", {}, "<think>\n", ""),
    ("</think>", {"json_schema": {"type": "object"}}, "<think>\n", "\n</think>\n\n"),
    ("</think>", {"json_schema": {"type": "object"}}, "assistant\n", ""),
    ("{{ messages }}", {"reasoning": False}, "assistant\n", ""),
    ("<|channel|><|message|>", {"grammar": 'root ::= "a"'}, "<|start|>assistant", "<|channel|>final<|message|>"),
    ("<|channel|><|message|>", {"reasoning": False}, "<|start|>assistant", ""),
]


@pytest.mark.parametrize(("template", "fields", "prompt_end", "prefix"), PREFIXES)
def test_an_answer_without_thoughts_begins_behind_them(
    template: str, fields: dict[str, object], prompt_end: str, prefix: str
) -> None:
    form = AnswerFormat.of(template)
    assert form.answer_prefix(params(**fields), prompt_end) == prefix
    reader = form.stream(params(**fields), prompt_end + prefix)
    if fields and template != "<|channel|><|message|>":
        reader.push("{}")
        reader.finish()
        assert (reader.text, reader.reasoning) == ("{}", None)


def test_tools_are_offered_unless_none_are_wanted() -> None:
    tools = [Tool(name="now")]
    assert [offered_tools(params(tools=tools, tool_choice=choice)) for choice in ("auto", "required", "now", "none")] == [
        True, True, True, False,
    ]  # fmt: skip
    assert not offered_tools(params())


def test_with_no_tools_wanted_what_looks_like_a_call_stays_text() -> None:
    reader = AnswerFormat.of(None).stream(params(tools=[Tool(name="now")], tool_choice="none"), "")
    reader.push('<tool_call>{"name": "now"}</tool_call>')
    reader.finish()
    assert (reader.text, reader.tool_calls) == ('<tool_call>{"name": "now"}</tool_call>', [])
