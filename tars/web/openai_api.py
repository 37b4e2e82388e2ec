"""The OpenAI API: /v1/models, /v1/chat/completions, /v1/completions, /v1/embeddings, and the field's /v1/rerank.

Law of this file: HTTP to service and back; the shapes of requests are `openai_messages.py`'s and `openai_retrieval.py`'s, those of
answers `openai_answers.py`'s.
A stream commits to 200 with its first byte, which waits for the model's first: everything that goes wrong before has its real status.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace

from aiohttp import web

from tars.core.types import ModelKind
from tars.errors import MethodNotFound, TarsError, UnknownModel
from tars.messages.base import CallContext
from tars.messages.inference import CompleteParams, CompleteResult, Delta, Progress, Usage
from tars.messages.node import ModelDescription
from tars.rpc.admission import Admission
from tars.rpc.options import RpcOptions
from tars.serving.service import NodeService
from tars.web.exchange import Exchange, Face, closing, event, json_response, no_result, result_of, translated, validated
from tars.web.openai_answers import (
    ChatChunks,
    CompletionChunks,
    chat_answer,
    completion_answer,
    embeddings_answer,
    error_body,
    model_body,
    progress_comment,
    rerank_answer,
)
from tars.web.openai_messages import ChatRequest, CompletionRequest
from tars.web.openai_retrieval import EmbeddingRequest, RerankRequest

DONE = b"data: [DONE]\n\n"

PATHS = ("/v1/models", "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/rerank")


def openai_face(service: NodeService, options: RpcOptions, admission: Admission) -> Face:
    """The face that answers in OpenAI's shapes."""
    return Face("openai", service, options, admission, lambda error, node, trace_id: error_body(error, trace_id))


def add_openai_routes(app: web.Application, service: NodeService, options: RpcOptions, admission: Admission) -> None:
    """Serve the API under /v1."""
    face = openai_face(service, options, admission)
    api = OpenAIApi(service)
    app.add_routes(
        [
            web.get("/v1/models", face.look(api.models)),
            web.get("/v1/models/{id:.+}", face.look(api.model)),
            web.post("/v1/chat/completions", face.call("inference.chat", api.chat)),
            web.post("/v1/completions", face.call("inference.complete", api.complete)),
            web.post("/v1/embeddings", face.call("inference.embed", api.embed)),
            web.post("/v1/rerank", face.call("inference.rerank", api.rerank)),
            web.route("*", "/v1/{rest:.*}", face.look(_nothing_here)),
        ]
    )


class OpenAIApi:
    """The handlers."""

    def __init__(self, service: NodeService):
        self._service = service
        # The API wants a time of creation for each model, and TARS keeps none: the time from which this node serves it.
        self._created = int(time.time())

    async def models(self, exchange: Exchange) -> web.Response:
        """GET /v1/models: what is deployed here; the catalogue's other models cannot be called."""
        return json_response(
            {"object": "list", "data": [model_body(model, self._created) for model in self._deployed()]}
        )

    async def model(self, exchange: Exchange) -> web.Response:
        """GET /v1/models/{id}, by name or alias."""
        asked = exchange.request.match_info["id"]
        for model in self._deployed():
            if asked == model.name or asked in model.aliases:
                return json_response(model_body(model, self._created))
        known = [model.name for model in self._deployed()]
        raise UnknownModel(
            f"This node serves no model of that name. It serves: {', '.join(known) or 'none'}.",
            details={"known": known},
        )

    async def chat(self, exchange: Exchange) -> web.StreamResponse:
        """POST /v1/chat/completions."""
        body = await exchange.json()
        request = validated(ChatRequest, body)
        exchange.priority = request.priority
        params = translated(request.to_params, body)
        answer_id, created = _answer_id("chatcmpl"), int(time.time())
        if not request.stream:
            result = await exchange.whole(lambda call: result_of(self._service.chat(params, call)))
            return json_response(chat_answer(answer_id, created, result))

        chunks = ChatChunks(answer_id, created, self._name(params.model, ModelKind.CHAT), usage=request.wants_usage)

        async def frames(call: CallContext) -> AsyncGenerator[bytes, None]:
            opening = b"".join(event(chunks.role(index)) for index in range(params.n))
            async with closing(self._service.chat(params, call)) as items:
                async for item in items:
                    if isinstance(item, Progress):
                        yield progress_comment(item)
                        continue
                    if isinstance(item, Delta):
                        yield opening + event(chunks.text(item))
                    else:
                        usage = event(chunks.usage(item.usage)) if request.wants_usage else b""
                        yield opening + b"".join(map(event, chunks.ends(item))) + usage + DONE
                        return
                    opening = b""
            raise no_result()

        return await exchange.stream(frames, _error_frame(exchange))

    async def complete(self, exchange: Exchange) -> web.StreamResponse:
        """POST /v1/completions. Prompts run one after the other: one call never takes more than one place in a replica's queue."""
        body = await exchange.json()
        request = validated(CompletionRequest, body)
        exchange.priority = request.priority
        runs: list[CompleteParams] = translated(request.to_params, body)
        echoed = [params.prompt if request.echo else "" for params in runs]
        answer_id, created = _answer_id("cmpl"), int(time.time())
        if not request.stream:

            async def run(call: CallContext) -> list[CompleteResult]:
                return [
                    await result_of(self._service.complete(params, _numbered(call, at, runs)))
                    for at, params in enumerate(runs)
                ]

            return json_response(completion_answer(answer_id, created, await exchange.whole(run), echoed))

        name = self._name(request.model, ModelKind.CHAT)
        chunks = CompletionChunks(answer_id, created, name, usage=request.wants_usage)

        async def frames(call: CallContext) -> AsyncGenerator[bytes, None]:
            usages: list[Usage] = []
            for at, params in enumerate(runs):
                first = at * params.n
                echoes = range(first, first + params.n) if request.echo else ()
                opening = b"".join(event(chunks.echo(index, params.prompt)) for index in echoes)
                async with closing(self._service.complete(params, _numbered(call, at, runs))) as items:
                    async for item in items:
                        if isinstance(item, Progress):
                            yield progress_comment(item)
                        elif isinstance(item, Delta):
                            yield opening + event(chunks.text(first + item.index, item))
                            opening = b""
                        else:
                            usages.append(item.usage)
                            yield opening + b"".join(map(event, chunks.ends(first, item)))
                            break
                    else:
                        raise no_result()
            yield (event(chunks.usage(usages)) if request.wants_usage else b"") + DONE

        return await exchange.stream(frames, _error_frame(exchange))

    async def embed(self, exchange: Exchange) -> web.StreamResponse:
        """POST /v1/embeddings."""
        body = await exchange.json()
        request = validated(EmbeddingRequest, body)
        params = translated(request.to_params, body)
        result = await exchange.whole(lambda call: self._service.embed(params, call))
        return json_response(embeddings_answer(result))

    async def rerank(self, exchange: Exchange) -> web.StreamResponse:
        """POST /v1/rerank."""
        body = await exchange.json()
        params = translated(validated(RerankRequest, body).to_params, body)
        result = await exchange.whole(lambda call: self._service.rerank(params, call))
        return json_response(rerank_answer(_answer_id("rerank"), result))

    def _deployed(self) -> list[ModelDescription]:
        return [model for model in self._service.models().models if model.deployed]

    def _name(self, asked: str | None, kind: ModelKind) -> str:
        """What a stream's chunks call the model before its result says so: what the caller asked for, or the only one of the kind."""
        if asked is not None:
            return asked
        return next((model.name for model in self._deployed() if model.model_kind == kind), "")


async def _nothing_here(exchange: Exchange) -> web.Response:
    raise MethodNotFound(
        f"This node does not serve {exchange.request.method} at this address. Of the OpenAI API it has {', '.join(PATHS)}."
    )


def _numbered(call: CallContext, index: int, runs: list[CompleteParams]) -> CallContext:
    """Each prompt is a call of its own for whoever keeps idempotent answers."""
    if call.idempotency_key is None or len(runs) == 1:
        return call
    return replace(call, idempotency_key=f"{call.idempotency_key}#{index}")


def _answer_id(prefix: str) -> str:
    return f"{prefix}-{secrets.token_hex(12)}"


def _error_frame(exchange: Exchange) -> Callable[[TarsError], bytes]:
    return lambda error: event(exchange.face.error_json(error, exchange.trace_id))
