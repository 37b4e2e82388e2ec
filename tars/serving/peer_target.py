"""The target that is another node: the same `inference.*` method over its mesh listener, turned back into the events of a worker.

Law of this file: it knows messages and one narrow connection, no HTTP. The peer gets what the caller asked, under the model's full name,
with one hop more, what is left of its time, its trace and its idempotency key. Vectors come as base64 and are passed on as they are: they
never become Python numbers on the way. What the peer says is an error of its own class; what comes in between (no connection, a stream that
breaks, an answer that is none, a peer that does not take this node for one of its own) is `PeerUnreachable`, so that another one is asked.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing
from typing import Any, Protocol, cast

from pydantic import ValidationError

from tars.errors import (
    BadPeerAnswer,
    DeadlineExceeded,
    Forbidden,
    InvalidRequest,
    MethodNotFound,
    NotAMember,
    ParseError,
    PeerUnreachable,
    Unauthorized,
    UnsupportedMediaType,
)
from tars.messages.base import MOST_CALLER_LENGTH, CallContext, ResumeMeta
from tars.messages.inference import (
    ChatParams,
    ChatResult,
    CompleteParams,
    CompleteResult,
    Delta,
    Embedded,
    EmbedParams,
    Generated,
    Reranked,
    RerankParams,
    RerankResult,
    ServedBy,
    Tokenized,
    TokenizeParams,
    TokenizeResult,
)
from tars.serving.lifeline import Lifeline, LineCut
from tars.workers.engine import Event, Finished, Work

METHOD_OF: Mapping[type[Work], str] = {
    ChatParams: "inference.chat",
    CompleteParams: "inference.complete",
    EmbedParams: "inference.embed",
    RerankParams: "inference.rerank",
    TokenizeParams: "inference.tokenize",
}
"""What can be sent; saving a running sequence is between a node and its own workers."""

DELTA = "inference.delta"
NEVER_SENT = "node_not_reachable"
"""The kind of the connection's error where nothing was sent (`rpc.http_client.NodeNotReachable`)."""
SHARE_PART = 0.02
"""Of the time left, that a hop keeps for itself: the peer's own "deadline exceeded", which says more, arrives before this node's."""
SHARE_MOST_SECONDS = 0.1
"""A LAN's round trip and both ends' processing, with room for a busy loop."""

_NOT_THE_CALLS_FAULT = (
    BadPeerAnswer,
    Forbidden,
    InvalidRequest,
    MethodNotFound,
    NotAMember,
    ParseError,
    Unauthorized,
    UnsupportedMediaType,
)
"""The call was checked here before it was sent: these are between the two nodes (another version, a node that was removed)."""


_TRACE_ID = re.compile(r"[0-9a-f]{32}")


class PeerConnection(Protocol):
    """The part of `rpc.http_client.RpcConnection` that is used here."""

    async def call(
        self, method: str, params: Mapping[str, Any] | None = None, *, timeout: float | None = None, **meta: Any
    ) -> Any:
        """The result as plain JSON; `meta` goes into `_meta`. Cancelling it closes the connection. Raises `TarsError`s."""
        ...

    def stream(
        self, method: str, params: Mapping[str, Any] | None = None, *, timeout: float | None = None, **meta: Any
    ) -> AsyncIterator[tuple[str | None, Any]]:
        """`(notification's method, its params)` for each delta, then `(None, result)`. Closing it cancels the work there."""
        ...


class PeerTarget:
    """Runs one call at one peer; see `targets.Target`. `served_by` is the replica that was chosen, and once the answer came, the one that
    answered. `name` is the peer's, for people; `spare` says whether another replica could take the call; `file_sha256` is the chosen one's.
    """

    def __init__(
        self,
        served_by: ServedBy,
        name: str,
        connection: PeerConnection,
        lifeline: Lifeline | None = None,
        now: Callable[[], float] = time.monotonic,
        spare: Callable[[], bool] = lambda: True,
        file_sha256: str | None = None,
    ):
        self.served_by = served_by
        self._name = name
        self._connection = connection
        self._lifeline = lifeline or Lifeline()
        self._spare = spare
        self._file_sha256 = file_sha256
        self._now = now

    async def run(self, work: Work, call: CallContext, resume: ResumeMeta | None = None) -> AsyncGenerator[Event]:
        """The peer's events. Raises its own `TarsError`s, or `PeerUnreachable`, with `details["sent"]` False where it was never reached."""
        method = METHOD_OF.get(type(work))
        if method is None:
            raise TypeError(f"{type(work).__name__} is no work for a peer")
        remaining = call.deadline.remaining(self._now())
        budget = remaining - min(SHARE_MOST_SECONDS, remaining * SHARE_PART)
        if budget <= 0:
            raise DeadlineExceeded("the call's time budget ran out on the way to a peer; allow more time")
        if self._lifeline.broken_for(self._spare):
            raise self._cut(sent=False)
        meta = meta_of(call, self.served_by.replica)
        if isinstance(work, ChatParams | CompleteParams) and self._file_sha256 is not None:
            # The peer may have another file of the model, too, and what it began could not go on where this one is.
            meta["file_sha256"] = self._file_sha256
        if resume is not None:
            meta["resume"] = resume.model_dump(mode="json", exclude_none=True)
        began = ended = False
        self._lifeline.watch.call_began()
        try:
            if isinstance(work, ChatParams | CompleteParams):
                stream = self._connection.stream(method, params_of(work), timeout=budget, **meta)
                async with aclosing(cast("AsyncGenerator[tuple[str | None, Any]]", stream)) as messages:
                    # Not `async for`: the line is held while the peer is waited for, and not while the caller reads.
                    while not ended:
                        try:
                            name, body = await self._lifeline.hold(anext(messages), self._spare)
                        except StopAsyncIteration:
                            raise PeerUnreachable("the stream ended without an answer") from None
                        if name is None:
                            ended = True
                            yield self._finished(work, body)
                        elif name == DELTA:
                            began = True
                            delta = Delta.model_validate(body)
                            if not 0 <= delta.index < work.n:
                                raise ValueError("a piece of an answer that was not asked for")
                            yield delta
                    async for _ in messages:
                        pass  # there is nothing more: whoever reads on to the end leaves the connection to the next call
            else:
                calling = self._connection.call(method, params_of(work), timeout=budget, **meta)
                yield self._finished(work, await self._lifeline.hold(calling, self._spare))
        except LineCut:
            raise self._cut(sent=True, partial=began) from None
        except PeerUnreachable as lost:
            raise self._lost(lost, began) from None
        except _NOT_THE_CALLS_FAULT as refused:
            # It was refused at the door; only what answered nonsense may have run it.
            sent = isinstance(refused, BadPeerAnswer)
            raise self._unusable(f"does not take this node's calls ({refused.kind})", sent) from None
        except (ValidationError, KeyError, TypeError, ValueError):
            raise self._unusable("answered what this version of TARS does not understand", True) from None
        finally:
            self._lifeline.watch.call_ended()

    def _finished(self, work: Work, result: Any) -> Finished:
        """The peer's answer as the worker there gave it, and who that was."""
        served_by = ServedBy.model_validate(result["served_by"]) if "served_by" in result else self.served_by
        finished = finished_of(work, result)
        self.served_by = served_by
        return finished

    def _cut(self, **details: bool) -> PeerUnreachable:
        """The mesh knows what broke this call: `dead` or `silent` in the details, so that nobody takes the call for the cause."""
        line = self._lifeline
        return PeerUnreachable(
            f"{self._name} {line.why or 'was not heard of for a moment'}. Send the call again.",
            retry_after_ms=500,
            details={"peer": self.served_by.node, "dead" if line.dead else "silent": True, **details},
        )

    def _lost(self, lost: PeerUnreachable, began: bool) -> PeerUnreachable:
        if lost.kind == NEVER_SENT:
            return PeerUnreachable(
                f"{self._name} takes no connection; its models are loaded elsewhere where they fit. Send the call again.",
                retry_after_ms=1000,
                details={"peer": self.served_by.node, "sent": False},
            )
        after = "after a part of the answer had come" if began else "before an answer came"
        return PeerUnreachable(
            f"The connection to {self._name} broke {after}. Send the call again.",
            retry_after_ms=1000,
            details={"peer": self.served_by.node, "partial": began},
        )

    def _unusable(self, what: str, sent: bool) -> PeerUnreachable:
        return PeerUnreachable(
            f"{self._name} {what}. Both nodes must run the same version, and both must be members of the mesh: see `tars nodes`.",
            details={"peer": self.served_by.node, "sent": sent},
        )


def meta_of(call: CallContext, replica: str) -> dict[str, Any]:
    """What goes with the call beside its time: one hop more, whose it is, the trace with a span of its own, the idempotency key.

    The key is the caller's and the method's own: at the peer every caller of this node is "mesh", and two of them may use the same words.
    """
    meta: dict[str, Any] = {"hops": call.hops + 1, "caller": call.caller[:MOST_CALLER_LENGTH]}
    if call.priority is not None:
        meta["priority"] = call.priority
    if _TRACE_ID.fullmatch(call.trace_id) and int(call.trace_id, 16):
        span = hashlib.blake2b(f"{call.trace_id}|{replica}".encode(), digest_size=8).hexdigest()
        meta["traceparent"] = f"00-{call.trace_id}-{span}-01"
    return meta


def params_of(work: Work) -> dict[str, Any]:
    """The params to send: as they came, but vectors as bytes, and every document's score, in no particular form."""
    params = work.model_dump(exclude_unset=True)
    if isinstance(work, EmbedParams):
        params["encoding_format"] = "base64"
    elif isinstance(work, RerankParams):
        params.pop("top_n", None)
        params.pop("return_documents", None)
    return params


def finished_of(work: Work, result: Any) -> Finished:
    """The event with which a worker would have ended. Raises `ValueError` (pydantic's among them), `KeyError` or `TypeError` where the
    answer is not of the method's shape."""
    match work:
        case ChatParams():
            chat = ChatResult.model_validate(result)
            return Generated(
                text=chat.message.content,
                reasoning=chat.message.reasoning,
                tool_calls=chat.message.tool_calls,
                **_common(chat),
            )
        case CompleteParams():
            completed = CompleteResult.model_validate(result)
            return Generated(text=completed.text, **_common(completed))
        case EmbedParams():
            count = 1 if isinstance(work.input, str) else len(work.input)
            # Not by `EmbedResult`, whose union of three kinds of list is tried in turn over megabytes.
            embedded = Embedded.model_validate(
                {
                    "vectors": result["embeddings"],
                    "dimensions": result["dimensions"],
                    "truncated": result["truncated"],
                    "split": result["split"],
                    "prompt_tokens": result["usage"]["prompt_tokens"],
                    "timings": result["timings"],
                }
            )
            if len(embedded.vectors) != count:
                raise ValueError("another number of vectors than of texts")
            return embedded
        case RerankParams():
            reranked = RerankResult.model_validate(result)
            scores: dict[int, float] = {scored.index: scored.score for scored in reranked.results}
            if scores.keys() != set(range(len(work.documents))):
                raise ValueError("not one score for each document")
            return Reranked(
                scores=[scores[index] for index in range(len(scores))],
                truncated=reranked.truncated,
                prompt_tokens=reranked.usage.prompt_tokens,
                timings=reranked.timings,
            )
        case _:
            return Tokenized(tokens=TokenizeResult.model_validate(result).tokens)


def _common(result: ChatResult | CompleteResult) -> dict[str, Any]:
    return {
        "finish_reason": result.finish_reason,
        "usage": result.usage,
        "timings": result.timings,
        "logprobs": result.logprobs,
        "seed": result.seed,
        "further": result.further,
    }
