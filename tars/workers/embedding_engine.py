"""Text embeddings and reranking by sentence-transformers models, batched across concurrent calls.

Law of this file: the engine protocol outside; inside it joins the parts: `embedding_intake` reads calls (what may take long, in a thread
of its own), `embedding_pool` keeps their texts in one queue, `embedding_choice` found the back end, and the loop here computes one batch
after the other and answers: a batch begins as soon as there is a text, none is waited for. Vectors are those of
`SentenceTransformer.encode(normalize_embeddings=True)`, scores those of `CrossEncoder.predict` (tests hold it). A batch that does not fit
the device's memory is computed in halves, and the smaller size is remembered.
"""

from __future__ import annotations

import contextlib
import ctypes
import time
from pathlib import Path
from typing import Any

import psutil

from tars.errors import DeadlineExceeded, DoesNotFit, ReplicaFailed, TarsError
from tars.messages.inference import Embedded, Reranked, RerankParams, Timings
from tars.messages.node import EngineCounters, LoadedInfo
from tars.workers.embedding_backends import Backend
from tars.workers.embedding_batches import TokenBudget
from tars.workers.embedding_choice import Chooser
from tars.workers.embedding_intake import Intake
from tars.workers.embedding_model import LoadedModel, import_engine, is_out_of_memory, kind_of
from tars.workers.embedding_pool import Call, Item, TextPool
from tars.workers.embedding_vectors import encoded
from tars.workers.engine import Emit, Event, LoadSpec, Progress, Submission
from tars.workers.inbox import Inbox

GIVE_BACK_SECONDS = 20.0
"""How often holes in the memory go back to the system: some milliseconds of page faults each time."""

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""From malloc.h."""


def keep_freed_memory() -> None:
    """Let glibc keep the activations of one pass for the next: given back and faulted in again, they cost up to 10 % (measured)."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, 2**30)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def give_back_memory() -> None:
    """Give the system the pages that nothing lies in. Batches of ever other shapes leave holes that fit no later one: without it a worker
    grew from 690 to 1,150 MiB in 20 minutes.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


class EmbeddingEngine:
    """See the module's law."""

    def __init__(self) -> None:
        self._inbox = Inbox()
        self._pool = TextPool()
        self._counters = EngineCounters()
        self._events: list[tuple[int, Event | Exception]] = []
        self._steps = 0
        self._texts = 0
        self._padding = 0
        self._native_seconds = 0.0
        self._busy_seconds = 0.0
        self._resident_before = 0
        self._device_memory: int | None = None
        self._emit: Emit
        self._backend: Backend
        self._budget: TokenBudget
        self._intake: Intake | None = None

    # --- load ---

    def load(self, spec: LoadSpec, progress: Progress, emit: Emit) -> LoadedInfo:
        """See the protocol. Percent is of the whole load: the imports take most of it."""
        started = time.monotonic()
        self._emit = emit
        self._resident_before = psutil.Process().memory_info().rss
        kind = kind_of(Path(spec.path))
        progress("import", 1.0)
        import_engine()
        progress("read", 60.0)
        model = LoadedModel(spec.path, kind)
        torch = model.torch
        torch.set_num_threads(max(1, spec.threads))
        keep_freed_memory()
        free_before = self._free_on_card(torch, spec)
        tokenizer = model.tokenizer()
        progress("warm", 75.0)
        architecture, prompts, default_prompt = model.architecture, model.prompts, model.default_prompt
        choice = self._choose(Chooser(model, tokenizer, spec, lambda line: print(f"embedding: {line}", flush=True)))
        progress("warm", 99.0)
        self._backend, tuned = choice.backend, choice.tuned
        self._budget = TokenBudget(tuned.batch_tokens or spec.batch_tokens)
        if free_before is not None:
            self._device_memory = max(0, free_before - int(torch.cuda.mem_get_info()[0]))
        self._intake = Intake(
            self._inbox,
            self._pool,
            tokenizer,
            emit,
            kind=kind,
            dimensions=choice.dimensions,
            prompts=prompts,
            default_prompt=default_prompt,
        )
        return LoadedInfo(
            model_kind=kind,
            memory_bytes=self.memory_bytes(),
            load_seconds=round(time.monotonic() - started, 3),
            context=tokenizer.most,
            slots=spec.slots,
            dimensions=choice.dimensions if kind == "embedding" else None,
            max_input_tokens=tokenizer.most,
            architecture=architecture,
            backend=f"{self._backend.name} {'cpu' if free_before is None else 'cuda'}",
            file_sha256=spec.sha256,
            speeds=tuned.speeds,
            tuned=tuned,
        )

    def _choose(self, chooser: Chooser) -> Any:
        try:
            return chooser.choose()
        except TarsError:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise DoesNotFit(
                    "The device ran out of memory while the model was loaded. Free some, or use another."
                ) from None
            raise

    def _free_on_card(self, torch: Any, spec: LoadSpec) -> int | None:
        """Bytes free on the card before the model comes; None on the CPU."""
        if spec.cuda_device is None:
            return None
        if not torch.cuda.is_available():
            raise ReplicaFailed(
                "The model was placed on a GPU, but the installed torch sees none: it is a CPU build, or the driver is too old. "
                "Install torch's CUDA build (README, 'Using a real GPU'), or deploy the model with device cpu."
            )
        return int(torch.cuda.mem_get_info()[0])

    # --- the protocol, from any thread ---

    def submit(self, submission: Submission) -> None:
        """See the protocol."""
        if self._intake is None or not self._intake.read_at_once(submission):
            self._inbox.put(submission)

    def cancel(self, sequence: int) -> None:
        """See the protocol. The waiting texts go at once, also while a batch is being computed."""
        self._inbox.cancel(sequence)

    def memory_bytes(self) -> int:
        """On a GPU what the load took, on a CPU the resident growth as of now."""
        if self._device_memory is not None:
            return self._device_memory
        return max(0, psutil.Process().memory_info().rss - self._resident_before)

    def counters(self) -> EngineCounters:
        """See the protocol."""
        running, waiting = self._pool.counts()
        return EngineCounters(
            running=running,
            waiting=waiting,
            steps=self._steps,
            prompt_tokens=self._intake.prompt_tokens if self._intake is not None else 0,
            python_seconds=round(max(0.0, self._busy_seconds - self._native_seconds), 6),
            native_seconds=round(self._native_seconds, 6),
            texts=self._texts,
            padding_tokens=self._padding,
        )

    def progress_mark(self) -> int:
        """See the protocol: batches and turns of the tokenizer."""
        return self._steps + (self._intake.mark if self._intake is not None else 0)

    def unload(self) -> None:
        """See the protocol."""
        self._inbox.close()

    # --- the engine thread ---

    def run(self) -> None:
        """See the protocol."""
        assert self._intake is not None
        thread = self._intake.start()
        give_back_memory()  # what loading and measuring left
        given_back = time.monotonic()
        while self._pool.wait():
            started = time.monotonic()
            self.step(started)
            now = time.monotonic()
            self._busy_seconds += now - started
            if now > given_back + GIVE_BACK_SECONDS:
                give_back_memory()
                given_back = now
        thread.join()
        del self._backend

    def step(self, now: float) -> None:
        """Compute one batch, and tell everything that it ended in one go."""
        for number in self._pool.expired(now):
            self._end(number, DeadlineExceeded("The call's time budget is used up; the work was stopped."))
        batch = self._pool.take(lambda lengths: self._backend.select(lengths, self._budget.tokens))
        if batch:
            self._compute(batch)
        if self._events:
            events, self._events = self._events, []
            self._emit(events)

    def _end(self, number: int, error: TarsError) -> None:
        if self._pool.end(number) is not None:
            self._events.append((number, error))

    def _compute(self, batch: list[Item]) -> None:
        started = time.monotonic()
        rows = [item.row for item in batch]
        lengths = [len(row) for row in rows]
        cost = self._backend.cost(lengths)
        try:
            values = self._backend.forward(rows)
        except TarsError as error:
            self._pool.done()
            for number in {item.call.number for item in batch}:
                self._end(number, error)
            return
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self._shrink(batch, cost)
            return
        finally:
            self._native_seconds += time.monotonic() - started
            self._steps += 1
        self._padding += cost - sum(lengths)
        self._texts += len(batch)
        self._pool.done()
        for item, value in zip(batch, values, strict=True):
            item.call.started = item.call.started or started
            self._deliver(item, value)

    def _shrink(self, batch: list[Item], cost: int) -> None:
        """Half the budget from now on, and the batch again; only a text that does not fit alone fails."""
        if len(batch) > 1:
            self._budget.shrink(cost)
            print(f"embedding: out of memory; batches have {self._budget.tokens} tokens from now on", flush=True)
            self._pool.put_back(batch)
            return
        self._pool.done()
        error = DoesNotFit(
            "The device ran out of memory on a single text. Send shorter texts, or give the model more memory."
        )
        self._end(batch[0].call.number, error)

    def _deliver(self, item: Item, value: Any) -> None:
        call = item.call
        if isinstance(call.work, RerankParams):
            call.results[item.index] = float(value[0])
        else:
            vector = call.vector_of(item.index, item.piece, value)
            if vector is None:
                return
            call.results[item.index] = encoded(vector, call.dimensions, call.work.output_type)
        call.left -= 1
        if not call.left and self._pool.end(call.number) is not None:
            self._events.append((call.number, self._answer(call)))

    def _answer(self, call: Call) -> Embedded | Reranked:
        now = time.monotonic()
        timings = Timings(
            queue_ms=round(((call.started or now) - call.received) * 1000, 3),
            total_ms=round((now - call.received) * 1000, 3),
        )
        if isinstance(call.work, RerankParams):
            scores = [result for result in call.results if isinstance(result, float)]
            return Reranked(scores=scores, truncated=sorted(call.truncated), prompt_tokens=call.tokens, timings=timings)
        return Embedded(
            vectors=[result for result in call.results if isinstance(result, str)],
            dimensions=call.dimensions,
            truncated=sorted(call.truncated),
            split=sorted(call.split),
            prompt_tokens=call.tokens,
            timings=timings,
        )
