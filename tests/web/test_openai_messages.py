"""What the OpenAI API's requests may say, and what TARS makes of it."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from tars.errors import InvalidParams
from tars.web.openai_messages import ChatRequest, CompletionRequest

HELLO = [{"role": "user", "content": "hello"}]


def chat(**fields):
    return ChatRequest.model_validate({"messages": HELLO, **fields}).to_params()


def test_the_bare_request_leaves_every_default_to_the_engine():
    assert chat().model_dump(exclude_unset=True) == {
        "messages": HELLO,
        "max_tokens": None,
        "logprobs": None,
        "json_schema": None,
    }


def test_sampling_is_carried_over():
    params = chat(
        model="m", temperature=0, top_p=0.5, seed=7, presence_penalty=1, frequency_penalty=-1, logit_bias={"42": -100},
        top_k=3, min_p=0.1, repeat_penalty=1.2, stop=["a", "b"], max_tokens=9,
    )  # fmt: skip
    assert (params.model, params.temperature, params.top_p, params.seed, params.max_tokens) == ("m", 0, 0.5, 7, 9)
    assert (params.presence_penalty, params.frequency_penalty, params.logit_bias) == (1, -1, {"42": -100})
    assert (params.top_k, params.min_p, params.repeat_penalty, params.stop) == (3, 0.1, 1.2, ["a", "b"])


def test_stop_may_be_one_text():
    assert chat(stop="END").stop == ["END"]


def test_the_newer_limit_wins_over_the_older():
    assert chat(max_tokens=9, max_completion_tokens=4).max_tokens == 4


@pytest.mark.parametrize(("seed", "given"), [(5, 5), (-1, 2**32 - 1), (2**40 + 3, 3)])
def test_any_seed_of_openais_range_becomes_one_of_the_engines(seed, given):
    assert chat(seed=seed).seed == given


def test_a_top_p_of_zero_means_the_likeliest_token_only():
    assert 0 < chat(top_p=0).top_p < 1e-5


@pytest.mark.parametrize(
    ("response_format", "schema"),
    [
        (None, None),
        ({"type": "text"}, None),
        ({"type": "json_object"}, {"type": "object"}),
        (
            {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": {"type": "array"}}},
            {"type": "array"},
        ),
    ],
)
def test_response_format_becomes_a_schema(response_format, schema):
    assert chat(response_format=response_format).json_schema == schema


def test_logprobs_become_a_number_of_alternatives():
    assert chat(logprobs=True).logprobs == 0
    assert chat(logprobs=True, top_logprobs=5).logprobs == 5
    assert chat(logprobs=False).logprobs is None
    with pytest.raises(ValidationError, match="logprobs: true"):
        chat(top_logprobs=5)


def test_text_parts_are_joined_and_developer_is_system():
    params = chat(
        messages=[
            {"role": "developer", "content": "be brief"},
            {
                "role": "user",
                "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}],
                "name": "x",
            },
        ]
    )
    assert [(message.role, message.content) for message in params.messages] == [
        ("system", "be brief"),
        ("user", "one\ntwo"),
    ]


def test_an_answer_copied_back_by_a_client_is_understood():
    answer = {
        "role": "assistant", "content": "hi", "refusal": None, "annotations": None, "audio": None, "function_call": None,
        "tool_calls": None,
    }  # fmt: skip
    assert chat(messages=[*HELLO, answer]).messages[1].content == "hi"


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]},
        {"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]},
        {"role": "assistant", "content": None, "function_call": {"name": "f"}},
        {"role": "assistant", "content": "", "audio": {"id": "1"}},
    ],
)
def test_what_is_not_text_is_refused_with_its_reason(message):
    with pytest.raises(InvalidParams) as refused:
        chat(messages=[message])
    assert refused.value.details["errors"][0]["at"] == "messages"


@pytest.mark.parametrize(
    "fields",
    [
        {"n": None}, {"tools": []}, {"tools": None}, {"tool_choice": "none"}, {"best_of": 1}, {"modalities": ["text"]}, {"audio": None},
        {"user": "u"}, {"metadata": {"a": "b"}}, {"store": True}, {"parallel_tool_calls": True}, {"reasoning_effort": "low"},
        {"service_tier": "auto"}, {"service_tier": "flex"}, {"stream_options": None}, {"logit_bias": {}}, {"prompt_cache_key": "k"},
    ],
)  # fmt: skip
def test_what_changes_nothing_is_let_through(fields):
    assert chat(**fields) == chat()


@pytest.mark.parametrize(
    "fields",
    [
        {"best_of": 2}, {"functions": [{}]}, {"function_call": "required"}, {"modalities": ["text", "audio"]},
        {"audio": {"voice": "x"}}, {"web_search_options": {}},
    ],
)  # fmt: skip
def test_what_would_change_the_meaning_is_refused(fields):
    name = next(iter(fields))
    with pytest.raises(InvalidParams) as refused:
        chat(**fields)
    assert refused.value.details["errors"][0]["at"] == name


TOOL = {"type": "function", "function": {"name": "f"}}


def test_a_model_cannot_be_held_to_one_tool_call():
    with pytest.raises(InvalidParams) as refused:
        chat(tools=[TOOL], parallel_tool_calls=False)
    assert refused.value.details["errors"][0]["at"] == "parallel_tool_calls"
    assert chat(parallel_tool_calls=False) == chat()
    assert chat(tools=[TOOL], parallel_tool_calls=True) == chat(tools=[TOOL])


def test_several_answers_may_be_asked_for():
    assert chat(n=3).n == 3
    completion = CompletionRequest.model_validate({"prompt": ["a", "b"], "n": 2})
    assert [params.n for params in completion.to_params()] == [2, 2]


@pytest.mark.parametrize(
    ("fields", "reasoning"),
    [
        ({}, None),
        ({"reasoning_effort": "none"}, False),
        ({"reasoning_effort": "high"}, None),
        ({"reasoning": True}, True),
    ],
)
def test_thinking_can_be_turned_off(fields, reasoning):
    assert chat(**fields).reasoning is reasoning


def test_only_a_tools_turn_answers_a_call():
    turns = chat(
        messages=[
            {"role": "user", "content": "a", "tool_call_id": "x"},
            {"role": "tool", "content": [{"type": "text", "text": "b"}], "tool_call_id": "x"},
        ]
    ).messages
    assert [turn.tool_call_id for turn in turns] == [None, "x"]


def test_a_completion_has_openais_own_default_length():
    request = CompletionRequest.model_validate({"prompt": ["a", "b"]})
    assert [(params.prompt, params.max_tokens) for params in request.to_params()] == [("a", 16), ("b", 16)]


@pytest.mark.parametrize("prompt", [[], ["a"] * 257])
def test_the_number_of_prompts_is_bounded(prompt):
    with pytest.raises(ValidationError, match="1 to 256"):
        CompletionRequest.model_validate({"prompt": prompt})


@pytest.mark.parametrize("prompt", [[1, 2], [[1], [2]]])
def test_token_ids_are_refused(prompt):
    with pytest.raises(InvalidParams, match="another vocabulary"):
        CompletionRequest.model_validate({"prompt": prompt})


def test_echo_with_log_probabilities_is_refused():
    with pytest.raises(InvalidParams, match="prompt"):
        CompletionRequest.model_validate({"prompt": "a", "echo": True, "logprobs": 1})


def test_stream_options_need_a_stream():
    with pytest.raises(ValidationError, match="stream: true"):
        chat(stream_options={"include_usage": True})
    assert ChatRequest.model_validate(
        {"messages": HELLO, "stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False}}
    ).wants_usage
