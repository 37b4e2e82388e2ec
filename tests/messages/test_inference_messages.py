"""Messages of `inference.*` cross a pipe and HTTP as JSON, and come back as what they were."""

from __future__ import annotations

import orjson
import pytest
from pydantic import ValidationError

from tars.messages.base import MAX_NAME_LENGTH, Message
from tars.messages.inference import (
    ChatMessage,
    ChatParams,
    CompleteParams,
    Delta,
    EmbedParams,
    RerankParams,
    TokenizeParams,
    TokenLogprob,
    ToolCall,
    ToolCallDelta,
)
from tars.messages.node import DeployParams, ModelParams


def test_log_probabilities_survive_json_although_it_has_no_tuples():
    sent = Delta(
        text="a", token_ids=[7], logprobs=[TokenLogprob(token="a", token_id=7, logprob=-0.5, top=[("b", -1.5)])]
    )
    assert Delta.model_validate(orjson.loads(orjson.dumps(sent.model_dump()))) == sent


def test_a_piece_of_an_answer_says_only_what_is_set():
    assert Delta(text="a", token_ids=[7]).wire() == {"text": "a", "token_ids": [7]}
    whole = Delta(
        text="",
        logprobs=[],
        index=2,
        reasoning="hm",
        tool_calls=[ToolCallDelta(index=0, id="1", name="f", arguments="{}")],
        ended=True,
    )
    assert whole.wire() == whole.__dict__
    assert Delta.model_validate_json(orjson.dumps(whole.wire(), default=lambda one: one.wire())) == whole


def test_a_turn_says_only_what_is_set():
    assert ChatMessage(role="assistant", content="").wire() == {"role": "assistant", "content": ""}
    call = ToolCall(id="1", name="f", arguments="{}")
    said = ChatMessage(role="assistant", content="", reasoning="", tool_calls=[call]).wire()
    assert said == {"role": "assistant", "content": "", "reasoning": "", "tool_calls": [call]}


@pytest.mark.parametrize(
    "message",
    [
        ChatParams.model_construct(messages=[{"role": "user", "content": ""}]),
        CompleteParams.model_construct(prompt=""),
        EmbedParams.model_construct(input="a"),
        RerankParams.model_construct(query="", documents=["a"]),
        TokenizeParams.model_construct(text=""),
        ModelParams.model_construct(),
        DeployParams.model_construct(),
    ],
    ids=lambda message: type(message).__name__,
)
def test_a_name_that_errors_and_the_status_page_would_repeat_is_bounded(message: Message):
    said = message.model_dump(exclude_unset=True, warnings=False)
    type(message).model_validate({**said, "model": "m" * MAX_NAME_LENGTH})
    with pytest.raises(ValidationError, match="at most 255"):
        type(message).model_validate({**said, "model": "m" * (MAX_NAME_LENGTH + 1)})
