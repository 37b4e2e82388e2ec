"""Chat and completion by llama.cpp: continuous batching of many sequences, one step after the other, in one thread.

Law of this file: the engine protocol outside; inside it lets the others work: `preparation` makes tokens of a call, `batcher` decides and
computes the steps, `llama_sampling` chooses tokens, `generation` says what a caller sees of them. No ctypes here.
"""

from __future__ import annotations

import os
import secrets
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from tars.errors import (
    BadModelFile,
    Draining,
    InternalError,
    InvalidParams,
    ReplicaFailed,
    TarsError,
    WrongModelKind,
)
from tars.messages.inference import ChatParams, CompleteParams, Tokenized, TokenizeParams
from tars.messages.node import EngineCounters, LoadedInfo, TunedSettings
from tars.workers.answer_format import AnswerFormat
from tars.workers.chat_template import CHATML, ChatTemplate
from tars.workers.engine import Emit, LoadSpec, Progress, Saved, SaveParams, Submission
from tars.workers.generation import SEEDS, Answer, Call, Emission, SavedCells, ending_error
from tars.workers.inbox import Inbox
from tars.workers.kv_cache import KvCache
from tars.workers.preparation import Preparation, Prepared
from tars.workers.sequence_state import read_state, write_state

if TYPE_CHECKING:  # importing these imports llama_cpp, which is `load`'s stage `import`
    from tars.workers.adapters import Adapters
    from tars.workers.batcher import Batcher
    from tars.workers.drafting import Drafting
    from tars.workers.llama_context import Context, Rows
    from tars.workers.llama_model import Model

EXACT_CHUNK = 64
"""Prefill borders of exact mode. A constant, not a measurement: replicas on other PCs must have the same."""


class LlamaEngine:
    """See the module's law."""

    def __init__(self) -> None:
        self._inbox = Inbox()
        self._calls: dict[int, Call] = {}
        self._out: list[Emission] = []
        self._mark = 0
        self._generated = 0
        self._busy_seconds = 0.0
        self._on_device = False
        self._free_before: int | None = None
        self._resident_before = 0
        self._memory = 0
        self._emit: Emit
        self._spec: LoadSpec
        self._model: Model
        self._adapters: Adapters
        self._drafting: Drafting | None = None
        self._draft_said = ""
        self._context: Context | None = None
        self._cache: KvCache
        self._batcher: Batcher | None = None
        self._preparation: Preparation
        self._format: AnswerFormat
        self._template_stop: list[str] = []

    # --- load ---

    def load(self, spec: LoadSpec, progress: Progress, emit: Emit) -> LoadedInfo:
        """See the protocol. Percent is of the whole load: import to 5, weights to 85, warm-up to 99."""
        started = time.monotonic()
        self._spec, self._emit = spec, emit
        self._resident_before = psutil.Process().memory_info().rss
        progress("import", 1.0)
        if spec.exact:
            # Read once, at the library's first product: without it ggml takes other kernels from 8 rows on (measured: Q4_0, Q6_K, Q4_K).
            os.environ["GGML_CPU_TILED_MM"] = "0"
        try:
            from tars.workers import llama_library
            from tars.workers.adapters import Adapters
            from tars.workers.batcher import ALONE_SECONDS, JOIN_SECONDS, Batcher, Shapes
            from tars.workers.drafting import Drafting
            from tars.workers.llama_context import shares_cells
            from tars.workers.llama_model import Model
            from tars.workers.self_measurement import chunk_for, gap_worth_filling
        except ImportError:
            raise ReplicaFailed(
                "llama-cpp-python is not installed or does not load here, so chat models cannot run. "
                "Install it with `pip install 'tars-node[chat]'` and restart the node."
            ) from None
        if spec.exact and shares_cells(spec):
            raise ReplicaFailed(
                "Exact mode needs a KV cache of its own for every slot: shared cells lie in another order each time. Deploy the model "
                'without kv_tokens and with as many slots as fit, or set `continuation = "fast"` under [engines].'
            )
        if spec.kv_tokens is not None and spec.kv_tokens < spec.context:
            raise ReplicaFailed(
                f"kv_tokens = {spec.kv_tokens} cannot hold one sequence of the context, {spec.context}: such a call could never end. "
                "Give at least the context's length, or a smaller context."
            )
        self._log = llama_library.NativeLog()
        self._log.install()
        self._on_device = spec.gpu_layers != 0 and spec.cuda_device is not None
        self._free_before = llama_library.free_device_memory() if self._on_device else None
        progress("read", 5.0)
        self._model = Model(spec, self._log, lambda percent: progress("load", 5.0 + 0.75 * percent))
        self._adapters = Adapters(self._model, spec.adapters, self._log)
        if spec.draft_path is not None:
            if not spec.exact and self._model.forgets_partly:
                self._drafting = Drafting(
                    self._model, spec, self._log, lambda percent: progress("load", 80.0 + 0.02 * percent)
                )
                self._draft_said = ", with a draft model"
            elif spec.exact:
                self._draft_said = ", without its draft model (exact mode)"
            else:
                self._draft_said = ", without its draft model (this model cannot take tokens back)"
        source = self._model.chat_template
        template = ChatTemplate(
            source or CHATML, self._model.special_text(self._model.bos), self._model.special_text(self._model.eos)
        )
        # Without a template of its own the model may not know ChatML's end token as one: then it comes as text.
        self._template_stop = [] if source else ["<|im_end|>"]
        self._format = AnswerFormat.of(source)
        self._model.show(self._format.markers)
        progress("load", 82.0)
        tuned = self._warm_up(progress)
        assert self._context is not None
        chunk = tuned.chunk or 1
        self._cache = KvCache(
            spec.slots,
            spec.kv_tokens if self._context.shared and spec.kv_tokens is not None else spec.slots * spec.context,
            shared=self._context.shared,
            partial=self._model.forgets_partly,
            chunk=chunk if spec.exact else 0,
        )
        most = min(spec.micro_batch, spec.context)
        shapes = Shapes(
            chunk=chunk,
            alone=chunk_for(tuned.speeds, ALONE_SECONDS * 1000, most),
            joined=chunk_for(tuned.speeds, JOIN_SECONDS * 1000, most),
            most=most,
            bound=spec.inter_token_ms / 1000,
            # An idle stream that is computed along must be able to forget that token again.
            gap=gap_worth_filling(tuned.speeds, spec.slots) if self._model.forgets_partly else 0,
            exact=spec.exact,
            least_rows=self._least_rows,
        )
        self._batcher = Batcher(
            self._context,
            self._cache,
            shapes,
            room=spec.context,
            choose=self._choose,
            fail=self._fail,
            adapt=self._adapt,
            drafting=self._drafting,
        )
        self._preparation = Preparation(self._model, template, self._format, spec.context, self._inbox.hand_back)
        self._measure_memory()
        return LoadedInfo(
            model_kind="chat",
            memory_bytes=self._memory,
            load_seconds=round(time.monotonic() - started, 3),
            context=spec.context,
            slots=spec.slots,
            has_chat_template=source is not None,
            architecture=self._model.architecture,
            backend=f"llama.cpp (llama-cpp-python {llama_library.version()}), {'GPU' if self._on_device else 'CPU'}"
            + self._draft_said,
            file_sha256=spec.sha256,
            speeds=tuned.speeds,
            tuned=tuned,
            adapters=self._adapters.names,
        )

    def _warm_up(self, progress: Progress) -> TunedSettings:
        """Make the context: with the settings that an earlier load of the same measured, else with those that are measured now.

        Computes a little in any case: pages the weights in, and refuses weights that give no numbers.
        """
        from tars.workers import self_measurement as measurement
        from tars.workers.llama_context import Context, shares_cells
        from tars.workers.llama_sampling import check_finite

        spec, known = self._spec, self._spec.tuned
        most = min(spec.context, max(spec.micro_batch, EXACT_CHUNK if spec.exact else 1))

        shared = shares_cells(spec) and spec.kv_tokens is not None
        room = max(2, (spec.kv_tokens or 0) // spec.slots) if shared else spec.context

        def made(flash_attention: bool) -> Context:
            return Context(self._model, spec, self._log, chunk=most, flash_attention=flash_attention)

        flash = spec.flash_attention if known is None or known.flash_attention is None else known.flash_attention
        context = self._context = made(flash)
        progress("warm", 85.0)
        ordinary = next((token for token in range(self._model.tokens) if self._model.pieces[token]), 0)
        try:
            check_finite(context.decode([ordinary], [0], [0], [0])[0])
        except ReplicaFailed as error:
            raise BadModelFile(error.message) from None
        context.forget(0, 0)
        self._mark += 1
        if known is not None and known.chunk is not None:
            speeds = known.speeds
        else:
            progress("warm", 88.0)
            measured = measurement.measure(context, self._model, room=room, chunk=most, mark=self._tick)
            # A card's kernels are known (core.tuning), a quantised cache needs flash attention, and exact mode needs one order of sums.
            if (
                not (self._on_device or spec.kv_type != "f16" or spec.exact)
                and measured.decode_one < measurement.SLOW_SECONDS
            ):
                progress("warm", 93.0)
                context.close()
                self._context = None
                context = self._context = made(not flash)
                other = measurement.measure(context, self._model, room=room, chunk=most, mark=self._tick)
                if other.typical < measurement.FLASH_WORTH * measured.typical:
                    measured, flash = other, not flash
                else:
                    context.close()
                    self._context = None
                    context = self._context = made(flash)
            speeds = measured.speeds
        chunk = (
            min(EXACT_CHUNK, spec.context) if spec.exact else measurement.chunk_for(speeds, spec.inter_token_ms, most)
        )
        self._least_rows = 1
        if spec.exact:
            # With each adapter: its matrices may go through other kernels than the model's.
            least = [measurement.least_exact_rows(context, self._model, room) for _ in self._adapters.each(context)]
            if None in least:
                raise ReplicaFailed(
                    "On this device a sequence's numbers depend on how many others are computed with it, so several slots cannot be exact. "
                    'Deploy the model with slots = 1, or set `continuation = "fast"` under [engines].'
                )
            self._least_rows = max(rows for rows in least if rows is not None)
        self._adapters.try_out(context, ordinary)
        if self._drafting is not None:
            progress("warm", 97.0)
            if not self._drafting.warm_up(context, ordinary, flash_attention=flash, mark=self._tick):
                self._draft_said = ", without its draft model (slower with it)"
                self._drafting.close()
                self._drafting = None
        context.native_seconds, context.decodes = 0.0, 0
        progress("warm", 99.0)
        return TunedSettings(flash_attention=flash, chunk=chunk, speeds=speeds)

    def _tick(self) -> None:
        self._mark += 1

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
        # A decode that computes for others too is awaited: its end frees the slot.
        batcher = self._batcher
        if batcher is not None and batcher.decoding.computing == {sequence} and self._context is not None:
            self._context.abort.set()

    def abort_step(self) -> bool:
        """Stop the decode that runs, for it does not end: it is tried once more, then its answers fail. False while none runs."""
        batcher = self._batcher
        if batcher is not None and batcher.decoding.computing and self._context is not None:
            batcher.decoding.stopped_by_watchdog = True
            self._context.abort.set()
            return True
        return False

    def memory_bytes(self) -> int:
        """On a GPU what the load took; on a CPU the resident growth as of now (pages of a mapped file come and go)."""
        if self._free_before is not None:
            return self._memory
        return max(0, psutil.Process().memory_info().rss - self._resident_before)

    def counters(self) -> EngineCounters:
        """See the protocol; a snapshot, taken while the engine works."""
        context, batcher = self._context, self._batcher
        if context is None or batcher is None:
            return EngineCounters()
        drafting = self._drafting
        native = context.native_seconds + (0.0 if drafting is None else drafting.native_seconds)
        used = min(self._cache.cells, sum(answer.position for answer in tuple(batcher.running)))
        return EngineCounters(
            running=len(batcher.running),
            waiting=len(batcher.waiting) + self._preparation.busy,
            kv_cells=self._cache.cells,
            kv_used=used,
            kv_cached=max(0, self._cache.cells - self._cache.free - used),
            steps=context.decodes,
            prompt_tokens=batcher.prompt_tokens,
            prompt_tokens_cached=batcher.prompt_tokens_cached,
            generated_tokens=self._generated,
            preemptions=batcher.preemptions,
            draft_tokens=0 if drafting is None else drafting.proposed,
            draft_accepted=0 if drafting is None else drafting.accepted,
            python_seconds=round(max(0.0, self._busy_seconds - native), 6),
            native_seconds=round(native, 6),
        )

    def progress_mark(self) -> int:
        """See the protocol: decodes and rounds of the loop."""
        return self._mark + (self._batcher.decoding.steps if self._batcher is not None else 0)

    def unload(self) -> None:
        """See the protocol."""
        self._inbox.close()
        if self._context is not None:
            self._context.abort.set()

    # --- the engine thread ---

    def run(self) -> None:
        """See the protocol."""
        assert self._context is not None
        assert self._batcher is not None
        batcher = self._batcher
        while True:
            # What is prepared in other threads is looked at once a second, for its deadlines.
            taken = self._inbox.take(wait=not batcher.busy, seconds=1.0 if self._preparation.busy else None)
            if taken.closed:
                break
            began = time.perf_counter()
            self._context.abort.clear()
            batcher.decoding.stopped_by_watchdog = False  # it came when its step had just ended
            now = time.monotonic()
            for submission in taken.submissions:
                self._admit(submission)
            for prepared in taken.handed_back:
                if self._preparation.done(prepared):
                    self._begin(prepared)
            self._drop_ended(taken.cancelled, now)
            if batcher.busy:
                batcher.step(self._flush)
            self._mark += 1
            self._flush()
            self._busy_seconds += time.perf_counter() - began
        for call in list(self._calls.values()):
            self._close(call)
        self._context.close()
        if self._drafting is not None:
            self._drafting.close()
        self._adapters.close()
        self._model.close()

    def _flush(self) -> None:
        if self._out:
            out, self._out = self._out, []
            self._emit(out)

    # --- calls come and go ---

    def _admit(self, submission: Submission) -> None:
        work = submission.work
        if isinstance(work, SaveParams):
            self._save(submission, work)
        elif isinstance(work, ChatParams | CompleteParams | TokenizeParams):
            prepared = self._preparation.prepare(submission)
            if prepared is not None:
                self._begin(prepared)
        else:
            error = WrongModelKind(
                "This is a chat model; it makes no embeddings and ranks nothing. Ask a model that does."
            )
            self._out.append((submission.sequence, error))

    def _begin(self, prepared: Prepared) -> None:
        """A prepared call: answer it, refuse it, or let its answers wait for streams."""
        submission, work = prepared.submission, prepared.submission.work
        number = submission.sequence
        if prepared.error is not None:
            self._out.append((number, prepared.error))
            return
        if isinstance(work, TokenizeParams):
            self._out.append((number, Tokenized(tokens=prepared.tokens)))
            return
        assert isinstance(work, ChatParams | CompleteParams)
        try:
            self._enter(prepared, work)
        except TarsError as error:
            self._out.append((number, error))
        except Exception:  # noqa: BLE001  # nothing was computed yet, so the others' state is whole: only this call ends
            traceback.print_exc()
            text = "The call could not be prepared; the worker's lines in the node's log say why."
            self._out.append((number, InternalError(text)))

    def _enter(self, prepared: Prepared, work: ChatParams | CompleteParams) -> None:
        """Make the call and its answers, and let them wait for streams. Raises what its sampling settings make impossible."""
        from tars.workers.adapters import adapter_of
        from tars.workers.llama_sampling import Sampler

        assert self._batcher is not None
        number = prepared.submission.sequence
        resume = prepared.submission.resume
        drawn = secrets.randbelow(SEEDS) if work.seed is None else work.seed
        seed = drawn if resume is None else resume.seed
        call = Call(
            prepared.submission,
            prepared.tokens,
            seed=seed,
            context=self._spec.context,
            answers=self._format,
            prompt_end=prepared.prompt_end,
            adapter=adapter_of(work.model, self._spec.model, self._adapters.names),
            template_stop=self._template_stop if isinstance(work, ChatParams) else (),
        )
        if any(not 0 <= token < self._model.tokens for one in call.begun for token in one.tokens):
            raise InvalidParams("The answer to be continued holds tokens that this model does not have.")
        try:
            for answer in call.answers:
                generated = answer.tokens[answer.prompt_length :]
                answer.sampler = Sampler(self._model, work, prepared.tokens, generated, answer.seed, prepared.grammar)
                if resume is not None and (delta := answer.replay(self._model.pieces)) is not None:
                    self._out.append((number, delta))
        except BaseException:
            for answer in call.answers:
                answer.close()
            raise
        for answer in call.answers:
            if answer.finish_reason is not None:  # it was whole already when it was broken off
                answer.close()
        if call.ended:
            self._out.append((number, call.result(time.monotonic())))
            return
        if resume is not None and resume.path is not None and work.n == 1:
            call.answers[0].saved = read_state(Path(resume.path), call.answers[0].tokens, call.adapter)
        self._calls[number] = call
        self._batcher.add([answer for answer in call.answers if answer.finish_reason is None])

    def _drop_ended(self, cancelled: set[int], now: float) -> None:
        """End what was cancelled or is too late, wherever it stands."""
        for call in list(self._calls.values()):
            if (error := call.ending(cancelled, now)) is not None:
                self._fail(call, error)
        if not self._preparation.busy:
            return
        for submission in self._preparation.pending():
            late = submission.deadline is not None and now >= submission.deadline
            if submission.sequence in cancelled or late:
                self._preparation.drop(submission.sequence)
                self._out.append((submission.sequence, ending_error(submission.sequence in cancelled)))
        self._out += self._preparation.late(now)

    def _fail(self, call: Call, error: TarsError) -> None:
        # Cells behind numbers that are none would spoil every prompt that begins alike.
        self._close(call, keep=not isinstance(error, ReplicaFailed))
        self._out.append((call.number, error))

    def _close(self, call: Call, *, keep: bool = True) -> None:
        assert self._batcher is not None
        self._calls.pop(call.number, None)
        self._batcher.drop(call, keep=keep)
        for answer in call.answers:
            answer.close()

    # --- tokens ---

    def _choose(self, answers: list[Answer], rows: Rows) -> None:
        """Sample the next token of each answer from its row of logits, and hand out what that makes certain."""
        from tars.workers.llama_sampling import greedy_rows

        now = time.monotonic()
        if all(answer.sampler is not None and answer.sampler.plain_greedy for answer in answers):
            greedy = greedy_rows(rows)
            for answer, token, row in zip(answers, greedy, rows, strict=True):
                self._take_token(answer, token, row, now)
            return
        for answer, row in zip(answers, rows, strict=True):
            self._take_token(answer, None, row, now)

    def _take_token(self, answer: Answer, token: int | None, row: Rows, now: float) -> None:
        """`token` None: it is still to be sampled, or the row holds something that is not a number."""
        from tars.workers.llama_sampling import Sampler, check_finite, token_logprob

        if answer.call.number not in self._calls:
            return  # another answer of the same call has just failed it
        assert isinstance(answer.sampler, Sampler)
        work = answer.call.work
        try:
            if token is None:
                check_finite(row)
                token = answer.sampler.sample(row)
            logprob = None if work.logprobs is None else token_logprob(self._model, row, token, work.logprobs)
            ended = token in self._model.end_tokens
            delta = answer.finish("stop") if ended else answer.accept(token, self._model.pieces[token], logprob)
        except TarsError as error:
            self._fail(answer.call, error)
            return
        except Exception:  # noqa: BLE001  # sampling and text are this call's alone: whatever went wrong in them is no reason to end the others
            traceback.print_exc()
            text = "The answer's next token could not be chosen or read; the worker's lines in the node's log say why."
            self._fail(answer.call, InternalError(text))
            return
        if answer.first_token is None:
            answer.first_token = now
        self._generated += 1
        if delta is not None:
            self._out.append((answer.call.number, delta))
        if answer.finish_reason is not None:
            self._finish(answer)

    def _adapt(self, adapter: str) -> None:
        assert self._context is not None
        self._adapters.use(self._context, adapter)

    def _finish(self, answer: Answer) -> None:
        assert self._batcher is not None
        self._batcher.leave(answer)
        answer.close()
        call = answer.call
        if call.ended:
            self._calls.pop(call.number, None)
            self._out.append((call.number, call.result(time.monotonic())))

    def _save(self, submission: Submission, work: SaveParams) -> None:
        """Write an answer's state to the file and end it here."""
        assert self._context is not None
        call = self._calls.get(work.sequence)
        if call is None or len(call.answers) != 1:
            text = "There is no such running answer here, or it is one of several; nothing was saved."
            self._out.append((submission.sequence, InvalidParams(text)))
            return
        if self._context.copying:
            self._inbox.put(submission)  # its cells may still be on their way: after the next step
            return
        answer = call.answers[0]
        try:
            cells = answer.saved
            if answer.stream is not None and answer.position:
                cells = SavedCells(self._context.state(answer.stream), answer.position)
            size = write_state(Path(work.path), answer.tokens, cells, call.adapter)
        except (OSError, MemoryError, InternalError):
            traceback.print_exc()
            text = "The answer's state could not be written (is the disk or the memory full?); it goes on here."
            self._out.append((submission.sequence, InternalError(text)))
            return
        generated = answer.tokens[answer.prompt_length :]
        saved = Saved(bytes=size, prompt_tokens=answer.prompt_length, generated=generated, seed=call.seed)
        self._fail(call, Draining("The answer moves to another replica; go on with it there."))
        self._out.append((submission.sequence, saved))
