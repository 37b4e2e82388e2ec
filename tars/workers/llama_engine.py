"""Chat and completion by llama.cpp: continuous batching of many sequences, one step after the other, in one thread.

Law of this file: the engine protocol outside; inside it lets the others work: `warm_up` ends the load, `preparation` makes tokens of a
call, `answering` makes the call's answers, and its `batcher` decides what a step computes. No ctypes here.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import psutil

from tars.errors import ReplicaFailed, WrongModelKind
from tars.messages.inference import ChatParams, CompleteParams, TokenizeParams
from tars.messages.node import EngineCounters, LoadedInfo
from tars.workers.answer_format import AnswerFormat
from tars.workers.chat_template import CHATML, ChatTemplate
from tars.workers.engine import Emit, LoadSpec, Progress, SaveParams, Submission
from tars.workers.generation import ending_error
from tars.workers.inbox import Inbox
from tars.workers.kv_cache import KvCache
from tars.workers.preparation import Preparation
from tars.workers.thread_waiting import ThreadWaiting

if TYPE_CHECKING:  # importing these imports llama_cpp, which is `load`'s stage `import`
    from tars.workers.adapters import Adapters
    from tars.workers.answering import Answering
    from tars.workers.batcher import Batcher
    from tars.workers.drafting import Drafting
    from tars.workers.llama_context import Context
    from tars.workers.llama_model import Model


class LlamaEngine:
    """See the module's law."""

    def __init__(self) -> None:
        self._inbox = Inbox()
        self._mark = 0
        self._busy_seconds = 0.0
        self._free_before: int | None = None
        self._resident_before = 0
        self._memory = 0
        self._model: Model
        self._adapters: Adapters
        self._drafting: Drafting | None = None
        self._context: Context | None = None
        self._cache: KvCache
        self._answering: Answering
        self._batcher: Batcher | None = None
        self._preparation: Preparation
        self._waiting: ThreadWaiting

    # --- load ---

    def load(self, spec: LoadSpec, progress: Progress, emit: Emit) -> LoadedInfo:
        """See the protocol. Percent is of the whole load: import to 5, weights to 85, warm-up to 99."""
        started = time.monotonic()
        self._resident_before = psutil.Process().memory_info().rss
        progress("import", 1.0)
        if spec.exact:
            # Read once, at the library's first product: without it ggml takes other kernels from 8 rows on (measured: Q4_0, Q6_K, Q4_K).
            os.environ["GGML_CPU_TILED_MM"] = "0"
        try:
            from tars.workers import llama_library
            from tars.workers.adapters import Adapters
            from tars.workers.answering import Answering
            from tars.workers.drafting import Drafting
            from tars.workers.llama_context import shares_cells
            from tars.workers.llama_model import Model
            from tars.workers.warm_up import warm_up
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
        log = llama_library.NativeLog()
        log.install()
        on_device = spec.gpu_layers != 0 and spec.cuda_device is not None
        self._free_before = llama_library.free_device_memory() if on_device else None
        progress("read", 5.0)
        self._model = Model(spec, log, lambda percent: progress("load", 5.0 + 0.75 * percent))
        self._adapters = Adapters(self._model, spec.adapters, log)
        draft_said = ""
        if spec.draft_path is not None:
            if not spec.exact and self._model.forgets_partly:
                self._drafting = Drafting(
                    self._model, spec, log, lambda percent: progress("load", 80.0 + 0.02 * percent)
                )
                draft_said = ", with a draft model"
            elif spec.exact:
                draft_said = ", without its draft model (exact mode)"
            else:
                draft_said = ", without its draft model (this model cannot take tokens back)"
        source = self._model.chat_template
        template = ChatTemplate(
            source or CHATML, self._model.special_text(self._model.bos), self._model.special_text(self._model.eos)
        )
        answers = AnswerFormat.of(source)
        self._model.show(answers.markers)
        progress("load", 82.0)
        warm = warm_up(
            spec,
            self._model,
            self._adapters,
            self._drafting,
            log,
            progress,
            on_device=on_device,
            mark=self._tick,
        )
        if self._drafting is not None and not warm.drafts:
            draft_said = ", without its draft model (slower with it)"
            self._drafting.close()
            self._drafting = None
        self._context = warm.context
        self._cache = KvCache(
            warm.context.streams,
            spec.kv_tokens if warm.context.shared and spec.kv_tokens is not None else spec.slots * spec.context,
            shared=warm.context.shared,
            partial=self._model.forgets_partly,
            chunk=warm.shapes.chunk if spec.exact else 0,
        )
        self._answering = Answering(
            spec,
            self._model,
            self._adapters,
            answers,
            warm.context,
            self._cache,
            warm.shapes,
            self._drafting,
            emit,
            # Without a template of its own the model may not know ChatML's end token as one: then it comes as text.
            template_stop=[] if source else ["<|im_end|>"],
        )
        self._batcher = self._answering.batcher
        self._preparation = Preparation(self._model, template, answers, spec.context, self._inbox.hand_back)
        self._waiting = ThreadWaiting(spec.threads)
        self._measure_memory()
        return LoadedInfo(
            model_kind="chat",
            memory_bytes=self._memory,
            load_seconds=round(time.monotonic() - started, 3),
            context=spec.context,
            slots=spec.slots,
            has_chat_template=source is not None,
            architecture=self._model.architecture,
            backend=f"llama.cpp (llama-cpp-python {llama_library.version()}), {'GPU' if on_device else 'CPU'}"
            + draft_said,
            file_sha256=spec.sha256,
            speeds=warm.tuned.speeds,
            tuned=warm.tuned,
            adapters=self._adapters.names,
        )

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
            generated_tokens=self._answering.generated,
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
        answering, batcher = self._answering, self._batcher
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
                    answering.begin(prepared)
            self._drop_ended(taken.cancelled, now)
            if batcher.busy:
                self._waiting.look(self._context.native_seconds, began)
                batcher.step(answering.flush)
            self._mark += 1
            answering.flush()
            self._busy_seconds += time.perf_counter() - began
        answering.close()
        self._waiting.close()
        self._context.close()
        if self._drafting is not None:
            self._drafting.close()
        self._adapters.close()
        self._model.close()

    def _admit(self, submission: Submission) -> None:
        work = submission.work
        if isinstance(work, SaveParams):
            if not self._answering.save(submission, work):
                self._inbox.put(submission)  # once more after the next step
        elif isinstance(work, ChatParams | CompleteParams | TokenizeParams):
            prepared = self._preparation.prepare(submission)
            if prepared is not None:
                self._answering.begin(prepared)
        else:
            error = WrongModelKind(
                "This is a chat model; it makes no embeddings and ranks nothing. Ask a model that does."
            )
            self._answering.out.append((submission.sequence, error))

    def _drop_ended(self, cancelled: set[int], now: float) -> None:
        """End what was cancelled or is too late, wherever it stands."""
        self._answering.end_late(cancelled, now)
        if not self._preparation.busy:
            return
        for submission in self._preparation.pending():
            late = submission.deadline is not None and now >= submission.deadline
            if submission.sequence in cancelled or late:
                self._preparation.drop(submission.sequence)
                self._answering.out.append((submission.sequence, ending_error(submission.sequence in cancelled)))
        self._answering.out += self._preparation.late(now)
