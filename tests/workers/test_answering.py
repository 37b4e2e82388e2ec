"""The calls of a chat engine on a real (random) GGUF: several answers, broken off, saved and continued elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_thread import Collected

from tars.errors import Cancelled, Draining, InvalidParams, TarsError
from tars.workers.engine import Resume, SaveParams
from tars.workers.llama_engine import LlamaEngine

pytestmark = pytest.mark.model

SYSTEM = (
    "the user and the assistant say hello to the world and to each other, in a system that is the same for all. " * 3
)


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


def test_n_answers_have_their_own_seeds_and_one_prompt(batch: Collected) -> None:
    several = batch.ask(SYSTEM, n=3, seed=11, temperature=1.0, top_k=0, min_p=0.0, top_p=1.0)
    single = [batch.ask(SYSTEM, seed=11 + index, temperature=1.0, top_k=0, min_p=0.0, top_p=1.0) for index in range(3)]
    assert [several.text, *(choice.text for choice in several.further)] == [one.text for one in single]
    assert [choice.index for choice in several.further] == [1, 2]
    assert len({one.text for one in single}) == 3
    assert several.usage.completion_tokens == sum(one.usage.completion_tokens for one in single)


def test_a_drawn_seed_is_told_and_gives_the_text_again(batch: Collected) -> None:
    drawn = batch.ask(SYSTEM, temperature=1.0)
    assert drawn.seed is not None
    assert batch.ask(SYSTEM, temperature=1.0, seed=drawn.seed).text == drawn.text


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
    saved = exact.saved(started, file)
    with pytest.raises(Draining):
        exact.end(started)
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


@pytest.mark.parametrize("damage", ["gone", "cut", "another"])
def test_a_state_that_does_not_suit_is_computed_again(exact: Collected, tmp_path: Path, damage: str) -> None:
    params: dict[str, object] = {"max_tokens": 40, "logit_bias": {"4": -100.0}}
    whole = exact.ask(SYSTEM, **params)
    started = exact.submit(SYSTEM, **params)
    exact.until_tokens(started, 5)
    file = tmp_path / "state"
    saved = exact.saved(started, file)
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
