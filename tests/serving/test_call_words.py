"""A call's record in words."""

from tars.messages.calls import AttemptDescription, CallDescription, WaitDescription
from tars.serving.call_words import explained


def call(**changes):
    said = {
        "id": "0a0b",
        "method": "inference.chat",
        "model": "mistral-7b",
        "caller": "alice",
        "face": "openai",
        "node": "n1",
        "node_name": "pc1",
        "forwarded_by": None,
        "started_at": 1_700_000_000.0,
        "seconds": 3.5,
        "outcome": "answered",
        "attempts": [],
        "waits": [],
    }
    return CallDescription(**{**said, **changes})


def attempt(**changes):
    said = {
        "replica": "mistral-7b@pc2#0",
        "node": "n2",
        "node_name": "pc2",
        "device_name": "RTX 4090",
        "after_seconds": 0.001,
        "seconds": 1.2,
        "why": "first",
        "reason": "first choice; rank 1: predicted 0.800 s",
        "outcome": "answered",
    }
    return AttemptDescription(**{**said, **changes})


def test_a_continued_call_is_told_in_the_order_of_what_happened():
    broken = attempt(outcome="peer_unreachable", tokens=34, passed_over=["mistral-7b@pc3#0: rank 2: predicted 1.100 s"])
    went_on = attempt(
        replica="mistral-7b@pc3#0",
        node_name="pc3",
        device_name="RTX 3060",
        after_seconds=1.7,
        seconds=1.8,
        why="continuation",
        reason="continued after peer_unreachable; rank 1: predicted 0.900 s",
        tokens=30,
    )
    waits = [
        WaitDescription(what="backoff", after_seconds=1.2, seconds=0.5),
        WaitDescription(what="idempotency_key", after_seconds=0.0, seconds=0.001),
    ]
    lines = explained([call(attempts=[broken, went_on], waits=waits)]).splitlines()
    assert lines[0] == "Call 0a0b: inference.chat of mistral-7b, for alice over openai"
    assert "at pc1; answered after 3.50 s, with 2 attempts" in lines[1]
    assert lines[2:] == [
        "     0.001 s  asked pc2, RTX 4090 (mistral-7b@pc2#0): first choice; rank 1: predicted 0.800 s",
        "              not mistral-7b@pc3#0: rank 2: predicted 1.100 s",
        "              -> the connection to it broke, or none came about after 1.20 s, 34 tokens came",
        "     1.200 s  waited 500 ms before trying again",
        "     1.700 s  asked pc3, RTX 3060 (mistral-7b@pc3#0): continued after peer_unreachable; rank 1: predicted 0.900 s",
        "              -> answered after 1.80 s, 30 tokens came",
    ]


def test_every_end_of_a_call_has_its_words():
    said = {
        outcome: explained([call(outcome=outcome, error=error, repeats=of, seconds=seconds)])
        for outcome, error, of, seconds in (
            ("running", "", "", None),
            ("repeated", "", "0c0d", 0.01),
            ("cancelled", "", "", 1.0),
            ("unknown_model", "no such model", "", 0.0),
        )
    }
    assert "it runs now" in said["running"]
    assert "got after 10 ms the answer of call 0c0d under the same idempotency key" in said["repeated"]
    assert "its caller went away after 1.00 s, and the work was stopped" in said["cancelled"]
    assert "failed after 0 ms with unknown_model: no such model" in said["unknown_model"]
    assert "no replica was asked" in said["unknown_model"]
    assert "no replica was asked" not in said["repeated"]


def test_what_runs_and_waits_now_has_no_length():
    text = explained(
        [
            call(
                outcome="running",
                seconds=None,
                attempts=[attempt(seconds=None, outcome="running")],
                waits=[WaitDescription(what="load", after_seconds=0.5, seconds=None)],
            )
        ]
    )
    assert "-> runs now\n" in text
    assert text.endswith("0.500 s  waits for the model to be loaded")


def test_an_attempt_of_another_nodes_call_says_whose_it_is():
    assert "came" in (text := explained([call(forwarded_by="n9")]))
    assert "from node n9, which knows the whole of it; here: answered after 3.50 s" in text


def test_an_error_without_words_of_its_own_is_said_by_its_kind():
    assert "-> failed with prompt_too_long after 1.20 s" in explained(
        [call(attempts=[attempt(outcome="prompt_too_long")])]
    )


def test_several_calls_stand_apart():
    assert explained([call(), call(id="0e0f")]).count("\n\nCall 0e0f") == 1
