"""Answers in OpenAI's shapes, read with the `openai` client's own types."""

from __future__ import annotations

import pytest
from openai.types import Completion, CreateEmbeddingResponse
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from tars import errors
from tars.messages.inference import (
    ChatMessage,
    ChatResult,
    CompleteResult,
    Delta,
    EmbedResult,
    RerankResult,
    Scored,
    ServedBy,
    Timings,
    TokenLogprob,
    ToolCallDelta,
    Usage,
)
from tars.web.openai_answers import (
    ChatChunks,
    CompletionChunks,
    chat_answer,
    completion_answer,
    embeddings_answer,
    error_body,
    rerank_answer,
)

COMMON = {
    "model": "m",
    "usage": Usage(prompt_tokens=2, completion_tokens=3, total_tokens=5),
    "timings": Timings(),
    "served_by": ServedBy(node="n", replica="r", device="d"),
}
LOGPROBS = [
    TokenLogprob(token="ab", token_id=1, logprob=-1.0, top=[("ab", -1.0)]),
    TokenLogprob(token="c", token_id=2, logprob=-2.0),
]


def strictly(model, body):
    """The client builds its types without checks; here they are checked."""
    return model.model_validate(body, strict=True)


@pytest.mark.parametrize(("reason", "said"), [("stop", "stop"), ("length", "length"), ("cancelled", "length")])
def test_a_chat_answer_fits_the_clients_type(reason, said):
    result = ChatResult(
        message=ChatMessage(role="assistant", content="abc"), finish_reason=reason, logprobs=LOGPROBS, **COMMON
    )
    answer = strictly(ChatCompletion, chat_answer("chatcmpl-1", 5, result))
    assert answer.choices[0].finish_reason == said
    assert [entry.token for entry in answer.choices[0].logprobs.content] == ["ab", "c"]
    assert answer.choices[0].logprobs.content[1].top_logprobs == []


def test_chat_chunks_fit_the_clients_type_and_say_usage_only_where_asked():
    result = ChatResult(message=ChatMessage(role="assistant", content="a"), finish_reason="stop", **COMMON)
    for usage in (False, True):
        chunks = ChatChunks("chatcmpl-1", 5, "m", usage=usage)
        said = [chunks.role(), chunks.text(Delta(text="a", logprobs=LOGPROBS)), *chunks.ends(result)]
        assert [strictly(ChatCompletionChunk, chunk).choices[0].finish_reason for chunk in said] == [None, None, "stop"]
        assert [chunk.get("usage", "absent") for chunk in said] == [None if usage else "absent"] * 3
        assert strictly(ChatCompletionChunk, chunks.usage(result.usage)).usage.total_tokens == 5


def test_the_seed_is_said_whole_and_streamed_and_not_where_prompts_have_their_own():
    chat = ChatResult(message=ChatMessage(role="assistant", content="a"), finish_reason="stop", seed=7, **COMMON)
    assert strictly(ChatCompletion, chat_answer("chatcmpl-1", 5, chat)).seed == 7
    assert [chunk["seed"] for chunk in ChatChunks("chatcmpl-1", 5, "m", usage=False).ends(chat)] == [7]
    one = CompleteResult(text="abc", finish_reason="stop", seed=8, **COMMON)
    other = one.model_copy(update={"seed": 9})
    assert strictly(Completion, completion_answer("cmpl-1", 5, [one], [""])).seed == 8
    assert "seed" not in completion_answer("cmpl-1", 5, [one, other], ["", ""])
    chunks = CompletionChunks("cmpl-1", 5, "m", usage=False)
    assert [chunk["seed"] for result in (one, other) for chunk in chunks.ends(0, result)] == [8, 9]
    assert "seed" not in chat_answer("chatcmpl-1", 5, chat.model_copy(update={"seed": None}))


def test_a_completion_adds_up_the_usage_of_its_prompts_and_counts_offsets_in_characters():
    result = CompleteResult(text="abc", finish_reason="stop", logprobs=LOGPROBS, **COMMON)
    answer = strictly(Completion, completion_answer("cmpl-1", 5, [result, result], ["", ">"]))
    assert [(choice.index, choice.text) for choice in answer.choices] == [(0, "abc"), (1, ">abc")]
    assert answer.usage.total_tokens == 10
    assert answer.choices[0].logprobs.text_offset == [0, 2]
    assert answer.choices[0].logprobs.top_logprobs == [{"ab": -1.0}, {}]


def test_completion_chunks_go_on_counting_offsets_for_each_choice():
    chunks = CompletionChunks("cmpl-1", 5, "m", usage=False)
    pieces = [chunks.text(index, Delta(text="abc", logprobs=LOGPROBS)) for index in (0, 1, 0)]
    # Not through the client's type: it forbids the null finish_reason that OpenAI itself sends in a stream.
    assert [piece["choices"][0]["logprobs"]["text_offset"] for piece in pieces] == [[0, 2], [0, 2], [3, 5]]
    assert {piece["choices"][0]["finish_reason"] for piece in pieces} == {None}


def test_half_a_character_has_no_bytes_and_the_likelier_of_two_halves_stays():
    half = TokenLogprob(token="\ufffd", token_id=3, logprob=-1.0, top=[("\ufffd", -1.0), ("\ufffd", -3.0)])
    result = ChatResult(
        message=ChatMessage(role="assistant", content=""), finish_reason="stop", logprobs=[half], **COMMON
    )
    entry = chat_answer("chatcmpl-1", 5, result)["choices"][0]["logprobs"]["content"][0]
    assert (entry["bytes"], entry["top_logprobs"][1]["bytes"]) == (None, None)
    whole = CompleteResult(text="", finish_reason="stop", logprobs=[half], **COMMON)
    answer = completion_answer("cmpl-1", 5, [whole], [""])
    assert answer["choices"][0]["logprobs"]["top_logprobs"] == [{"\ufffd": -1.0}]


def test_embeddings_fit_the_clients_type():
    result = EmbedResult(embeddings=[[0.6, 0.8]], dimensions=2, truncated=[0], **COMMON)
    answer = strictly(CreateEmbeddingResponse, embeddings_answer(result))
    assert answer.data[0].embedding == [0.6, 0.8]
    assert (answer.truncated, answer.split) == ([0], [])


def test_a_usage_says_what_was_not_computed_again():
    result = CompleteResult(
        text="a",
        finish_reason="stop",
        **COMMON | {"usage": Usage(prompt_tokens=2, completion_tokens=3, total_tokens=5, cached_tokens=2)},
    )
    answer = strictly(Completion, completion_answer("cmpl-1", 5, [result, result], ["", ""]))
    assert answer.usage.prompt_tokens_details.cached_tokens == 4


def test_a_piece_without_text_has_no_empty_one_unless_it_says_nothing_else():
    chunks = ChatChunks("chatcmpl-1", 5, "m", usage=False)
    pieces = [
        Delta(text="", index=1, reasoning="hm"),
        Delta(text="", tool_calls=[ToolCallDelta(index=0, id="1", name="f")]),
        Delta(text=""),
    ]
    said = [strictly(ChatCompletionChunk, chunks.text(piece)).choices[0] for piece in pieces]
    assert [choice.index for choice in said] == [1, 0, 0]
    assert [choice.delta.content for choice in said] == [None, None, ""]


def test_a_document_is_in_the_answer_only_where_it_was_asked_for():
    scored = [Scored(index=1, score=0.75, document="b"), Scored(index=0, score=0.5)]
    answer = rerank_answer("rerank-1", RerankResult(results=scored, truncated=[1], **COMMON))
    assert answer["results"] == [
        {"index": 1, "relevance_score": 0.75, "document": {"text": "b"}},
        {"index": 0, "relevance_score": 0.5},
    ]
    assert (answer["id"], answer["truncated"]) == ("rerank-1", [1])


def every_error() -> list[type[errors.TarsError]]:
    def below(cls: type[errors.TarsError]) -> list[type[errors.TarsError]]:
        return [cls, *(found for child in cls.__subclasses__() for found in below(child))]

    return below(errors.TarsError)


@pytest.mark.parametrize("cls", every_error(), ids=lambda cls: cls.__name__)
def test_every_error_has_a_type_that_fits_its_status(cls):
    body = error_body(cls("what happened"), "trace")["error"]
    assert body["code"] == cls.kind
    assert body["message"] == "what happened"
    by_status = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error", 504: "timeout_error"}
    expected = by_status.get(cls.http_status)
    if expected is None:
        expected = "invalid_request_error" if cls.http_status < 499 else None
    if expected is None:
        assert body["type"] in ("server_error", "service_unavailable_error")
    else:
        assert body["type"] == expected


def test_an_error_names_the_parameter_that_it_is_about():
    at = errors.InvalidParams(
        "x", details={"errors": [{"at": "messages[0].role", "problem": "p"}, {"at": "b", "problem": "q"}]}
    )
    assert error_body(at, "t")["error"]["param"] == "messages[0].role"
    assert error_body(errors.UnknownModel("x"), "t")["error"]["param"] == "model"
    assert error_body(errors.Overloaded("x"), "t")["error"]["param"] is None
