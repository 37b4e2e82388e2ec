"""What a replica takes at once, and what calls take of it."""

import pytest

from tars.core.prefix_affinity import tokens_in
from tars.core.routing import PREFILL_PART, UNITS_PER_CALL
from tars.errors import Overloaded
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
    TokenizeParams,
    Usage,
)
from tars.messages.node import LoadedInfo, MeasuredSpeeds
from tars.serving.call_costs import LEAST_CALLS, LEFT_PART, Capacity, Costs, capacity_of

SLOTS = Capacity(room=5, full=4, most_calls=100, own_word=10.0)
TEXTS = Capacity(room=16_000.0, full=1000.0, most_calls=100, own_word=None, most_tokens=100, generates=False)
TEXT = "x" * 256
LONG = "x" * 4000


@pytest.fixture
def costs():
    return Costs()


def generated(tokens, prompt=0, cached=0):
    usage = Usage(prompt_tokens=prompt, completion_tokens=tokens, total_tokens=prompt + tokens, cached_tokens=cached)
    return Generated(text="", finish_reason="stop", usage=usage, timings=Timings())


def test_a_generating_replica_has_its_slots_and_a_quarter_more():
    info = LoadedInfo(model_kind="chat", memory_bytes=1, load_seconds=1.0, slots=8)
    assert capacity_of(info, 64) == Capacity(10.0, 8.0, 72, None)
    one = info.model_copy(update={"slots": 1, "speeds": MeasuredSpeeds(decode_tokens_per_second=30.0)})
    assert capacity_of(one, 64) == Capacity(2.0, 1.0, 65, 30.0)


def test_a_generation_costs_as_many_tokens_as_usual_or_as_it_may_have_and_its_prompt(costs):
    assert costs.expected(CompleteParams(prompt=""), SLOTS) == (UNITS_PER_CALL, 1.0)
    assert costs.expected(CompleteParams(prompt="", n=3), SLOTS) == (3 * UNITS_PER_CALL, 3.0)
    assert costs.expected(CompleteParams(prompt="", n=3, max_tokens=10), SLOTS) == (30.0, 3.0)
    turns = [ChatMessage(role="user", content=TEXT)] * 2
    prompt = 2 * tokens_in(TEXT) / PREFILL_PART
    assert costs.expected(ChatParams(messages=turns, max_tokens=10), SLOTS) == (10.0 + prompt, 1.0)


def test_texts_cost_their_tokens_as_far_as_they_are_read(costs):
    short = tokens_in(TEXT)
    assert short < TEXTS.most_tokens < tokens_in(LONG)
    assert costs.expected(EmbedParams(input=TEXT), TEXTS) == (short, short)
    assert costs.expected(EmbedParams(input=[TEXT, LONG, ""]), TEXTS)[0] == short + TEXTS.most_tokens + 1
    whole = EmbedParams(input=LONG, overflow="mean")
    assert costs.expected(whole, TEXTS)[0] == tokens_in(LONG)
    assert costs.expected(RerankParams(query="q" * 40, documents=[TEXT[:40], LONG]), TEXTS)[0] == 20 + 100
    assert costs.expected(TokenizeParams(text=LONG), TEXTS) == (0.0, 0.0)


def test_no_call_of_many_texts_takes_more_than_its_part_of_the_room(costs):
    assert costs.expected(EmbedParams(input=[LONG] * 2048), TEXTS) == (204_800.0, TEXTS.room / LEAST_CALLS)


def test_answers_are_taken_to_be_as_long_as_they_were(costs):
    work = CompleteParams(prompt="")
    for tokens in (100, 200):
        costs.real(work, generated(tokens), expected=1.0, room=1.0, tokens=0.0)
    assert costs.expected(work, SLOTS)[0] == pytest.approx(150.0)
    costs.real(work, generated(900), expected=1.0, room=6.0, tokens=0.0)
    assert costs.expected(work, SLOTS)[0] == pytest.approx(150.0)


@pytest.mark.parametrize(
    ("work", "end", "units"),
    [
        (CompleteParams(prompt=""), generated(7, prompt=50, cached=10), 7 + 40 / PREFILL_PART),
        (CompleteParams(prompt=""), Overloaded("full"), 5.0),
        (CompleteParams(prompt=""), None, 5.0),
        (EmbedParams(input="a"), Embedded(vectors=[], dimensions=1, prompt_tokens=3, timings=Timings()), 3.0),
        (RerankParams(query="q", documents=["a"]), Reranked(scores=[1.0], prompt_tokens=4, timings=Timings()), 4.0),
        (EmbedParams(input="a"), Overloaded("full"), 0.0),
        (EmbedParams(input="a"), None, 40.0 * LEFT_PART),
    ],
)
def test_what_a_call_has_cost_is_known_by_its_end(costs, work, end, units):
    assert costs.real(work, end, expected=40.0, room=1.0, tokens=5.0) == pytest.approx(units)
