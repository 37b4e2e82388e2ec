"""Answers as bytes. That every kind of answer is the same at another node is tested with the nodes (`test_idempotency`)."""

import pytest

from tars.core.idempotency_keys import LARGEST_ANSWER
from tars.messages.inference import TokenizeResult
from tars.serving.kept_answers import answer_of, bytes_for_homes, bytes_of, read

ANSWER = TokenizeResult(model="m", tokens=[1, 2], count=2)


def test_an_answer_is_read_as_what_its_method_answers():
    said = bytes_of(ANSWER)
    assert answer_of("inference.tokenize", said) == ANSWER
    assert read(TokenizeResult, said) == ANSWER


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("inference.chat", bytes_of(ANSWER)),
        ("inference.of_a_later_version", bytes_of(ANSWER)),
        ("inference.tokenize", b"{"),
    ],
)
def test_what_another_version_kept_is_no_answer(method, said, caplog):
    assert answer_of(method, said) is None
    assert "another version" in caplog.text


def test_what_json_cannot_say_is_not_kept():
    assert bytes_of(ANSWER.model_copy(update={"model": "\ud800"})) is None
    assert bytes_for_homes(ANSWER.model_copy(update={"model": "\ud800"})) is None


def test_a_large_answer_has_bytes_but_none_for_the_homes():
    envelope = len(bytes_of(ANSWER.model_copy(update={"model": ""})))
    fits = ANSWER.model_copy(update={"model": "x" * (LARGEST_ANSWER - envelope)})
    assert len(bytes_for_homes(fits)) == LARGEST_ANSWER
    large = ANSWER.model_copy(update={"model": fits.model + "x"})
    assert len(bytes_of(large)) == LARGEST_ANSWER + 1
    assert bytes_for_homes(large) is None
