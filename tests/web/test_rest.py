"""The REST facade, over real HTTP."""

from __future__ import annotations

import asyncio
import json

import pytest

from tars.errors import StillLoading, WorkerCrashed
from tars.messages.inference import ChatResult, Delta, Progress, ToolCall

BOUND = 5.0


async def test_health_is_200_only_where_calls_are_taken(node, service):
    loaded = service.known_models
    for state, models, status, word in (
        ("ready", loaded, 200, "ok"),
        ("loading", loaded, 200, "loading"),  # one worker restarts, the other models answer
        ("loading", loaded[2:], 503, "loading"),
        ("draining", loaded, 503, "draining"),
    ):
        service.state, service.known_models = state, models
        async with node.http.get(f"{node.url}/health") as response:
            assert (response.status, await response.json()) == (status, {"status": word})
    assert service.described == 0, "cheap: no probe"


async def test_status_models_and_config_are_the_services_own_words(node, service):
    for path, expected in (
        ("status", service.description.model_dump()),
        ("models", service.models().model_dump()),
        ("config", {"security": {"api_key": "***"}}),
    ):
        async with node.http.get(f"{node.url}/{path}") as response:
            assert response.status == 200
            assert response.headers["Cache-Control"] == "no-store"
            assert await response.json() == expected
    assert service.started == []


async def test_metrics_are_served_as_prometheus_text(node):
    async with node.http.get(f"{node.url}/metrics") as response:
        assert response.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        assert "tars_calls_total 312\n" in await response.text()


async def test_a_prompt_is_completed_and_messages_are_chatted(node, service):
    async with node.http.post(f"{node.url}/inference", json={"prompt": "a", "temperature": 0}) as response:
        assert (await response.json())["text"] == "Hello, wörld"
    body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 5}
    async with node.http.post(f"{node.url}/inference", json=body) as response:
        assert (await response.json())["message"] == {"role": "assistant", "content": "Hello, wörld"}
    assert service.started == ["inference.complete", "inference.chat"]
    assert [method for method, _, _ in service.ended] == service.started
    assert (service.params[0].temperature, service.params[1].max_tokens) == (0, 5)
    assert {call.face for call in service.calls} == {"rest"}
    assert [call.method for call in service.calls] == service.started


def events_of(text: str) -> list[tuple[str, dict]]:
    found = []
    for block in text.strip().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n"))
        found.append((fields.get("event", "message"), json.loads(fields["data"])))
    return found


async def test_a_stream_is_deltas_and_then_the_result(node):
    async with node.http.post(f"{node.url}/inference", json={"prompt": "a", "stream": True}) as response:
        assert response.content_type == "text/event-stream"
        events = events_of(await response.text())
    assert [name for name, _ in events] == ["message"] * 3 + ["result"]
    assert "".join(body["text"] for _, body in events[:-1]) == events[-1][1]["text"] == "Hello, wörld"


async def test_a_stream_that_waits_for_a_load_says_how_far_it_is(node, service):
    service.loads = [Progress(stage="load", percent=10.0, node="pc2")]
    async with node.http.post(f"{node.url}/inference", json={"prompt": "a", "stream": True}) as response:
        events = events_of(await response.text())
    assert events[0] == ("progress", {"stage": "load", "percent": 10.0, "node": "pc2"})
    assert [name for name, _ in events] == ["progress"] + ["message"] * 3 + ["result"]
    async with node.http.post(f"{node.url}/inference", json={"prompt": "a"}) as response:
        assert (await response.json())["text"] == "Hello, wörld"


async def test_a_stream_that_breaks_ends_with_an_error_event(node, service):
    service.late_error = WorkerCrashed("the worker died", retry_after_ms=100)
    async with node.http.post(f"{node.url}/inference", json={"prompt": "a", "stream": True}) as response:
        name, body = events_of(await response.text())[-1]
    assert name == "error"
    assert body["error"]["data"]["kind"] == "worker_crashed"
    assert body["error"]["data"]["retry_after_ms"] == 100


async def test_an_error_is_jsonrpcs_object_under_its_http_status(node, service):
    service.error = StillLoading("loading", retry_after_ms=2500, details={"stage": "read", "percent": 40})
    async with node.http.post(f"{node.url}/inference", json={"prompt": "a", "stream": True}) as response:
        assert response.status == 503
        assert response.headers["Retry-After"] == "3"
        error = (await response.json())["error"]
    assert error["code"] == 1003
    assert error["data"]["stage"] == "read"
    assert error["data"]["node"] == "node-1"
    assert error["data"]["trace_id"] == service.ended[0][2] == service.calls[0].trace_id


@pytest.mark.parametrize(
    ("path", "body", "place"),
    [
        ("inference", {}, None),
        ("inference", {"prompt": "a", "messages": []}, None),
        ("inference", {"prompt": "a", "stream": "yes"}, None),
        ("inference", {"prompt": 5}, "prompt"),
        ("inference", {"prompt": "a", "grammer": "x"}, "grammer"),
        ("inference", {"messages": []}, "messages"),
        ("embed", {"input": []}, ""),
        ("embed", {"input": "a", "encoding_format": "hex"}, "encoding_format"),
        ("rerank", {"query": "q", "documents": []}, "documents"),
        ("rerank", {"query": "q", "documents": ["a"], "top_k": 1}, "top_k"),
    ],
)
async def test_a_bad_body_is_refused_with_its_place(node, service, path, body, place):
    async with node.http.post(f"{node.url}/{path}", json=body) as response:
        assert response.status == 400
        data = (await response.json())["error"]["data"]
    assert data["kind"] == "invalid_params"
    if place is not None:
        assert data["errors"][0]["at"] == place
    assert service.params == []


async def test_embed_answers_with_the_vectors(node):
    async with node.http.post(f"{node.url}/embed", json={"input": ["a", "b"]}) as response:
        assert (await response.json())["embeddings"] == [[0.6, 0.8, 0.0], [0.6, 0.8, 1.0]]


async def test_several_answers_reasoning_and_tool_calls_stand_in_the_deltas_and_in_the_result(node, service):
    service.reasoning = "hm"
    service.tool_call = ToolCall(id="1", name="f", arguments="{}")
    body = {"messages": [{"role": "user", "content": "a"}], "n": 2}
    async with node.http.post(f"{node.url}/inference", json=body) as response:
        whole = ChatResult.model_validate(await response.json())
    assert (whole.message.reasoning, whole.message.tool_calls) == ("hm", [service.tool_call])
    assert [choice.index for choice in whole.further] == [1]
    async with node.http.post(f"{node.url}/inference", json={**body, "stream": True}) as response:
        events = events_of(await response.text())
    deltas = [Delta.model_validate(body) for name, body in events if name == "message"]
    for index in (0, 1):
        mine = [delta for delta in deltas if delta.index == index]
        assert "".join(delta.text for delta in mine) == "Hello, wörld"
        assert "".join(delta.reasoning for delta in mine) == "hm"
        assert "".join(piece.arguments for delta in mine for piece in delta.tool_calls) == "{}"
    assert ChatResult.model_validate(events[-1][1]) == whole


async def test_rerank_answers_with_the_scores(node, service):
    body = {"query": "q", "documents": ["a", "b"], "return_documents": True, "top_n": 1}
    async with node.http.post(f"{node.url}/rerank", json=body) as response:
        assert (await response.json())["results"] == [{"index": 1, "score": 1.0, "document": "b"}]
    assert service.started == ["inference.rerank"]


async def test_leaving_a_stream_cancels_the_work(node, service):
    service.gate = asyncio.Event()
    response = await node.http.post(f"{node.url}/inference", json={"prompt": "a", "stream": True})
    async with asyncio.timeout(BOUND):
        await service.waiting.wait()
        response.close()
        await service.closed.wait()
        await service.all_ended.wait()
    assert service.ended[0][1].kind == "cancelled"


async def test_a_caller_that_names_its_key_is_known_by_its_name(serve, service, keyed_options):
    node = await serve(keyed_options)
    async with node.http.post(f"{node.url}/embed", json={"input": "a"}) as response:
        assert response.status == 401
        assert response.headers["WWW-Authenticate"] == "Bearer"
        assert (await response.json())["error"]["data"]["kind"] == "unauthorized"
    headers = {"Authorization": "Bearer sesame"}
    async with node.http.post(f"{node.url}/embed", json={"input": "a"}, headers=headers) as response:
        assert response.status == 200
    assert service.calls[0].caller == "laptop"


async def test_every_route_is_guarded(node):
    """A route that a later change adds without access checks shows here: each is asked as a page of another site would."""
    for path in (
        "/",
        "/static/app.js",
        "/events",
        "/health",
        "/status",
        "/models",
        "/config",
        "/metrics",
        "/v1/models",
    ):
        async with node.http.get(f"{node.url}{path}", headers={"Origin": "https://evil.example"}) as response:
            assert response.status == 403, path
        async with node.http.get(f"{node.url}{path}", headers={"Host": "evil.example"}) as response:
            assert response.status == 403, path
