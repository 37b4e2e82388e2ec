"""The Python client for other services: `async with Client("http://127.0.0.1:8000") as tars: await tars.chat("Hello")`.

Law of this file: one typed method for each row of the method table (a test holds them together), and nothing that is not in a row.
It needs no engine. Every failure is a `tars.errors.TarsError`; a wrong parameter is refused here already, as `InvalidParams`,
before anything is sent.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Generic, Literal, TypedDict, TypeVar, Unpack, cast

from pydantic import ValidationError

from tars.errors import BadPeerAnswer, TarsError
from tars.messages.admission import (
    KeyNewResult,
    KeyRevokeResult,
    KeysResult,
    NodeRemoveResult,
    TokenNewResult,
    TokenRevokeResult,
    TokensResult,
)
from tars.messages.base import Message, Priority
from tars.messages.calls import ExplainCallResult
from tars.messages.files import PullResult, TransfersResult
from tars.messages.inference import (
    ChatMessage,
    ChatResult,
    CompleteResult,
    Delta,
    EmbedResult,
    Progress,
    RerankResult,
    TokenizeResult,
    Tool,
)
from tars.messages.mesh_state import SHOWN_NODES, MeshDescription
from tars.messages.node import (
    DeployResult,
    DrainResult,
    ExplainResult,
    ModelsResult,
    NodeDescription,
    PeersResult,
    PingResult,
    PlanResult,
    RemoveResult,
)
from tars.rpc.http_client import BatchCall, RpcConnection
from tars.rpc.method_table import METHODS, MethodSpec
from tars.rpc.validation import validated

__all__ = ["BatchCall", "Client", "GenerationOptions", "ResultStream"]

ResultT = TypeVar("ResultT", ChatResult, CompleteResult)


class CallOptions(TypedDict, total=False):
    """What goes with any call."""

    timeout: float
    """Seconds; sent along as `_meta.timeout_ms`, so that the node stops work nobody waits for."""
    idempotency_key: str
    traceparent: str
    priority: Priority
    """`batch` for work that nobody waits for: it lets interactive calls go first."""


class GenerationOptions(CallOptions, total=False):
    """What chat and completion share: `messages.inference.GenerationParams`, where defaults and bounds stand."""

    model: str
    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repeat_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int
    n: int
    stop: list[str]
    logprobs: int
    logit_bias: dict[str, float]
    json_schema: dict[str, Any]
    grammar: str


class ResultStream(Generic[ResultT]):
    """A streamed answer: iterate it for the deltas, then read `result`. Leaving it early (`aclose`, `async with`) cancels the work.

    `on_progress` may be set: while the call waits for its model to be loaded, it hears how far that is.
    """

    def __init__(self, spec: MethodSpec, events: AsyncIterator[tuple[str | None, Any]]) -> None:
        self.on_progress: Callable[[Progress], object] | None = None
        self._spec = spec
        self._events = cast("AsyncGenerator[tuple[str | None, Any], None]", events)
        self._result: ResultT | None = None

    def __aiter__(self) -> ResultStream[ResultT]:
        return self

    async def __anext__(self) -> Delta:
        async for notification, payload in self._events:
            if notification is None:
                self._result = cast(ResultT, _message(self._spec.result, payload))
                await self._events.aclose()
                break
            if notification == self._spec.delta_notification:
                return cast(Delta, _message(self._spec.delta, payload))
            if notification == self._spec.progress_notification and self.on_progress is not None:
                self.on_progress(cast(Progress, _message(self._spec.progress, payload)))
        raise StopAsyncIteration

    async def __aenter__(self) -> ResultStream[ResultT]:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connection of this answer; the node stops the work."""
        await self._events.aclose()

    @property
    def result(self) -> ResultT:
        """The whole answer; there once the iteration has ended."""
        if self._result is None:
            raise RuntimeError("the stream has not ended: iterate it to its end first")
        return self._result


class Client:
    """One node's methods. Make one and keep it: it holds the connections. `timeout` is each call's default budget in seconds."""

    def __init__(self, url: str = "http://127.0.0.1:8000", api_key: str | None = None, timeout: float = 300.0) -> None:
        self._connection = RpcConnection(url, api_key=api_key, timeout=timeout)

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._connection.close()

    # --- inference ------------------------------------------------------------------------------------------------------

    async def chat(
        self,
        messages: str | Sequence[ChatMessage | Mapping[str, Any]],
        *,
        tools: Sequence[Tool | Mapping[str, Any]] | None = None,
        tool_choice: str | None = None,
        reasoning: bool | None = None,
        **options: Unpack[GenerationOptions],
    ) -> ChatResult:
        """Answer a chat; a plain text is one user's message. What the model wants called stands in `message.tool_calls`."""
        params = _chat(messages, tools, tool_choice, reasoning)
        return cast(ChatResult, await self._typed("inference.chat", params, options))

    def chat_stream(
        self,
        messages: str | Sequence[ChatMessage | Mapping[str, Any]],
        *,
        tools: Sequence[Tool | Mapping[str, Any]] | None = None,
        tool_choice: str | None = None,
        reasoning: bool | None = None,
        **options: Unpack[GenerationOptions],
    ) -> ResultStream[ChatResult]:
        """The same, piece by piece. With `n` the pieces of all answers come as they are made: `delta.index` says whose each is."""
        return self._streamed("inference.chat", _chat(messages, tools, tool_choice, reasoning), options)

    async def complete(self, prompt: str, **options: Unpack[GenerationOptions]) -> CompleteResult:
        """Continue a text."""
        return cast(CompleteResult, await self._typed("inference.complete", {"prompt": prompt}, options))

    def complete_stream(self, prompt: str, **options: Unpack[GenerationOptions]) -> ResultStream[CompleteResult]:
        """The same, piece by piece."""
        return self._streamed("inference.complete", {"prompt": prompt}, options)

    async def embed(
        self,
        input: str | Sequence[str],  # the parameter's name on the wire, and in every embeddings API
        *,
        model: str | None = None,
        encoding_format: Literal["float", "base64"] = "float",
        output_type: Literal["float", "int8", "binary"] | None = None,
        truncate: bool = True,
        overflow: Literal["mean"] | None = None,
        dimensions: int | None = None,
        input_type: Literal["query", "passage"] | None = None,
        prompt: str | None = None,
        **options: Unpack[CallOptions],
    ) -> EmbedResult:
        """Unit-length float32 vectors of one text or many, in their order; the options are those of `messages.inference.EmbedParams`."""
        params = {
            "input": input if isinstance(input, str) else list(input),
            "model": model,
            "encoding_format": encoding_format,
            "output_type": output_type,
            "truncate": truncate,
            "overflow": overflow,
            "dimensions": dimensions,
            "input_type": input_type,
            "prompt": prompt,
        }
        return cast(EmbedResult, await self._typed("inference.embed", params, options))

    async def rerank(
        self,
        query: str,
        documents: Sequence[str],
        *,
        model: str | None = None,
        top_n: int | None = None,
        return_documents: bool = False,
        truncate: bool = True,
        **options: Unpack[CallOptions],
    ) -> RerankResult:
        """How relevant each document is to the query, best first."""
        params = {
            "query": query,
            "documents": list(documents),
            "model": model,
            "top_n": top_n,
            "return_documents": return_documents,
            "truncate": truncate,
        }
        return cast(RerankResult, await self._typed("inference.rerank", params, options))

    async def tokenize(
        self, text: str, *, model: str | None = None, add_special: bool = True, **options: Unpack[CallOptions]
    ) -> TokenizeResult:
        """Token ids of a text."""
        params = {"text": text, "model": model, "add_special": add_special}
        return cast(TokenizeResult, await self._typed("inference.tokenize", params, options))

    # --- the node, its models, its mesh -----------------------------------------------------------------------------------

    async def discover(self, **options: Unpack[CallOptions]) -> dict[str, Any]:
        """The node's OpenRPC document."""
        return cast("dict[str, Any]", await self._plain("rpc.discover", {}, options))

    async def ping(self, **options: Unpack[CallOptions]) -> PingResult:
        """Is it there, and ready?"""
        return cast(PingResult, await self._typed("node.ping", {}, options))

    async def describe(self, **options: Unpack[CallOptions]) -> NodeDescription:
        """Devices, replicas, measured speeds, counters."""
        return cast(NodeDescription, await self._typed("node.describe", {}, options))

    async def drain(self, **options: Unpack[CallOptions]) -> DrainResult:
        """Take no new inference calls."""
        return cast(DrainResult, await self._typed("node.drain", {}, options))

    async def resume(self, **options: Unpack[CallOptions]) -> DrainResult:
        """Undo `drain`."""
        return cast(DrainResult, await self._typed("node.resume", {}, options))

    async def explain_call(self, id: str, **options: Unpack[CallOptions]) -> ExplainCallResult:
        """What became of a call: its replicas, waits and end. `id`: `served_by.call` of its result, or the error's trace id."""
        return cast(ExplainCallResult, await self._typed("calls.explain", {"id": id}, options))

    async def peers(self, **options: Unpack[CallOptions]) -> PeersResult:
        """The nodes that it sees."""
        return cast(PeersResult, await self._typed("mesh.peers", {}, options))

    async def describe_mesh(
        self, *, node: str | None = None, most_nodes: int = SHOWN_NODES, **options: Unpack[CallOptions]
    ) -> MeshDescription:
        """Every node with its devices and replicas; `node` for one of them."""
        params = {"node": node, "most_nodes": most_nodes}
        return cast(MeshDescription, await self._typed("mesh.describe", params, options))

    async def plan(self, **options: Unpack[CallOptions]) -> PlanResult:
        """Which replica goes on which device and why."""
        return cast(PlanResult, await self._typed("mesh.plan", {}, options))

    async def explain(self, model: str, **options: Unpack[CallOptions]) -> ExplainResult:
        """Why there, why not elsewhere, what would make it fit."""
        return cast(ExplainResult, await self._typed("mesh.explain", {"model": model}, options))

    async def models(self, **options: Unpack[CallOptions]) -> ModelsResult:
        """Deployed models first, then the catalogue."""
        return cast(ModelsResult, await self._typed("models.list", {}, options))

    async def deploy(
        self,
        model: str,
        *,
        replicas: int = 1,
        context: int | None = None,
        slots: int | None = None,
        kv_tokens: int | None = None,
        kv_type: Literal["f16", "q8_0", "q4_0"] = "f16",
        gpu_layers: int | None = None,
        variant: str | None = None,
        device: str | None = None,
        **options: Unpack[CallOptions],
    ) -> DeployResult:
        """Want a model loaded; loading goes on after the answer."""
        params = {
            "model": model,
            "replicas": replicas,
            "context": context,
            "slots": slots,
            "kv_tokens": kv_tokens,
            "kv_type": kv_type,
            "gpu_layers": gpu_layers,
            "variant": variant,
            "device": device,
        }
        return cast(DeployResult, await self._typed("models.deploy", params, options))

    async def pull(self, model: str, *, variant: str | None = None, **options: Unpack[CallOptions]) -> PullResult:
        """Have the node fetch a model's file; answers when it is there, so give it `timeout`: gigabytes take minutes."""
        return cast(PullResult, await self._typed("models.pull", {"model": model, "variant": variant}, options))

    async def add_file(
        self, model: str, path: str, *, variant: str | None = None, **options: Unpack[CallOptions]
    ) -> PullResult:
        """Have the node take a file that lies on its own PC, at `path` from the root."""
        params = {"model": model, "path": path, "variant": variant}
        return cast(PullResult, await self._typed("models.add_file", params, options))

    async def transfers(self, **options: Unpack[CallOptions]) -> TransfersResult:
        """Model files on their way to the node."""
        return cast(TransfersResult, await self._typed("models.transfers", {}, options))

    async def remove(self, model: str, **options: Unpack[CallOptions]) -> RemoveResult:
        """Want a model no longer."""
        return cast(RemoveResult, await self._typed("models.remove", {"model": model}, options))

    # --- administration: needs an admin key, or the operator key ----------------------------------------------------------

    async def new_token(self, ttl_seconds: int = 3600, **options: Unpack[CallOptions]) -> TokenNewResult:
        """A token that lets one more PC in, once, within `ttl_seconds`."""
        return cast(TokenNewResult, await self._typed("mesh.token_new", {"ttl_seconds": ttl_seconds}, options))

    async def tokens(self, **options: Unpack[CallOptions]) -> TokensResult:
        """The tokens that this node made."""
        return cast(TokensResult, await self._typed("mesh.token_list", {}, options))

    async def revoke_token(self, id: str, **options: Unpack[CallOptions]) -> TokenRevokeResult:
        """End a token early."""
        return cast(TokenRevokeResult, await self._typed("mesh.token_revoke", {"id": id}, options))

    async def new_key(self, name: str, *, admin: bool = False, **options: Unpack[CallOptions]) -> KeyNewResult:
        """An API key that works on every node."""
        return cast(KeyNewResult, await self._typed("mesh.key_new", {"name": name, "admin": admin}, options))

    async def keys(self, **options: Unpack[CallOptions]) -> KeysResult:
        """Who has a key."""
        return cast(KeysResult, await self._typed("mesh.key_list", {}, options))

    async def revoke_key(self, name: str, **options: Unpack[CallOptions]) -> KeyRevokeResult:
        """End a key on every node."""
        return cast(KeyRevokeResult, await self._typed("mesh.key_revoke", {"name": name}, options))

    async def remove_node(self, node: str, **options: Unpack[CallOptions]) -> NodeRemoveResult:
        """Throw a node out for ever: by its id, the beginning of it, or its name."""
        return cast(NodeRemoveResult, await self._typed("mesh.remove", {"node": node}, options))

    # --- any method -----------------------------------------------------------------------------------------------------------

    async def call(self, method: str, params: Mapping[str, Any] | None = None, **options: Unpack[CallOptions]) -> Any:
        """Any method by name, as plain JSON, checked by the node alone."""
        return await self._connection.call(method, params, **options)

    async def stream(
        self, method: str, params: Mapping[str, Any] | None = None, **options: Unpack[CallOptions]
    ) -> AsyncIterator[tuple[str | None, Any]]:
        """Any streaming method: `(notification's name, params)` for each piece, then `(None, result)`."""
        async with aclosing(
            cast("AsyncGenerator[tuple[str | None, Any], None]", self._connection.stream(method, params, **options))
        ) as events:
            async for event in events:
                yield event

    async def batch(self, calls: Sequence[BatchCall], *, timeout: float | None = None) -> list[Any | TarsError | None]:
        """Several calls in one request: each one's result as plain JSON or its error, in order; None for a notification."""
        return await self._connection.batch(calls, timeout=timeout)

    async def _typed(self, method: str, params: dict[str, Any], options: Mapping[str, Any]) -> Message:
        return _message(METHODS[method].result, await self._plain(method, params, options))

    async def _plain(self, method: str, params: dict[str, Any], options: Mapping[str, Any]) -> Any:
        sent, around = _split(METHODS[method], params, options)
        return await self._connection.call(method, sent, **around)

    def _streamed(self, method: str, params: dict[str, Any], options: Mapping[str, Any]) -> ResultStream[Any]:
        spec = METHODS[method]
        sent, around = _split(spec, params, options)
        return ResultStream(spec, self._connection.stream(method, sent, **around))


def _split(
    spec: MethodSpec, params: dict[str, Any], options: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What goes into params (checked here, what was left out left out) and what goes around the call."""
    around = {key: value for key, value in options.items() if key in CallOptions.__annotations__}
    given = {**params, **{key: value for key, value in options.items() if key not in around}}
    message = validated(spec, {key: value for key, value in given.items() if value is not None})
    return message.model_dump(exclude_unset=True), around


def _message(model: type[Message] | None, payload: Any) -> Message:
    if model is None:
        raise TypeError("the method's result is not a message")
    try:
        return model.model_validate(payload)
    except ValidationError:
        raise BadPeerAnswer(
            f"The node's answer is not a {model.__name__} as this client knows it: the two are of different versions. Update the older one."
        ) from None


def _chat(
    messages: str | Sequence[ChatMessage | Mapping[str, Any]],
    tools: Sequence[Tool | Mapping[str, Any]] | None,
    tool_choice: str | None,
    reasoning: bool | None,
) -> dict[str, Any]:
    """The params of a chat, without the sampling."""
    turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else _plain(messages)
    return {
        "messages": turns,
        "tools": None if tools is None else _plain(tools),
        "tool_choice": tool_choice,
        "reasoning": reasoning,
    }


def _plain(given: Sequence[Message | Mapping[str, Any]]) -> list[dict[str, Any]]:
    # What stands at its default is left out, so that a node of an older version takes what it knows.
    return [one.model_dump(exclude_defaults=True) if isinstance(one, Message) else dict(one) for one in given]
