"""Grammars of forced calls, held against the states that the engine itself samples with, and read back by the format's own reader."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from engine_thread import EngineThread
from tiny_gguf import CHATML, write_tiny_gguf

from tars.errors import BadGrammar, InvalidParams
from tars.messages.inference import ChatMessage, ChatParams, Delta, Generated, Tool
from tars.workers.answer_format import AnswerFormat
from tars.workers.answer_format_constraint import CallSyntax, tool_grammar, until
from tars.workers.answer_format_stream import Thinking
from tars.workers.engine import LoadSpec
from tars.workers.gbnf import parse
from tars.workers.grammar_states import Automaton

WEATHER = Tool(
    name="get_weather",
    parameters={
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"$ref": "#/$defs/days"}, "unit": {"type": "string", "enum": ["C", "F"]}},
        "required": ["city", "days"],
        "$defs": {"days": {"type": "integer", "minimum": 1, "maximum": 9}},
    },
)  # fmt: skip
NOW = Tool(name="now")
JSON = '{"city":"Köln <b>","days":2}'

FORMATS = {
    '<tool_call> "arguments"': (
        f'<tool_call>\n{{"name": "get_weather", "arguments": {JSON}}}\n</tool_call>',
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
        "\n",
    ),
    "": (
        f'<tool_call>\n{{"name": "get_weather", "arguments": {JSON}}}\n</tool_call>',
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
        "\n",
    ),
    "<tool_call><function=<parameter=": (
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nKöln <b>\n</parameter>\n"
        "<parameter=days>\n2\n</parameter>\n</function>\n</tool_call>",
        "<tool_call>\n<function=now>\n</function>\n</tool_call>",
        "\n",
    ),
    "<tool_call><arg_key>": (
        "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Köln <b></arg_value>\n<arg_key>days"
        "</arg_key>\n<arg_value>2</arg_value>\n</tool_call>",
        "<tool_call>now\n</tool_call>",
        "\n",
    ),
    "[TOOL_CALLS][ARGS]": (f"[TOOL_CALLS]get_weather[ARGS]{JSON}", "[TOOL_CALLS]now[ARGS]{}", ""),
    "[TOOL_CALLS]": (
        f'[TOOL_CALLS][{{"name": "get_weather", "arguments": {JSON}}}]',
        '[TOOL_CALLS][{"name": "now", "arguments": {}}]',
        None,
    ),
    '{"name": function name, "parameters"': (
        f'{{"name": "get_weather", "parameters": {JSON}}}',
        '{"name": "now", "parameters": {}}',
        None,
    ),
    "<｜tool▁calls▁begin｜>```json": (
        f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n{JSON}\n```"
        f"<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{}\n```<｜tool▁call▁end｜>"
        "<｜tool▁calls▁end｜>",
        None,
    ),
    "<|tool_calls_section_begin|><|tool_call_argument_begin|>": (
        f"<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0"
        f"<|tool_call_argument_begin|>{JSON}<|tool_call_end|><|tool_calls_section_end|>",
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.now:0<|tool_call_argument_begin|>{}"
        "<|tool_call_end|><|tool_calls_section_end|>",
        None,
    ),
    "<|START_ACTION|>tool_name": (
        f'<|START_ACTION|>[{{"tool_call_id": "0", "tool_name": "get_weather", "parameters": {JSON}}}]<|END_ACTION|>',
        '<|START_ACTION|>[{"tool_call_id": "0", "tool_name": "now", "parameters": {}}]<|END_ACTION|>',
        None,
    ),
    "<minimax:tool_call><invoke name=": (
        '<minimax:tool_call>\n<invoke name="get_weather">\n<parameter name="city">Köln <b></parameter>\n'
        '<parameter name="days">2</parameter>\n</invoke>\n</minimax:tool_call>',
        '<minimax:tool_call>\n<invoke name="now">\n</invoke>\n</minimax:tool_call>',
        "\n",
    ),
    "<seed:tool_call>": (
        "<seed:tool_call>\n<function=get_weather>\n<parameter=city>Köln <b></parameter>\n<parameter=days>2"
        "</parameter>\n</function>\n</seed:tool_call>",
        "<seed:tool_call>\n<function=now>\n</function>\n</seed:tool_call>",
        "\n",
    ),
    "<|channel|><|message|>": (
        f"<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{JSON}",
        "<|channel|>commentary to=functions.now <|constrain|>json<|message|>{}",
        None,
    ),
}
"""A template's marks -> a forced call of either tool, and what stands between two calls (None: TARS forces one)."""


def params(choice: str = "required", **fields: object) -> ChatParams:
    given = {"messages": [ChatMessage(role="user", content="q")], "tools": [WEATHER, NOW], "tool_choice": choice}
    return ChatParams.model_validate({**given, **fields})


def accepts(grammar: str, text: str) -> bool:
    automaton = Automaton(parse(grammar))
    state = automaton.after_text(automaton.start, text)
    return state is not None and state.accepting


@pytest.mark.parametrize("template", FORMATS)
def test_a_forced_call_is_the_only_text_and_its_own_format_reads_it(template: str) -> None:
    weather, now, between = FORMATS[template]
    form = AnswerFormat.of(template)
    grammar = form.constraint(params())
    assert grammar is not None
    for text in (weather, now):
        assert accepts(grammar, text)
        reader = form.stream(params(), "")
        reader.push(text)
        reader.finish()
        assert reader.text == ""
        assert len(reader.tool_calls) == 1
    assert accepts(grammar, weather + (between or "") + now) == (between is not None)
    assert not accepts(grammar, "The weather is fine.")
    assert not accepts(grammar, "")
    for wrong in (weather.replace("2", "99"), weather.replace("get_weather", "get_water"), weather + " and"):
        assert wrong == weather or not accepts(grammar, wrong)


@pytest.mark.parametrize("template", FORMATS)
def test_a_named_tool_is_the_only_one(template: str) -> None:
    weather, now, _ = FORMATS[template]
    grammar = AnswerFormat.of(template).constraint(params("now"))
    assert grammar is not None
    assert accepts(grammar, now)
    assert not accepts(grammar, weather)


@pytest.mark.parametrize("choice", ["auto", "none"])
def test_a_free_choice_needs_no_grammar(choice: str) -> None:
    assert AnswerFormat.of("[TOOL_CALLS]").constraint(params(choice)) is None


def test_where_the_template_has_no_place_for_tools_the_call_is_in_tars_own_notation() -> None:
    grammar = AnswerFormat.of("<｜tool▁calls▁begin｜>").constraint(params(), own=True)
    assert grammar is not None
    assert accepts(grammar, FORMATS[""][0])


THINKING = [
    ("", None, "<think>\nI look at < it.\n</think>\n\n", True),
    ("", None, "", True),
    ("", None, "I look.\n</think>\n\n", False),
    ("<think>\n", None, "I look.\n</think>\n\n", True),
    ("<think>\n", None, "", False),
    ("<think>\n\n</think>\n\n", None, "", True),
    ("<think>\n\n</think>\n\n", None, "<think>a</think>", False),
    ("", False, "<think>a</think>", False),
]


@pytest.mark.parametrize(("prompt_end", "reasoning", "thoughts", "allowed"), THINKING)
def test_thoughts_come_before_a_forced_call(
    prompt_end: str, reasoning: bool | None, thoughts: str, allowed: bool
) -> None:
    form = AnswerFormat.of('<think></think><tool_call> "arguments"')
    grammar = form.constraint(params(reasoning=reasoning), prompt_end)
    assert grammar is not None
    assert accepts(grammar, thoughts + FORMATS[""][0]) == allowed


def test_gpt_oss_may_think_before_a_forced_call() -> None:
    form = AnswerFormat.of("<|channel|><|message|>")
    grammar = form.constraint(params())
    assert grammar is not None
    text = "<|channel|>analysis<|message|>Hm, 1 < 2.<|end|><|start|>assistant" + FORMATS["<|channel|><|message|>"][0]
    assert accepts(grammar, text)
    reader = form.stream(params(), "<|start|>assistant")
    reader.push(text)
    reader.finish()
    assert (reader.reasoning, len(reader.tool_calls), reader.text) == ("Hm, 1 < 2.", 1, "")


@pytest.mark.parametrize("fields", [{"json_schema": {"type": "object"}}, {"grammar": 'root ::= "a"'}])
def test_a_forced_call_and_another_form_of_the_answer_exclude_each_other(fields: dict[str, object]) -> None:
    with pytest.raises(InvalidParams, match="not both"):
        AnswerFormat.of("").constraint(params(**fields))


def test_parameters_that_no_grammar_can_keep_are_refused_by_name() -> None:
    tool = Tool(name="t", parameters={"type": "object", "properties": {"a": {"not": {}}}})
    with pytest.raises(BadGrammar, match="not"):
        AnswerFormat.of("").constraint(params(tools=[tool]))


def test_tools_of_any_size_are_refused_in_words() -> None:
    many = [
        Tool(
            name=f"t{number}",
            parameters={
                "type": "object",
                "properties": {"a" * 90 + str(place): {"type": "string"} for place in range(60)},
            },
        )
        for number in range(100)
    ]
    with pytest.raises((BadGrammar, InvalidParams), match="262144"):
        AnswerFormat.of("").constraint(params(tools=many))


def test_parameters_that_are_no_object_cannot_be_written_one_by_one() -> None:
    syntax = CallSyntax("<", ">", "</>", parameter=("<", ">", "</>"))
    with pytest.raises(InvalidParams, match="object with properties"):
        tool_grammar(
            params(tools=[Tool(name="t", parameters={"type": "array"})]), syntax, None, opened=False, closed=False
        )


@pytest.mark.parametrize("close", ["</think>", "[/THINK]", "<|END_THINKING|>", "</arg_value>"])
@pytest.mark.parametrize("text", ["", "a", "a < b", "<b>bold</b>", "[x]", "</thin", "<|"])
def test_text_up_to_a_mark_is_free_and_the_mark_ends_it(close: str, text: str) -> None:
    grammar = f'root ::= {until(close)} "#"'
    assert accepts(grammar, text + " #")
    assert not accepts(grammar, text + close + " #")
    assert not accepts(grammar, "<" + close + " #")
    assert Thinking("a", close).closed_by(f"x{close}\n")


@pytest.mark.model
@pytest.mark.parametrize(
    ("template", "fields"),
    [
        (CHATML, {}),
        (CHATML + "{{ '<think>\n' if '</think>' }}", {"reasoning": False}),
        (
            "{{ tools | tojson }}{% for m in messages %}{% if m.tool_calls %}[TOOL_CALLS]{{ m.tool_calls[0].function.name }}[ARGS]"
            "{{ m.tool_calls[0].function.arguments | tojson }}{% else %}[INST]{{ m.content }}[/INST]{% endif %}{% endfor %}",
            {},
        ),
    ],
    ids=["no place for tools", "thoughts opened", "mistral"],
)
def test_a_model_of_random_weights_calls_the_tool_that_it_must(
    tmp_path: Path, template: str, fields: dict[str, object]
) -> None:
    """Every part at once: template, grammar, sampling, reading. What such a model says freely has no sense."""
    from tars.workers.llama_engine import LlamaEngine

    days = Tool(
        name="days",
        parameters={
            "type": "object",
            "properties": {"n": {"type": "integer", "minimum": 1, "maximum": 99}},
            "required": ["n"],
        },
    )
    path = write_tiny_gguf(tmp_path / "tiny.gguf", template=template)
    running = EngineThread(
        LlamaEngine(), LoadSpec(replica="r", model="m", engine="llama", path=str(path), context=1024)
    )
    try:
        running.submit(params("days", tools=[days], max_tokens=400, seed=3, **fields))
        pieces: list[Delta] = []
        while isinstance(event := running.events.get(timeout=60)[1], Delta):
            pieces.append(event)
    finally:
        running.close()
    assert isinstance(event, Generated)
    assert (event.text, event.finish_reason) == ("", "tool_calls")
    assert 1 <= json.loads(event.tool_calls[0].arguments)["n"] <= 99
    streamed = [piece for delta in pieces for piece in delta.tool_calls]
    assert [(one.id, one.name, one.arguments) for one in streamed] == [
        (call.id, call.name, call.arguments) for call in event.tool_calls
    ]
