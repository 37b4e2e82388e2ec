"""Messages of `inference.*` cross a pipe and HTTP as JSON, and come back as what they were."""

from __future__ import annotations

import orjson

from tars.messages.inference import Delta, TokenLogprob


def test_log_probabilities_survive_json_although_it_has_no_tuples():
    sent = Delta(
        text="a", token_ids=[7], logprobs=[TokenLogprob(token="a", token_id=7, logprob=-0.5, top=[("b", -1.5)])]
    )
    assert Delta.model_validate(orjson.loads(orjson.dumps(sent.model_dump()))) == sent
