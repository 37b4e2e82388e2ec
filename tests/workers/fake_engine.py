"""An engine without a model, driven by its prompts: how the tests make a worker crash, hang, print and dawdle on demand.

`LoadSpec.path` decides the load: `ok`, `slow:<path>` (goes on until that file exists), `bad-file`, `abort`, `raise`, `stuck` (no progress),
`crash-once:<path>` (aborts the first time; the file remembers).
A prompt decides the call: `count N` (N deltas at once), `slow N` (one a millisecond; can be saved and resumed), `forever`, `flood` (as
`forever`, 64 KiB a delta and without a pause), `abort`, `hang` (the engine thread sleeps for ever), `stuck` (a step that stands still until
it is broken off, and again), `stuck-once`, `print` (native prints), `fail`, `bug`; an embedding answers its texts' lengths.
Where a call asks for log probabilities or several answers, its deltas have them.
"""

from __future__ import annotations

import base64
import ctypes
import json
import os
import struct
import threading
import time
from pathlib import Path

from tars.errors import BadGrammar, BadModelFile, Cancelled, DeadlineExceeded, Draining, WorkerCrashed
from tars.messages.inference import (
    CompleteParams,
    Delta,
    Embedded,
    EmbedParams,
    Generated,
    Timings,
    Tokenized,
    TokenLogprob,
    Usage,
)
from tars.messages.node import EngineCounters, LoadedInfo
from tars.workers.engine import Emit, LoadSpec, Progress, Saved, SaveParams, Submission
from tars.workers.inbox import Inbox


class FakeEngine:
    def __init__(self) -> None:
        self._inbox = Inbox()
        self._mark = 0
        self._emit: Emit = lambda events: None
        self._aborted = threading.Event()
        self._generated = 0
        self._running = 0

    def load(self, spec: LoadSpec, progress: Progress, emit: Emit) -> LoadedInfo:
        self._emit = emit
        progress("import", 5.0)
        what, _, argument = spec.path.partition(":")
        if what == "bad-file":
            raise BadModelFile("The file is not a model.")
        if what == "raise":
            raise RuntimeError("secret /path")
        if what == "abort":
            os.abort()
        if what == "stuck":
            time.sleep(3600)
        if what == "crash-once" and not Path(argument).exists():
            Path(argument).touch()
            os.abort()
        if what == "slow":
            percent = 10.0
            while not Path(argument).exists():
                progress("load", percent)
                percent = min(90.0, percent + 1.0)
                time.sleep(0.01)
        os.write(1, b"Content-Length: 5\r\n\r\nloud!")
        return LoadedInfo(model_kind="chat", memory_bytes=1, load_seconds=0.0, slots=spec.slots)

    def submit(self, submission: Submission) -> None:
        self._inbox.put(submission)

    def cancel(self, sequence: int) -> None:
        self._inbox.cancel(sequence)

    def memory_bytes(self) -> int:
        return 4711

    def counters(self) -> EngineCounters:
        return EngineCounters(running=self._running, generated_tokens=self._generated, steps=self._mark)

    def progress_mark(self) -> int:
        return self._mark

    def abort_step(self) -> None:
        self._aborted.set()

    def unload(self) -> None:
        self._inbox.close()

    def run(self) -> None:
        waiting: list[Submission] = []
        cancelled: set[int] = set()
        while True:
            taken = self._inbox.take(wait=not waiting)
            if taken.closed:
                return
            waiting += taken.submissions
            cancelled |= taken.cancelled
            for submission in [one for one in waiting if one.sequence in cancelled]:
                waiting.remove(submission)
                self._emit([(submission.sequence, Cancelled("cancelled"))])
            if waiting:
                self._running = 1
                self._answer(waiting.pop(0), cancelled)
                self._running = 0

    def _answer(self, submission: Submission, cancelled: set[int]) -> None:
        self._mark += 1
        number, work = submission.sequence, submission.work
        if isinstance(work, EmbedParams):
            texts = [work.input] if isinstance(work.input, str) else work.input
            vectors = [base64.b64encode(struct.pack("<f", len(text))).decode() for text in texts]
            self._emit([(number, Embedded(vectors=vectors, dimensions=1, prompt_tokens=len(texts), timings=Timings()))])
            return
        if isinstance(work, SaveParams):
            self._emit([(number, WorkerCrashed("nothing to save"))])
            return
        if not isinstance(work, CompleteParams):
            self._emit([(number, Tokenized(tokens=[1, 2, 3]))])
            return
        what, _, argument = work.prompt.partition(" ")
        if what == "abort":
            os.abort()
        if what == "hang":
            time.sleep(3600)
        if what.startswith("stuck"):
            for _ in range(1 if what == "stuck-once" else 2):
                self._aborted.wait()
                self._aborted.clear()
            if what == "stuck":
                self._emit([(number, WorkerCrashed("the step was broken off twice"))])
                return
        if what == "print":
            os.write(1, b"raw noise\r\n\r\n")
            libc = ctypes.CDLL(None)
            libc.printf(b"Content-Length: 3\r\n\r\nC printf %d\n", 1)
            libc.fflush(None)
            print("python print")
        if what == "fail":
            self._emit([(number, BadGrammar("no such grammar"))])
            return
        if what == "bug":
            self._emit([(number, ValueError("secret /path"))])
            return
        wanted = int(argument) if what in ("count", "slow") else 10**9 if what in ("forever", "flood") else 1
        first = 0
        if submission.resume is not None:
            generated = submission.resume.generated[0]
            first = len(generated)
            if submission.resume.path is not None:
                assert json.loads(Path(submission.resume.path).read_text()) == generated
            ready = generated[submission.resume.handed_out[0] :]
            self._emit([(number, Delta(text="".join(f"{one} " for one in ready), token_ids=ready))])
        for index in range(first, wanted):
            self._mark += 1
            self._generated += 1
            taken = self._inbox.take(wait=False)
            for late in taken.submissions:
                if isinstance(late.work, SaveParams) and late.work.sequence == number:
                    state = json.dumps(list(range(index)))
                    Path(late.work.path).write_text(state)
                    saved = Saved(bytes=len(state), prompt_tokens=1, generated=list(range(index)), seed=7)
                    self._emit([(number, Draining("moved")), (late.sequence, saved)])
                    return
                self._inbox.put(late)
            cancelled |= taken.cancelled
            if number in cancelled:
                self._emit([(number, Cancelled("cancelled"))])
                return
            if submission.deadline is not None and time.monotonic() > submission.deadline:
                self._emit([(number, DeadlineExceeded("late"))])
                return
            text = "x" * 65_536 if what == "flood" else f"{index} "
            logprobs = None
            if work.logprobs is not None:
                logprobs = [TokenLogprob(token=text, token_id=index, logprob=-0.5, top=[(text, -0.5)])]
            self._emit(
                [
                    (number, Delta(text=text, token_ids=[index], index=answer, logprobs=logprobs))
                    for answer in range(work.n)
                ]
            )
            if what in ("slow", "forever"):
                time.sleep(0.001)
        usage = Usage(prompt_tokens=1, completion_tokens=wanted, total_tokens=wanted + 1)
        self._emit([(number, Generated(text="done", finish_reason="stop", usage=usage, timings=Timings()))])
