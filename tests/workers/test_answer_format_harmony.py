from __future__ import annotations

import pytest

from tars.messages.inference import Tool
from tars.workers.answer_format_harmony import HarmonyStream

TOOLS = {"now": Tool(name="now")}
PROMPT = "<|start|>user<|message|>q<|end|><|start|>assistant"

ANSWERS = [
    ("<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes.<|return|>", "Yes.", "Hm.", []),
    ("<|channel|>final<|message|>Yes.", "Yes.", None, []),
    ("<|channel|>analysis<|message|>Cut off", "", "Cut off", []),
    ("<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>analysis<|message|>b<|end|>", "", "a\n\nb", []),
    (
        "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant<|channel|>commentary to=functions.now "
        "<|constrain|>json<|message|>{}<|call|>",
        "I look.",
        None,
        ["{}"],
    ),
    (" to=functions.now<|channel|>commentary <|constrain|>json<|message|>{\"a\": 1}", "", None, ['{"a": 1}']),
    ("<|channel|>commentary to=functions.now<|message|>{\"a\": <|call|>", '<|channel|>commentary to=functions.now'
    '<|message|>{"a": <|call|>', None, []),
    ("<|channel|>commentary to=functions.who<|message|>{}", "<|channel|>commentary to=functions.who<|message|>{}", None, []),
    ("Plain text.", "Plain text.", None, []),
    ("total", "total", None, []),
    ("<|channel|>", "<|channel|>", None, []),
    ("<|channel|>" + "x" * 1000, "<|channel|>" + "x" * 1000, None, []),
    ("<|start|>" + "x" * 1000, "<|start|>" + "x" * 1000, None, []),
    ("", "", None, []),
]  # fmt: skip


@pytest.mark.parametrize(("written", "text", "reasoning", "calls"), ANSWERS, ids=range(len(ANSWERS)))
@pytest.mark.parametrize("step", [1, 7, 10_000])
def test_messages_go_where_their_channel_says(
    written: str, text: str, reasoning: str | None, calls: list[str], step: int
) -> None:
    reader = HarmonyStream(TOOLS, PROMPT)
    for start in range(0, len(written), step):
        reader.push(written[start : start + step])
    reader.finish()
    assert (reader.text, reader.reasoning, [call.arguments for call in reader.tool_calls]) == (text, reasoning, calls)


@pytest.mark.parametrize(
    ("prompt", "text", "reasoning"),
    [
        (PROMPT + "<|channel|>final<|message|>", "{}", None),
        (PROMPT + "<|channel|>analysis<|message|>", "", "{}"),
        (PROMPT, "{}", None),
        ("", "{}", None),
    ],
)
def test_the_prompt_says_in_which_message_an_answer_begins(prompt: str, text: str, reasoning: str | None) -> None:
    reader = HarmonyStream({}, prompt)
    reader.push("{}")
    reader.finish()
    assert (reader.text, reader.reasoning) == (text, reasoning)


def test_thoughts_and_text_come_out_as_they_are_written() -> None:
    reader = HarmonyStream(TOOLS, PROMPT)
    pieces = [
        "<|channel|>",
        "analysis",
        "<|message|>",
        "I ",
        "think",
        "<|end|>",
        "<|start|>",
        "assistant",
        "<|channel|>final<|message|>",
        "Yes",
    ]
    out = [reader.push(piece) for piece in pieces]
    assert [piece.reasoning for piece in out if piece.reasoning] == ["I ", "think"]
    assert [piece.text for piece in out if piece.text] == ["Yes"]
