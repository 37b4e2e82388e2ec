"""Continuous batching on a real (random) GGUF: many callers at once, each gets what he would get alone; the cache full, stops, moves."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from engine_thread import EngineThread, EventLog

from tars.errors import (
    BadGrammar,
    Cancelled,
    DeadlineExceeded,
    Draining,
    InvalidParams,
    ReplicaFailed,
    TarsError,
    WorkerCrashed,
)
from tars.messages.inference import CompleteParams, Generated
from tars.messages.node import MeasuredSpeeds, TunedSettings
from tars.workers.engine import LoadSpec, Resume, Saved, SaveParams, Submission
from tars.workers.kv_cache import LEFT
from tars.workers.llama_engine import LlamaEngine

pytestmark = pytest.mark.model

SYSTEM = (
    "the user and the assistant say hello to the world and to each other, in a system that is the same for all. " * 3
)

TUNED = TunedSettings(
    flash_attention=False,
    chunk=64,
    speeds=MeasuredSpeeds(
        prefill_tokens_per_second=10_000,
        decode_tokens_per_second=2_000,
        decode_tokens_per_second_all_slots=4_000,
    ),
)
"""Not what the measurement at load finds: with flash attention a row's numbers depend on the others', and texts could not be compared."""

ENDLESS = {"max_tokens": 4000, "logit_bias": {"4": -100.0}}
"""Token 4 is the tiny model's end."""


class Collected(EventLog):
    """What came for each call, from all of them at once."""

    def __init__(self, engine: LlamaEngine, path: Path, **changes: object) -> None:
        spec = {
            "replica": "r",
            "model": "m",
            "engine": "llama",
            "path": str(path),
            "context": 512,
            "slots": 4,
            "tuned": TUNED,
            **changes,
        }
        super().__init__()
        self.thread = EngineThread(engine, LoadSpec.model_validate(spec))
        self.engine = engine

    def submit(
        self, prompt: str, *, resume: Resume | None = None, seconds: float | None = None, **params: object
    ) -> int:
        work = CompleteParams.model_validate({"prompt": prompt, "max_tokens": 24, "temperature": 0.0, **params})
        if resume is None:
            return self.thread.submit(work, seconds)
        number = next(self.thread.numbers)
        self.engine.submit(Submission(number, work, None, resume))
        return number

    def until_tokens(self, number: int, count: int) -> list[int]:
        while sum(len(delta.token_ids) for delta in self.deltas.get(number, [])) < count:
            assert number not in self.ends, self.ends[number]
            self.take()
        return [token for delta in self.deltas[number] for token in delta.token_ids]

    def end(self, number: int) -> Generated:
        event = super().end(number)
        told = [delta for delta in self.deltas.get(number, []) if delta.index == 0]
        if told and not event.further and number not in self.resumed:
            assert "".join(delta.text for delta in told) == event.text
        return event

    resumed: set[int] = set()

    def ask(self, prompt: str, **params: object) -> Generated:
        return self.end(self.submit(prompt, **params))


@pytest.fixture(scope="module")
def batch(tiny_gguf: Path) -> Iterator[Collected]:
    collected = Collected(LlamaEngine(), tiny_gguf)
    yield collected
    assert collected.engine.counters().running == 0
    assert collected.engine.counters().waiting == 0
    collected.thread.close()


@pytest.fixture(scope="module")
def exact(tiny_gguf: Path) -> Iterator[Collected]:
    collected = Collected(LlamaEngine(), tiny_gguf, exact=True)
    yield collected
    collected.thread.close()


def prompts(count: int) -> list[str]:
    return [f"{SYSTEM} number {number} says " + "hello " * (number * 3) for number in range(count)]


def test_many_calls_run_at_once_and_each_gets_what_it_gets_alone(exact: Collected) -> None:
    alone = [exact.ask(prompt, seed=number, temperature=number % 2 * 0.9) for number, prompt in enumerate(prompts(8))]
    numbers = [
        exact.submit(prompt, seed=number, temperature=number % 2 * 0.9) for number, prompt in enumerate(prompts(8))
    ]
    together = [exact.end(number) for number in numbers]
    assert [one.text for one in together] == [one.text for one in alone]
    assert len({one.text for one in alone}) > 4, "a model that says the same to everybody shows nothing"


def test_the_calls_really_share_their_steps(batch: Collected) -> None:
    before = batch.engine.counters()
    numbers = [batch.submit(f"{number} hello", max_tokens=60, logit_bias={"4": -100.0}) for number in range(4)]
    for number in numbers:
        batch.end(number)
    after = batch.engine.counters()
    assert after.generated_tokens - before.generated_tokens == 240
    assert after.steps - before.steps < 120, "four sequences at once need about a quarter of the steps"


def test_more_calls_than_slots_wait_and_all_are_answered(batch: Collected) -> None:
    numbers = [batch.submit(f"{number} hello") for number in range(20)]
    assert {batch.end(number).usage.completion_tokens for number in numbers} <= set(range(1, 25))


def test_a_shared_beginning_is_computed_once(batch: Collected) -> None:
    batch.ask(SYSTEM)
    before = batch.engine.counters()
    results = [batch.end(number) for number in [batch.submit(prompt) for prompt in prompts(4)]]
    after = batch.engine.counters()
    shared = min(result.usage.prompt_tokens for result in results) - 30
    assert all(result.usage.cached_tokens > shared * 0.7 for result in results)
    assert after.prompt_tokens_cached - before.prompt_tokens_cached == sum(r.usage.cached_tokens for r in results)


def test_a_second_turn_computes_only_what_is_new(batch: Collected) -> None:
    first = batch.ask(f"7 {SYSTEM}", max_tokens=20, logit_bias={"4": -100.0, "2": -100.0})
    second = batch.ask(f"7 {SYSTEM}{first.text} and then", max_tokens=4)
    assert second.usage.cached_tokens >= first.usage.prompt_tokens - 2
    assert (
        second.usage.prompt_tokens - second.usage.cached_tokens < 70
    )  # a random model's bytes are other tokens when read again


def test_n_answers_have_their_own_seeds_and_one_prompt(batch: Collected) -> None:
    several = batch.ask(SYSTEM, n=3, seed=11, temperature=1.0, top_k=0, min_p=0.0, top_p=1.0)
    single = [batch.ask(SYSTEM, seed=11 + index, temperature=1.0, top_k=0, min_p=0.0, top_p=1.0) for index in range(3)]
    assert [several.text, *(choice.text for choice in several.further)] == [one.text for one in single]
    assert [choice.index for choice in several.further] == [1, 2]
    assert len({one.text for one in single}) == 3
    assert several.usage.completion_tokens == sum(one.usage.completion_tokens for one in single)


@pytest.mark.parametrize("kv_tokens", [None, 1024])
def test_a_prompt_that_several_ask_for_at_once_is_computed_once(
    tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch, kv_tokens: int | None
) -> None:
    from tars.workers.llama_context import Context, Rows

    engine = Collected(LlamaEngine(), tiny_gguf, kv_tokens=kv_tokens)
    decode = Context.decode
    computed: list[int] = []

    def counted(context: Context, tokens: Sequence[int], *others: Sequence[int]) -> Rows:
        computed.append(len(tokens))
        return decode(context, tokens, *others)

    monkeypatch.setattr(Context, "decode", counted)
    prompt = engine.ask(SYSTEM, n=4, seed=1, temperature=1.0, max_tokens=1).usage.prompt_tokens
    assert sum(computed) <= prompt + 3 * LEFT
    engine.thread.close()


def test_a_chunk_that_was_not_computed_says_nothing_about_the_pace(
    tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tars.workers.llama_context import Aborted, Context, Rows

    engine = Collected(LlamaEngine(), tiny_gguf)
    batcher = engine.engine._batcher
    assert batcher is not None
    decode = Context.decode
    took: list[int] = []
    monkeypatch.setattr(batcher._pace_alone, "took", lambda tokens, seconds: took.append(tokens))
    stop = [True]

    def stopped_once(context: Context, *arguments: Sequence[int]) -> Rows:
        if stop.pop():
            stop.append(False)
            raise Aborted
        stop.append(False)
        return decode(context, *arguments)

    monkeypatch.setattr(Context, "decode", stopped_once)
    prompt = engine.ask(SYSTEM).usage.prompt_tokens
    assert took == [prompt]
    engine.thread.close()


def test_a_drawn_seed_is_told_and_gives_the_text_again(batch: Collected) -> None:
    drawn = batch.ask(SYSTEM, temperature=1.0)
    assert drawn.seed is not None
    assert batch.ask(SYSTEM, temperature=1.0, seed=drawn.seed).text == drawn.text


def test_a_cancelled_call_frees_its_slot_within_a_step_and_harms_nobody(batch: Collected) -> None:
    wanted = batch.ask("0 hello", max_tokens=60, logit_bias={"4": -100.0}).text
    long = [batch.submit(f"{number} long", **ENDLESS) for number in range(3)]
    other = batch.submit("0 hello", max_tokens=60, logit_bias={"4": -100.0})
    for number in long:
        batch.until_tokens(number, 3)
    waiting = batch.submit("9 waits", max_tokens=2)
    batch.engine.cancel(long[1])
    with pytest.raises(Cancelled):
        batch.end(long[1])
    assert batch.end(waiting).usage.completion_tokens <= 2
    assert batch.end(other).text == wanted
    for number in (long[0], long[2]):
        batch.engine.cancel(number)
        with pytest.raises(Cancelled):
            batch.end(number)


def test_a_deadline_ends_one_call_and_not_its_neighbours(batch: Collected) -> None:
    late = batch.submit("1 late", seconds=0.05, **ENDLESS)
    other = batch.submit("2 hello", max_tokens=100, logit_bias={"4": -100.0})
    with pytest.raises(DeadlineExceeded):
        batch.end(late)
    assert batch.end(other).usage.completion_tokens == 100


def test_a_bad_grammar_fails_alone(batch: Collected) -> None:
    wanted = batch.ask("3 hello", max_tokens=40, logit_bias={"4": -100.0}).text
    good = batch.submit("3 hello", max_tokens=40, logit_bias={"4": -100.0})
    bad = batch.submit("4 hello", grammar='root ::= "a" missing')
    with pytest.raises(BadGrammar):
        batch.end(bad)
    assert batch.end(good).text == wanted


def test_a_long_prompt_comes_in_while_others_go_on(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # On a busy machine a decode takes long, and a chunk might then take longer, too.
    monkeypatch.setattr("tars.workers.batcher.CHUNK_TO_DECODE", 0.0)
    engine = Collected(LlamaEngine(), tiny_gguf, context=2048, inter_token_ms=0.001)
    running = engine.submit("hello", **{**ENDLESS, "max_tokens": 2000})
    engine.until_tokens(running, 5)
    before = sum(len(delta.token_ids) for delta in engine.deltas[running])
    long = engine.submit(SYSTEM * 5, max_tokens=1)
    result = engine.end(long)
    between = sum(len(delta.token_ids) for delta in engine.deltas[running]) - before
    # The chunk is the smallest (16 tokens): between two of them the other answer gets its token.
    assert between >= result.usage.prompt_tokens // 16 - 2
    engine.engine.cancel(running)
    with pytest.raises(Cancelled):
        engine.end(running)
    engine.thread.close()


def test_calls_that_come_together_begin_together(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Collected(LlamaEngine(), tiny_gguf, context=512)
    # Chunks of one prompt each, so that there are decodes that could come in between.
    monkeypatch.setattr(engine.engine._batcher._pace_alone, "took", lambda tokens, seconds: None)
    engine.engine._batcher._pace_alone.chunk = 64
    held = threading.Event()
    drop_ended = engine.engine._drop_ended

    def hold(cancelled: set[int], now: float) -> None:
        held.wait(10)
        drop_ended(cancelled, now)

    monkeypatch.setattr(engine.engine, "_drop_ended", hold)
    numbers = [engine.submit(f"{number} {SYSTEM}"[:120], max_tokens=8, logit_bias={"4": -100.0}) for number in range(4)]
    held.set()
    order = []
    while len(engine.ends) < 4:
        order.append(engine.take())
    assert sorted(order[:4]) == numbers, "one of them had its second token before another had its first"
    engine.thread.close()


def test_a_full_cache_sends_the_youngest_away_and_nobody_notices(tiny_gguf: Path) -> None:
    engine = Collected(LlamaEngine(), tiny_gguf, context=512, slots=4, kv_tokens=512)
    params = {"max_tokens": 300, "logit_bias": {"4": -100.0, "2": -100.0}}
    alone = [engine.ask(f"{number} hello", **params).text for number in range(4)]
    numbers = [engine.submit(f"{number} hello", **params) for number in range(4)]
    together = [engine.end(number).text for number in numbers]
    assert engine.engine.counters().preemptions > 0
    assert together == alone
    assert engine.ask("hello " * 50, max_tokens=None, logit_bias={"4": -100.0, "2": -100.0}).usage.total_tokens == 512
    engine.thread.close()


def test_cells_that_found_no_place_in_ram_are_computed_again(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Collected(LlamaEngine(), tiny_gguf, context=512, slots=3, kv_tokens=512)
    monkeypatch.setattr("tars.workers.batcher.SWAPPED_MOST", 0)
    params = {"max_tokens": 300, "logit_bias": {"4": -100.0, "2": -100.0}}
    numbers = [engine.submit(f"{number} hello", **params) for number in range(3)]
    assert [engine.end(number).usage.completion_tokens for number in numbers] == [300] * 3
    assert engine.engine.counters().preemptions > 0
    engine.thread.close()


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_broken_off_answer_goes_on_elsewhere_without_a_lost_or_doubled_token(
    tiny_gguf: Path, exact: Collected, temperature: float
) -> None:
    params: dict[str, object] = {"max_tokens": 60, "temperature": temperature, "seed": 3, "stop": ["zzz"]}
    whole = exact.ask(SYSTEM, **params)
    started = exact.submit(SYSTEM, **params)
    exact.until_tokens(started, 10)
    exact.engine.cancel(started)
    with pytest.raises(Cancelled):
        exact.end(started)
    shown = exact.deltas[started]
    had = [token for delta in shown for token in delta.token_ids]
    handed_out = sum(len(delta.token_ids) for delta in shown[:4])
    other = Collected(LlamaEngine(), tiny_gguf, exact=True)
    resumed = other.submit(SYSTEM, resume=Resume(generated=[had], handed_out=[handed_out], seed=3), **params)
    other.resumed = {resumed}
    result = other.end(resumed)
    assert result.text == whole.text
    assert result.usage == whole.usage.model_copy(update={"cached_tokens": result.usage.cached_tokens})
    pieces = shown[:4] + other.deltas[resumed]
    assert "".join(delta.text for delta in pieces) == whole.text
    assert sum(len(delta.token_ids) for delta in pieces) == whole.usage.completion_tokens
    other.thread.close()


def test_a_saved_answer_moves_to_another_engine_and_computes_nothing_again(
    tiny_gguf: Path, exact: Collected, tmp_path: Path
) -> None:
    params: dict[str, object] = {"max_tokens": 200, "temperature": 0.8, "seed": 5, "logit_bias": {"4": -100.0}}
    whole = exact.ask(SYSTEM, **params)
    started = exact.submit(SYSTEM, **params)
    exact.until_tokens(started, 20)
    file = tmp_path / "state"
    file.touch(0o600)
    saving = exact.thread.submit(SaveParams(sequence=started, path=str(file)))
    with pytest.raises(Draining):
        exact.end(started)
    while saving not in exact.ends:
        exact.take()
    saved = exact.ends[saving]
    assert isinstance(saved, Saved)
    assert saved.bytes == file.stat().st_size > 1000
    handed_out = sum(len(delta.token_ids) for delta in exact.deltas[started])
    assert handed_out <= len(saved.generated)
    other = Collected(LlamaEngine(), tiny_gguf, exact=True)
    resume = Resume(generated=[saved.generated], handed_out=[handed_out], seed=saved.seed, path=str(file))
    resumed = other.submit(SYSTEM, resume=resume, **params)
    other.resumed = {resumed}
    assert other.end(resumed).text == whole.text
    steps = other.engine.counters().steps
    assert steps <= 200 - len(saved.generated) + 2, "the prompt and the first tokens were computed again"
    text = "".join(delta.text for delta in exact.deltas[started] + other.deltas[resumed])
    assert text == whole.text
    other.thread.close()


def test_a_restored_answer_does_not_overwrite_cells_that_are_still_to_be_copied(
    tiny_gguf: Path, tmp_path: Path
) -> None:
    """llama.cpp copies between split streams at the next decode, and restores at once."""
    engine = Collected(LlamaEngine(), tiny_gguf, slots=2, tuned=TUNED)
    long = {"max_tokens": 150, "logit_bias": {"4": -100.0, "2": -100.0}}
    prompt = SYSTEM[:200]
    wanted = [engine.ask("1 " * 80, **long).text, engine.ask(prompt, max_tokens=8).text]
    moving = engine.submit("1 " * 80, **long)
    engine.until_tokens(moving, 10)
    file = tmp_path / "state"
    file.touch(0o600)
    saving = engine.thread.submit(SaveParams(sequence=moving, path=str(file)))
    while saving not in engine.ends:
        engine.take()
    saved = engine.ends[saving]
    assert isinstance(saved, Saved)
    assert engine.engine._context is not None
    while actions := engine.engine._cache.drop_oldest():
        engine.engine._context.perform(actions)
    # Stream 0 has the prompt's cells and goes on behind them: they are copied to stream 1, and the restored answer comes into stream 0.
    engine.ask(prompt, **{**long, "max_tokens": 30})
    resume = Resume(generated=[saved.generated], handed_out=[0], seed=saved.seed, path=str(file))
    with engine.engine._inbox._condition:  # the engine takes both at once
        asked = engine.submit(prompt, max_tokens=8)
        resumed = engine.submit("1 " * 80, resume=resume, **long)
    result = engine.end(asked)
    assert result.usage.cached_tokens > 100
    assert [engine.end(resumed).text, result.text] == wanted
    engine.thread.close()


@pytest.mark.parametrize("damage", ["gone", "cut", "another"])
def test_a_state_that_does_not_suit_is_computed_again(exact: Collected, tmp_path: Path, damage: str) -> None:
    params: dict[str, object] = {"max_tokens": 40, "logit_bias": {"4": -100.0}}
    whole = exact.ask(SYSTEM, **params)
    started = exact.submit(SYSTEM, **params)
    exact.until_tokens(started, 5)
    file = tmp_path / "state"
    file.touch(0o600)
    saving = exact.thread.submit(SaveParams(sequence=started, path=str(file)))
    while saving not in exact.ends:
        exact.take()
    saved = exact.ends[saving]
    assert isinstance(saved, Saved)
    if damage == "gone":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-500])
    else:
        file.write_bytes(file.read_bytes().replace(b'"tokens": [', b'"tokens": [1, ', 1))
    resume = Resume(generated=[saved.generated], handed_out=[0], seed=saved.seed, path=str(file))
    resumed = exact.submit(SYSTEM, resume=resume, **params)
    assert exact.end(resumed).text == whole.text


def test_saving_what_does_not_run_is_the_callers_error(batch: Collected, tmp_path: Path) -> None:
    saving = batch.thread.submit(SaveParams(sequence=987_654, path=str(tmp_path / "state")))
    while saving not in batch.ends:
        batch.take()
    assert isinstance(batch.ends[saving], InvalidParams)


def test_a_state_that_cannot_be_written_leaves_the_answer_running(batch: Collected, tmp_path: Path) -> None:
    running = batch.submit("5 hello", max_tokens=100, logit_bias={"4": -100.0})
    batch.until_tokens(running, 2)
    saving = batch.thread.submit(SaveParams(sequence=running, path=str(tmp_path / "no folder" / "state")))
    assert batch.end(running).usage.completion_tokens == 100
    while saving not in batch.ends:
        batch.take()
    assert isinstance(batch.ends[saving], TarsError)


def test_tokens_of_another_vocabulary_are_refused(batch: Collected) -> None:
    with pytest.raises(InvalidParams, match="tokens that this model does not have"):
        batch.end(batch.submit("hello", resume=Resume(generated=[[10**8]], handed_out=[0], seed=1)))


def test_a_step_that_the_watchdog_stops_is_tried_again(tiny_gguf: Path) -> None:
    engine = Collected(LlamaEngine(), tiny_gguf)
    wanted = engine.ask(SYSTEM, max_tokens=200, logit_bias={"4": -100.0}).text
    running = engine.submit(SYSTEM, max_tokens=200, logit_bias={"4": -100.0})
    engine.until_tokens(running, 3)
    aborted = threading.Event()

    def stop_one_step() -> None:
        while not engine.engine.abort_step():
            if running in engine.ends:
                return
        aborted.set()

    stop_one_step()
    assert aborted.is_set()
    assert engine.end(running).text == wanted
    engine.thread.close()


def test_a_step_that_never_ends_fails_its_calls_with_a_retryable_error(
    tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tars.workers.llama_context import Aborted, Context

    engine = Collected(LlamaEngine(), tiny_gguf)
    started = threading.Event()

    def hangs(context: Context, *arguments: object) -> None:
        while not context.abort.is_set:
            started.set()
        raise Aborted

    real = Context.decode
    monkeypatch.setattr(Context, "decode", hangs)
    number = engine.submit("hello")
    while number not in engine.ends:
        if engine.thread.events.empty():
            engine.engine.abort_step()
        else:
            engine.take()
    monkeypatch.setattr(Context, "decode", real)
    with pytest.raises(WorkerCrashed) as refused:
        engine.end(number)
    assert refused.value.retryable
    assert engine.ask("hello").usage.completion_tokens > 0
    engine.thread.close()


def test_exact_mode_refuses_shared_cells(tiny_gguf: Path) -> None:
    with pytest.raises(ReplicaFailed, match="Exact mode"):
        Collected(LlamaEngine(), tiny_gguf, exact=True, kv_tokens=512)


def test_what_an_earlier_load_measured_is_taken_over(tiny_gguf: Path) -> None:
    first = Collected(LlamaEngine(), tiny_gguf)
    tuned = first.thread.info.tuned
    first.thread.close()
    second = Collected(LlamaEngine(), tiny_gguf, tuned=tuned)
    assert second.thread.info.tuned == tuned
    assert second.engine.counters().steps == 0
    assert second.ask("hello").usage.completion_tokens > 0
    second.thread.close()
