"""What calls ask for and what answers show."""

import pytest

from tars.core.prefix_affinity import blocks_of
from tars.core.routing import UNITS_PER_CALL, units_of
from tars.messages.inference import (
    ChatMessage,
    ChatParams,
    CompleteParams,
    Embedded,
    EmbedParams,
    Generated,
    Reranked,
    RerankParams,
    Timings,
    Tokenized,
    TokenizeParams,
    Tool,
    Usage,
)
from tars.serving.demand import demand_of, observed, prompt_text
from tars.workers.engine import SaveParams


def chat(*turns, **more):
    messages = [ChatMessage(role=role, content=content) for role, content in turns]
    return ChatParams(messages=messages, **{"model": "m", **more})


@pytest.mark.parametrize(
    ("work", "units"),
    [
        (EmbedParams(input="one text"), 1.0),
        (EmbedParams(input=["a"] * 500), 500.0),
        (RerankParams(query="q", documents=["a"] * 30), 30.0),
        (TokenizeParams(text="a" * 1000), 0.0),
        (CompleteParams(prompt="x"), UNITS_PER_CALL),
        (CompleteParams(prompt="x", max_tokens=10, n=2), 20.0),
        (CompleteParams(prompt="x", max_tokens=10_000), UNITS_PER_CALL),
        (SaveParams(sequence=1, path="p"), UNITS_PER_CALL),
    ],
)
def test_a_calls_size(work, units):
    assert units_of([], demand_of(work)) == units


def test_a_prompts_size_is_that_of_its_text():
    assert demand_of(CompleteParams(prompt="x" * 4000)).prompt_tokens == pytest.approx(1000, rel=0.01)


def test_chats_share_what_comes_first_in_a_template():
    long = "The rules of the house. " * 40
    one, other = chat(("system", long), ("user", "Hi?")), chat(("system", long), ("user", "Who are you?"))
    shared = len(long) // 256
    assert blocks_of(prompt_text(one))[:shared] == blocks_of(prompt_text(other))[:shared]
    tools = [Tool(name="weather", parameters={"type": "object"})]
    with_tools = chat(("system", long), ("user", "Hi?"), tools=tools)
    assert blocks_of(prompt_text(one))[0] != blocks_of(prompt_text(with_tools))[0], "tools stand first"
    adapted = chat(("system", long), ("user", "Hi?"), model="m:legal")
    assert blocks_of(prompt_text(one))[0] != blocks_of(prompt_text(adapted))[0], "an adapter's cache is its own"


def test_what_computes_no_prompt_has_none():
    assert prompt_text(EmbedParams(input="x")) == ""


def generated(tokens, **timings):
    usage = Usage(prompt_tokens=100, completion_tokens=tokens, total_tokens=100 + tokens, cached_tokens=40)
    return Generated(text="", finish_reason="stop", usage=usage, timings=Timings(**timings))


def test_a_generations_speed_is_the_replicas_own_and_its_prefill_is_apart():
    seen = observed(generated(51, queue_ms=500, first_token_ms=700, total_ms=1700, tokens_per_second=50), 60.0)
    assert (seen.units, seen.seconds, seen.asked, seen.waited) == (50.0, 1.0, 51.0, False)
    assert (seen.prefill_tokens, seen.prefill_seconds) == (60.0, pytest.approx(0.2))


def test_without_the_replicas_clock_the_whole_call_counts():
    seen = observed(generated(10), 2.0)
    assert (seen.units, seen.seconds, seen.waited, seen.prefill_seconds) == (10.0, 2.0, True, 0.0)


def test_texts_are_counted_and_what_says_nothing_says_nothing():
    assert observed(Embedded(vectors=["", ""], dimensions=1, prompt_tokens=2, timings=Timings()), 0.5).units == 2.0
    assert observed(Reranked(scores=[0.1] * 3, prompt_tokens=2, timings=Timings()), 0.5).seconds == 0.5
    assert observed(Tokenized(tokens=[1]), 0.5) is None
    assert observed(generated(0), 0.5) is None
