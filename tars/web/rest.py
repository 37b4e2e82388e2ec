"""The REST facade: GET /health /status /models /config /metrics, POST /inference /embed /rerank.

Law of this file: JSON-RPC's messages over plain HTTP, for curl and for scripts; nothing here that JSON-RPC cannot do. Errors are
JSON-RPC's error objects (`{"error": {code, message, data}}`) under the error's own HTTP status.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator

from aiohttp import hdrs, web

from tars.errors import InvalidParams, TarsError
from tars.messages.base import CallContext
from tars.messages.inference import (
    ChatParams,
    ChatResult,
    CompleteParams,
    CompleteResult,
    Delta,
    EmbedParams,
    Progress,
    RerankParams,
)
from tars.rpc.admission import Admission
from tars.rpc.options import RpcOptions
from tars.serving.service import NodeService
from tars.web import metrics
from tars.web.exchange import Exchange, Face, Json, closing, event, json_response, no_result, result_of, validated

LIVE: dict[str, str] = {hdrs.CACHE_CONTROL: "no-store"}
"""What says how the node is now must never come out of a cache."""


def rest_face(service: NodeService, options: RpcOptions, admission: Admission) -> Face:
    """The face that answers in JSON-RPC's shapes, without its envelope."""
    return Face("rest", service, options, admission, error_body)


def error_body(error: TarsError, node: str, trace_id: str) -> Json:
    """`{"error": {code, message, data}}`."""
    return {"error": error.to_json(node=node, trace_id=trace_id)}


def add_rest_routes(app: web.Application, service: NodeService, options: RpcOptions, admission: Admission) -> None:
    """Serve the facade."""
    face = rest_face(service, options, admission)
    rest = RestFacade(service)
    app.add_routes(
        [
            web.get("/health", face.look(rest.health)),
            web.get("/status", face.look(rest.status)),
            web.get("/models", face.look(rest.models)),
            web.get("/config", face.look(rest.config)),
            web.get("/metrics", face.look(rest.metrics)),
            web.post("/inference", face.call("inference.complete", rest.inference)),
            web.post("/embed", face.call("inference.embed", rest.embed)),
            web.post("/rerank", face.call("inference.rerank", rest.rerank)),
        ]
    )


class RestFacade:
    """The handlers."""

    def __init__(self, service: NodeService):
        self._service = service

    async def health(self, exchange: Exchange) -> web.Response:
        """GET /health: 200 where this node takes calls, 503 where not (draining, nothing loaded yet). Cheap, and needs no key.

        While one model loads or its worker restarts, the others answer: 200, with `loading` as the status, so that no balancer
        takes the whole node out for it.
        """
        state = self._service.ping().state
        takes_calls = state == "ready" or (
            state == "loading" and any(model.replicas_ready for model in self._service.models().models)
        )
        status = "ok" if state == "ready" else state
        return json_response({"status": status}, status=200 if takes_calls else 503, headers=LIVE)

    async def status(self, exchange: Exchange) -> web.Response:
        """GET /status: `node.describe`."""
        return json_response(await self._service.describe(), headers=LIVE)

    async def models(self, exchange: Exchange) -> web.Response:
        """GET /models: `models.list`."""
        return json_response(self._service.models(), headers=LIVE)

    async def config(self, exchange: Exchange) -> web.Response:
        """GET /config: the configuration in force, without its secrets."""
        return json_response(self._service.config(), headers=LIVE)

    async def metrics(self, exchange: Exchange) -> web.Response:
        """GET /metrics, for Prometheus."""
        text = metrics.render(await self._service.describe(), self._service.peers())
        return web.Response(body=text.encode(), headers={**LIVE, hdrs.CONTENT_TYPE: metrics.CONTENT_TYPE})

    async def inference(self, exchange: Exchange) -> web.StreamResponse:
        """POST /inference: `{prompt}` or `{messages}`, with the params of `inference.complete` and `inference.chat`.

        `stream: true` answers with server-sent events: `event: progress` while the model is loaded, the deltas, then one `event: result`,
        or one `event: error`.
        """
        body = await exchange.json()
        streams = body.pop("stream", False)
        if not isinstance(streams, bool):
            raise InvalidParams("stream must be true or false; nothing was run.")
        if ("prompt" in body) == ("messages" in body):
            raise InvalidParams(
                "the body needs either prompt (a text) or messages (a chat), not both; nothing was run."
            )
        params = validated(ChatParams, body) if "messages" in body else validated(CompleteParams, body)
        exchange.method = "inference.chat" if isinstance(params, ChatParams) else "inference.complete"

        def start(call: CallContext) -> AsyncIterator[Delta | Progress | ChatResult | CompleteResult]:
            if isinstance(params, ChatParams):
                return self._service.chat(params, call)
            return self._service.complete(params, call)

        if not streams:
            return json_response(await exchange.whole(lambda call: result_of(start(call))))

        async def frames(call: CallContext) -> AsyncGenerator[bytes, None]:
            async with closing(start(call)) as items:
                async for item in items:
                    if isinstance(item, Progress):
                        yield event(item, "progress")
                    elif isinstance(item, Delta):
                        yield event(item)
                    else:
                        yield event(item, "result")
                        return
            raise no_result()

        return await exchange.stream(
            frames, lambda error: event(exchange.face.error_json(error, exchange.trace_id), "error")
        )

    async def embed(self, exchange: Exchange) -> web.Response:
        """POST /embed: `inference.embed`."""
        params = validated(EmbedParams, await exchange.json())
        return json_response(await exchange.whole(lambda call: self._service.embed(params, call)))

    async def rerank(self, exchange: Exchange) -> web.Response:
        """POST /rerank: `inference.rerank`."""
        params = validated(RerankParams, await exchange.json())
        return json_response(await exchange.whole(lambda call: self._service.rerank(params, call)))
