"""What goes wrong for one call ends that call: the engine thread and the others' answers go on as if nothing had been."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_thread import EngineThread, EventLog

from tars.errors import Cancelled, InternalError, InvalidParams, PromptTooLong, ReplicaFailed, TarsError
from tars.messages.inference import CompleteParams, Generated, Tokenized, TokenizeParams
from tars.workers.engine import LoadSpec, Resume, Saved, SaveParams, Submission
from tars.workers.llama_engine import LlamaEngine
from tars.workers.sequence_state import read_state, write_state

pytestmark = pytest.mark.model

ON: dict[str, Any] = {"logit_bias": {"4": -100.0, "2": -100.0}}
"""Tokens 2 and 4 end the tiny model's text."""

SYSTEM = "the user and the assistant say hello to the world and to each other, in a system that is the same for all. "


class Calls(EventLog):
    """An engine, and everything that came of each call."""

    def __init__(self, path: Path, **changes: object) -> None:
        spec = {"replica": "r", "model": "m", "engine": "llama", "path": str(path), "context": 512, "slots": 4}
        self.engine = LlamaEngine()
        self.thread = EngineThread(self.engine, LoadSpec.model_validate({**spec, **changes}))
        super().__init__()

    def submit(self, prompt: str = SYSTEM, *, resume: Resume | None = None, **params: Any) -> int:
        work = CompleteParams.model_validate({"prompt": prompt, "max_tokens": 30, "temperature": 0.0, **ON, **params})
        number = next(self.thread.numbers)
        self.engine.submit(Submission(number, work, None, resume))
        return number

    def until(self, number: int, tokens: int) -> None:
        while sum(len(delta.token_ids) for delta in self.deltas.get(number, [])) < tokens:
            assert number not in self.ends, self.ends
            self.take()

    def ask(self, prompt: str = SYSTEM, **params: Any) -> Generated:
        return self.end(self.submit(prompt, **params))

    def close(self) -> None:
        """Nothing is left behind, and every call ended once."""
        counters = self.engine.counters()
        assert (counters.running, counters.waiting, counters.kv_used) == (0, 0, 0)
        batcher = self.engine._batcher
        assert batcher is not None
        assert batcher._swapped == 0
        self.thread.close()
        while not self.thread.events.empty():
            self.take()  # fails where a call ended twice


@pytest.fixture
def calls(tiny_gguf: Path) -> Iterator[Calls]:
    """Exact: in fast mode a text that is computed again, or beside another, may take the other of two near ties."""
    calls = Calls(tiny_gguf, exact=True)
    yield calls
    calls.close()


@pytest.fixture
def shared(tiny_gguf: Path) -> Iterator[Calls]:
    calls = Calls(tiny_gguf, kv_tokens=512)
    yield calls
    calls.close()


def poison(monkeypatch: pytest.MonkeyPatch, rows_of: int, which: Sequence[int]) -> threading.Event:
    """Let the next decode with so many rows of logits have NaN in those."""
    from tars.workers.llama_context import Context, Rows

    real, done = Context.decode, threading.Event()

    def decode(context: Context, *arguments: Any) -> Rows:
        rows = real(context, *arguments)
        if len(rows) == rows_of and not done.is_set():
            done.set()
            rows = rows.copy()
            rows[list(which)] = np.nan
        return rows

    monkeypatch.setattr(Context, "decode", decode)
    return done


@pytest.mark.parametrize("which", [[0], [1], [0, 1]])
@pytest.mark.parametrize("biased", [True, False])
def test_numbers_that_are_none_end_a_call_of_several_answers_once(
    calls: Calls, monkeypatch: pytest.MonkeyPatch, which: list[int], biased: bool
) -> None:
    wanted = calls.ask("1 other", max_tokens=60).text
    done = poison(monkeypatch, 2, which)
    number = calls.submit(n=2, max_tokens=200, **({} if biased else {"logit_bias": {}}))
    assert isinstance(calls.event(number), ReplicaFailed)
    assert done.is_set()
    assert calls.ask("1 other", max_tokens=60).text == wanted


def test_cells_behind_numbers_that_are_none_are_taken_over_by_nobody(
    calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, 1, [0])
    assert isinstance(calls.event(calls.submit()), ReplicaFailed)
    assert calls.ask().usage.cached_tokens == 0


@pytest.mark.parametrize("place", ["sampler", "text"])
def test_an_error_nobody_thought_of_ends_its_call_only(
    calls: Calls, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    from tars.workers.llama_sampling import Sampler
    from tars.workers.text_stream import TextStream

    wanted = calls.ask("1 other", max_tokens=60).text
    other = calls.submit("1 other", max_tokens=60)
    calls.until(other, 2)
    one, name = (Sampler, "sample") if place == "sampler" else (TextStream, "push")
    real, bad = getattr(one, name), queue.Queue[int]()
    bad.put(1)

    def fails(self: Any, *arguments: Any) -> Any:
        mine = arguments[0] == 300 if place == "text" else self._draw._seed == 77
        if mine and not bad.empty():
            bad.get()
            raise KeyError("nobody thought of it")
        return real(self, *arguments)

    monkeypatch.setattr(one, name, fails)
    # Token 300 is the only one that the biased call can have.
    number = calls.submit("2 bad", seed=77, logit_bias={"300": 100.0})
    assert isinstance(calls.event(number), InternalError)
    assert "nobody thought of it" in capsys.readouterr().err
    assert calls.end(other).text == wanted


def test_a_state_for_which_there_is_no_memory_is_computed_again(
    shared: Calls, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tars.workers.llama_context import Context

    def no_memory(context: Context, stream: int) -> bytes:
        raise MemoryError

    monkeypatch.setattr(Context, "state", no_memory)
    numbers = [shared.submit(f"{number} hello", max_tokens=250) for number in range(3)]
    assert [shared.end(number).usage.completion_tokens for number in numbers] == [250] * 3
    assert shared.engine.counters().preemptions > 0


def test_a_state_that_cannot_be_read_is_not_saved_and_the_answer_goes_on(
    calls: Calls, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tars.workers.llama_context import Context

    wanted = calls.ask(max_tokens=200).text
    running = calls.submit(max_tokens=200)
    calls.until(running, 3)
    for error in (MemoryError(), InternalError("A sequence's state could not be read.")):

        def fails(context: Context, stream: int, error: Exception = error) -> bytes:
            raise error

        monkeypatch.setattr(Context, "state", fails)
        saving = calls.thread.submit(SaveParams(sequence=running, path=str(tmp_path / "state")))
        assert isinstance(calls.event(saving), InternalError)
    assert calls.end(running).text == wanted


def saved(calls: Calls, tmp_path: Path, tokens: int = 5, **params: Any) -> tuple[Path, Saved]:
    """Break an answer off and save it."""
    running = calls.submit(max_tokens=200, **params)
    calls.until(running, tokens)
    file = tmp_path / "state"
    one = calls.saved(running, file)
    assert isinstance(calls.event(running), TarsError)
    return file, one


def resume_of(file: Path, one: Saved) -> Resume:
    return Resume(generated=[one.generated], handed_out=[0], seed=one.seed, path=str(file))


@pytest.mark.parametrize("shift", [-7, 2])
def test_a_state_that_holds_another_number_of_tokens_than_it_says_is_computed_again(
    calls: Calls, tmp_path: Path, shift: int
) -> None:
    wanted = calls.ask(max_tokens=200).text
    file, one = saved(calls, tmp_path)
    tokens = calls.event(calls.thread.submit(TokenizeParams(text=SYSTEM, add_special=True)))
    assert isinstance(tokens, Tokenized)
    had = [*tokens.tokens, *one.generated]
    cells = read_state(file, had)
    assert cells is not None
    more = [*one.generated, *[50] * (shift + 1)]
    again = resume_of(file, one.model_copy(update={"generated": more}))
    write_state(file, [*tokens.tokens, *more], type(cells)(cells.data, cells.tokens + shift))
    result = calls.ask(max_tokens=200, resume=again)
    assert result.usage.completion_tokens == 200
    if more == one.generated:
        assert result.text == wanted


def test_a_state_that_has_no_memory_to_come_in_is_computed_again(
    calls: Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = calls.ask(max_tokens=200).text
    file, one = saved(calls, tmp_path)
    monkeypatch.setattr("tars.workers.batcher.SWAPPED_MOST", 1)
    assert calls.ask(max_tokens=200, resume=resume_of(file, one)).text == wanted


def test_of_several_answers_all_are_continued_or_none(calls: Calls) -> None:
    with pytest.raises(InvalidParams, match="each of the `n` answers"):
        calls.ask(n=2, resume=Resume(generated=[[50]], handed_out=[0], seed=1))


def test_steps_that_were_stopped_long_ago_are_forgiven(tiny_gguf: Path) -> None:
    """Only a step that does not end twice in a row fails its calls."""
    calls = Calls(tiny_gguf, exact=True)
    wanted = calls.ask(max_tokens=400).text
    running = calls.submit(max_tokens=400)
    for tokens in (3, 100, 200):
        calls.until(running, tokens)
        while not calls.engine.abort_step():
            assert running not in calls.ends
    assert calls.end(running).text == wanted


def test_exact_answers_take_over_only_what_was_computed_as_a_prompt_of_theirs(tiny_gguf: Path) -> None:
    """Generated tokens were computed one by one; another call's prompt that reads the same was computed in chunks."""
    calls = Calls(tiny_gguf, exact=True)
    events = [
        calls.event(calls.thread.submit(TokenizeParams(text=text, add_special=True))) for text in (SYSTEM, SYSTEM * 3)
    ]
    short, long = (event.tokens for event in events if isinstance(event, Tokenized))
    assert long[: len(short)] == short
    calls.ask(SYSTEM * 3, max_tokens=1)
    generated = long[len(short) :]
    before = calls.engine.counters().steps
    resume = Resume(generated=[generated], handed_out=[0], seed=1)
    calls.ask(SYSTEM, max_tokens=len(generated) + 2, resume=resume)
    assert calls.engine.counters().steps - before >= len(generated)
    calls.close()


def test_a_model_that_forgets_only_whole_sequences_computes_no_idle_streams_along(
    tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tars.workers.llama_model import Model

    real = Model.__init__

    def forgets_whole(model: Model, *arguments: Any) -> None:
        real(model, *arguments)
        model.forgets_partly = False

    monkeypatch.setattr(Model, "__init__", forgets_whole)
    monkeypatch.setattr("tars.workers.self_measurement.gap_worth_filling", lambda speeds, slots: slots)
    calls = Calls(tiny_gguf)
    batcher = calls.engine._batcher
    assert batcher is not None
    assert batcher.decoding._companions([0, 3]) == {}
    calls.close()


def test_fewer_cells_than_a_context_are_refused_at_the_load(tiny_gguf: Path) -> None:
    with pytest.raises(ReplicaFailed, match="kv_tokens"):
        Calls(tiny_gguf, kv_tokens=100)


@pytest.mark.parametrize("context", [1, 2, 3])
@pytest.mark.parametrize("exact", [True, False])
def test_the_smallest_contexts(tiny_gguf: Path, context: int, exact: bool) -> None:
    calls = Calls(tiny_gguf, context=context, exact=exact)
    if context > 1:
        results = [calls.submit("", max_tokens=None) for _ in range(6)]
        assert {calls.end(number).usage.completion_tokens for number in results} == {context - 1}
    with pytest.raises(PromptTooLong):
        calls.ask("abc")
    calls.close()


def test_as_many_slots_as_there_can_be(tiny_gguf: Path) -> None:
    calls = Calls(tiny_gguf, context=64, slots=256, kv_tokens=2048)
    numbers = [calls.submit(f"{number}", max_tokens=4) for number in range(300)]
    assert {calls.end(number).usage.completion_tokens for number in numbers} == {4}
    calls.close()
    with pytest.raises(ReplicaFailed, match="256"):
        Calls(tiny_gguf, context=64, slots=257)


def test_calls_that_each_need_the_whole_cache_come_one_after_the_other(shared: Calls) -> None:
    numbers = [shared.submit(f"{number} hello", max_tokens=None) for number in range(4)]
    assert [shared.end(number).usage.total_tokens for number in numbers] == [512] * 4


def test_a_call_that_waits_for_cells_can_be_cancelled(shared: Calls) -> None:
    numbers = [shared.submit(f"{number} hello", max_tokens=None) for number in range(4)]
    while not (preempted := shared.engine.counters().preemptions):
        shared.take()
    assert preempted
    for number in numbers[1:]:
        shared.engine.cancel(number)
        assert isinstance(shared.event(number), Cancelled)
    assert shared.end(numbers[0]).usage.total_tokens == 512


def test_an_engine_is_unloaded_while_it_decodes_and_while_calls_wait(tiny_gguf: Path) -> None:
    calls = Calls(tiny_gguf)
    numbers = [calls.submit(f"{number} hello", max_tokens=None) for number in range(12)]
    calls.until(numbers[0], 1)
    calls.thread.close()
