"""What nodes tell each other of idempotency keys, as JSON."""

import pytest
from pydantic import ValidationError

from tars.core.idempotency_keys import KeyState
from tars.messages.key_claims import AwaitAnswerParams, ClaimKeyParams, KeyResult

KEY, BODY = "0a" * 32, "0b" * 32


def test_every_state_of_a_key_can_be_said():
    for state in KeyState:
        assert KeyResult(state=state.value).state == state


@pytest.mark.parametrize(
    "wrong",
    [
        {"key": "the caller's own words"},
        {"body": BODY[:-1]},
        {"claim": {"owner": "a", "token": "t", "epoch": 0}},
        {"claim": {"owner": "", "token": "t"}},
        {"more": 1},
    ],
)
def test_a_question_that_is_none_is_refused(wrong):
    right = {"key": KEY, "body": BODY, "claim": {"owner": "a", "token": "t"}}
    assert ClaimKeyParams.model_validate(right).claim.epoch == 1
    with pytest.raises(ValidationError):
        ClaimKeyParams.model_validate({**right, **wrong})


def test_nobody_is_kept_waiting_for_long():
    with pytest.raises(ValidationError):
        AwaitAnswerParams.model_validate({"key": KEY, "body": BODY, "wait_ms": 60_000})
