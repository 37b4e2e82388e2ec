"""Answers broken at any place, several times, and continued by another real engine: nothing is lost, nothing comes twice.

The gateway is `StreamSoFar`: all that a continuation has is what the caller got. In exact mode every answer is that of an unbroken call to
the last field; in fast mode what the caller had stays, and length and reason are right.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import pytest
from engine_thread import EngineThread, EventLog
from tiny_gguf import CHATML, write_tiny_gguf

from tars.errors import BadGrammar, Cancelled, InvalidParams
from tars.messages.inference import ChatMessage, ChatParams, CompleteParams, Delta, Generated, Tool
from tars.messages.node import MeasuredSpeeds, TunedSettings
from tars.serving.continuation import StreamSoFar
from tars.serving.local_target import begun
from tars.workers.engine import LoadSpec, Resume, Submission
from tars.workers.llama_engine import LlamaEngine

pytestmark = pytest.mark.model

PROMPT = (
    "the user and the assistant say hello to the world and to each other, in a system that is the same for all. " * 2
)
ON = {"2": -100.0, "4": -100.0}
"""Tokens 2 and 4 end the tiny model's text."""
TOOLS = (
    CHATML
    + '{# <think></think><tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call> #}'
)
"""Templates that show these marks write thoughts and calls with them."""
SPEEDS = MeasuredSpeeds(
    prefill_tokens_per_second=10_000.0,
    decode_tokens_per_second=2_000.0,
    decode_tokens_per_second_all_slots=4_000.0,
)

Work = ChatParams | CompleteParams


class Replica(EventLog):
    """A real engine that is given work and, where it has begun elsewhere, what the caller has."""

    def __init__(self, path: Path, **changes: Any) -> None:
        super().__init__()
        spec = {
            "replica": "r",
            "model": "m",
            "engine": "llama",
            "path": str(path),
            "context": 1024,
            "slots": 3,
            **changes,
        }
        self.engine = LlamaEngine()
        self.thread = EngineThread(self.engine, LoadSpec.model_validate(spec))

    def submit(self, work: Work, resume: Resume | None = None) -> int:
        number = next(self.thread.numbers)
        self.engine.submit(Submission(number, work, None, resume))
        return number

    def close(self) -> None:
        assert self.engine.counters().running == 0
        self.thread.close()


@dataclass
class Heard:
    """What a caller has of one call."""

    deltas: list[Delta] = field(default_factory=list)

    def of(self, index: int) -> dict[str, Any]:
        own = [delta for delta in self.deltas if delta.index == index]
        return {
            "text": "".join(delta.text for delta in own),
            "reasoning": "".join(delta.reasoning for delta in own),
            "token_ids": [token for delta in own for token in delta.token_ids],
            "logprobs": [one for delta in own for one in delta.logprobs or []],
            "tool_calls": [one for delta in own for one in delta.tool_calls],
        }


def _heard(replica: Replica, number: int) -> Heard:
    return Heard(replica.deltas.get(number, []))


def broken(replicas: list[Replica], work: Work, breaks: list[int]) -> tuple[Heard, Generated, int]:
    """The call through `replicas` in turn; each attempt breaks after so many pieces, the last one does not."""
    so_far, heard, resumed = StreamSoFar(work), Heard(), 0
    for attempt, pieces in enumerate([*breaks, None]):
        replica = replicas[attempt % len(replicas)]
        told = so_far.resume()
        resumed += told is not None
        number = replica.submit(work, None if told is None else begun(told))
        while number not in replica.ends and len(replica.deltas.get(number, [])) != pieces:
            replica.take()
        came = list(replica.deltas.get(number, []))[:pieces]
        for delta in came:
            so_far.take(delta)
        heard.deltas += came
        if pieces is None:
            return heard, so_far.merged(replica.end(number)), resumed
        replica.engine.cancel(number)
        end = replica.event(number)  # its slot is free; what came meanwhile reached nobody
        assert isinstance(end, Cancelled | Generated), end
    raise AssertionError


def chat(**params: Any) -> ChatParams:
    return ChatParams.model_validate(
        {"messages": [ChatMessage(role="user", content="hello")], "max_tokens": 60, **params}
    )


def complete(**params: Any) -> CompleteParams:
    return CompleteParams.model_validate({"prompt": PROMPT, "max_tokens": 60, **params})


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
TOOL = Tool(name="register", parameters=PERSON)

CALLS: dict[str, Work] = {
    "greedy": complete(temperature=0.0, seed=1),
    "seeded": complete(temperature=1.3, top_k=0, top_p=1.0, min_p=0.0, seed=2),
    "penalties": complete(temperature=0.9, repeat_penalty=1.3, frequency_penalty=0.5, presence_penalty=0.2, seed=3),
    "ends by itself": complete(temperature=1.0, seed=4, logit_bias={"4": 6.0}, max_tokens=None),
    "stop strings": complete(temperature=1.0, seed=5, stop=["e", "the and", "th", "o "], logit_bias=ON),
    "characters of several bytes": complete(grammar='root ::= [ぁ-ん🙂-🙏]{14} "end"', seed=6, stop=["んぁ", "end!"]),
    "half a character at the end": complete(grammar="root ::= [🙂-🙏]{9}", seed=7, max_tokens=26),
    "three answers": complete(temperature=1.1, seed=8, n=3, logit_bias={"4": 3.0}),
    "log probabilities": complete(temperature=1.0, seed=9, logprobs=3, n=2, logit_bias=ON, max_tokens=30),
    "json schema": complete(json_schema=PERSON, seed=10, temperature=1.0),
    "grammar": complete(grammar='root ::= ("ab" | "ac" root | [0-9]{3} "!" root)', seed=11, temperature=1.5),
    "a tool that must be called": chat(tools=[TOOL], tool_choice="required", seed=20, temperature=1.0, max_tokens=120),
    "chat": chat(temperature=1.0, seed=13, logit_bias=ON),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("continued") / "tiny.gguf", template=TOOLS)


@pytest.fixture(scope="module")
def exact(model: Path) -> Iterator[list[Replica]]:
    replicas = [Replica(model, exact=True), Replica(model, exact=True, slots=2)]
    yield replicas
    for replica in replicas:
        replica.close()


@pytest.fixture(scope="module")
def fast(model: Path) -> Iterator[list[Replica]]:
    tuned = TunedSettings(flash_attention=False, chunk=64, speeds=SPEEDS)
    replicas = [Replica(model, tuned=tuned), Replica(model, tuned=tuned.model_copy(update={"chunk": 32}), slots=1)]
    yield replicas
    for replica in replicas:
        replica.close()


def breaks_of(name: str) -> list[list[int]]:
    """One break in each part of an answer, some of which nothing came between, one at every piece, some anywhere, one after the last."""
    rng = Random(name)
    return [[1], [4], [12], [0, 1, 0, 2], [1] * 12, [rng.randrange(8) for _ in range(5)], [10_000]]


@pytest.mark.parametrize("name", CALLS)
def test_an_exact_answer_is_that_of_an_unbroken_call_wherever_it_breaks(exact: list[Replica], name: str) -> None:
    work = CALLS[name]
    number = exact[0].submit(work)
    wanted = exact[0].end(number)
    undisturbed = _heard(exact[0], number)
    for breaks in breaks_of(name):
        heard, whole, resumed = broken(exact, work, breaks)
        assert resumed or sum(breaks) <= 1
        for index in range(work.n):
            assert heard.of(index) == undisturbed.of(index), breaks
        cached = {"cached_tokens": whole.usage.cached_tokens}
        expected = wanted.model_copy(update={"timings": whole.timings, "usage": wanted.usage.model_copy(update=cached)})
        assert whole == expected, breaks


@pytest.mark.parametrize("name", CALLS)
def test_a_fast_answer_keeps_what_the_caller_had_and_is_whole(fast: list[Replica], name: str) -> None:
    work = CALLS[name]
    for breaks in breaks_of(name)[3:]:
        heard, whole, _ = broken(fast, work, breaks)
        choices = [whole, *whole.further]
        counted = 0
        for index, choice in enumerate(choices):
            had = heard.of(index)
            assert had["text"] == choice.text, breaks
            assert had["reasoning"] == (choice.reasoning or "")
            assert [one.id for one in had["tool_calls"]] == [one.id for one in choice.tool_calls]
            counted += len(had["token_ids"])
            if work.logprobs is not None:
                assert [one.token_id for one in had["logprobs"]] == had["token_ids"]
                assert had["logprobs"] == choice.logprobs
            if choice.finish_reason == "length":
                assert len(had["token_ids"]) == work.max_tokens
            else:
                assert not any(text in choice.text for text in work.stop)
        assert counted == whole.usage.completion_tokens
        if name == "json schema":
            assert json.loads(whole.text).keys() == {"name", "age"}


def test_a_required_call_of_a_tool_is_the_same_call_after_every_break(exact: list[Replica]) -> None:
    work = CALLS["a tool that must be called"]
    wanted = exact[0].end(exact[0].submit(work))
    assert wanted.finish_reason == "tool_calls"
    (made,) = wanted.tool_calls
    assert json.loads(made.arguments).keys() == {"name", "age"}
    _, whole, resumed = broken(exact, work, [3, 3, 3])
    assert resumed == 3
    assert whole.tool_calls == [made], "with the same id"


def test_thoughts_go_on_as_thoughts(exact: list[Replica]) -> None:
    work = chat(grammar='root ::= "<think>" [a-f ]{10} "</think>" [g-k ]{10} "<tool_call>x"', seed=5, temperature=1.0)
    number = exact[0].submit(work)
    wanted = exact[0].end(number)
    assert wanted.reasoning
    assert wanted.text.strip()
    for breaks in ([2], [9], [14], [1] * 20):
        heard, whole, _ = broken(exact, work, breaks)
        assert (whole.reasoning, whole.text) == (wanted.reasoning, wanted.text)
        assert heard.of(0) == _heard(exact[0], number).of(0)


def test_an_answer_that_was_whole_when_it_broke_computes_nothing(exact: list[Replica]) -> None:
    work = complete(temperature=1.0, seed=8, n=3, logit_bias={"4": 3.0})
    number = exact[0].submit(work)
    wanted = exact[0].end(number)
    so_far = StreamSoFar(work)
    for delta in exact[0].deltas[number]:
        so_far.take(delta)
    told = so_far.resume()
    assert told is not None
    assert told.ended == [0, 1, 2], "each said that it was its last piece"
    steps = exact[1].engine.counters().steps
    again = exact[1].submit(work, begun(told))
    whole = exact[1].end(again)
    assert [one.text for one in [whole, *whole.further]] == [one.text for one in [wanted, *wanted.further]]
    assert whole.usage.completion_tokens == wanted.usage.completion_tokens
    assert not exact[1].deltas.get(again)
    assert exact[1].engine.counters().steps == steps


def test_tokens_that_the_grammar_forbids_are_a_clear_error_and_spoil_nobody_else(exact: list[Replica]) -> None:
    work = complete(grammar='root ::= "ab" [0-9]+', seed=1)
    with pytest.raises(BadGrammar, match="does not follow the grammar"):
        exact[0].end(exact[0].submit(work, Resume(generated=[[10]], handed_out=[1], seed=1)))
    with pytest.raises(InvalidParams, match="does not fit the call"):
        exact[0].end(exact[0].submit(work, Resume(generated=[[], []], handed_out=[0, 0], seed=1)))
    assert exact[0].end(exact[0].submit(work)).text.startswith("ab")
