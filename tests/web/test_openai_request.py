"""What any request of the OpenAI API lets through, drops or refuses."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from tars.errors import InvalidParams
from tars.web.openai_request import OpenAIRequest, refuse_tokens


class Small(OpenAIRequest):
    ignored = frozenset({"user"})

    text: str = ""
    suffix_allowed: bool = False


class Filling(OpenAIRequest):
    suffix: str | None = None


def test_what_is_known_to_mean_nothing_is_dropped_and_what_is_unknown_is_refused():
    assert Small.model_validate({"text": "a", "user": object()}) == Small(text="a")
    with pytest.raises(ValidationError, match="Extra inputs"):
        Small.model_validate({"text": "a", "metadata": {}})


@pytest.mark.parametrize("value", [None, ""])
def test_a_refused_field_passes_where_it_asks_for_nothing(value):
    assert Small.model_validate({"suffix": value}) == Small()


def test_a_refused_field_says_why_unless_the_request_has_it():
    with pytest.raises(InvalidParams, match="fill in the middle") as refused:
        Small.model_validate({"suffix": "end"})
    assert refused.value.details["errors"][0]["at"] == "suffix"
    assert Filling.model_validate({"suffix": "end"}).suffix == "end"


@pytest.mark.parametrize("given", [[1, 2], [[1], [2]]])
def test_token_ids_are_refused(given):
    with pytest.raises(InvalidParams, match="another vocabulary"):
        refuse_tokens("input", given)


@pytest.mark.parametrize("given", [[], "a", ["a"], None])
def test_everything_else_is_not_judged_here(given):
    refuse_tokens("input", given)
