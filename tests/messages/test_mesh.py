"""The envelope of envelopes: what `mesh.gossip` takes and gives."""

import pytest
from pydantic import ValidationError

from tars.messages.mesh import MOST_ANSWERS, GossipParams, GossipResult


def test_an_envelope_is_an_object_and_nothing_else_comes_along():
    assert GossipParams.model_validate({"envelope": {"sender": "a"}}).envelope == {"sender": "a"}
    for wrong in ({"envelope": []}, {"envelope": "{}"}, {}, {"envelope": {}, "more": 1}):
        with pytest.raises(ValidationError):
            GossipParams.model_validate(wrong)


def test_answers_are_bounded():
    assert len(GossipResult.model_validate({"envelopes": [{}] * MOST_ANSWERS}).envelopes) == MOST_ANSWERS
    with pytest.raises(ValidationError):
        GossipResult.model_validate({"envelopes": [{}] * (MOST_ANSWERS + 1)})
