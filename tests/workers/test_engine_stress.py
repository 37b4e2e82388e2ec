"""A storm of calls on a real (random) GGUF: hundreds that begin, share, wait, give way, move, fail and are cancelled at random moments.

What is compared: in exact mode every text with that of the same call alone in a fresh engine, to the byte. In the other modes rounding
depends on what runs beside, and a tiny random model's texts hang on it; so there the logits of every step are kept, and each answer's have
to be those of its whole text computed again in one pass in a context of its own, up to rounding, while a sampler of its own has to choose
the very same tokens from them (greedy, drawn and constrained alike). A cell that is missing, stale or another one's shows in the logits
of all tokens after it.

The engine's books (cells, streams, swapped bytes) are compared with llama.cpp's memory after every step.

`STRESS_SEED` in the environment takes another storm than the one that is always run.
"""

from __future__ import annotations

import os
import queue
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_thread import EngineThread
from tiny_gguf import write_tiny_adapter

from tars.errors import (
    BadGrammar,
    Cancelled,
    DeadlineExceeded,
    Draining,
    InvalidParams,
    PromptTooLong,
    ReplicaFailed,
    WorkerCrashed,
)
from tars.messages.inference import CompleteParams, Delta, Generated
from tars.messages.node import MeasuredSpeeds, TunedSettings
from tars.workers.engine import AdapterSpec, Event, LoadSpec, Resume, Saved, SaveParams, Submission
from tars.workers.kv_cache import LEFT
from tars.workers.llama_engine import LlamaEngine

pytestmark = pytest.mark.model

SEED = int(os.environ.get("STRESS_SEED", "1"))
CALLS = 80
AT_ONCE = 14
CONTEXT = 512

BASES = [
    "",
    "the user and the assistant say hello to the world. ",
    "the user and the assistant say hello to the world and to each other, in a system that is the same for all. " * 2,
]
GRAMMARS = {
    'root ::= "yes" | "no " [0-9]+ "."': re.compile(r"yes|no \d+\."),
    'root ::= "[" ("a" | "b" | "cd")+ "]"': re.compile(r"\[(a|b|cd)+\]"),
}
ERRORS: dict[str, tuple[type[Exception], ...]] = {
    "bad grammar": (BadGrammar,),
    "bad bias": (InvalidParams,),
    "too long": (PromptTooLong,),
    "poisoned": (ReplicaFailed,),
    "cancelled": (Cancelled,),
    "late": (DeadlineExceeded,),
    "moved": (Draining,),
    "broken off": (Cancelled,),
    "plain": (),
}
Row = np.ndarray[Any, np.dtype[np.float32]]

TUNED = TunedSettings(
    flash_attention=False,
    chunk=48,
    speeds=MeasuredSpeeds(
        prefill_tokens_per_second=10_000.0,
        decode_tokens_per_second=3_000.0,
        decode_tokens_per_second_all_slots=6_000.0,
    ),
)
"""Not measured, so that every machine computes alike; flash attention would round each row otherwise."""

ROUNDED_MOST = 0.06
"""Standard deviations of a row by which one of its logits may differ. Measured: 97 of 100 rows do not differ by a bit, the others by up to
0.04; with one wrong token in the prompt every row differs by 0.03 to 0.07, and with more of them by up to 1.
"""

REFUSED = ("bad grammar", "bad bias", "too long")
KINDS = [*["plain"] * 12, *["moved"] * 3, *["broken off"] * 2, *["cancelled"] * 3, *["late"] * 2, "poisoned", *REFUSED]


@dataclass
class Planned:
    """A call of the storm, and what came of it."""

    kind: str
    params: dict[str, Any]
    number: int
    after: int
    """So many tokens of its own have come when it is cancelled, saved or poisoned."""
    resume: Resume | None = None
    before: list[Delta] = field(default_factory=list)
    """What the caller had before the call was continued here."""
    deltas: list[Delta] = field(default_factory=list)
    end: Event | Exception | None = None
    acted: bool = False
    saving: int | None = None

    @property
    def work(self) -> CompleteParams:
        return CompleteParams.model_validate(self.params)

    def ids(self, index: int = 0) -> list[int]:
        return [token for delta in self.before + self.deltas if delta.index == index for token in delta.token_ids]

    def text(self, index: int = 0) -> str:
        return "".join(delta.text for delta in self.before + self.deltas if delta.index == index)


class Storm:
    """One engine, and everything that is asked of it."""

    def __init__(self, path: Path, folder: Path, seed: int, **changes: Any) -> None:
        spec = {"replica": "r", "model": "m", "engine": "llama", "path": str(path), "context": CONTEXT, **changes}
        self.engine = LlamaEngine()
        self.thread = EngineThread(self.engine, LoadSpec.model_validate(spec))
        self.random = random.Random(seed)
        self.folder = folder
        self.calls: dict[int, Planned] = {}
        self.savings: dict[int, Planned] = {}
        self.open: set[int] = set()
        self.rows: dict[tuple[int, int], dict[int, Row]] = {}
        """(call, answer) -> tokens generated before -> logits of the next one."""
        self.drift: list[str] = []
        self.adapters = ["", *self.thread.info.adapters]
        self._watch()

    # --- what is asked ---

    def params(self) -> dict[str, Any]:
        pick = self.random
        done = [
            one for one in self.calls.values() if isinstance(one.end, Generated) and len(one.params["prompt"]) < 300
        ]
        if done and pick.random() < 0.15:  # another turn of a chat that was there, or the same prompt again
            earlier = pick.choice(done)
            prompt = earlier.params["prompt"] + (earlier.text()[:60] + " and then" if pick.random() < 0.6 else "")
        else:
            prompt = pick.choice(BASES) + f"{pick.randrange(3)} " * pick.randrange(20) + "hello " * pick.randrange(8)
        params: dict[str, Any] = {
            "prompt": prompt + "?",
            "max_tokens": pick.choice([1, 2, 8, 30, 60]),
            "temperature": pick.choice([0.0, 0.0, 0.9]),
            "seed": pick.randrange(1000),
        }
        if pick.random() < 0.5:
            params["logit_bias"] = {"4": -100.0, "2": -100.0}
        if pick.random() < 0.2:
            params["n"] = pick.choice([2, 3])
        if pick.random() < 0.2:
            params["stop"] = [pick.choice("etaoin"), "zzz"]
        if pick.random() < 0.15:
            params["grammar"] = pick.choice(list(GRAMMARS))
        if pick.random() < 0.15:
            params |= {"repeat_penalty": 1.3, "presence_penalty": 0.5}
        if pick.random() < 0.15:
            params["logprobs"] = 2
        if len(self.adapters) > 1:
            params["model"] = pick.choice(["m", "m", "m:" + self.adapters[1]])
        return params

    def begin(self) -> None:
        kind, params = self.random.choice(KINDS), self.params()
        seconds = None
        if kind == "bad grammar":
            params["grammar"] = "root ::= nowhere"
        elif kind == "bad bias":
            params["logit_bias"] = {"no token": 1.0}
        elif kind == "too long":
            params["prompt"] = "hello world " * 300
        elif kind == "late":
            seconds = self.random.choice([0.0, 0.01, 0.05, 0.2])
        elif kind == "moved":
            params["n"] = 1
        self.submit(kind, params, self.random.randrange(25), seconds)

    def submit(
        self,
        kind: str,
        params: dict[str, Any],
        after: int,
        seconds: float | None = None,
        resume: Resume | None = None,
        before: list[Delta] | None = None,
    ) -> Planned:
        number = next(self.thread.numbers)
        planned = self.calls[number] = Planned(kind, params, number, after, resume, before or [])
        self.open.add(number)
        deadline = None if seconds is None else time.monotonic() + seconds
        self.engine.submit(Submission(number, planned.work, deadline, resume))
        return planned

    def act(self, planned: Planned) -> None:
        """Do to a call what is to happen to it, once enough of it came."""
        if planned.acted or planned.end is not None or len(planned.ids()) < planned.after:
            return
        if planned.kind in ("cancelled", "broken off"):
            self.engine.cancel(planned.number)
        elif planned.kind == "moved":
            file = self.folder / f"state-{planned.number}"
            file.touch(0o600)
            planned.saving = self.thread.submit(SaveParams(sequence=planned.number, path=str(file)))
            self.savings[planned.saving] = planned
            self.open.add(planned.saving)
        planned.acted = True

    def go_on(self, planned: Planned, generated: list[list[int]], path: Path | None) -> None:
        """Continue a broken off call here; its caller had some of its deltas, or all."""
        had = planned.before + planned.deltas
        had = had[: self.random.randrange(len(had) + 1)] if self.random.random() < 0.5 else had
        resume = Resume(
            generated=generated,
            handed_out=[
                sum(len(delta.token_ids) for delta in had if delta.index == index) for index in range(len(generated))
            ],
            ended=[delta.index for delta in had if delta.ended],
            seed=planned.params["seed"],
            path=None if path is None else str(path),
        )
        kinds = (
            ["plain", "plain", "cancelled", "moved"] if len(generated) == 1 else ["plain", "cancelled", "broken off"]
        )
        after = len(generated[0]) + self.random.randrange(10)
        self.submit(self.random.choice(kinds), planned.params, after, resume=resume, before=had)

    # --- what comes ---

    def take(self) -> None:
        bound = time.monotonic() + 60
        while True:
            assert not self.drift, self.drift
            try:
                number, event = self.thread.events.get(timeout=0.2)
                break
            except queue.Empty:
                assert self.thread.thread.is_alive(), "the engine thread died"
                assert time.monotonic() < bound, f"nothing came for {sorted(self.open)}"
        assert number in self.open, f"{event} for a call that had ended"
        if isinstance(event, Delta):
            self.calls[number].deltas.append(event)
            self.act(self.calls[number])
            return
        self.open.remove(number)
        if number in self.savings:
            self._saved(self.savings[number], event)
            return
        planned = self.calls[number]
        planned.end = event
        if planned.kind == "broken off" and isinstance(event, Cancelled):
            self.go_on(planned, [planned.ids(index) for index in range(planned.work.n)], None)

    def _saved(self, planned: Planned, event: Event | Exception) -> None:
        if not isinstance(event, Saved):
            assert isinstance(event, InvalidParams), event  # it had ended, or was still being prepared
            return
        file = self.folder / f"state-{planned.number}"
        damage = self.random.random()
        if damage < 0.1:
            file.unlink()
        elif damage < 0.2:
            file.write_bytes(file.read_bytes()[:-100])
        self.go_on(planned, [event.generated], file)

    def run(self, calls: int) -> None:
        begun = 0
        while begun < calls or self.open:
            while begun < calls and len(self.open) < AT_ONCE and self.random.random() < 0.7:
                self.begin()
                begun += 1
            for number in sorted(self.open):
                if number in self.calls and self.random.random() < 0.3:
                    self.act(self.calls[number])
            if self.random.random() < 0.01:
                self.engine.abort_step()
            if self.open:
                self.take()

    # --- the engine's books ---

    def _watch(self) -> None:
        """Compare the books after every step, and let the poisoned calls' rows be no numbers."""
        batcher = self.engine._batcher
        assert batcher is not None
        step, choose = batcher.step, batcher.decoding._choose

        def checked(between: Callable[[], None]) -> None:
            step(between)
            self.drift += self.differences()

        def poisoned(answers: list[Any], rows: Any) -> None:
            bad = [
                index
                for index, answer in enumerate(answers)
                if (planned := self.calls.get(answer.call.number)) is not None
                and planned.kind == "poisoned"
                and answer.generated >= planned.after
            ]
            if bad:
                rows = rows.copy()
                rows[bad] = np.nan
            for answer, row in zip(answers, rows, strict=True):
                self.rows.setdefault((answer.call.number, answer.index), {})[answer.generated] = row.copy()
            choose(answers, rows)

        batcher.step, batcher.decoding._choose = checked, poisoned  # type: ignore[method-assign]

    def differences(self) -> list[str]:
        """Where the engine's bookkeeping, its answers and llama.cpp's memory disagree."""
        from llama_cpp import llama_cpp as api

        batcher, cache, context = self.engine._batcher, self.engine._cache, self.engine._context
        assert batcher is not None
        assert context is not None
        found: list[str] = []
        for stream in range(context.streams):
            there = api.llama_memory_seq_pos_max(context._memory, stream) + 1
            if there != cache.length(stream):
                found.append(f"stream {stream} has {there} tokens and should have {cache.length(stream)}")
        taken = {number for number, stream in enumerate(cache._streams) if stream.taken}
        streams = [answer.stream for answer in batcher.running]
        if len(set(streams)) != len(streams) or taken != set(streams):
            found.append(f"running are {streams}, taken {taken}")
        for answer in batcher.running:
            assert answer.stream is not None
            tokens = cache._streams[answer.stream].tokens
            if answer.position != len(tokens) or tokens != answer.tokens[: answer.position]:
                found.append(f"call {answer.call.number} is at {answer.position}, its stream has {len(tokens)} tokens")
        if any(answer.stream is not None or answer.position for answer in batcher.waiting):
            found.append("a waiting answer has a stream")
        owners = Counter(cell for stream in cache._streams for cell in stream.cells)
        if owners != Counter(cache._owners) or len(owners) > cache.cells:
            found.append(f"{len(owners)} cells are owned and {len(cache._owners)} counted, of {cache.cells}")
        swapped = sum(len(answer.saved.data) for answer in batcher.waiting if answer.saved is not None)
        if swapped != batcher._swapped:
            found.append(f"{swapped} bytes are swapped and {batcher._swapped} counted")
        queued = {answer.call.number for answer in [*batcher.running, *batcher.waiting]}
        if queued != set(self.engine._answering._calls):
            found.append(
                f"calls {set(self.engine._answering._calls) ^ queued} are known and nowhere, or the other way round"
            )
        return found

    def check_nothing_is_left(self, threads: int) -> None:
        from llama_cpp import llama_cpp as api

        assert not self.drift
        assert self.differences() == []
        cache, context = self.engine._cache, self.engine._context
        assert context is not None
        assert cache.used == 0
        counters = self.engine.counters()
        assert (counters.running, counters.waiting, counters.kv_used) == (0, 0, 0)
        assert counters.kv_cached + cache.free == counters.kv_cells
        assert self.engine._preparation._threads == {}
        while actions := cache.drop_oldest():
            context.perform(actions)
        assert cache.free == cache.cells
        for stream in range(context.streams):
            assert api.llama_memory_seq_pos_max(context._memory, stream) == -1
        bound = time.monotonic() + 10
        while threading.active_count() > threads and time.monotonic() < bound:
            time.sleep(0.01)
        assert threading.active_count() <= threads
        self.thread.close()

    # --- what every end must be ---

    def check_ends(self) -> Counter[str]:
        """Each call ended as it had to; how often which way."""
        ways: Counter[str] = Counter()
        for planned in self.calls.values():
            end = planned.end
            assert end is not None
            ways[f"{planned.kind}: {type(end).__name__}"] += 1
            if isinstance(end, Exception):
                allowed = (*ERRORS[planned.kind], WorkerCrashed)  # two steps in a row were stopped
                assert isinstance(end, allowed), (planned.kind, planned.params, repr(end))
                continue
            assert isinstance(end, Generated)
            assert planned.kind not in REFUSED, planned.kind
            self._check_generated(planned, end)
        return ways

    def _check_generated(self, planned: Planned, end: Generated) -> None:
        work, usage = planned.work, end.usage
        choices = [(0, end.text, end.finish_reason), *((one.index, one.text, one.finish_reason) for one in end.further)]
        assert [index for index, _, _ in choices] == list(range(work.n))
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
        left = LEFT if planned.resume is None else 0  # what was generated stands behind the prompt
        assert 0 <= usage.cached_tokens <= max(0, usage.prompt_tokens - left)
        if self.thread.spec.exact:
            assert usage.cached_tokens % 64 == 0
        assert end.seed == work.seed
        assert usage.completion_tokens == sum(len(planned.ids(index)) for index, _, _ in choices)
        for index, text, reason in choices:
            assert planned.text(index) == text, (planned.params, planned.resume)
            assert not any(stop in text for stop in work.stop)
            assert reason in ("stop", "length")
            if reason == "length":
                assert len(planned.ids(index)) == work.max_tokens
            if work.grammar is not None and reason == "stop" and not work.stop:
                assert GRAMMARS[work.grammar].fullmatch(text), text
        if work.logprobs is not None and planned.resume is None:
            assert end.logprobs is not None
            assert [one.token_id for one in end.logprobs] == planned.ids()


class Alone:
    """Computes whole texts again, each in one pass in a context of its own, and asks the sampler about every token."""

    def __init__(self, spec: LoadSpec) -> None:
        from tars.workers.adapters import Adapters
        from tars.workers.llama_context import Context
        from tars.workers.llama_library import NativeLog
        from tars.workers.llama_model import Model

        log = NativeLog()
        spec = spec.model_copy(update={"slots": 1, "kv_tokens": None})
        self.model = Model(spec, log, lambda percent: None)
        self.adapters = Adapters(self.model, spec.adapters, log)
        self.context = Context(self.model, spec, log, chunk=CONTEXT, flash_attention=False)

    def logits(self, planned: Planned, index: int) -> Any:
        """[generated tokens, vocabulary]: what each of the answer's tokens had to be chosen from."""
        prompt, generated = self.prompt(planned), planned.ids(index)
        tokens = [*prompt, *generated]
        self.adapters.use(self.context, (planned.work.model or "").partition(":")[2])
        self.context.forget(0, 0)
        wanted = list(range(len(prompt) - 1, len(tokens) - 1))
        return self.context.decode(tokens, list(range(len(tokens))), [0] * len(tokens), wanted)

    def chosen(self, planned: Planned, index: int, rows: dict[int, Row]) -> list[int]:
        """What a sampler of its own chooses from these rows, after what was generated before them."""
        from tars.workers.llama_sampling import Sampler, compile_grammar

        before = [] if planned.resume is None else planned.resume.generated[index]
        grammar, seed = compile_grammar(self.model, planned.work), planned.params["seed"] + index
        sampler = Sampler(self.model, planned.work, self.prompt(planned), before, seed, grammar)
        return [*before, *(sampler.sample(rows[place]) for place in range(len(before), len(planned.ids(index))))]

    def prompt(self, planned: Planned) -> list[int]:
        return self.model.tokenize(planned.params["prompt"].encode(), add_special=True)

    def close(self) -> None:
        self.context.close()
        self.adapters.close()
        self.model.close()


@pytest.mark.parametrize(
    "layout", [pytest.param({"slots": 4}, id="split"), pytest.param({"slots": 6, "kv_tokens": CONTEXT}, id="unified")]
)
def test_a_storm_in_which_every_token_is_the_one_that_the_model_and_the_sampler_choose_alone(
    tiny_gguf: Path, tmp_path: Path, layout: dict[str, Any]
) -> None:
    adapter = write_tiny_adapter(tmp_path / "adapter.gguf", strength=0.3)
    storm = Storm(
        tiny_gguf,
        tmp_path,
        SEED,
        micro_batch=48,
        tuned=TUNED,
        adapters=[AdapterSpec(name="other", path=str(adapter))],
        **layout,
    )
    threads = threading.active_count()
    storm.run(CALLS)
    ways = storm.check_ends()
    assert ways["plain: Generated"] > CALLS // 3, ways
    if "kv_tokens" in layout:
        assert storm.engine.counters().preemptions > 0
    assert storm.engine.counters().prompt_tokens_cached > 0
    storm.check_nothing_is_left(threads)
    alone = Alone(storm.thread.spec)
    rounded, all_of_them = 0, 0
    for planned in storm.calls.values():
        if not isinstance(planned.end, Generated):
            continue
        for index in range(planned.work.n):
            rows, generated = storm.rows.get((planned.number, index), {}), planned.ids(index)
            assert alone.chosen(planned, index, rows) == generated
            again = alone.logits(planned, index) if generated else []
            # Behind the last one the model ended its text.
            off = [
                float(np.abs(row - again[place]).max() / again[place].std())
                for place, row in rows.items()
                if place < len(generated)
            ]
            assert max(off, default=0) < ROUNDED_MOST, (
                f"call {planned.number} {planned.params} {planned.resume} {planned.end} {index} {off}"
            )
            rounded, all_of_them = rounded + sum(one > 0 for one in off), all_of_them + len(off)
    assert all_of_them > 300
    assert rounded <= all_of_them // 8, f"{rounded} of {all_of_them} rows are others than alone"
    alone.close()


def test_a_storm_in_exact_mode_in_which_every_text_is_the_same_as_alone(tiny_gguf: Path, tmp_path: Path) -> None:
    storm = Storm(tiny_gguf, tmp_path, SEED, slots=4, exact=True)
    threads = threading.active_count()
    storm.run(CALLS)
    ways = storm.check_ends()
    assert ways["plain: Generated"] > CALLS // 3, ways
    storm.check_nothing_is_left(threads)
    quiet = Storm(tiny_gguf, tmp_path, SEED, slots=4, exact=True)
    for planned in storm.calls.values():
        if not isinstance(planned.end, Generated):
            continue
        again = quiet.submit("plain", planned.params, 0)
        while again.end is None:
            quiet.take()
        assert isinstance(again.end, Generated)
        told = (
            planned.end.text,
            planned.end.finish_reason,
            [(one.text, one.finish_reason) for one in planned.end.further],
        )
        assert told == (
            again.end.text,
            again.end.finish_reason,
            [(one.text, one.finish_reason) for one in again.end.further],
        ), (planned.params, planned.resume)
        assert planned.ids() == again.ids()
    quiet.thread.close()
