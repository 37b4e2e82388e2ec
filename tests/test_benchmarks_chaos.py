"""What `scripts/bench chaos` asks, whom it strikes, what it calls right, and what it concludes and draws."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from chaos_answers import Heard, Step, Text, judge
from chaos_callers import CallRecord
from chaos_deck import CHAT_MODEL, MIX, MODELS, TOP_K, Call, Kind, deck
from chaos_faults import HOLD_SECONDS, Fault, FaultKind, FaultRecord, NodeView, chosen, schedule, victims
from chaos_picture import MARKS, page
from chaos_results import duplicates, next_piece_after, summarise

from tars.messages.inference import ChatParams, CompleteParams, EmbedParams
from tars.web.openai_messages import ChatRequest, CompletionRequest
from tars.web.openai_retrieval import EmbeddingRequest

QUESTIONS = ["What is TARS?", "How do I add a second PC?", "What does the coordinator do?"]

# --- the deck ---------------------------------------------------------------------------------------------------------


def test_the_same_seed_asks_the_same_calls_and_another_seed_others() -> None:
    assert deck(1, 100, QUESTIONS) == deck(1, 100, QUESTIONS)
    assert deck(1, 100, QUESTIONS) != deck(2, 100, QUESTIONS)
    assert {call.kind for call in deck(1, 1, QUESTIONS)} == set(MIX)


def test_every_call_is_one_that_both_faces_take_and_that_has_one_right_answer() -> None:
    calls = deck(3, 400, QUESTIONS)
    for call in calls:
        params = dict(call.params)
        if call.kind is Kind.EMBEDDING:
            EmbedParams.model_validate(params)
            EmbeddingRequest.model_validate(params)
            continue
        assert {"seed", "temperature"} <= set(params)
        # What else may be drawn is told by the undisturbed run.
        assert call.greedy or params["top_k"] == TOP_K
        message, request = (
            (ChatParams, ChatRequest) if call.method == "inference.chat" else (CompleteParams, CompletionRequest)
        )
        told = message.model_validate(params)
        if not call.only_rpc:
            translated: Any = request.model_validate(params).to_params()  # type: ignore[attr-defined]  # both have it
            translated = translated[0] if isinstance(translated, list) else translated
            assert translated.model_dump(exclude={"model"}) == told.model_dump(exclude={"model"})
    assert sum(call.only_rpc for call in calls) > 0
    assert sum(call.params.get("n") == 2 for call in calls) > 0
    assert sum("stop" in call.params for call in calls) > 0


# --- what is right ----------------------------------------------------------------------------------------------------

GREEDY = Call(0, Kind.CHAT_STREAM, {"model": CHAT_MODEL, "max_tokens": 4, "temperature": 0.0})
SEEDED = Call(0, Kind.CHAT_STREAM, {"model": CHAT_MODEL, "max_tokens": 4, "temperature": 0.8, "seed": 1})


def step(text: str, token: int, *others: tuple[str, float]) -> Step:
    return Step(text, token, -0.1, ((text, -0.1), *others))


RIGHT = Heard(
    (
        Text(
            "A node is it",
            "length",
            pieces="A node is it",
            token_ids=(1, 2, 3, 4),
            steps=(step("A", 1), step(" node", 2, (" PC", -0.3), (" mesh", -3.0)), step(" is", 3), step(" it", 4)),
        ),
    ),
    completion_tokens=4,
)


def heard(
    text: str, tokens: tuple[int, ...] = (1, 2, 3, 4), finish: str = "length", pieces: str | None = None
) -> Heard:
    return Heard((Text(text, finish, text if pieces is None else pieces, tokens),), completion_tokens=len(tokens))


@pytest.mark.parametrize("exact", [False, True])
def test_the_undisturbed_answer_is_right_in_both_modes(exact: bool) -> None:
    assert judge(GREEDY, RIGHT, heard("A node is it"), exact=exact).problems == ()
    # As an OpenAI client hears it: without tokens.
    assert judge(GREEDY, RIGHT, Heard((Text("A node is it", "length"),), 4), exact=exact).problems == ()


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(
    ("answer", "what"),
    [
        (heard("A node it", (1, 2, 4)), "undisturbed answer"),
        (heard("A node node is it", (1, 2, 2, 3, 4)), "undisturbed answer"),
        (heard("A node is it", (1, 2, 3, 3, 4)), "undisturbed answer"),
        (heard("A node is it", finish="stop"), "finish reason"),
        (heard("A node is it", pieces="A node node is it"), "not the result"),
        (heard("A mesh is it", (1, 9, 3, 4)), "undisturbed answer"),
        (Heard((Text("A node is it", "length"),), completion_tokens=5), "usage says 5"),
        (Heard((), 0), "0 answers instead of 1"),
    ],
)
def test_what_is_missing_there_twice_or_otherwise_is_wrong_in_both_modes(exact: bool, answer: Heard, what: str) -> None:
    problems = judge(GREEDY, RIGHT, answer, exact=exact).problems
    assert any(what in problem for problem in problems), problems


def test_a_near_tie_may_part_the_text_in_fast_mode_only() -> None:
    other = heard("A PC runs on", (1, 7, 8, 9))
    assert judge(GREEDY, RIGHT, other, exact=False).parted
    assert judge(GREEDY, RIGHT, other, exact=True).problems
    # Also where only the text is known.
    assert judge(GREEDY, RIGHT, Heard((Text("A PC runs on", "length"),), 4), exact=False).parted
    # A drawn token may be any that might have been drawn.
    assert judge(SEEDED, RIGHT, heard("A mesh runs on", (1, 9, 3, 4)), exact=False).parted
    assert judge(SEEDED, RIGHT, heard("A dog runs on", (1, 11, 3, 4)), exact=False).problems


def test_after_a_near_tie_length_and_stop_strings_still_count() -> None:
    assert any(
        "3 tokens with 4" in each for each in judge(GREEDY, RIGHT, heard("A PC runs", (1, 7, 8)), exact=False).problems
    )
    stopped = replace(GREEDY, params={**GREEDY.params, "stop": ["runs"]})
    assert any(
        "stop string" in each
        for each in judge(stopped, RIGHT, heard("A PC runs on", (1, 7, 8, 9)), exact=False).problems
    )


def test_an_answer_that_goes_on_after_the_undisturbed_ones_end_is_right_only_where_it_was_drawn() -> None:
    ended = Heard((replace(RIGHT.texts[0], finish_reason="stop"),), 4)
    longer = heard("A node is it not", (1, 2, 3, 4, 5), finish="stop")
    longer_call = {"max_tokens": 9}
    assert judge(replace(GREEDY, params={**GREEDY.params, **longer_call}), ended, longer, exact=False).problems
    assert judge(replace(SEEDED, params={**SEEDED.params, **longer_call}), ended, longer, exact=False).parted


def test_vectors_are_compared_to_the_fifth_decimal() -> None:
    call = Call(0, Kind.EMBEDDING, {"input": ["a"]})
    right = Heard(vectors=((0.6, 0.8),))
    assert judge(call, right, Heard(vectors=((0.600001, 0.8),)), exact=True).problems == ()
    for wrong in (((0.6002, 0.8),), ((0.6, 0.8), (0.6, 0.8)), ((0.6,),), ((float("nan"), 0.8),)):
        assert judge(call, right, Heard(vectors=wrong), exact=False).problems


# --- the faults -------------------------------------------------------------------------------------------------------


def test_a_seed_gives_the_same_faults_of_every_kind_and_none_that_cannot_be_done() -> None:
    faults = schedule(1, 100, links=True)
    assert faults == schedule(1, 100, links=True) != schedule(2, 100, links=True)
    counted = Counter(fault.kind for fault in faults)
    assert set(counted) == set(FaultKind)
    assert min(counted.values()) >= 3
    assert [fault.number for fault in faults] == list(range(100))
    assert all(HOLD_SECONDS[fault.kind][0] <= fault.hold <= HOLD_SECONDS[fault.kind][1] for fault in faults)
    assert not any(fault.kind.needs_links for fault in schedule(1, 100, links=False))
    assert {fault.kind for fault in schedule(1, 9, links=True, only=[FaultKind.CUT])} == {FaultKind.CUT}
    # Those that are rare otherwise are not where they are asked for.
    assert len({fault.kind for fault in schedule(1, 2, links=True, only=[FaultKind.ROLLING, FaultKind.CUT])}) == 2
    with pytest.raises(ValueError, match="loopback"):
        schedule(1, 9, links=False, only=[FaultKind.CUT])


def view(name: str, *ready: str, healthy: bool = True, coordinates: bool = False) -> NodeView:
    return NodeView(name, healthy, name in ("a", "b"), coordinates, frozenset(ready))


CHAT, EMBEDDING = MODELS


def test_a_live_replica_of_each_model_and_a_gateway_always_remain() -> None:
    nodes = [view("a", CHAT, coordinates=True), view("b", *MODELS), view("c", EMBEDDING)]
    assert victims(FaultKind.KILL, nodes, MODELS) == [("a", None), ("b", None), ("c", None)]
    assert victims(FaultKind.COORDINATOR, nodes, MODELS) == [("a", None)]
    assert victims(FaultKind.WORKER_KILL, nodes, MODELS) == [
        ("a", CHAT), ("b", EMBEDDING), ("b", CHAT), ("c", EMBEDDING),
    ]  # fmt: skip
    # b is all that is left of the chat model, and of the gateways.
    one_down = [view("a", CHAT, healthy=False), *nodes[1:]]
    assert victims(FaultKind.FREEZE, one_down, MODELS) == [("c", None)]
    assert victims(FaultKind.WORKER_FREEZE, one_down, MODELS) == [("b", EMBEDDING), ("c", EMBEDDING)]
    assert victims(FaultKind.COORDINATOR, one_down, MODELS) == []
    assert victims(FaultKind.OVERLOAD, one_down, MODELS) == victims(FaultKind.ROLLING, one_down, MODELS) == []
    assert victims(FaultKind.ROLLING, nodes, MODELS) == victims(FaultKind.OVERLOAD, nodes, MODELS) == [("all", None)]


def test_the_draw_picks_one_of_them() -> None:
    possible: list[tuple[str, str | None]] = [("a", None), ("b", None)]
    fault = Fault(0, FaultKind.KILL, 0.0, 1.0, False)
    assert [chosen(replace(fault, draw=draw), possible)[0] for draw in (0.0, 0.49, 0.5, 1.0)] == ["a", "a", "b", "b"]


# --- what it came to --------------------------------------------------------------------------------------------------


def record(sent: float, seconds: float | None, outcome: str = "right", **more: Any) -> CallRecord:
    made = CallRecord(
        more.pop("call", 0), more.pop("kind", Kind.CHAT_STREAM), "rpc", "a", True, sent, more.pop("phase", "chaos")
    )
    made.ended, made.outcome = None if seconds is None else sent + seconds, outcome
    for name, value in more.items():
        setattr(made, name, value)
    return made


CALM = [record(0.1 * number, 0.5, phase="calm") for number in range(5)]


def fault(kind: FaultKind = FaultKind.KILL, node: str = "c", struck: float = 10.0, **more: Any) -> FaultRecord:
    made = FaultRecord(0, kind, node, None, struck, over=struck + 2, detected=struck + 0.5, mended=struck + 6)
    for name, value in more.items():
        setattr(made, name, value)
    return made


def test_added_latency_is_what_a_call_took_beyond_the_calm_median_of_the_same_call() -> None:
    chaos = [record(10.0 + number, 0.5) for number in range(99)] + [record(120.0, 2.5)]
    found = summarise(CALM, chaos, [fault()])
    assert found.added_p50 == pytest.approx(0.0)
    assert found.added_p99 == pytest.approx(0.0)
    assert summarise(CALM, chaos[50:], [fault()]).added_p99 == pytest.approx(2.0)
    assert found.sent == 105
    assert found.nothing_lost


@pytest.mark.parametrize("outcome", ["lost", "wrong", "running"])
def test_one_bad_call_is_enough(outcome: str) -> None:
    found = summarise(CALM, [record(10.0, 1.0, outcome, problems=["because"])], [fault()])
    assert not found.nothing_lost
    assert any("because" in problem for problem in found.problems)


def test_an_honest_refusal_is_no_lost_call() -> None:
    found = summarise(CALM, [record(10.0, 1.0, "refused", refusals=7)], [])
    assert found.nothing_lost
    assert found.refusals == 7


def test_a_late_call_is_none_of_the_lost_ones_and_is_told_all_the_same() -> None:
    found = summarise(CALM, [record(10.0, 1.0, "late", refusals=1, problems=["90 s are over"])], [])
    assert found.nothing_lost
    assert found.by_outcome["late"] == 1
    assert any("90 s are over" in problem for problem in found.problems)


def test_attempts_in_overloads_are_counted_apart() -> None:
    one, three = ([{"outcome": "late"}] * number + [{"outcome": "answered"}] for number in (0, 2))
    calls = [record(10.0, 1.0, attempts=one), record(50.0, 1.0, attempts=three), record(51.0, 1.0)]
    found = summarise(CALM, calls, [fault(FaultKind.OVERLOAD, "all", struck=49.0)])
    assert (found.attempts_a_call, found.overload_attempts_a_call) == (1.0, 3.0)
    assert (found.attempted_elsewhere, found.continued) == (1, 0)
    assert summarise(CALM, calls, []).overload_attempts_a_call is None


def test_two_computations_under_one_key_are_one_duplicate() -> None:
    same = [record(10.0, 1.0, twin=1, run="x 1"), record(10.5, 0.5, twin=1, run="x 1")]
    twice = [record(10.0, 1.0, twin=2, run="x 1"), record(10.5, 0.5, twin=2, run="y 2")]
    assert len(duplicates([*same, *twice])) == 1
    found = summarise(CALM, [*same, *twice], [])
    assert (found.duplicated, found.twins, found.nothing_lost) == (1, 2, False)


def test_a_gateway_that_was_gone_without_a_fault_is_said() -> None:
    again = [record(10.0, 3.0, sent_again=[(11.0, "a")])]
    assert summarise(CALM, again, [fault(node="a")]).unexplained == 0
    assert summarise(CALM, again, [fault(node="c")]).unexplained == 1
    assert summarise(CALM, again, [fault(FaultKind.OVERLOAD, "all")]).unexplained == 1
    assert summarise(CALM, again, [fault(FaultKind.ROLLING, "all")]).unexplained == 0


def test_gaps_of_streams_whose_gateway_died_are_counted_apart() -> None:
    alive = record(9.0, 4.0, pieces=[9.5, 10.0, 12.0, 13.0])
    died = record(9.0, 8.0, pieces=[9.5, 16.0, 17.0], sent_again=[(14.0, "a")])
    found = summarise(CALM, [alive, died], [fault(struck=10.5)])
    assert (found.longest_gap, found.longest_gap_sent_again) == (pytest.approx(2.0), pytest.approx(6.5))
    (kind,) = found.faults
    assert (kind.longest_gap, kind.recovered, kind.detected, kind.mended) == (
        pytest.approx(2.0), pytest.approx(1.5), pytest.approx(0.5), pytest.approx(6.0),
    )  # fmt: skip


def test_gaps_of_streams_whose_gateway_was_cut_off_itself_are_counted_apart() -> None:
    stream = record(9.0, 8.0, pieces=[9.5, 10.0, 15.0])
    assert stream.gateway == "a"
    for kind in (FaultKind.CUT, FaultKind.SWALLOW):
        found = summarise(CALM, [stream], [fault(kind, "a", struck=10.5)])
        assert (found.longest_gap, found.longest_gap_cut_off) == (0.0, pytest.approx(5.0))
    for other in (
        fault(FaultKind.CUT, "c", struck=10.5),
        fault(FaultKind.FREEZE, "a", struck=10.5),
        fault(FaultKind.CUT, "a", struck=16.0),
    ):
        found = summarise(CALM, [stream], [other])
        assert (found.longest_gap, found.longest_gap_cut_off) == (pytest.approx(5.0), 0.0)


def test_a_stream_goes_on_with_its_next_piece_or_its_end() -> None:
    stream = record(0.0, 10.0, pieces=[1.0, 2.0])
    assert next_piece_after(stream, 1.5) == 0.5
    assert next_piece_after(stream, 4.0) == 6.0
    assert next_piece_after(stream, 0.5) is None
    assert next_piece_after(stream, 11.0) is None


def test_without_a_right_answer_in_calm_there_is_nothing_to_compare_with() -> None:
    with pytest.raises(ValueError, match="calm"):
        summarise([], [record(1.0, 1.0)], [])


# --- the page ---------------------------------------------------------------------------------------------------------


def result(**more: Any) -> dict[str, Any]:
    call = {
        "kind": "chat stream", "phase": "chaos", "sent": 12.0, "ended": 13.5, "outcome": "right", "gap": 0.4, "problems": [],
    }  # fmt: skip
    calls = [call, {**call, "sent": 30.0, "ended": 31.0, "outcome": "lost", "gap": None, "problems": ["<lost>"]}]
    faults = [
        {
            "kind": kind, "node": "all" if kind in ("rolling restart", "5x overload") else "b", "model": None,
            "struck": 10.0 + number, "over": 12.0 + number, "mended": None if number == 3 else 15.0 + number,
        }
        for number, kind in enumerate(FaultKind)
    ]  # fmt: skip
    summary = summarise(CALM, [record(10.0, 1.0, "lost", problems=["<lost> & gone"])], [fault()]).to_json()
    return {
        "seed": 1, "mode": "fast", "links": True, "cut_short": False, "rates": {"steady": 2.0, "capacity": 6.0},
        "summary": summary, "calls": calls, "faults": faults,
        "batch": {"calls": 60, "both": 10.0, "frozen": 15.0, "alone": 19.0}, **more,
    }  # fmt: skip


def test_every_kind_of_fault_has_a_mark_of_its_own() -> None:
    assert set(MARKS) == set(FaultKind)
    assert len({letter for letter, _ in MARKS.values()}) == len(MARKS)


def test_the_page_shows_faults_and_bad_calls_and_says_nothing_as_markup() -> None:
    text = page(result())
    svg = text[text.index("<svg") : text.index("</svg>") + len("</svg>")]
    drawn = ElementTree.fromstring(svg)
    assert sum(each.get("class") == "mark" for each in drawn.iter("text")) == len(FaultKind)
    assert [each.text for each in drawn.iter("title")][-1] == "lost: <lost>"
    assert "&lt;lost&gt; &amp; gone" in text
    assert "<script" not in text


def test_a_batch_alone_makes_a_page_too() -> None:
    text = page({"seed": 1, "mode": "exact", "summary": None, "batch": result()["batch"]})
    assert "15.0" in text
    assert "<svg" not in text
