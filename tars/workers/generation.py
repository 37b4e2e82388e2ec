"""One call that generates text, and each of its answers: what it has, what it hands out, when it ends.

Law of this file: no llama.cpp and no KV cache. The engine says which token came; this file says what the caller sees of it. An answer's
tokens alone decide its text, so an answer that was preempted, continued or moved is replayed here and goes on exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from tars.errors import Cancelled, DeadlineExceeded, InvalidParams, StaleRoute, TarsError
from tars.messages.inference import (
    ChatParams,
    Choice,
    CompleteParams,
    Delta,
    FinishReason,
    Generated,
    Timings,
    TokenLogprob,
    ToolCall,
    Usage,
)
from tars.workers.answer_format import AnswerFormat, AnswerPiece
from tars.workers.engine import Event, Resume, Submission
from tars.workers.text_stream import Released, TextStream

Emission = tuple[int, Event | Exception]

SEEDS = 2**32


class Sampling(Protocol):
    """What an answer needs of `llama_sampling.Sampler`."""

    plain_greedy: bool

    def close(self) -> None:
        """Free what is native in it."""
        ...


@dataclass(frozen=True, slots=True)
class SavedCells:
    """KV cells of an answer that had to leave the cache, as llama.cpp wrote them."""

    data: bytes
    tokens: int
    """How many of the answer's tokens they hold."""


@dataclass(frozen=True, slots=True)
class Begun:
    """How far an answer had come elsewhere."""

    tokens: Sequence[int] = ()
    """That were generated."""
    handed_out: int = 0
    """How many of them the caller has."""
    ended: bool = False
    """It was whole, and the caller knows."""


class Answer:
    """One sequence. `tokens` are the prompt's, then the generated ones; the first `position` of them are in the KV cache."""

    __slots__ = (
        "_certain",
        "_hidden",
        "_logprobs",
        "_parser",
        "_reasoning",
        "_stream",
        "_text",
        "_was_whole",
        "aborted",
        "cached",
        "call",
        "finish_reason",
        "first_token",
        "index",
        "position",
        "prompt_length",
        "sampler",
        "saved",
        "started",
        "stream",
        "tokens",
    )

    def __init__(self, call: Call, index: int, prompt: Sequence[int]) -> None:
        self.call = call
        self.index = index
        begun = call.begun[index]
        self.tokens = [*prompt, *begun.tokens]
        self.prompt_length = len(prompt)
        self.position = 0
        self.stream: int | None = None
        """Of the KV cache; None while it waits for one."""
        self.saved: SavedCells | None = None
        self.cached = 0
        """Prompt tokens that were not computed again."""
        self.sampler: Sampling | None = None
        self.started: float | None = None
        self.first_token: float | None = None
        self.aborted = 0
        """How many of its last steps the watchdog stopped, one after the other."""
        self.finish_reason: FinishReason | None = None
        self._stream: TextStream[TokenLogprob | None] = TextStream(call.stop)
        self._parser = call.format.stream(call.work, call.prompt_end) if isinstance(call.work, ChatParams) else None
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._logprobs: list[TokenLogprob] = []
        self._certain = 0
        """Generated tokens whose text was released by the stream."""
        self._hidden = begun.handed_out
        """So many of them the caller had before this answer was continued."""
        self._was_whole = begun.ended

    @property
    def generated(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - self.prompt_length

    @property
    def pending(self) -> int:
        """Tokens that are known and not in the KV cache."""
        return len(self.tokens) - self.position

    @property
    def seed(self) -> int:
        """Of this answer: the call's plus its index."""
        return (self.call.seed + self.index) % SEEDS

    def replay(self, pieces: Sequence[bytes]) -> Delta | None:
        """Bring the text to where the tokens that were generated elsewhere are; what of it the caller has not seen, None for nothing.

        `pieces`: bytes of every token of the vocabulary.
        """
        shown: Delta | None = None
        begins_here = self.prompt_length + self._hidden
        before = self.tokens[self.prompt_length : begins_here]
        if before:
            text = self._stream.shown_before(
                before, b"".join([pieces[token] for token in before]), ended=self._was_whole
            )
            self._show(Released(text, before))
        for token in self.tokens[begins_here:]:
            if self._stream.stopped:
                break
            piece = self._show(self._stream.push(token, pieces[token], None))
            if piece is not None:
                shown = piece if shown is None else _joined(shown, piece)
        if not self._stream.stopped and self.generated >= self.call.most:
            return self._ended_before(shown, "length")
        # Where it was whole without either, then by the model's own end, which is no token of the text.
        return self._ended_before(shown, "stop") if self._stream.stopped or self._was_whole else shown

    def accept(self, token: int, piece: bytes, logprob: TokenLogprob | None) -> Delta | None:
        """Take the next token; what the caller may see now. `finish_reason` is set where it was the last one."""
        self.tokens.append(token)
        delta = self._show(self._stream.push(token, piece, logprob))
        if self._stream.stopped:
            return self._with_end(delta, "stop")
        if self.generated >= self.call.most:
            return self._with_end(delta, "length")
        return delta

    def finish(self, reason: FinishReason) -> Delta | None:
        """The model ended its answer; what was held back until now."""
        return self._with_end(None, reason)

    def choice(self) -> Choice:
        """The whole answer."""
        assert self.finish_reason is not None
        calls: list[ToolCall] = self._parser.tool_calls if self._parser is not None else []
        return Choice(
            index=self.index,
            text="".join(self._text),
            finish_reason="tool_calls" if calls and self.finish_reason == "stop" else self.finish_reason,
            logprobs=self._logprobs if self.call.work.logprobs is not None else None,
            reasoning="".join(self._reasoning) or None,
            tool_calls=calls,
        )

    def close(self) -> None:
        """Free its sampler."""
        if self.sampler is not None:
            self.sampler.close()
            self.sampler = None

    def _ended_before(self, delta: Delta | None, reason: FinishReason) -> Delta | None:
        """It was whole already. Its last piece brought everything that was held back: who had that one has all."""
        delta = self._with_end(delta, reason)
        return None if self._certain <= self._hidden else delta

    def _with_end(self, delta: Delta | None, reason: FinishReason) -> Delta | None:
        delta = self._last(delta, reason)
        if delta is not None:
            return delta.model_copy(update={"ended": True})
        # The end of the only answer comes with the call's result; that of one of several is to be known before it.
        return Delta(text="", index=self.index, ended=True) if len(self.call.answers) > 1 else None

    def _last(self, delta: Delta | None, reason: FinishReason) -> Delta | None:
        rest = self._show(self._stream.finish())
        self.finish_reason = reason
        if self._parser is not None and (last := self._parsed(self._parser.finish(), [], None)) is not None:
            rest = last if rest is None else _joined(rest, last)
        if delta is None or rest is None:
            return delta or rest
        return _joined(delta, rest)

    def _show(self, released: Released[TokenLogprob | None]) -> Delta | None:
        """What the caller gets of a release: nothing of what was handed out before."""
        if not released.token_ids and not released.text:
            return None
        self._certain += len(released.token_ids)
        logprobs = [one for one in released.extras if one is not None] if self.call.work.logprobs is not None else None
        self._logprobs += logprobs or []
        piece = AnswerPiece(released.text) if self._parser is None else self._parser.push(released.text)
        delta = self._parsed(piece, released.token_ids, logprobs)
        return None if self._certain <= self._hidden else delta

    def _parsed(self, piece: AnswerPiece, token_ids: list[int], logprobs: list[TokenLogprob] | None) -> Delta | None:
        self._text.append(piece.text)
        self._reasoning.append(piece.reasoning)
        if not (token_ids or piece.text or piece.reasoning or piece.tool_calls):
            return None
        return Delta(
            text=piece.text,
            token_ids=token_ids,
            logprobs=logprobs,
            index=self.index,
            reasoning=piece.reasoning,
            tool_calls=piece.tool_calls,
        )


class Call:
    """A chat or completion under way, with its `n` answers."""

    __slots__ = (
        "adapter",
        "answers",
        "begun",
        "deadline",
        "format",
        "most",
        "number",
        "prompt_end",
        "prompt_length",
        "received",
        "seed",
        "stop",
        "work",
    )

    def __init__(
        self,
        submission: Submission,
        prompt: Sequence[int],
        *,
        seed: int,
        context: int,
        answers: AnswerFormat,
        prompt_end: str = "",
        adapter: str = "",
        template_stop: Sequence[str] = (),
    ) -> None:
        """`seed` is the call's own, or the one that was drawn for it. Raises `InvalidParams` or `StaleRoute` where it cannot go on here."""
        work = submission.work
        assert isinstance(work, ChatParams | CompleteParams)
        self.number = submission.sequence
        self.work: ChatParams | CompleteParams = work
        self.deadline = submission.deadline
        self.received = submission.received
        self.seed = seed
        self.adapter = adapter
        self.format = answers
        self.prompt_end = prompt_end
        self.stop = [*work.stop, *template_stop]
        self.begun = [Begun()] * work.n if submission.resume is None else _begun(submission.resume, work.n)
        self.prompt_length = len(prompt)
        room = context - len(prompt)
        self.most = room if work.max_tokens is None else min(work.max_tokens, room)
        for one in self.begun:
            if len(one.tokens) >= room and not one.ended:
                raise StaleRoute(
                    f"The answer has {len(one.tokens)} tokens already, and this replica's context has room for {room} after the prompt; "
                    "it goes on where the context is longer."
                )
        self.answers = [Answer(self, index, prompt) for index in range(work.n)]

    def ending(self, cancelled: set[int], now: float) -> TarsError | None:
        """Why it must end now; None where it may go on."""
        if self.number in cancelled:
            return ending_error(True)
        if self.deadline is not None and now >= self.deadline:
            return ending_error(False)
        return None

    @property
    def ended(self) -> bool:
        """True once every answer has ended."""
        return all(answer.finish_reason is not None for answer in self.answers)

    def result(self, now: float) -> Generated:
        """The whole, once all answers ended."""
        first, *others = [answer.choice() for answer in self.answers]
        generated = sum(answer.generated for answer in self.answers)
        started = min((answer.started for answer in self.answers if answer.started is not None), default=now)
        first_token = min(
            (answer.first_token for answer in self.answers if answer.first_token is not None), default=None
        )
        computed = generated - sum(len(one.tokens) for one in self.begun)
        decode_seconds = now - (first_token or now)
        # The first token comes out of the prefill; the speed is that of the ones after it.
        speed = (computed - 1) / decode_seconds if computed > 1 and decode_seconds > 0 else None
        return Generated(
            text=first.text,
            finish_reason=first.finish_reason,
            logprobs=first.logprobs,
            reasoning=first.reasoning,
            tool_calls=first.tool_calls,
            further=others,
            seed=self.seed,
            usage=Usage(
                prompt_tokens=self.prompt_length,
                completion_tokens=generated,
                total_tokens=self.prompt_length + generated,
                cached_tokens=self.answers[0].cached,
            ),
            timings=Timings(
                queue_ms=_ms(started - self.received),
                first_token_ms=None if first_token is None else _ms(first_token - self.received),
                total_ms=_ms(now - self.received),
                tokens_per_second=None if speed is None else round(speed, 2),
            ),
        )


def _begun(resume: Resume, answers: int) -> list[Begun]:
    """How far each answer had come. Raises `InvalidParams` where that cannot be."""
    counts = [len(tokens) for tokens in resume.generated]
    if (
        len(counts) != answers
        or len(resume.handed_out) != answers
        or any(not 0 <= handed <= count for handed, count in zip(resume.handed_out, counts, strict=True))
        or not set(resume.ended) <= set(range(answers))
    ):
        raise InvalidParams(
            "What is to be continued does not fit the call: it needs the tokens of each of the `n` answers."
        )
    return [
        Begun(tokens, handed, index in resume.ended)
        for index, (tokens, handed) in enumerate(zip(resume.generated, resume.handed_out, strict=True))
    ]


def ending_error(cancelled: bool) -> TarsError:
    """Of a call that was cancelled, else of one whose time is up."""
    if cancelled:
        return Cancelled("The call was cancelled.")
    return DeadlineExceeded("The call's time budget is used up; the work was stopped.")


def _joined(first: Delta, second: Delta) -> Delta:
    return first.model_copy(
        update={
            "text": first.text + second.text,
            "token_ids": [*first.token_ids, *second.token_ids],
            "logprobs": None if first.logprobs is None else [*first.logprobs, *(second.logprobs or [])],
            "reasoning": first.reasoning + second.reasoning,
            "tool_calls": [*first.tool_calls, *second.tool_calls],
        }
    )


def _ms(seconds: float) -> float:
    return round(max(0.0, seconds) * 1000, 3)
