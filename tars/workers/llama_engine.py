"""Chat and completion by llama.cpp, one token of one sequence a step.

Law of this file: the engine protocol on one side, `llama_model`, `llama_sampling`, `text_stream` and `chat_template` on the other; no
ctypes here. The step loop is the only place that decides what is computed next: a later issue makes it many sequences by letting `_step`
decode a token of every running one. Until then calls wait in the order they came.

Reuse of a prompt's beginning: KV cells stay between calls, but only whole prefill chunks are taken over, because a cell's bits depend on
the shape of the batch that made it: so a warm call computes exactly what a cold one does, and a seed gives the same text.
"""

from __future__ import annotations

import secrets
import time
import traceback
from collections import deque
from typing import TYPE_CHECKING

import psutil

from tars.errors import (
    BadModelFile,
    Cancelled,
    DeadlineExceeded,
    InternalError,
    InvalidParams,
    PromptTooLong,
    ReplicaFailed,
    TarsError,
    WrongModelKind,
)
from tars.messages.inference import (
    ChatParams,
    CompleteParams,
    Delta,
    FinishReason,
    Generated,
    Timings,
    Tokenized,
    TokenizeParams,
    TokenLogprob,
    Usage,
)
from tars.messages.node import EngineCounters, LoadedInfo, MeasuredSpeeds
from tars.workers.chat_template import CHATML, ChatTemplate
from tars.workers.engine import Emit, LoadSpec, Progress, Submission
from tars.workers.inbox import Inbox
from tars.workers.text_stream import Released, TextStream

if TYPE_CHECKING:  # importing these imports llama_cpp, which is `load`'s stage `import`
    from tars.workers.llama_model import Context, Logits, Model
    from tars.workers.llama_sampling import Sampler

CPU_CHUNK = 128
"""Prompt tokens per step on a CPU: field notes measured the best inter-token times at about 96; a power of two suits the kernels."""

DEVICE_CHUNK = 512
"""The same on a GPU, where a chunk takes milliseconds: llama.cpp's default micro batch."""

WARM_TOKENS = 8
"""Tokens decoded to measure the speed, as far as they take no longer than `WARM_SECONDS` together."""

WARM_SECONDS = 2.0
"""A big model on a slow CPU must not spend its start-up on being measured."""


class _Sequence:
    """One generation under way."""

    def __init__(self, submission: Submission, received: float) -> None:
        assert isinstance(submission.work, ChatParams | CompleteParams)
        self.number = submission.sequence
        self.work = submission.work
        self.deadline = submission.deadline
        self.received = received
        self.started = 0.0
        self.first_token: float | None = None
        self.tokens: list[int] = []
        """The prompt's, then the generated ones."""
        self.prompt_length = 0
        self.position = 0
        """How many of them are in the KV cache."""
        self.most = 0
        """Tokens to generate at most."""
        self.sampler: Sampler | None = None
        self.stream: TextStream[TokenLogprob | None] = TextStream()
        self.text: list[str] = []
        self.logprobs: list[TokenLogprob] = []


class LlamaEngine:
    """See the module's law."""

    def __init__(self) -> None:
        self._inbox = Inbox()
        self._waiting: deque[tuple[Submission, float]] = deque()
        self._active: _Sequence | None = None
        self._cached: list[int] = []
        """Prompt tokens whose KV cells stand at the beginning of sequence 0, prefilled in chunks from 0 on."""
        self._mark = 0
        self._on_device = False
        self._free_before: int | None = None
        self._resident_before = 0
        self._memory = 0
        self._emit: Emit
        self._spec: LoadSpec
        self._model: Model
        self._context: Context | None = None
        self._template: ChatTemplate
        self._template_stop: list[str] = []

    # --- load ---

    def load(self, spec: LoadSpec, progress: Progress, emit: Emit) -> LoadedInfo:
        """See the protocol. Percent is of the whole load: import to 5, weights to 85, warm-up to 99."""
        started = time.monotonic()
        self._spec, self._emit = spec, emit
        self._resident_before = psutil.Process().memory_info().rss
        progress("import", 1.0)
        try:
            from tars.workers import llama_library
            from tars.workers.llama_model import Context, Model
        except ImportError:
            raise ReplicaFailed(
                "llama-cpp-python is not installed or does not load here, so chat models cannot run. "
                "Install it with `pip install 'tars-node[chat]'` and restart the node."
            ) from None
        log = llama_library.NativeLog()
        log.install()
        self._log = log
        self._on_device = spec.gpu_layers != 0 and spec.cuda_device is not None
        self._free_before = llama_library.free_device_memory() if self._on_device else None
        progress("read", 5.0)
        self._model = Model(spec, log, lambda percent: progress("load", 5.0 + 0.75 * percent))
        self._chunk = min(DEVICE_CHUNK if self._on_device else CPU_CHUNK, spec.context)
        progress("load", 82.0)
        self._context = Context(self._model, spec, self._chunk, log)
        source = self._model.chat_template
        self._template = ChatTemplate(
            source or CHATML, self._model.special_text(self._model.bos), self._model.special_text(self._model.eos)
        )
        # Without a template of its own the model may not know ChatML's end token as one: then it comes as text.
        self._template_stop = [] if source else ["<|im_end|>"]
        progress("warm", 85.0)
        speeds = self._warm_up(progress)
        self._measure_memory()
        return LoadedInfo(
            model_kind="chat",
            memory_bytes=self._memory,
            load_seconds=round(time.monotonic() - started, 3),
            context=spec.context,
            # One sequence at a time, whatever the cache has room for, until batching comes.
            slots=1,
            has_chat_template=source is not None,
            architecture=self._model.architecture,
            backend=f"llama.cpp (llama-cpp-python {llama_library.version()}), {'GPU' if self._on_device else 'CPU'}",
            file_sha256=spec.sha256,
            speeds=speeds,
        )

    def _warm_up(self, progress: Progress) -> MeasuredSpeeds:
        """Compute a little: pages the weights in, fills caches, measures, and refuses weights that give no numbers."""
        from tars.workers.llama_sampling import check_finite

        assert self._context is not None
        ordinary = [token for token in range(self._model.tokens) if self._model.pieces[token]] or [0]
        try:
            check_finite(self._context.decode(ordinary[:1], 0))
        except ReplicaFailed as error:
            raise BadModelFile(error.message) from None
        progress("warm", 90.0)
        self._mark += 1
        # The best of several steps, not their mean: another process on the same cores is not the model's speed.
        decode_times: list[float] = []
        while len(decode_times) < min(WARM_TOKENS, self._spec.context - 1) and sum(decode_times) < WARM_SECONDS:
            position = 1 + len(decode_times)
            decode_times.append(self._timed_decode([ordinary[position % len(ordinary)]], position))
        progress("warm", 95.0)
        self._context.forget(0)
        fastest = min(decode_times, default=1.0)
        # Prefill is at least as fast as decode, so this takes `WARM_SECONDS` at most.
        count = max(1, min(self._chunk, self._spec.context - 1, int(WARM_SECONDS / fastest)))
        prompt = [ordinary[index % len(ordinary)] for index in range(count)]
        prefill_time = self._timed_decode(prompt, 0)
        self._context.forget(0)
        if prefill_time < WARM_SECONDS / 2:
            prefill_time = min(prefill_time, self._timed_decode(prompt, 0))
            self._context.forget(0)
        prefill_speed, decode_speed = count / prefill_time, 1 / fastest
        progress("warm", 99.0)
        return MeasuredSpeeds(
            prefill_tokens_per_second=round(prefill_speed, 1), decode_tokens_per_second=round(decode_speed, 1)
        )

    def _timed_decode(self, tokens: list[int], position: int) -> float:
        assert self._context is not None
        started = time.monotonic()
        self._context.decode(tokens, position)
        self._mark += 1
        return max(1e-9, time.monotonic() - started)

    def _measure_memory(self) -> None:
        from tars.workers import llama_library

        free = llama_library.free_device_memory() if self._free_before is not None else None
        if free is not None and self._free_before is not None:
            self._memory = max(0, self._free_before - free)
        else:
            self._memory = max(0, psutil.Process().memory_info().rss - self._resident_before)

    # --- the protocol, from any thread ---

    def submit(self, submission: Submission) -> None:
        """See the protocol."""
        self._inbox.put(submission)

    def cancel(self, sequence: int) -> None:
        """See the protocol."""
        self._inbox.cancel(sequence)
        active, context = self._active, self._context
        # Should the sequence end between these lines, the next one's chunk is aborted and simply computed again.
        if active is not None and active.number == sequence and context is not None:
            context.abort.set()

    def memory_bytes(self) -> int:
        """On a GPU what the load took; on a CPU the resident growth as of now (pages of a mapped file come and go)."""
        if self._free_before is not None:
            return self._memory
        return max(0, psutil.Process().memory_info().rss - self._resident_before)

    def counters(self) -> EngineCounters:
        """See the protocol."""
        return EngineCounters()

    def progress_mark(self) -> int:
        """See the protocol: steps taken."""
        return self._mark

    def unload(self) -> None:
        """See the protocol."""
        self._inbox.close()
        if self._context is not None:
            self._context.abort.set()

    # --- the engine thread ---

    def run(self) -> None:
        """See the protocol."""
        assert self._context is not None
        while True:
            taken = self._inbox.take(wait=self._active is None and not self._waiting)
            if taken.closed:
                break
            self._context.abort.clear()
            now = time.monotonic()
            for submission in taken.submissions:
                self._admit(submission, now)
            self._drop_ended(taken.cancelled, now)
            try:
                if self._active is None and self._waiting:
                    self._begin_or_refuse(*self._waiting.popleft())
                elif self._active is not None:
                    self._step(self._active)
            except TarsError as error:
                self._fail(error)
            self._mark += 1
        self._close_active()
        self._context.close()
        self._model.close()

    def _admit(self, submission: Submission, now: float) -> None:
        work = submission.work
        if isinstance(work, TokenizeParams):
            try:
                tokens = self._model.tokenize(_encode(work.text), add_special=work.add_special)
            except TarsError as error:
                self._emit([(submission.sequence, error)])
            else:
                self._emit([(submission.sequence, Tokenized(tokens=tokens))])
        elif isinstance(work, ChatParams | CompleteParams):
            self._waiting.append((submission, now))
        else:
            self._emit(
                [
                    (
                        submission.sequence,
                        WrongModelKind("This is a chat model; it makes no embeddings. Ask an embedding model."),
                    )
                ]
            )

    def _drop_ended(self, cancelled: set[int], now: float) -> None:
        """End what was cancelled or is too late, waiting or active."""

        def ending(number: int, deadline: float | None) -> TarsError | None:
            if number in cancelled:
                return Cancelled("The call was cancelled.")
            if deadline is not None and now >= deadline:
                return DeadlineExceeded("The call's time budget is used up; the work was stopped.")
            return None

        for entry in list(self._waiting):
            submission = entry[0]
            if (error := ending(submission.sequence, submission.deadline)) is not None:
                self._waiting.remove(entry)
                self._emit([(submission.sequence, error)])
        active = self._active
        if active is not None and (error := ending(active.number, active.deadline)) is not None:
            self._fail(error)

    def _begin_or_refuse(self, submission: Submission, received: float) -> None:
        """`_begin`; a fault of ours in there ends this call only: nothing was computed yet, so the others' state is whole."""
        try:
            self._begin(submission, received)
        except TarsError:
            raise
        except Exception:  # noqa: BLE001  # whatever a caller's schema or template provokes must not take everybody's worker along
            traceback.print_exc()
            raise InternalError(
                "The call could not be prepared; the worker's lines in the node's log say why."
            ) from None

    def _begin(self, submission: Submission, received: float) -> None:
        """Make a waiting call the active one: render, tokenize, check, find what of its prompt is cached."""
        from tars.workers.llama_sampling import Sampler, compile_grammar

        assert self._context is not None
        sequence = self._active = _Sequence(submission, received)
        sequence.started = time.monotonic()
        work = sequence.work
        sequence.tokens = self._prompt(work)
        sequence.prompt_length = len(sequence.tokens)
        room = self._spec.context - sequence.prompt_length
        sequence.most = room if work.max_tokens is None else min(work.max_tokens, room)
        stop = [*work.stop, *(self._template_stop if isinstance(work, ChatParams) else [])]
        sequence.stream = TextStream(stop)
        seed = secrets.randbits(32) if work.seed is None else work.seed
        sequence.sampler = Sampler(self._model, work, sequence.tokens, [], seed, compile_grammar(self._model, work))
        shared = 0
        for ours, cached in zip(sequence.tokens, self._cached, strict=False):
            if ours != cached:
                break
            shared += 1
        # The last token is always computed again: its logits are what generation starts from.
        whole_chunks = min(shared, sequence.prompt_length - 1) // self._chunk * self._chunk
        sequence.position = self._context.forget(whole_chunks)
        self._cached = sequence.tokens[: sequence.position]

    def _prompt(self, work: ChatParams | CompleteParams) -> list[int]:
        text = self._template.render(work.messages) if isinstance(work, ChatParams) else work.prompt
        encoded = _encode(text)
        context = self._spec.context
        fewest = self._model.fewest_tokens(encoded)
        if fewest >= context:
            raise _too_long(fewest, context, "at least ")
        bos_text = self._model.special_text(self._model.bos)
        # A template that spells the beginning-of-sequence token out must not get a second one.
        add_special = not (isinstance(work, ChatParams) and bos_text and text.startswith(bos_text))
        tokens = self._model.tokenize(encoded, add_special=add_special)
        if not tokens and self._model.bos >= 0:
            tokens = [self._model.bos]
        if not tokens:
            raise InvalidParams("The prompt is empty, and this model has no token to begin with. Give it some text.")
        if len(tokens) >= context:
            raise _too_long(len(tokens), context, "")
        return tokens

    def _step(self, sequence: _Sequence) -> None:
        """Compute the next chunk of the prompt or the newest token; where that was the last one known, choose the next."""
        from tars.workers.llama_model import Aborted

        assert self._context is not None
        end = min(sequence.position + self._chunk, len(sequence.tokens))
        try:
            logits = self._context.decode(sequence.tokens[sequence.position : end], sequence.position)
        except Aborted:
            # Whoever set the flag is in the inbox, or it was meant for a sequence that just ended: then this chunk is simply repeated.
            sequence.position = self._context.forget(sequence.position)
            return
        sequence.position = end
        if end <= sequence.prompt_length and end % self._chunk == 0:
            self._cached = sequence.tokens[:end]
        if end == len(sequence.tokens):
            self._choose(sequence, logits)

    def _choose(self, sequence: _Sequence, logits: Logits) -> None:
        """Sample one token, hand out the text that it makes certain, end the generation where it ends."""
        from tars.workers.llama_sampling import check_finite, token_logprob

        assert sequence.sampler is not None
        check_finite(logits)
        token = sequence.sampler.sample(logits)
        if sequence.first_token is None:
            sequence.first_token = time.monotonic()
        if token in self._model.end_tokens:
            self._finish(sequence, "stop")
            return
        wanted = sequence.work.logprobs
        logprob = token_logprob(self._model, logits, token, wanted) if wanted is not None else None
        sequence.tokens.append(token)
        self._hand_out(sequence, sequence.stream.push(token, self._model.pieces[token], logprob))
        if sequence.stream.stopped:
            self._finish(sequence, "stop")
        elif len(sequence.tokens) - sequence.prompt_length >= sequence.most:
            self._finish(sequence, "length")

    def _hand_out(self, sequence: _Sequence, released: Released[TokenLogprob | None]) -> None:
        if not released.token_ids:
            return
        logprobs = [one for one in released.extras if one is not None] if sequence.work.logprobs is not None else None
        sequence.text.append(released.text)
        sequence.logprobs += logprobs or []
        self._emit([(sequence.number, Delta(text=released.text, token_ids=released.token_ids, logprobs=logprobs))])

    def _finish(self, sequence: _Sequence, reason: FinishReason) -> None:
        self._hand_out(sequence, sequence.stream.finish())
        now = time.monotonic()
        generated = len(sequence.tokens) - sequence.prompt_length
        decode_seconds = now - (sequence.first_token or now)
        # The first token comes out of the prefill; the speed is that of the ones after it.
        speed = (generated - 1) / decode_seconds if generated > 1 and decode_seconds > 0 else None
        first = None if sequence.first_token is None else _ms(sequence.first_token - sequence.received)
        self._close_active()
        self._emit(
            [
                (
                    sequence.number,
                    Generated(
                        text="".join(sequence.text),
                        finish_reason=reason,
                        usage=Usage(
                            prompt_tokens=sequence.prompt_length,
                            completion_tokens=generated,
                            total_tokens=len(sequence.tokens),
                        ),
                        timings=Timings(
                            queue_ms=_ms(sequence.started - sequence.received),
                            first_token_ms=first,
                            total_ms=_ms(now - sequence.received),
                            tokens_per_second=None if speed is None else round(speed, 2),
                        ),
                        logprobs=sequence.logprobs if sequence.work.logprobs is not None else None,
                    ),
                )
            ]
        )

    def _fail(self, error: TarsError) -> None:
        assert self._active is not None
        number = self._active.number
        self._close_active()
        self._emit([(number, error)])

    def _close_active(self) -> None:
        active, self._active = self._active, None
        if active is not None and active.sampler is not None:
            active.sampler.close()


def _ms(seconds: float) -> float:
    return round(max(0.0, seconds) * 1000, 3)


def _encode(text: str) -> bytes:
    """UTF-8; half of a surrogate pair becomes a question mark instead of an exception."""
    return text.encode("utf-8", "replace")


def _too_long(tokens: int, context: int, at_least: str) -> PromptTooLong:
    return PromptTooLong(
        f"The prompt has {at_least}{tokens} tokens and the context {context}, which has to hold the answer too. "
        "Shorten it, or deploy the model with a larger context.",
        details={"prompt_tokens": tokens, "context": context},
    )
