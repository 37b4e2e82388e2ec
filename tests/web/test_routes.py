"""All faces on one application: nothing unguarded, nothing twice, refusals in the shape of the face that was asked."""

from __future__ import annotations

import asyncio
import json

import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request

from tars.errors import Forbidden
from tars.rpc.options import RpcOptions
from tars.web.routes import PUBLIC_PATHS, add_web_routes, render_refusal

SECRET = ("/events", "/status", "/models", "/config", "/metrics", "/inference", "/embed", "/v1/models")


def test_only_the_empty_page_and_health_need_no_key():
    assert {path for path in PUBLIC_PATHS if not path.startswith("/static/")} == {"/", "/health"}


async def test_every_path_without_a_key_is_a_route(service):
    app = web.Application()
    add_web_routes(app, service, RpcOptions())
    served = {resource.canonical for resource in app.router.resources()}
    assert served >= PUBLIC_PATHS
    assert set(SECRET) <= served


@pytest.mark.parametrize("path", SECRET)
async def test_what_tells_of_the_node_is_refused_without_the_key(serve, keyed_options, path):
    node = await serve(keyed_options)
    method = node.http.post if path in ("/inference", "/embed") else node.http.get
    async with method(node.url + path, **({"json": {}} if method == node.http.post else {})) as response:
        assert response.status == 401


@pytest.mark.parametrize(
    ("path", "keys"),
    [
        ("/v1/models", {"message", "type", "param", "code", "trace_id"}),
        ("/status", {"code", "message", "data"}),
    ],
)
def test_a_refusal_has_the_shape_of_its_face(path, keys):
    response = render_refusal(make_mocked_request("GET", path), Forbidden("no"), node="node-1")
    assert response.status == 403
    assert set(json.loads(response.body)["error"]) == keys


async def test_the_faces_share_one_bound_on_calls(serve, service):
    node = await serve(RpcOptions(max_concurrent_calls=1))
    service.gate = asyncio.Event()
    first = asyncio.create_task(node.http.post(f"{node.url}/v1/embeddings", json={"input": "a"}))
    async with asyncio.timeout(5):
        await service.waiting.wait()
    async with node.http.post(f"{node.url}/embed", json={"input": "a"}) as second:
        assert second.status == 429
    service.gate.set()
    assert (await first).status == 200


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/nope"), ("PUT", "/health"), ("DELETE", "/"), ("GET", "/static/../x")]
)
async def test_what_no_face_has_is_a_clear_error_too(serve, method, path):
    node = await serve()
    async with node.http.request(method, node.url + path, json={}) as response:
        assert response.status == 404
        assert (await response.json())["error"]["data"]["kind"] == "method_not_found"
