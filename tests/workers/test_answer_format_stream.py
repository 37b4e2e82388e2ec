"""Answers read piece by piece: the same whatever the pieces, and nothing lost."""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tars.messages.inference import ChatMessage, ChatParams, Tool
from tars.workers.answer_format import AnswerFormat
from tars.workers.answer_format_stream import AnswerStream, first_mark, held_from

TOOLS = [
    Tool(
        name="get_weather",
        parameters={
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    ),
    Tool(name="now"),
]
ARGUMENTS = {"city": 'Köln "am Rhein" </tool_call>', "days": 2}
JSON = json.dumps(ARGUMENTS, ensure_ascii=False)

TEMPLATES = {
    "hermes": '<think></think><tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>',
    "function-tags": "<tool_call>\n<function=x>\n<parameter=y>\n</parameter></function></tool_call> enable_thinking </think>",
    "glm": "<tool_call>{name}\n<arg_key>{k}</arg_key>\n</tool_call>",
    "mistral": "[TOOL_CALLS][",
    "mistral-v11": "[TOOL_CALLS] [CALL_ID] [ARGS] [THINK][/THINK]",
    "llama-3": 'Respond in the format {"name": function name, "parameters": dictionary} <|python_tag|>',
    "deepseek-r1": "<｜tool▁calls▁begin｜>```json </think>",
    "deepseek-v3.1": "<｜tool▁calls▁begin｜> </think>",
    "kimi": "<|tool_calls_section_begin|><|tool_call_argument_begin|>",
    "cohere": "<|START_ACTION|>tool_name <|END_THINKING|>",
    "nemotron": "<TOOLCALL>",
    "tool-calls-tag": "<tool_calls>",
    "granite": "<|tool_call|> followed by a JSON list",
    "minimax": '<minimax:tool_call><invoke name="x">',
    "seed": "<seed:tool_call></seed:think>",
    "firefunction": " functools[",
    "harmony": "<|channel|>analysis<|message|>",
    "own": "{{ messages }}",
}
"""The marks that each format's templates show."""

WRITTEN = {
    "hermes": f'<tool_call>\n{{"name": "get_weather", "arguments": {JSON}}}\n</tool_call>\n<tool_call>\n{{"name": "now"}}\n'
    f"</tool_call>",
    "function-tags": '<tool_call>\n<function=get_weather>\n<parameter=city>\nKöln "am Rhein" </tool_call\n</parameter>\n'
    "<parameter=days>\n2\n"
    "</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=now>\n</function>\n</tool_call>",
    "glm": '<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Köln "am Rhein" </tool_call</arg_value>\n'
    "<arg_key>days</arg_key>\n"
    "<arg_value>2</arg_value>\n</tool_call>\n<tool_call>now\n</tool_call>",
    "mistral": f'[TOOL_CALLS][{{"name": "get_weather", "arguments": {JSON}}}, {{"name": "now", "arguments": {{}}}}]',
    "mistral-v11": f"[TOOL_CALLS]get_weather[CALL_ID]abc123def[ARGS]{JSON}[TOOL_CALLS]now[ARGS]{{}}",
    "llama-3": f'{{"name": "get_weather", "parameters": {JSON}}}; {{"name": "now", "parameters": {{}}}}',
    "deepseek-r1": f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n{JSON}\n```"
    f"<｜tool▁call▁end｜>\n"
    "<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "deepseek-v3.1": f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{JSON}<｜tool▁call▁end｜>"
    "<｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "kimi": f"<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>{JSON}"
    f"<|tool_call_end|>"
    "<|tool_call_begin|>functions.now:1<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>",
    "cohere": f'<|START_ACTION|>[\n{{"tool_call_id": "0", "tool_name": "get_weather", "parameters": {JSON}}},\n'
    '{"tool_call_id": "1", "tool_name": "now", "parameters": {}}\n]<|END_ACTION|>',
    "nemotron": f'<TOOLCALL>[{{"name": "get_weather", "arguments": {JSON}}}, {{"name": "now", "arguments": {{}}}}]</TOOLCALL>',
    "tool-calls-tag": f'<tool_calls>\n{{"name": "get_weather", "arguments": {JSON}}}\n{{"name": "now", "arguments": {{}}}}\n'
    f"</tool_calls>",
    "granite": f'<|tool_call|>[{{"name": "get_weather", "arguments": {JSON}}}, {{"name": "now", "arguments": {{}}}}]',
    "minimax": '<minimax:tool_call>\n<invoke name="get_weather">\n<parameter name="city">Köln "am Rhein" </tool_call</parameter>\n'
    '<parameter name="days">2</parameter>\n</invoke>\n<invoke name="now">\n</invoke>\n</minimax:tool_call>',
    "seed": '<seed:tool_call>\n<function=get_weather>\n<parameter=city>Köln "am Rhein" </tool_call</parameter>\n'
    "<parameter=days>2</parameter>\n"
    "</function>\n</seed:tool_call>\n<seed:tool_call>\n<function=now>\n</function>\n</seed:tool_call>",
    "firefunction": f' functools[{{"name": "get_weather", "arguments": {JSON}}}, {{"name": "now", "arguments": {{}}}}]',
    "harmony": f"<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{JSON}<|call|>"
    "<|start|>assistant to=functions.now<|channel|>commentary json<|message|>{}<|call|>",
    "own": f'<tool_call>\n{{"name": "get_weather", "arguments": {JSON}}}\n</tool_call>\n'
    f'<tool_call>{{"name": "now", "arguments": {{}}}}</tool_call>',
}
"""A call of `get_weather` and one of `now`, as the templates themselves print them."""


def params(*, tools: bool = True, **fields: object) -> ChatParams:
    given_tools = TOOLS if tools else []
    return ChatParams.model_validate(
        {"messages": [ChatMessage(role="user", content="q")], "tools": given_tools, **fields}
    )


def stream(name: str, *, tools: bool = True, prompt_end: str = "") -> AnswerStream:
    form = AnswerFormat.of(TEMPLATES[name])
    assert form.name == name
    return form.stream(params(tools=tools), prompt_end)


def read(reader: AnswerStream, pieces: list[str]) -> tuple[str, str | None, list[tuple[str, str]]]:
    """What came out over all pieces, which has to be what the stream says in the end."""
    out = [reader.push(piece) for piece in pieces]
    out.append(reader.finish())
    text = "".join(piece.text for piece in out)
    reasoning = "".join(piece.reasoning for piece in out)
    calls = [call for piece in out for call in piece.tool_calls]
    assert (text, reasoning or None) == (reader.text, reader.reasoning)
    assert [(call.id, call.name, call.arguments) for call in calls] == [
        (call.id, call.name, call.arguments) for call in reader.tool_calls
    ]
    assert [call.index for call in calls] == list(range(len(calls)))
    assert len({call.id for call in calls}) == len(calls)
    return text, reader.reasoning, [(call.name or "", call.arguments) for call in calls]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "by character"])
def test_calls_are_read_in_every_format(name: str, whole: bool) -> None:
    written = WRITTEN[name]
    text, reasoning, calls = read(stream(name), [written] if whole else list(written))
    assert (text.strip(), reasoning) == ("", None)
    assert [call[0] for call in calls] == ["get_weather", "now"]
    expected = ARGUMENTS if JSON in written else {**ARGUMENTS, "city": 'Köln "am Rhein" </tool_call'}
    assert [json.loads(call[1]) for call in calls] == [expected, {}]


@pytest.mark.parametrize("name", TEMPLATES)
def test_without_tools_what_looks_like_a_call_stays_text(name: str) -> None:
    text, _, calls = read(stream(name, tools=False), list(WRITTEN[name]))
    assert calls == []
    assert text.replace("\n\n", "") == WRITTEN[name].replace("\n\n", "")


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name not in ("harmony", "llama-3")])
def test_a_text_before_a_call_is_the_answers_text(name: str) -> None:
    text, _, calls = read(stream(name), ["I look it up.\n\n" + WRITTEN[name]])
    assert (text, len(calls)) == ("I look it up.", 2)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("cut", [0.3, 0.5, 0.7])
def test_a_call_that_breaks_off_comes_out_as_text(name: str, cut: float) -> None:
    written = WRITTEN[name].partition("now")[0]
    written = written[: int(written.index("get_weather") + 12 + 30 * cut)]
    text, _, calls = read(stream(name), list(written))
    assert calls == []
    assert text == written


MALFORMED = [
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": Köln}}\n</tool_call>',
    '<tool_call>\n{"name": "no_such_tool", "arguments": {}}\n</tool_call>',
    '<tool_call>\n{"name": "get_weather", "arguments": [1]}\n</tool_call>',
    '<tool_call>\n{"name": "get_weather", "arguments": {}} and more\n</tool_call>',
    '<tool_call>\n{"name": "get_weather", "arguments": {},}\n</tool_call>',
    "<tool_call> is how a call begins",
    "<tool_call>\n" + '{"name": ' * 5000,
    "<tool_call>\n" + "[" * 100_000 + "</tool_call>",
    "<tool_call></tool_call>",
    "<tool_call>",
]


@pytest.mark.parametrize("written", MALFORMED, ids=range(len(MALFORMED)))
def test_a_malformed_call_comes_out_as_text_and_what_follows_is_read(written: str) -> None:
    text, _, calls = read(stream("hermes"), [written, " then "])
    assert (text, calls) == (written + " then ", [])


def test_a_good_call_after_a_malformed_one_is_read() -> None:
    text, _, calls = read(stream("hermes"), list(MALFORMED[0] + WRITTEN["hermes"]))
    assert (text, len(calls)) == (MALFORMED[0], 2)


def test_text_comes_out_at_once_and_only_what_may_be_a_mark_waits() -> None:
    reader = stream("hermes")
    assert [reader.push(piece).text for piece in ("Hello", " wor", "ld <tool", "box>")] == [
        "Hello", " wor", "ld", " <toolbox>",
    ]  # fmt: skip


THOUGHTS = [
    ("<think>\nI think.\n</think>\n\nYes.", "", "I think.", "Yes."),
    ("I think.\n</think>\n\nYes.", "<think>\n", "I think.", "Yes."),
    ("I think and am cut", "<think>\n", "I think and am cut", ""),
    ("<think>\n\n</think>\n\nYes.", "", None, "Yes."),
    ("Yes.", "<think>\n\n</think>\n\n", None, "Yes."),
    ("Say <think> to begin.", "", None, "Say <think> to begin."),
    ("<thin ice>", "", None, "<thin ice>"),
    ("  Yes.", "", None, "  Yes."),
]


@pytest.mark.parametrize(("written", "prompt_end", "reasoning", "text"), THOUGHTS)
@pytest.mark.parametrize("tools", [True, False])
def test_thoughts_are_told_from_the_answer(
    written: str, prompt_end: str, reasoning: str | None, text: str, tools: bool
) -> None:
    assert read(stream("hermes", tools=tools, prompt_end=prompt_end), list(written)) == (text, reasoning, [])


def test_a_call_after_thoughts_is_read() -> None:
    text, reasoning, calls = read(stream("hermes"), list("<think>hm</think>\n" + WRITTEN["hermes"]))
    assert (text, reasoning, len(calls)) == ("", "hm", 2)


def test_two_equal_calls_have_different_ids_and_the_same_answer_the_same_ones() -> None:
    twice = '[TOOL_CALLS][{"name": "now"}, {"name": "now"}]'
    first, again = stream("mistral"), stream("mistral")
    first.push(twice)
    again.push(twice)
    ids = [call.id for call in first.tool_calls]
    assert len(set(ids)) == 2
    assert ids == [call.id for call in again.tool_calls]


FRAGMENTS = [
    "<tool_call>", "</tool_call>", "<think>", "</think>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>", ""
    "<|channel|>", "<|end|>",
    "<|message|>", "<|start|>", "assistant", "analysis", "final", "commentary to=functions.now", "<|call|>",
    "now", "get_weather", '"', "\\",
    "{", "}", "[", "]", ":", ",", ";", " ", "\n", "<", "|", "x", "é", '{"name": "now"}', '{"name": "now", "parameters": {}}',
    '"arguments"', "<function=now>", "</function>", "<arg_key>", "<|tool_call_begin|>", "<｜tool▁calls▁begin｜>", ""
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜>", "{}", "<tool", "_call>", "</thi", "nk>", "functools[",
]  # fmt: skip


@st.composite
def answers(draw: st.DrawFn) -> list[str]:
    """An answer of marks, their parts, whole calls and text, cut anywhere."""
    piece = st.one_of(st.sampled_from(FRAGMENTS), st.sampled_from(sorted(WRITTEN.values())), st.text(max_size=5))
    text = "".join(draw(st.lists(piece, max_size=12)))
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=12)))
    return [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]


@pytest.mark.slow
@settings(max_examples=4 * settings().max_examples)
@given(
    pieces=answers(),
    name=st.sampled_from(sorted(TEMPLATES)),
    tools=st.booleans(),
    prompt_end=st.sampled_from(
        ["", "<think>\n", "<|start|>assistant", "<|start|>assistant<|channel|>final<|message|>"]
    ),
)
@example(pieces=["<tool_call>now<too", "l_call>"], name="hermes", tools=True, prompt_end="")
def test_what_came_out_depends_on_the_text_alone(pieces: list[str], name: str, tools: bool, prompt_end: str) -> None:
    """After every piece, not only in the end: a replayed answer goes on where it was."""
    cut, grown = stream(name, tools=tools, prompt_end=prompt_end), ""
    for piece in pieces:
        cut.push(piece)
        grown += piece
        whole = stream(name, tools=tools, prompt_end=prompt_end)
        whole.push(grown)
        assert (cut.text, cut.reasoning, cut.tool_calls) == (whole.text, whole.reasoning, whole.tool_calls)
    cut.finish()
    assert read(stream(name, tools=tools, prompt_end=prompt_end), [grown]) == (
        cut.text,
        cut.reasoning,
        [(call.name, call.arguments) for call in cut.tool_calls],
    )


@settings(max_examples=2 * settings().max_examples)
@given(
    text=st.text(alphabet=st.characters(exclude_characters="<[{｜ft", codec="utf-8")),
    name=st.sampled_from(sorted(TEMPLATES)),
    tools=st.booleans(),
)
def test_without_marks_everything_comes_out_as_it_is(text: str, name: str, tools: bool) -> None:
    assert read(stream(name, tools=tools), [text]) == (text, None, [])


@settings(max_examples=2 * settings().max_examples)
@given(pieces=answers(), name=st.sampled_from(sorted(set(TEMPLATES) - {"harmony"})))
def test_nothing_but_marks_thoughts_and_calls_is_ever_missing_from_the_text(pieces: list[str], name: str) -> None:
    """Without tools and before any thought, the text is the answer, to the letter."""
    text = "".join(pieces)
    out, reasoning, calls = read(stream(name, tools=False, prompt_end="</think>[/THINK]</think>"), pieces)
    assert calls == []
    if reasoning is None and not any(text.lstrip().startswith(mark) for mark in ("<think>", "[THINK]")):
        assert out == text


def test_marks_are_found_and_their_beginnings_held() -> None:
    assert held_from("abc<to", ("<tool>",)) == 3
    assert held_from("abc<tx", ("<tool>",)) == 6
    assert first_mark("a<tool_calls>", ("<tool", "<tool_calls>")) == (1, "<tool_calls>")
    assert first_mark("abc", ("<tool",)) is None
