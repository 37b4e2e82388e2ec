"""`inference.*` on top of the router: the answer's last form, idempotency, and admission while draining.

Law of this file: params in, messages out; it decides neither where a call runs nor how.
"""

from __future__ import annotations

import asyncio
import base64
import struct
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any, TypeVar, cast

from tars.core.types import ModelKind
from tars.errors import DeadlineExceeded, Draining, InternalError, WrongModelKind
from tars.messages.base import CallContext, Message
from tars.messages.inference import (
    ChatMessage,
    ChatParams,
    ChatResult,
    CompleteParams,
    CompleteResult,
    Delta,
    Embedded,
    EmbedParams,
    EmbedResult,
    Generated,
    ServedBy,
    Tokenized,
    TokenizeParams,
    TokenizeResult,
    Usage,
)
from tars.serving.idempotency import Claim, IdempotentAnswers
from tars.serving.router import Router, ServedModel

BYTES_A_FLOAT = 32
"""A Python float and its place in a list (CPython: 24 and 8)."""
BYTES_A_CHARACTER = 4
"""The widest that CPython stores; an answer's log probabilities are left out of the count, they are asked for rarely."""

Result = TypeVar("Result", ChatResult, CompleteResult)
Answer = TypeVar("Answer", Embedded, Tokenized)


class Inference:
    """See the module's law. `now` is the monotonic clock of every deadline."""

    def __init__(self, router: Router, now: Callable[[], float] = time.monotonic):
        self._router = router
        self._now = now
        self._answers = IdempotentAnswers(now)
        self.draining = False

    def chat(self, params: ChatParams, call: CallContext) -> AsyncGenerator[Delta | ChatResult]:
        """Deltas, then the result. A call joined or repeated under its idempotency key gets one delta with the whole text."""

        def result(model: str, generated: Generated, served_by: ServedBy) -> ChatResult:
            return ChatResult(
                model=model,
                message=ChatMessage(role="assistant", content=generated.text),
                served_by=served_by,
                **_common(generated),
            )

        return self._generate(params, call, result, lambda kept: kept.message.content)

    def complete(self, params: CompleteParams, call: CallContext) -> AsyncGenerator[Delta | CompleteResult]:
        """As `chat`, for a plain prompt."""

        def result(model: str, generated: Generated, served_by: ServedBy) -> CompleteResult:
            return CompleteResult(model=model, text=generated.text, served_by=served_by, **_common(generated))

        return self._generate(params, call, result, lambda kept: kept.text)

    async def _generate(
        self,
        params: ChatParams | CompleteParams,
        call: CallContext,
        result: Callable[[str, Generated, ServedBy], Result],
        text_of: Callable[[Result], str],
    ) -> AsyncGenerator[Delta | Result]:
        model = self._admit(params.model, ModelKind.CHAT)
        claim = await self._claim(call, params)
        if not isinstance(claim, Claim):
            kept = cast("Result", claim)
            yield Delta(text=text_of(kept))
            yield kept
            return
        try:
            async with aclosing(self._router.run(model, params, call)) as events:
                async for event, served_by in events:
                    if isinstance(event, Delta):
                        yield event
                    elif isinstance(event, Generated):
                        made = result(model.name, event, served_by)
                        claim.succeed(made, len(event.text) * BYTES_A_CHARACTER)
                        yield made
        finally:
            claim.fail()

    async def embed(self, params: EmbedParams, call: CallContext) -> EmbedResult:
        """Unit vectors in the order of the input."""
        model = self._admit(params.model, ModelKind.EMBEDDING)
        claim = await self._claim(call, params)
        if isinstance(claim, EmbedResult):
            return claim
        assert isinstance(claim, Claim)
        try:
            embedded, served_by = await self._answer(Embedded, model, params, call)
            vectors: list[list[float]] | list[str] = (
                embedded.vectors if params.encoding_format == "base64" else [_floats(v) for v in embedded.vectors]
            )
            result = EmbedResult(
                model=model.name,
                embeddings=vectors,
                dimensions=embedded.dimensions,
                truncated=embedded.truncated,
                usage=Usage(prompt_tokens=embedded.prompt_tokens, total_tokens=embedded.prompt_tokens),
                timings=embedded.timings,
                served_by=served_by,
            )
            claim.succeed(result, len(embedded.vectors) * embedded.dimensions * BYTES_A_FLOAT)
            return result
        finally:
            claim.fail()

    async def tokenize(self, params: TokenizeParams, call: CallContext) -> TokenizeResult:
        """Token ids of a text by a model of any kind; without a name, the only chat model's."""
        try:
            model = self._admit(params.model, ModelKind.CHAT)
        except WrongModelKind:
            model = self._admit(params.model, ModelKind.EMBEDDING)
        tokenized, _ = await self._answer(Tokenized, model, params, call)
        return TokenizeResult(model=model.name, tokens=tokenized.tokens, count=len(tokenized.tokens))

    async def _answer(
        self, kind: type[Answer], model: ServedModel, params: EmbedParams | TokenizeParams, call: CallContext
    ) -> tuple[Answer, ServedBy]:
        """The one event that a call without deltas ends with."""
        async with aclosing(self._router.run(model, params, call)) as events:
            async for event, served_by in events:
                if isinstance(event, kind):
                    return event, served_by
        raise InternalError("the worker ended without an answer")

    def _admit(self, name: str | None, kind: ModelKind) -> ServedModel:
        if self.draining:
            raise Draining(
                "this node is being drained and takes no new calls; send the call to another node, "
                "or resume this one with `node.resume`",
                retry_after_ms=5000,
            )
        model = self._router.resolve(name, kind)
        if model.unavailable is not None:
            raise model.unavailable
        return model

    async def _claim(self, call: CallContext, params: Message) -> Claim | Message:
        if call.idempotency_key is None:
            return Claim(None, None, None)
        try:
            async with asyncio.timeout(call.deadline.remaining(self._now())):
                return await self._answers.claim_or_answer(call, params)
        except TimeoutError:
            raise DeadlineExceeded(
                "the first call under this idempotency key is still running and the time budget is gone; ask again later"
            ) from None


def _common(generated: Generated) -> dict[str, Any]:
    return {
        "finish_reason": generated.finish_reason,
        "usage": generated.usage,
        "timings": generated.timings,
        "logprobs": generated.logprobs,
    }


def _floats(vector: str) -> list[float]:
    data = base64.b64decode(vector)
    return list(struct.unpack(f"<{len(data) // 4}f", data))
