"""Continuous batching on a real (random) GGUF: many callers at once, each gets what he would get alone; the cache full, stops, moves."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from engine_thread import TUNED, Collected

from tars.errors import (
    BadGrammar,
    Cancelled,
    DeadlineExceeded,
    ReplicaFailed,
    WorkerCrashed,
)
from tars.workers.engine import Resume
from tars.workers.kv_cache import LEFT
from tars.workers.llama_engine import LlamaEngine

pytestmark = pytest.mark.model

SYSTEM = (
    "the user and the assistant say hello to the world and to each other, in a system that is the same for all. " * 3
)

ENDLESS = {"max_tokens": 4000, "logit_bias": {"4": -100.0}}
"""Token 4 is the tiny model's end."""


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


@pytest.mark.parametrize("generated", [0, 10])
def test_who_was_begun_elsewhere_does_not_wait_for_a_slot(tiny_gguf: Path, tmp_path: Path, generated: int) -> None:
    """Slots that share their cells: there is a stream beyond them, and for nobody who begins."""
    engine = Collected(LlamaEngine(), tiny_gguf, slots=2, kv_tokens=1000, tuned=TUNED)
    long = {"max_tokens": 200, "logit_bias": {"4": -100.0, "2": -100.0}}
    short = {**long, "max_tokens": 40}
    wanted = engine.ask("3 hello", **short).text
    moving = engine.submit("3 hello", **short)
    engine.until_tokens(moving, 10)
    saved = engine.saved(moving, tmp_path / "state")
    running = [engine.submit(f"{number} hello", **long) for number in range(2)]
    waiting = [engine.submit(f"{number} hello", **short) for number in (5, 6)]
    for number in running:
        engine.until_tokens(number, 2)
    tokens = saved.generated[:generated]
    resume = Resume(generated=[tokens], handed_out=[len(tokens)], seed=saved.seed)
    resumed = engine.submit("3 hello", resume=resume, **short)
    order = []
    while not {*running, *waiting, resumed} <= engine.ends.keys():
        number = engine.take()
        if number in engine.ends:
            order.append(number)
        assert engine.engine.counters().running <= 2 + bool(generated)
    assert engine.ends[resumed].text == wanted
    assert order.index(resumed) == (0 if generated else 4)
    assert sorted(order[: 2 + bool(generated)]) == sorted([*running, *([resumed] if generated else [])])
    assert sorted(order) == sorted([*running, *waiting, resumed])
    engine.thread.close()


def test_where_every_stream_is_taken_one_that_has_given_nothing_gives_way_to_one_that_was_begun(
    tiny_gguf: Path, tmp_path: Path
) -> None:
    """Streams with cells of their own: there are no more of them than slots."""
    engine = Collected(LlamaEngine(), tiny_gguf, context=2048, slots=2, exact=True)
    long = {"max_tokens": 300, "logit_bias": {"4": -100.0, "2": -100.0}}
    short = {**long, "max_tokens": 40}
    prompt = SYSTEM * 4
    wanted = [engine.ask(text, **short).text for text in ("3 hello", prompt)]
    while actions := engine.engine._cache.drop_oldest():
        engine.engine._context.perform(actions)
    moving = engine.submit("3 hello", **short)
    engine.until_tokens(moving, 10)
    saved = engine.saved(moving, tmp_path / "state")
    running = engine.submit("1 hello", **long)
    engine.until_tokens(running, 2)
    resume = Resume(generated=[saved.generated], handed_out=[len(saved.generated)], seed=saved.seed)
    prefilled = engine.engine._batcher._prefill_for
    resumed = []

    def then(pace: object) -> bool:
        """The answer comes when a first chunk of the long prompt is computed."""
        done = prefilled(pace)
        if not resumed and any(0 < each.position < each.prompt_length for each in engine.engine._batcher.running):
            resumed.append(engine.submit("3 hello", resume=resume, **short))
        return done

    engine.engine._batcher._prefill_for = then
    coming = engine.submit(prompt, **short)
    order = []
    while not {running, coming} <= engine.ends.keys():
        order.append(engine.take())
    assert engine.engine.counters().preemptions == 1
    assert [engine.ends[resumed[0]].text, engine.ends[coming].text] == wanted
    assert order.index(resumed[0]) < order.index(coming)
    engine.thread.close()


def test_cells_that_found_no_place_in_ram_are_computed_again(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Collected(LlamaEngine(), tiny_gguf, context=512, slots=3, kv_tokens=512)
    monkeypatch.setattr("tars.workers.batcher.SWAPPED_MOST", 0)
    params = {"max_tokens": 300, "logit_bias": {"4": -100.0, "2": -100.0}}
    numbers = [engine.submit(f"{number} hello", **params) for number in range(3)]
    assert [engine.end(number).usage.completion_tokens for number in numbers] == [300] * 3
    assert engine.engine.counters().preemptions > 0
    engine.thread.close()


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
    saved = engine.saved(moving, file)
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
