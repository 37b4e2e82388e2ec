"""What a model's answer looks like, found in its own chat template: where it thinks, and how it calls tools.

Law of this file: pure; a template's text in, a description out that can read answers (`stream`) and force them into a tool call
(`constraint`). Nothing is known by a model's name: the marks that a template itself prints say which format its model was trained on.
A template that this file does not recognise, or that has no place for tools, gets TARS's own notation, the `<tool_call>{json}</tool_call>`
of Hermes and Qwen, which `chat_template` then explains to the model in a system text.
"""

from __future__ import annotations

from dataclasses import dataclass

from tars.messages.inference import ChatParams
from tars.workers.answer_format_calls import (
    CallBlock,
    deepseek_calls,
    function_calls,
    invoke_calls,
    json_calls,
    kimi_calls,
    mistral_calls,
    tagged_calls,
)
from tars.workers.answer_format_constraint import HARMONY_SYNTAX, CallSyntax, tool_grammar
from tars.workers.answer_format_harmony import HARMONY_MARKS, HarmonyStream
from tars.workers.answer_format_stream import AnswerPiece, AnswerStream, MarkedStream, Thinking

__all__ = ["AnswerFormat", "AnswerPiece", "AnswerStream", "offered_tools"]

OWN_BLOCK = CallBlock("<tool_call>", "</tool_call>", tagged_calls, begins=("<function=",), by_name=True)
"""Hermes, Qwen, GLM, and what TARS tells models of other templates to write."""

OWN_SYNTAX = CallSyntax('<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>", between="\n")

_DEEPSEEK_MARKS = ("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>")
_DEEPSEEK_BLOCK = CallBlock(
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    deepseek_calls,
    _DEEPSEEK_MARKS,
    begins=_DEEPSEEK_MARKS[:1],
)
_KIMI_MARKS = ("<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>")

_THINKING = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<seed:think>", "</seed:think>"),
)
"""Marks around a model's thoughts; the first pair whose closing mark stands in the template."""


@dataclass(frozen=True, slots=True)
class _Notation:
    """A way of calling tools. The template shows it by holding all of `shown`; `syntax` is how to force it."""

    name: str
    shown: tuple[str, ...]
    blocks: tuple[CallBlock, ...]
    syntax: CallSyntax
    bare: bool = False
    """The JSON of a call may stand without any mark where the answer begins."""


_NOTATIONS = (
    _Notation(
        "minimax",
        ("<minimax:tool_call>", "<invoke name="),
        (CallBlock("<minimax:tool_call>", "</minimax:tool_call>", invoke_calls, begins=("<invoke name=",)),),
        CallSyntax(
            '<minimax:tool_call>\n<invoke name="',
            '">\n',
            "</invoke>\n</minimax:tool_call>",
            between="\n",
            parameter=('<parameter name="', '">', "</parameter>\n"),
        ),
    ),
    _Notation(
        "seed",
        ("<seed:tool_call>",),
        (CallBlock("<seed:tool_call>", "</seed:tool_call>", function_calls, begins=("<function=",)),),
        CallSyntax(
            "<seed:tool_call>\n<function=",
            ">\n",
            "</function>\n</seed:tool_call>",
            between="\n",
            parameter=("<parameter=", ">", "</parameter>\n"),
        ),
    ),
    _Notation(
        "kimi",
        ("<|tool_calls_section_begin|>", "<|tool_call_argument_begin|>"),
        (
            CallBlock(
                "<|tool_calls_section_begin|>",
                "<|tool_calls_section_end|>",
                kimi_calls,
                _KIMI_MARKS,
                begins=_KIMI_MARKS[:1],
            ),
        ),
        CallSyntax(
            "<|tool_call_begin|>functions.",
            ":0<|tool_call_argument_begin|>",
            "<|tool_call_end|>",
            "<|tool_calls_section_begin|>",
            "<|tool_calls_section_end|>",
            single=True,
        ),
    ),
    _Notation(
        "deepseek-r1",
        ("<｜tool▁calls▁begin｜>", "```json"),
        (_DEEPSEEK_BLOCK,),
        CallSyntax(
            "<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
            "\n```json\n",
            "\n```<｜tool▁call▁end｜>",
            "<｜tool▁calls▁begin｜>",
            "<｜tool▁calls▁end｜>",
            between="\n",
        ),
    ),
    _Notation(
        "deepseek-v3.1",
        ("<｜tool▁calls▁begin｜>",),
        (_DEEPSEEK_BLOCK,),
        CallSyntax(
            "<｜tool▁call▁begin｜>",
            "<｜tool▁sep｜>",
            "<｜tool▁call▁end｜>",
            "<｜tool▁calls▁begin｜>",
            "<｜tool▁calls▁end｜>",
        ),
    ),
    _Notation(
        "mistral-v11",
        ("[TOOL_CALLS]", "[ARGS]"),
        (CallBlock("[TOOL_CALLS]", None, mistral_calls, ("[CALL_ID]", "[ARGS]"), named=True),),
        CallSyntax("[TOOL_CALLS]", "[ARGS]", ""),
    ),
    _Notation(
        "mistral",
        ("[TOOL_CALLS]",),
        (CallBlock("[TOOL_CALLS]", None, mistral_calls, ("[CALL_ID]", "[ARGS]"), named=True),),
        CallSyntax('{"name": "', '", "arguments": ', "}", "[TOOL_CALLS][", "]", between=", "),
    ),
    _Notation(
        "cohere",
        ("<|START_ACTION|>", "tool_name"),
        (CallBlock("<|START_ACTION|>", "<|END_ACTION|>", json_calls),),
        CallSyntax(
            '{"tool_call_id": "0", "tool_name": "',
            '", "parameters": ',
            "}",
            "<|START_ACTION|>[",
            "]<|END_ACTION|>",
            single=True,
        ),
    ),
    _Notation(
        "nemotron",
        ("<TOOLCALL>",),
        (CallBlock("<TOOLCALL>", "</TOOLCALL>", json_calls),),
        CallSyntax('{"name": "', '", "arguments": ', "}", "<TOOLCALL>[", "]</TOOLCALL>", between=", "),
    ),
    _Notation(
        "function-tags",
        ("<tool_call>", "<function=", "<parameter="),
        (OWN_BLOCK,),
        CallSyntax(
            "<tool_call>\n<function=",
            ">\n",
            "</function>\n</tool_call>",
            between="\n",
            parameter=("<parameter=", ">\n", "\n</parameter>\n"),
        ),
    ),
    _Notation(
        "glm",
        ("<tool_call>", "<arg_key>"),
        (OWN_BLOCK,),
        CallSyntax(
            "<tool_call>",
            "\n",
            "</tool_call>",
            between="\n",
            parameter=("<arg_key>", "</arg_key>\n<arg_value>", "</arg_value>\n"),
        ),
    ),
    _Notation(
        "tool-calls-tag",
        ("<tool_calls>",),
        (CallBlock("<tool_calls>", "</tool_calls>", json_calls),),
        CallSyntax('{"name": "', '", "arguments": ', "}", "<tool_calls>[", "]</tool_calls>", between=", "),
    ),
    _Notation("hermes", ("<tool_call>", '"arguments'), (OWN_BLOCK,), OWN_SYNTAX),
    _Notation(
        "granite",
        ("<|tool_call|>", "JSON list"),
        (CallBlock("<|tool_call|>", None, json_calls),),
        CallSyntax('{"name": "', '", "arguments": ', "}", "<|tool_call|>[", "]", between=", "),
    ),
    _Notation(
        "firefunction",
        (" functools[",),
        (CallBlock("functools", None, json_calls),),
        CallSyntax('{"name": "', '", "arguments": ', "}", " functools[", "]", between=", "),
    ),
    _Notation(
        "llama-3",
        ('{"name": function name, "parameters"',),
        (CallBlock("<|python_tag|>", None, json_calls),),
        CallSyntax('{"name": "', '", "parameters": ', "}", single=True),
        bare=True,
    ),
)
"""The first that the template shows is its own; the more particular ones come first."""

_HARMONY_THINKING = Thinking("<|channel|>analysis<|message|>", "<|end|><|start|>assistant")

_OWN = _Notation("own", (), (OWN_BLOCK,), OWN_SYNTAX)


def offered_tools(params: ChatParams) -> bool:
    """True where the model is told of the tools and may call them."""
    return bool(params.tools) and params.tool_choice != "none"


@dataclass(frozen=True, slots=True)
class AnswerFormat:
    """See the module's law. `native_tools`: the template's own notation is known, so that it may tell the model about tools itself."""

    name: str
    native_tools: bool
    _notation: _Notation
    _thinking: Thinking | None
    _harmony: bool = False

    @classmethod
    def of(cls, template_source: str | None) -> AnswerFormat:
        """The format of a template; None is a model without one."""
        source = template_source or ""
        if "<|channel|>" in source and "<|message|>" in source:
            return cls("harmony", True, _OWN, None, True)
        marks = next((pair for pair in _THINKING if pair[1] in source), None)
        thinking = None if marks is None else Thinking(*marks, switch=_has_switch(source))
        notation = next((one for one in _NOTATIONS if all(mark in source for mark in one.shown)), _OWN)
        return cls(notation.name, notation is not _OWN, notation, thinking)

    @property
    def thinks(self) -> bool:
        """True where the model may think before it answers."""
        return self._harmony or self._thinking is not None

    @property
    def markers(self) -> frozenset[str]:
        """Texts of control tokens that have to come out as text, so that a stream sees them."""
        if self._harmony:
            return HARMONY_MARKS
        marks = {mark for block in self._blocks for mark in block.marks}
        return frozenset(marks | ({self._thinking.open, self._thinking.close} if self._thinking else set()))

    @property
    def _blocks(self) -> tuple[CallBlock, ...]:
        """TARS's own is always read too: a template may know a notation and yet have no place for tools."""
        return tuple(dict.fromkeys((*self._notation.blocks, OWN_BLOCK)))

    def answer_prefix(self, params: ChatParams, prompt_end: str) -> str:
        """What has to be put after the rendered prompt, so that the answer begins without thoughts; mostly nothing.

        Needed where the caller asked for no thoughts and the template has no switch, and where a schema or grammar of the caller's
        holds from the first token on: it leaves no room for thoughts.
        """
        constrained = params.json_schema is not None or params.grammar is not None
        if self._harmony:
            return "<|channel|>final<|message|>" if constrained else ""
        if self._thinking is None or not (constrained or params.reasoning is False):
            return ""
        if self._thinking.opened_by(prompt_end):
            return f"\n{self._thinking.close}\n\n"
        if self._thinking.closed_by(prompt_end) or (constrained and params.reasoning is not False):
            return ""
        return "" if self._thinking.switch else f"{self._thinking.open}\n\n{self._thinking.close}\n\n"

    def stream(self, params: ChatParams, prompt_end: str) -> AnswerStream:
        """A reader of one answer. `prompt_end`: the rendered prompt or its end, `answer_prefix` included; does it open the thoughts?"""
        tools = {tool.name: tool for tool in params.tools} if offered_tools(params) else {}
        if self._harmony:
            return HarmonyStream(tools, prompt_end)
        thinking = self._thinking
        return MarkedStream(
            tools,
            self._blocks,
            thinking,
            opened=thinking is not None and thinking.opened_by(prompt_end),
            may_open=thinking is not None and not thinking.closed_by(prompt_end),
            bare=self._notation.bare,
        )

    def constraint(self, params: ChatParams, prompt_end: str = "", *, own: bool = False) -> str | None:
        """The GBNF grammar that `tool_choice` asks for, or None where it asks for none.

        `own`: the template had no place for the tools, so TARS's own notation was explained to the model (`ChatTemplate.own_tools`).
        Raises `InvalidParams` where it cannot go with `json_schema` or `grammar`, `BadGrammar` where a tool's parameters cannot be kept.
        """
        if params.tool_choice in ("auto", "none"):
            return None
        if self._harmony:
            return tool_grammar(params, HARMONY_SYNTAX, _HARMONY_THINKING, opened=False, closed=False)
        thinking = self._thinking
        return tool_grammar(
            params,
            OWN_SYNTAX if own else self._notation.syntax,
            thinking,
            opened=thinking is not None and thinking.opened_by(prompt_end),
            closed=thinking is not None and thinking.closed_by(prompt_end),
        )


def _has_switch(source: str) -> bool:
    return "enable_thinking" in source or "thinking is" in source or "if thinking" in source or "not thinking" in source
