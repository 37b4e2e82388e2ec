"""The OpenAI API, through the official `openai` client against a real server on loopback."""

from __future__ import annotations

import asyncio
import json
from time import monotonic

import aiohttp
import openai
import pytest

from tars.errors import Draining, Overloaded, ReplicaFailed, StillLoading, WorkerCrashed
from tars.messages.inference import ChatMessage, Progress, ToolCall
from tars.rpc.options import EnvelopeLimits, RpcOptions

HELLO = [{"role": "user", "content": "hello"}]
BOUND = 5.0
"""Seconds that anything here may take; it takes milliseconds."""


@pytest.fixture
async def client(node):
    async with openai.AsyncOpenAI(base_url=f"{node.url}/v1", api_key="none", max_retries=0, timeout=BOUND) as client:
        yield client


async def test_a_chat_answer_is_what_the_client_expects(client, service):
    answer = await client.chat.completions.create(model="help-desk", messages=HELLO)
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.model == "help-desk"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == "Hello, wörld"
    assert answer.choices[0].finish_reason == "stop"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (7, 3, 10)
    assert answer._request_id == service.ended[0][2]
    assert service.started == ["inference.chat"]
    assert service.ended[0][:2] == ("inference.chat", None)
    assert service.calls[0].face == "openai"


async def test_the_synchronous_client_works_too(node):
    def ask() -> str | None:
        with openai.OpenAI(base_url=f"{node.url}/v1", api_key="none", max_retries=0, timeout=BOUND) as client:
            stream = client.chat.completions.create(model="help-desk", messages=HELLO, stream=True)
            return "".join(chunk.choices[0].delta.content or "" for chunk in stream)

    assert await asyncio.to_thread(ask) == "Hello, wörld"


async def test_a_streamed_chat_opens_with_the_role_and_ends_with_reason_usage_and_done(client):
    stream = await client.chat.completions.create(
        model="help-desk", messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "Hello, wörld"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * 4 + ["stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.total_tokens == 10
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert {chunk.model for chunk in chunks} == {"help-desk"}


async def test_a_stream_ends_with_done_and_has_no_usage_unless_asked(node):
    body = {"messages": HELLO, "stream": True}
    async with node.http.post(f"{node.url}/v1/chat/completions", json=body) as response:
        assert response.status == 200
        assert response.content_type == "text/event-stream"
        assert response.headers["X-Accel-Buffering"] == "no"
        events = (await response.text()).split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert all("usage" not in chunk for chunk in chunks)
    assert {chunk["model"] for chunk in chunks} == {"help-desk"}, "the only chat model, where none was named"


async def test_log_probabilities_have_openais_shape_whole_and_streamed(client, service):
    service.logprobs = True
    ask = {"model": "help-desk", "messages": HELLO, "logprobs": True, "top_logprobs": 2}
    whole = await client.chat.completions.create(**ask)
    last = whole.choices[0].logprobs.content[-1]
    assert (last.token, last.logprob, bytes(last.bytes).decode()) == ("wörld", -0.25, "wörld")
    assert [(top.token, top.logprob) for top in last.top_logprobs] == [("wörld", -0.25), ("other", -1.5)]
    streamed = [
        entry.token
        async for chunk in await client.chat.completions.create(**ask, stream=True)
        for entry in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else ())
    ]
    assert streamed == ["Hello", ", ", "wörld"]
    assert service.params[0].logprobs == 2


async def test_several_prompts_give_numbered_choices_in_one_answer(client, service):
    answer = await client.completions.create(model="help-desk", prompt=["a", "b"], echo=True, max_tokens=5)
    assert [(choice.index, choice.text) for choice in answer.choices] == [(0, "aHello, wörld"), (1, "bHello, wörld")]
    assert answer.usage.total_tokens == 20
    assert [params.prompt for params in service.params] == ["a", "b"]
    assert service.started == ["inference.complete"]


async def test_a_streamed_completion_carries_text_log_probabilities_and_offsets(client, service):
    service.logprobs = True
    stream = await client.completions.create(
        model="help-desk", prompt=["a", "b"], logprobs=1, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    texts = {0: "", 1: ""}
    offsets: dict[int, list[int]] = {0: [], 1: []}
    for chunk in chunks[:-1]:
        choice = chunk.choices[0]
        texts[choice.index] += choice.text
        offsets[choice.index] += choice.logprobs.text_offset if choice.logprobs else []
    assert texts == {0: "Hello, wörld", 1: "Hello, wörld"}
    assert offsets == {0: [0, 5, 7], 1: [0, 5, 7]}
    assert chunks[-1].usage.total_tokens == 20


async def test_embeddings_come_back_as_numbers_in_both_encodings(client, service):
    default = await client.embeddings.create(model="all-MiniLM-L6-v2", input=["a", "b"])
    plain = await client.embeddings.create(model="all-MiniLM-L6-v2", input="a", encoding_format="float")
    assert [entry.index for entry in default.data] == [0, 1]
    assert default.data[1].embedding == pytest.approx([0.6, 0.8, 1.0], abs=1e-6)
    assert plain.data[0].embedding == [0.6, 0.8, 0.0]
    assert default.usage.prompt_tokens == 4
    assert [params.encoding_format for params in service.params] == ["base64", "float"]


async def test_dimensions_and_tarss_own_wishes_reach_the_model(client, service):
    cut = await client.embeddings.create(model="all-MiniLM-L6-v2", input="a", dimensions=2)
    assert cut.data[0].embedding == pytest.approx([0.6, 0.8], abs=1e-6)
    await client.embeddings.create(
        model="all-MiniLM-L6-v2", input="a", extra_body={"overflow": "mean", "input_type": "query"}
    )
    await client.embeddings.create(
        model="all-MiniLM-L6-v2", input="a", extra_body={"truncate": False, "prompt": "passage: "}
    )
    assert [params.dimensions for params in service.params] == [2, None, None]
    assert [params.overflow for params in service.params] == [None, "mean", None]
    assert [params.input_type for params in service.params] == [None, "query", None]
    assert [(params.truncate, params.prompt) for params in service.params[1:]] == [(True, None), (False, "passage: ")]


async def test_small_vectors_come_as_whole_numbers_which_the_client_does_not_read_as_float32(client, service):
    for output_type in ("int8", "binary"):
        small = await client.embeddings.create(
            model="all-MiniLM-L6-v2", input=["a", "b"], extra_body={"output_type": output_type}
        )
        assert [entry.embedding for entry in small.data] == [[0, 0, 0], [0, 0, 1]]
        assert service.params[-1].output_type == output_type


async def test_several_answers_are_numbered_choices_whole_and_streamed(client, service):
    whole = await client.chat.completions.create(model="help-desk", messages=HELLO, n=3, seed=5)
    assert [(choice.index, choice.message.content, choice.finish_reason) for choice in whole.choices] == [
        (0, "Hello, wörld", "stop"),
        (1, "Hello, wörld", "length"),
        (2, "Hello, wörld", "length"),
    ]
    assert (service.params[0].n, service.params[0].seed) == (3, 5)
    assert whole.usage.prompt_tokens_details.cached_tokens == 5
    texts, roles, reasons = {}, {}, {}
    async for chunk in await client.chat.completions.create(model="help-desk", messages=HELLO, n=2, stream=True):
        choice = chunk.choices[0]
        texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
        roles[choice.index] = roles.get(choice.index) or choice.delta.role
        reasons[choice.index] = choice.finish_reason
    assert texts == {0: "Hello, wörld", 1: "Hello, wörld"}
    assert roles == {0: "assistant", 1: "assistant"}
    assert reasons == {0: "stop", 1: "length"}


async def test_several_answers_to_several_prompts_are_numbered_prompt_by_prompt(client, service):
    ask = {"model": "help-desk", "prompt": ["a", "b"], "n": 2, "echo": True}
    whole = await client.completions.create(**ask)
    expected = {0: "aHello, wörld", 1: "aHello, wörld", 2: "bHello, wörld", 3: "bHello, wörld"}
    assert {choice.index: choice.text for choice in whole.choices} == expected
    streamed, reasons = {}, {}
    async for chunk in await client.completions.create(**ask, stream=True):
        choice = chunk.choices[0]
        streamed[choice.index] = streamed.get(choice.index, "") + choice.text
        reasons[choice.index] = choice.finish_reason
    assert streamed == expected
    assert reasons == {0: "stop", 1: "length", 2: "stop", 3: "length"}


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        "strict": True,
    },
}


async def test_a_tool_is_called_whole_and_streamed_and_its_answer_given_back(client, service):
    service.pieces, service.finish_reason = [], "tool_calls"
    service.tool_call = ToolCall(id="call_1", name="weather", arguments='{"city": "Rome"}')
    ask = {"model": "help-desk", "messages": HELLO, "tools": [WEATHER]}
    choice = {"type": "function", "function": {"name": "weather"}}
    whole = await client.chat.completions.create(**ask, tool_choice=choice)
    params = service.params[0]
    assert (params.tools[0].name, params.tool_choice) == ("weather", "weather")
    assert params.tools[0].parameters == WEATHER["function"]["parameters"]
    assert whole.choices[0].finish_reason == "tool_calls"
    said = whole.choices[0].message
    assert said.content is None
    assert [(call.id, call.function.name, call.function.arguments) for call in said.tool_calls] == [
        ("call_1", "weather", '{"city": "Rome"}')
    ]
    pieces = [
        chunk.choices[0].delta.tool_calls[0]
        async for chunk in await client.chat.completions.create(**ask, stream=True)
        if chunk.choices[0].delta.tool_calls
    ]
    assert [(piece.index, piece.id, piece.type) for piece in pieces] == [(0, "call_1", "function"), (0, None, None)]
    assert pieces[0].function.name == "weather"
    assert "".join(piece.function.arguments for piece in pieces) == '{"city": "Rome"}'
    answered = [*HELLO, said, {"role": "tool", "tool_call_id": "call_1", "content": "sunny"}]
    await client.chat.completions.create(model="help-desk", messages=answered, tools=[WEATHER])
    turns = service.params[-1].messages[1:]
    assert turns == [
        ChatMessage(role="assistant", content="", tool_calls=[service.tool_call]),
        ChatMessage(role="tool", content="sunny", tool_call_id="call_1"),
    ]


async def test_what_a_model_thinks_stands_apart_from_what_it_says(client, service):
    service.reasoning = "hm"
    whole = await client.chat.completions.create(model="help-desk", messages=HELLO)
    assert (whole.choices[0].message.reasoning_content, whole.choices[0].message.content) == ("hm", "Hello, wörld")
    thought, said = "", ""
    async for chunk in await client.chat.completions.create(model="help-desk", messages=HELLO, stream=True):
        thought += getattr(chunk.choices[0].delta, "reasoning_content", None) or ""
        said += chunk.choices[0].delta.content or ""
    assert (thought, said) == ("hm", "Hello, wörld")
    await client.chat.completions.create(
        model="help-desk", messages=[*HELLO, whole.choices[0].message, *HELLO], reasoning_effort="none"
    )
    assert service.params[-1].reasoning is False
    assert service.params[-1].messages[1].reasoning == "hm"


async def test_documents_are_reranked_in_the_shape_that_cohere_and_jina_have(node, service):
    body = {"model": "reranker", "query": "q", "documents": ["a", {"text": "b"}, "c"], "top_n": 2}
    async with node.http.post(f"{node.url}/v1/rerank", json=body) as response:
        answer = await response.json()
    assert answer["results"] == [{"index": 2, "relevance_score": 1.0}, {"index": 1, "relevance_score": 2 / 3}]
    assert (answer["model"], answer["usage"]["total_tokens"]) == ("reranker", 4)
    async with node.http.post(f"{node.url}/v1/rerank", json={**body, "return_documents": True}) as response:
        results = (await response.json())["results"]
    assert [one["document"] for one in results] == [{"text": "c"}, {"text": "b"}]
    assert service.started == ["inference.rerank"] * 2
    assert service.params[0].documents == ["a", "b", "c"]


async def test_models_lists_what_is_deployed_and_finds_it_by_alias(client):
    assert [model.id async for model in client.models.list()] == ["help-desk", "all-MiniLM-L6-v2"]
    assert (await client.models.retrieve("demo")).id == "help-desk"
    with pytest.raises(openai.NotFoundError) as missing:
        await client.models.retrieve("mistral-7b")
    assert missing.value.code == "unknown_model"


async def test_an_unknown_model_is_a_404_also_when_a_stream_was_asked_for(client, service):
    for stream in (False, True):
        with pytest.raises(openai.NotFoundError) as missing:
            await client.chat.completions.create(model="nope", messages=HELLO, stream=stream)
        assert missing.value.code == "unknown_model"
        assert missing.value.param == "model"
        assert missing.value.type == "invalid_request_error"
    assert [error.kind for _, error, _ in service.ended] == ["unknown_model", "unknown_model"]


@pytest.mark.parametrize(
    ("error", "exception", "kind", "error_type", "again"),
    [
        (Overloaded("busy", retry_after_ms=1500), openai.RateLimitError, "overloaded", "rate_limit_error", "true"),
        (
            StillLoading("loading", retry_after_ms=900),
            openai.InternalServerError,
            "still_loading",
            "service_unavailable_error",
            "true",
        ),
        (
            ReplicaFailed("gave up"),
            openai.InternalServerError,
            "replica_failed",
            "service_unavailable_error",
            "false",
        ),
        (Draining("stopping"), openai.InternalServerError, "draining", "service_unavailable_error", "true"),
        (RuntimeError("/secret/path"), openai.InternalServerError, "internal", "server_error", "false"),
    ],
)
async def test_an_error_has_its_status_type_code_and_advice_on_trying_again(
    client, service, error, exception, kind, error_type, again
):
    service.error = error
    with pytest.raises(exception) as raised:
        await client.chat.completions.create(model="help-desk", messages=HELLO, stream=True)
    assert (raised.value.code, raised.value.type) == (kind, error_type)
    headers = raised.value.response.headers
    assert headers["x-should-retry"] == again
    if getattr(error, "retry_after_ms", None):
        assert headers["retry-after"] == str(-(-error.retry_after_ms // 1000))
        assert headers["retry-after-ms"] == str(error.retry_after_ms)
    assert "secret" not in raised.value.response.text
    assert service.ended[0][1].kind == kind


async def test_the_client_tries_again_by_itself_where_that_can_help(node, service):
    service.error = StillLoading("loading", retry_after_ms=1)

    def started(method: str) -> None:
        if len(service.calls) == 1:
            service.error = None

    service.call_started = started
    async with openai.AsyncOpenAI(base_url=f"{node.url}/v1", api_key="none", max_retries=1, timeout=BOUND) as client:
        answer = await client.chat.completions.create(model="help-desk", messages=HELLO)
    assert answer.choices[0].message.content == "Hello, wörld"
    assert len(service.calls) == 2


@pytest.mark.parametrize(
    ("path", "asked"), [("/v1/chat/completions", {"messages": HELLO}), ("/v1/completions", {"prompt": "Hello"})]
)
async def test_a_stream_that_waits_for_a_load_says_how_far_it_is_in_comments(node, client, service, path, asked):
    service.loads = [Progress(stage="load", percent=percent, node="pc2\n: x") for percent in (10.0, 60.0)]
    response = await node.http.post(node.url + path, json={"model": "help-desk", "stream": True, **asked})
    lines = (await response.text()).split("\n\n")
    assert lines[:2] == [f": the model is being loaded on pc2 : x: load, {percent} %" for percent in (10, 60)]
    assert lines[2].startswith("data: {")
    assert "data: [DONE]" in lines
    stream = await client.chat.completions.create(model="help-desk", messages=HELLO, stream=True)
    assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == "Hello, wörld"


async def test_an_error_after_the_stream_began_reaches_the_client_and_ends_it(client, service):
    service.late_error = WorkerCrashed("the worker died")
    stream = await client.chat.completions.create(model="help-desk", messages=HELLO, stream=True)
    pieces: list[str] = []

    async def read() -> None:
        async for chunk in stream:
            pieces.append(chunk.choices[0].delta.content or "")

    with pytest.raises(openai.APIError) as raised:
        await read()
    assert "".join(pieces) == "Hello, wörld"
    assert raised.value.code == "worker_crashed"
    assert service.ended[0][1] is service.late_error


async def test_closing_a_stream_cancels_the_work(client, service):
    service.gate = asyncio.Event()
    stream = await client.chat.completions.create(model="help-desk", messages=HELLO, stream=True)
    async with asyncio.timeout(BOUND):
        await service.waiting.wait()
        await stream.close()
        await service.closed.wait()
        await service.all_ended.wait()
    assert service.ended[0][1].kind == "cancelled"


async def test_leaving_before_a_whole_answer_cancels_the_work(node, service):
    service.gate = asyncio.Event()
    post = asyncio.create_task(node.http.post(f"{node.url}/v1/embeddings", json={"input": "a"}))
    async with asyncio.timeout(BOUND):
        await service.waiting.wait()
        post.cancel()
        await service.closed.wait()


async def test_the_clients_timeout_becomes_the_deadline_of_a_whole_answer(client, service):
    await client.chat.completions.create(model="help-desk", messages=HELLO, timeout=3)
    stream = await client.chat.completions.create(model="help-desk", messages=HELLO, timeout=3, stream=True)
    await stream.close()
    whole, streamed = (call.deadline.at for call in service.calls)
    assert whole - monotonic() < 3
    assert streamed - whole > 60, "for a stream it bounds the gap between two bytes, not the whole"


async def test_the_service_tier_says_how_urgent_a_call_is(client, service):
    for tier in ("flex", "priority", "auto"):
        await client.chat.completions.create(model="help-desk", messages=HELLO, service_tier=tier)
    await client.completions.create(model="help-desk", prompt="x", extra_body={"service_tier": "flex"})
    await client.embeddings.create(model="minilm", input="x", extra_headers={"X-Priority": "batch"})
    assert [call.priority for call in service.calls] == ["batch", "interactive", None, "batch", "batch"]


async def test_a_call_over_its_deadline_is_stopped_and_said_to_be(node, service):
    service.gate = asyncio.Event()
    headers = {"X-Request-Timeout-Ms": "40"}
    async with node.http.post(f"{node.url}/v1/embeddings", json={"input": "a"}, headers=headers) as response:
        assert response.status == 504
        assert (await response.json())["error"]["type"] == "timeout_error"
    assert service.closed.is_set()


async def test_a_stream_over_its_deadline_says_so_and_ends(node, service):
    service.gate = asyncio.Event()
    body = {"messages": HELLO, "stream": True}
    headers = {"X-Request-Timeout-Ms": "40"}
    async with node.http.post(f"{node.url}/v1/chat/completions", json=body, headers=headers) as response:
        assert response.status == 200
        last = (await response.text()).strip().split("\n\n")[-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "deadline_exceeded"
    assert service.closed.is_set()


async def test_a_silent_stream_is_kept_alive_by_comments_that_the_client_skips(serve, service):
    node = await serve(RpcOptions(heartbeat_seconds=0.01))
    service.gate = asyncio.Event()
    async with node.http.post(f"{node.url}/v1/chat/completions", json={"messages": HELLO, "stream": True}) as response:
        async with asyncio.timeout(BOUND):
            while b": still here\n" not in (line := await response.content.readline()):
                assert line
        service.gate.set()
        assert (await response.text()).endswith("data: [DONE]\n\n")


async def test_a_node_at_its_limit_refuses_the_next_call(serve, service):
    node = await serve(RpcOptions(max_concurrent_calls=1))
    service.gate = asyncio.Event()
    first = asyncio.create_task(node.http.post(f"{node.url}/v1/embeddings", json={"input": "a"}))
    async with asyncio.timeout(BOUND):
        await service.waiting.wait()
    async with node.http.post(f"{node.url}/v1/embeddings", json={"input": "a"}) as second:
        assert second.status == 429
        assert second.headers["Retry-After"] == "1"
    service.gate.set()
    assert (await first).status == 200


@pytest.mark.parametrize(
    ("path", "body", "param", "words"),
    [
        ("chat/completions", {"messages": HELLO, "n": 17}, "n", "16"),
        ("chat/completions", {"messages": HELLO, "tools": [{"type": "custom"}]}, "tools", "functions only"),
        ("chat/completions", {"messages": HELLO, "tools": [{"type": "function"}]}, "tools[0].function", "required"),
        ("chat/completions", {"messages": HELLO, "tool_choice": "required"}, "tool_choice", "there are no tools"),
        ("chat/completions", {"messages": HELLO, "tool_choice": {"a": 1}}, "tool_choice", 'is "none"'),
        ("chat/completions", {"messages": [{"role": "user"}]}, "messages[0]", "content is required"),
        ("chat/completions", {"messages": HELLO, "temprature": 1}, "temprature", "did you mean 'temperature'"),
        ("chat/completions", {"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role", "system"),
        ("completions", {"prompt": [1, 2, 3]}, "prompt", "must be text"),
        ("completions", {"prompt": "a", "suffix": "b"}, "suffix", "middle"),
        ("embeddings", {"input": [[1, 2]]}, "input", "must be text"),
        ("embeddings", {}, "input", "required"),
        ("embeddings", {"input": "a", "dimensions": 0}, "dimensions", "1"),
        ("rerank", {"query": "q"}, "documents", "required"),
        ("rerank", {"query": "q", "documents": []}, "documents", "1"),
        ("rerank", {"query": "q", "documents": [{"title": "a"}]}, "documents", "no text"),
        ("rerank", {"query": "q", "documents": [5]}, "documents[0]", "string"),
        ("rerank", {"query": "q", "documents": ["a"], "top_n": 0}, "top_n", "1"),
    ],
)
async def test_a_bad_request_names_its_parameter(node, service, path, body, param, words):
    async with node.http.post(f"{node.url}/v1/{path}", json=body) as response:
        assert response.status == 400
        error = (await response.json())["error"]
    assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", "invalid_params", param)
    assert words in error["message"]
    assert service.params == []
    assert service.ended[0][1].kind == "invalid_params"


@pytest.mark.parametrize(
    ("body", "status"), [(b"{", 400), (b"[]", 400), (b"{" + b" " * 2000 + b"}", 413), (b"\xff", 400)]
)
async def test_a_body_that_is_no_object_or_too_large_is_refused(serve, body, status):
    node = await serve(RpcOptions(envelope=EnvelopeLimits(max_body_bytes=1000)))
    headers = {"Content-Type": "application/json"}
    async with node.http.post(f"{node.url}/v1/embeddings", data=body, headers=headers) as response:
        assert response.status == status
        assert (await response.json())["error"]["type"] == "invalid_request_error"


async def test_an_address_that_is_not_served_says_what_is_in_openais_shape(client):
    with pytest.raises(openai.NotFoundError) as missing:
        await client.responses.create(model="help-desk", input="hello")
    assert missing.value.code == "method_not_found"
    assert "/v1/chat/completions" in missing.value.message


async def test_the_key_is_asked_for_in_openais_shape(serve, keyed_options):
    node = await serve(keyed_options)
    for key, allowed in (("sesame", True), ("wrong", False)):
        async with openai.AsyncOpenAI(base_url=f"{node.url}/v1", api_key=key, max_retries=0) as client:
            if allowed:
                assert (await client.models.list()).data
            else:
                with pytest.raises(openai.AuthenticationError) as refused:
                    await client.models.list()
                assert refused.value.code == "unauthorized"


async def test_a_page_of_another_site_and_another_host_name_are_refused(node):
    for headers in ({"Origin": "https://evil.example"}, {"Host": "evil.example"}):
        async with node.http.get(f"{node.url}/v1/models", headers=headers) as response:
            assert response.status == 403
            assert (await response.json())["error"]["type"] == "permission_error"
    data = aiohttp.FormData({"input": "a"})
    async with node.http.post(f"{node.url}/v1/embeddings", data=data) as response:
        assert response.status == 415


async def test_the_callers_trace_is_kept(node, service):
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    headers = {"traceparent": f"00-{trace}-00f067aa0ba902b7-01"}
    async with node.http.post(f"{node.url}/v1/embeddings", json={"input": "a"}, headers=headers) as response:
        assert response.headers["X-Request-Id"] == trace
    assert service.calls[0].trace_id == trace


async def test_the_clients_idempotency_key_is_the_calls_and_its_request_id_the_calls_id(client, service):
    answer = await client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": "hi"}], extra_headers={"Idempotency-Key": "k"}
    )
    (call,) = service.calls
    assert (call.idempotency_key, call.streamed) == ("k", False)
    assert answer._request_id == call.trace_id
    stream = await client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": "hi"}],
        stream=True,
        extra_headers={"Idempotency-Key": "k"},
    )
    async for _ in stream:
        pass
    assert (service.calls[1].idempotency_key, service.calls[1].streamed) == ("k", True)
    assert stream.response.headers["X-Request-Id"] == service.calls[1].trace_id


async def test_each_prompt_of_a_call_has_an_idempotency_key_of_its_own(node, service):
    headers = {"Idempotency-Key": "k"}
    async with node.http.post(f"{node.url}/v1/completions", json={"prompt": ["a", "b"]}, headers=headers) as response:
        assert response.status == 200
    assert [call.idempotency_key for call in service.calls] == ["k#0", "k#1"]


async def test_a_piece_that_json_cannot_say_ends_the_stream_with_an_error_and_stops_the_work(node, service):
    service.unsayable = True
    async with node.http.post(f"{node.url}/v1/chat/completions", json={"messages": HELLO, "stream": True}) as response:
        last = (await response.text()).strip().split("\n\n")[-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "internal"
    assert service.closed.is_set()
