"""`inference.*` on top of the router: the answer's last form, idempotency, and admission while draining.

Law of this file: params in, messages out; it decides neither where a call runs nor how.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from typing import Any, TypeVar, cast

from tars.core.types import ModelKind
from tars.errors import DeadlineExceeded, InternalError, StaleRoute, TarsError, WrongModelKind
from tars.messages.base import CallContext, Message
from tars.messages.inference import (
    ChatMessage,
    ChatParams,
    ChatResult,
    Choice,
    CompleteParams,
    CompleteResult,
    Delta,
    Embedded,
    EmbedParams,
    EmbedResult,
    Generated,
    Progress,
    Reranked,
    RerankParams,
    RerankResult,
    Scored,
    ServedBy,
    Tokenized,
    TokenizeParams,
    TokenizeResult,
    ToolCallDelta,
    Usage,
)
from tars.serving.call_record import REPEATED, CallRecord, CallRecords
from tars.serving.idempotency import Claim, IdempotentAnswers, OtherNodes, seed_of
from tars.serving.router import Router, ServedModel, draining_error
from tars.serving.vectors import written

KEY_WAIT = "idempotency_key"
"""What a call with a key waits for before it runs: the word of the key's homes, or the first call's answer."""
BYTES_A_SCORE = 512
"""A `Scored` with its fields (measured with `sys.getsizeof`, its dictionary included)."""
BYTES_A_CHARACTER = 4
"""The widest that CPython stores; an answer's log probabilities are left out of the count, they are asked for rarely."""

Result = TypeVar("Result", ChatResult, CompleteResult)
Answer = TypeVar("Answer", Embedded, Reranked, Tokenized)
Asked = TypeVar("Asked", EmbedParams, RerankParams)
Whole = TypeVar("Whole", EmbedResult, RerankResult)


class Inference:
    """See the module's law. `now` is the monotonic clock of every deadline."""

    def __init__(
        self,
        router: Router,
        now: Callable[[], float] = time.monotonic,
        others: OtherNodes | None = None,
        records: CallRecords | None = None,
    ):
        self._router = router
        self._now = now
        self.answers = IdempotentAnswers(now, others)
        """Of calls with an idempotency key. `others`: the nodes that share them."""
        self.records = records or CallRecords(now)
        """The last calls; the router's, too."""

    @property
    def draining(self) -> bool:
        """While it is set, new calls run at peers or not at all; running ones go on."""
        return self._router.draining

    @draining.setter
    def draining(self, on: bool) -> None:
        self._router.draining = on

    def chat(self, params: ChatParams, call: CallContext) -> AsyncGenerator[Delta | Progress | ChatResult]:
        """`Progress` while the model is loaded, deltas of all `n` answers as they come, then the result. A call joined or repeated under
        its idempotency key gets one delta for each answer, with the whole of it.
        """

        def result(model: str, generated: Generated, served_by: ServedBy) -> ChatResult:
            message = ChatMessage(
                role="assistant",
                content=generated.text,
                reasoning=generated.reasoning,
                tool_calls=generated.tool_calls,
            )
            return ChatResult(model=model, message=message, served_by=served_by, **_common(generated))

        return self._generate(params, call, result)

    def complete(self, params: CompleteParams, call: CallContext) -> AsyncGenerator[Delta | Progress | CompleteResult]:
        """As `chat`, for a plain prompt."""

        def result(model: str, generated: Generated, served_by: ServedBy) -> CompleteResult:
            return CompleteResult(model=model, text=generated.text, served_by=served_by, **_common(generated))

        return self._generate(params, call, result)

    async def _generate(
        self,
        params: ChatParams | CompleteParams,
        call: CallContext,
        result: Callable[[str, Generated, ServedBy], Result],
    ) -> AsyncGenerator[Delta | Progress | Result]:
        with self._recorded(call, params.model) as record:
            model = self._admit(params.model, ModelKind.CHAT, call)
            name = record.model = _full_name(model, params.model)
            claim = await self._claim(call, params, record)
            if not isinstance(claim, Claim):
                kept = cast("Result", claim)
                for choice in kept.choices():
                    yield _whole(choice)
                yield kept
                return
            shown = False
            seed = seed_of(call) if params.seed is None and not call.hops else None
            with claim:
                # By its full name: the engine reads the adapter behind the colon, and an alias may hold one too.
                work = params.model_copy(update={"model": name} if seed is None else {"model": name, "seed": seed})
                async with aclosing(self._router.run(model, work, call)) as events:
                    async for event, served_by in events:
                        if isinstance(event, Progress):
                            yield event
                        elif isinstance(event, Delta):
                            shown = call.streamed
                            yield event
                        elif isinstance(event, Generated) and served_by is not None:
                            made = result(name, event, _for_call(served_by, call))
                            size = sum(map(_characters, made.choices())) * BYTES_A_CHARACTER
                            made = await claim.succeed(made, size, shown=shown)
                            record.answered()
                            yield made

    async def embed(self, params: EmbedParams, call: CallContext) -> EmbedResult:
        """Vectors in the order of the input. Those that are not asked for as base64 are JSON text already (`vectors.written`): the
        result is for writing, not for reading.
        """
        return await self._at_once(ModelKind.EMBEDDING, Embedded, params, call, _embedded)

    async def rerank(self, params: RerankParams, call: CallContext) -> RerankResult:
        """Documents by their relevance to the query, best first; equal ones in the order of the input."""
        return await self._at_once(ModelKind.RERANK, Reranked, params, call, _reranked)

    async def tokenize(self, params: TokenizeParams, call: CallContext) -> TokenizeResult:
        """Token ids of a text by a model of any kind; without a name, the only chat model's."""
        with self._recorded(call, params.model) as record:
            model = self._admit_any(params.model, call)
            record.model = _full_name(model, params.model)
            tokenized, _ = await self._answer(Tokenized, model, params, call)
            record.answered()
            return TokenizeResult(model=record.model, tokens=tokenized.tokens, count=len(tokenized.tokens))

    async def _at_once(
        self,
        kind: ModelKind,
        event: type[Answer],
        params: Asked,
        call: CallContext,
        result: Callable[[Asked, str, Answer, ServedBy], Awaitable[tuple[Whole, int]]],
    ) -> Whole:
        """A call without deltas, under its idempotency key. `result` makes the answer, and about the bytes that it takes."""
        with self._recorded(call, params.model) as record:
            model = self._admit(params.model, kind, call)
            record.model = _full_name(model, params.model)
            claim = await self._claim(call, params, record)
            if not isinstance(claim, Claim):
                return cast("Whole", claim)
            with claim:
                answer, served_by = await self._answer(event, model, params, call)
                made, size = await result(params, record.model, answer, served_by)
                made = await claim.succeed(made, size)
                record.answered()
                return made

    async def _answer(
        self,
        kind: type[Answer],
        model: ServedModel,
        params: EmbedParams | RerankParams | TokenizeParams,
        call: CallContext,
    ) -> tuple[Answer, ServedBy]:
        """The one event that a call without deltas ends with."""
        # By its full name, as a generation: a peer may know another alias, or serve several models of the kind.
        name = _full_name(model, params.model)
        work = params if params.model == name else params.model_copy(update={"model": name})
        async with aclosing(self._router.run(model, work, call)) as events:
            async for event, served_by in events:
                if isinstance(event, kind) and served_by is not None:
                    return event, _for_call(served_by, call)
        raise InternalError("the worker ended without an answer")

    def _admit(self, name: str | None, kind: ModelKind, call: CallContext) -> ServedModel:
        try:
            model = self._router.resolve(name, kind)
            if model.unavailable is not None:
                raise model.unavailable
        except WrongModelKind:
            raise
        except TarsError as error:
            if not call.hops:
                raise
            # The peer that sent it knew better a moment ago, and what it says to its caller is its own view.
            raise StaleRoute(
                f"this node cannot take the call ({error.message}); another one may", details={"cause": error.kind}
            ) from None
        if not self._router.can_take(model, call):
            raise draining_error()
        return model

    def _admit_any(self, name: str | None, call: CallContext) -> ServedModel:
        for kind in (ModelKind.CHAT, ModelKind.EMBEDDING):
            try:
                return self._admit(name, kind, call)
            except WrongModelKind:
                continue
        return self._admit(name, ModelKind.RERANK, call)

    async def _claim(self, call: CallContext, params: Message, record: CallRecord) -> Claim | Message:
        # A call that a peer forwarded is an attempt of one that has its claim there.
        if call.idempotency_key is None or call.hops:
            return Claim()
        try:
            with record.waiting(KEY_WAIT):
                async with asyncio.timeout(call.deadline.remaining(self._now())):
                    found = await self.answers.claim_or_answer(call, params)
        except TimeoutError:
            raise DeadlineExceeded(
                "the first call under this idempotency key is still running and the time budget is gone; ask again later"
            ) from None
        if not isinstance(found, Claim):
            served_by = getattr(found, "served_by", None)
            record.answered(REPEATED, of=served_by.call if isinstance(served_by, ServedBy) else "")
        return found

    @contextmanager
    def _recorded(self, call: CallContext, model: str | None) -> Iterator[CallRecord]:
        """A record of the call, which says how it ended whatever ends it."""
        record = self.records.open(call, model or "")
        try:
            yield record
        except TarsError as error:
            record.failed(error)
            raise
        finally:
            record.left()


def _for_call(served_by: ServedBy, call: CallContext) -> ServedBy:
    return served_by.model_copy(update={"call": call.trace_id})


def _common(generated: Generated) -> dict[str, Any]:
    return {
        "finish_reason": generated.finish_reason,
        "usage": generated.usage,
        "timings": generated.timings,
        "logprobs": generated.logprobs,
        "seed": generated.seed,
        "further": generated.further,
    }


async def _embedded(
    params: EmbedParams, model: str, embedded: Embedded, served_by: ServedBy
) -> tuple[EmbedResult, int]:
    if params.encoding_format == "base64":
        vectors: list[Any] = list(embedded.vectors)
        size = sum(map(len, embedded.vectors))
    else:
        vectors, size = await written(embedded.vectors, params.output_type)
    # Not validated: JSON text is no list of numbers, and looking at two million of them takes longer than writing them.
    result = EmbedResult.model_construct(
        model=model,
        embeddings=vectors,
        dimensions=embedded.dimensions,
        truncated=embedded.truncated,
        split=embedded.split,
        usage=Usage(prompt_tokens=embedded.prompt_tokens, total_tokens=embedded.prompt_tokens),
        timings=embedded.timings,
        served_by=served_by,
    )
    return result, size


async def _reranked(
    params: RerankParams, model: str, reranked: Reranked, served_by: ServedBy
) -> tuple[RerankResult, int]:
    """The best first. Raises `InternalError` where there is not one score for each document."""
    scores = reranked.scores
    if len(scores) != len(params.documents):
        raise InternalError("the worker scored another number of documents than it was given")
    best = sorted(range(len(scores)), key=lambda index: -scores[index])[: params.top_n]  # sorted() is stable
    result = RerankResult(
        model=model,
        results=[
            Scored(
                index=index,
                score=scores[index],
                document=params.documents[index] if params.return_documents else None,
            )
            for index in best
        ],
        truncated=reranked.truncated,
        usage=Usage(prompt_tokens=reranked.prompt_tokens, total_tokens=reranked.prompt_tokens),
        timings=reranked.timings,
        served_by=served_by,
    )
    characters = sum(len(scored.document or "") for scored in result.results)
    return result, len(result.results) * BYTES_A_SCORE + characters * BYTES_A_CHARACTER


def _full_name(model: ServedModel, asked: str | None) -> str:
    """A model's own name, whichever of its names was asked for; with the adapter, where one was named (`name:adapter`)."""
    return model.name if asked is None or asked == model.name or asked in model.aliases else asked


def _whole(choice: Choice) -> Delta:
    """One delta with everything that the answer's own ones said."""
    return Delta(
        text=choice.text,
        index=choice.index,
        logprobs=choice.logprobs,
        reasoning=choice.reasoning or "",
        tool_calls=[
            ToolCallDelta(index=place, id=made.id, name=made.name, arguments=made.arguments)
            for place, made in enumerate(choice.tool_calls)
        ],
    )


def _characters(choice: Choice) -> int:
    return len(choice.text) + len(choice.reasoning or "") + sum(len(made.arguments) + 64 for made in choice.tool_calls)
