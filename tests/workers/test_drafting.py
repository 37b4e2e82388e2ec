"""A draft model changes how many steps an answer takes and never its text: real engines on tiny models, with and without a draft.

What the load measures of models this small is noise, so the tests say what it measured (`COSTS`); everything else is real.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_gguf as tiny
from engine_thread import EngineThread, EventLog
from tiny_gguf import write_tiny_adapter, write_tiny_gguf

from tars.core.memory import DRAFT_BATCH, DRAFTED_MOST
from tars.errors import BadModelFile, Cancelled, DoesNotFit, ReplicaFailed, TarsError
from tars.messages.inference import CompleteParams, Generated
from tars.messages.node import TunedSettings
from tars.workers import drafting as module
from tars.workers.draft_worth import LENGTHS, Costs
from tars.workers.engine import LoadSpec, Saved, SaveParams
from tars.workers.llama_engine import LlamaEngine

pytestmark = pytest.mark.model

ON: dict[str, Any] = {"logit_bias": {"4": -100.0, "2": -100.0}}
"""Tokens 2 and 4 end the tiny model's text."""

HELLO = "hello world, the user and the assistant say hello to the world. "
LONG = HELLO * 6
"""More tokens than the draft computes at once."""

EVERY = range(1, DRAFTED_MOST + 1)
COSTS = Costs(
    draft=dict.fromkeys(EVERY, 1e-9),
    plain=dict.fromkeys(EVERY, 1.0),
    checked={(count, length): 1.0 for count in EVERY for length in LENGTHS},
)
"""Proposals for nothing: drafting is always on, with the greatest length."""

MEASURE = module.measure
"""The real one: `worth_it` replaces it while these tests run."""

HOPELESS = Costs(draft={1: 1.0}, plain={1: 1.0}, checked={(1, 2): 1.0})


class Calls(EventLog):
    """An engine, and everything that came of each call."""

    def __init__(self, path: Path, draft: Path | None, **changes: object) -> None:
        spec: dict[str, object] = {"replica": "r", "model": "m", "engine": "llama", "path": str(path)}
        spec |= {"context": 512, "slots": 4, "draft_path": None if draft is None else str(draft)}
        # Without flash attention, as the load would measure it now and then: with and without a draft in the same kernels.
        spec["tuned"] = TunedSettings(flash_attention=False, chunk=128)
        self.engine = LlamaEngine()
        self.thread = EngineThread(self.engine, LoadSpec.model_validate({**spec, **changes}))
        super().__init__()

    @property
    def drafting(self) -> module.Drafting:
        assert self.engine._drafting is not None
        return self.engine._drafting

    def submit(self, prompt: str = HELLO, **params: Any) -> int:
        return self.thread.submit(
            CompleteParams.model_validate({"prompt": prompt, "max_tokens": 40, "temperature": 0.0, **ON, **params})
        )

    def until(self, number: int, tokens: int) -> None:
        while len(self.tokens(number)) < tokens:
            assert number not in self.ends, self.ends
            self.take()

    def tokens(self, number: int, index: int = 0) -> list[int]:
        """Token ids that came of an answer so far."""
        return [token for delta in self.deltas.get(number, []) if delta.index == index for token in delta.token_ids]

    def ask(self, prompt: str = HELLO, **params: Any) -> tuple[list[int], Generated]:
        number = self.submit(prompt, **params)
        end = self.end(number)
        return self.tokens(number), end

    def counted(self, work: Callable[[], object]) -> tuple[int, int, int]:
        """What it took: (steps of the model, tokens proposed, tokens accepted)."""
        before = self.engine.counters()
        work()
        after = self.engine.counters()
        return (
            after.steps - before.steps,
            after.draft_tokens - before.draft_tokens,
            after.draft_accepted - before.draft_accepted,
        )

    def close(self) -> None:
        counters = self.engine.counters()
        assert (counters.running, counters.waiting, counters.kv_used) == (0, 0, 0)
        assert 0 <= counters.draft_accepted <= counters.draft_tokens
        self.thread.close()


@pytest.fixture(autouse=True, scope="module")
def worth_it() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "measure", lambda *arguments: COSTS)
        yield


@pytest.fixture(scope="module")
def other_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model of the same vocabulary, which seldom says the same."""
    return write_tiny_gguf(tmp_path_factory.mktemp("drafts") / "other.gguf", seed=2, layers=1)


@pytest.fixture(scope="module")
def plain(tiny_gguf: Path) -> Iterator[Calls]:
    calls = Calls(tiny_gguf, None)
    yield calls
    calls.close()


@pytest.fixture(scope="module")
def drafted(tiny_gguf: Path) -> Iterator[Calls]:
    """With itself as the draft: everything that is proposed to a greedy answer is right."""
    calls = Calls(tiny_gguf, tiny_gguf)
    yield calls
    calls.close()


@pytest.fixture(scope="module")
def misled(tiny_gguf: Path, other_gguf: Path) -> Iterator[Calls]:
    """With a draft that is mostly wrong, and believed in for ever."""
    calls = Calls(tiny_gguf, other_gguf)
    calls.drafting._worth.length = lambda answers: 4  # type: ignore[union-attr, method-assign]
    yield calls
    calls.close()


# --- the text is the model's -----------------------------------------------------------------------------------------


GRAMMAR = 'root ::= ("yes " | "no ")+ "stop"'

KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "drawn": {"temperature": 0.8, "seed": 7},
    "drawn with all stages": {"temperature": 1.2, "seed": 8, "top_k": 30, "top_p": 0.9, "min_p": 0.01},
    "penalised": {"repeat_penalty": 1.3, "frequency_penalty": 0.3},
    "grammar": {"grammar": GRAMMAR},
    "drawn grammar": {"grammar": GRAMMAR, "temperature": 1.0, "seed": 3},
    "log probabilities": {"logprobs": 3},
    "a long prompt": {"prompt": LONG},
    "to its own end": {"logit_bias": {}, "temperature": 1.5, "seed": 11, "max_tokens": 200},
    "to the context's end": {"prompt": LONG, "max_tokens": None},
    "one token": {"max_tokens": 1},
    "two tokens": {"max_tokens": 2},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", ["drafted", "misled"])
def test_the_text_is_what_the_model_says_without(
    kind: str, engine: str, plain: Calls, request: pytest.FixtureRequest
) -> None:
    calls: Calls = request.getfixturevalue(engine)
    wanted, alone = plain.ask(**KINDS[kind])
    for _ in range(2):  # the second time on what the first left in both caches
        tokens, end = calls.ask(**KINDS[kind])
        assert tokens == wanted
        assert (end.text, end.finish_reason, end.usage.completion_tokens) == (
            alone.text,
            alone.finish_reason,
            alone.usage.completion_tokens,
        )
        if end.logprobs is not None and alone.logprobs is not None:
            assert [one.token_id for one in end.logprobs] == wanted
            assert [one.logprob for one in end.logprobs] == pytest.approx(
                [one.logprob for one in alone.logprobs], abs=0.02
            )


def test_a_draft_that_is_always_right_saves_most_steps(plain: Calls, drafted: Calls) -> None:
    alone, none, _ = plain.counted(lambda: plain.ask("steps " + HELLO, max_tokens=91))
    steps, proposed, accepted = drafted.counted(lambda: drafted.ask("steps " + HELLO, max_tokens=91))
    assert none == 0
    # The first token comes out of the prompt; then ten steps of eight proposals and the model's own token each.
    assert (proposed, accepted) == (80, 80)
    assert alone - steps == 80


def test_a_draft_that_is_always_wrong_is_left_off_after_a_while(tiny_gguf: Path, other_gguf: Path) -> None:
    calls = Calls(tiny_gguf, other_gguf)
    calls.drafting._worth = module.DraftWorth(
        Costs(
            draft=dict.fromkeys(EVERY, 0.1),
            plain=dict.fromkeys(EVERY, 1.0),
            checked={(count, length): 1.0 + length / 10 for count in EVERY for length in LENGTHS},
        )
    )
    _, first, accepted = calls.counted(lambda: calls.ask(max_tokens=100))
    assert accepted < first / 2
    _, proposed, _ = calls.counted(lambda: calls.ask(max_tokens=100))
    assert (first > 0, proposed) == (True, 0)
    calls.close()


def test_a_stop_string_ends_the_text_where_it_ends_without(plain: Calls, drafted: Calls) -> None:
    text = plain.ask()[1].text
    stop = text[len(text) // 2 :][:3]
    wanted = plain.ask(stop=[stop])
    assert wanted[1].finish_reason == "stop"
    tokens, end = drafted.ask(stop=[stop])
    assert (tokens, end.text, end.finish_reason) == (wanted[0], wanted[1].text, "stop")
    assert end.usage == wanted[1].usage


def test_what_an_answer_left_in_the_cache_is_what_it_says(plain: Calls, drafted: Calls) -> None:
    """Refused proposals must be gone from the cells that the next prompt takes over."""
    text = plain.ask("left " + HELLO, max_tokens=30)[1].text
    longer = "left " + HELLO + text
    drafted.ask("left " + HELLO, max_tokens=30)
    tokens, end = drafted.ask(longer)
    assert end.usage.cached_tokens > 20
    assert tokens == plain.ask(longer)[0]


# --- several answers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [2, 4])
@pytest.mark.parametrize("draft", ["tiny_gguf", "other_gguf"])
def test_two_at_once_are_drafted_for_and_a_third_ends_that(
    draft: str, slots: int, plain: Calls, tiny_gguf: Path, request: pytest.FixtureRequest
) -> None:
    """Whether their streams are neighbours, which are computed together, or not."""
    calls = Calls(tiny_gguf, request.getfixturevalue(draft), slots=slots)
    calls.ask("three " + LONG, max_tokens=2)  # what is in a cache decides the streams of the next
    prompts = ["one " + HELLO, "two " + LONG, "three " + HELLO]
    params: list[dict[str, Any]] = [{"max_tokens": 300}, {"temperature": 0.9, "seed": 5, "max_tokens": 100}, {}]
    wanted = [plain.ask(prompt, **more)[0] for prompt, more in zip(prompts, params, strict=True)]
    batcher, propose = calls.engine._batcher, calls.drafting.propose
    assert batcher is not None
    got: dict[int, set[int]] = {}

    def count(answers: Any, room: int) -> Any:
        proposals = propose(answers, room)
        if proposals:
            got.setdefault(len(batcher.running), set()).update(answer.call.number for answer in answers)
        return proposals

    calls.drafting.propose = count  # type: ignore[method-assign]
    for number in (2, 3):
        got.clear()
        numbers = [calls.submit(prompt, **more) for prompt, more in zip(prompts[:number], params[:number], strict=True)]
        for each in numbers:
            calls.end(each)
        assert [calls.tokens(each) for each in numbers] == wanted[:number]
        if number == 2:
            assert got[2] == set(numbers)
    calls.close()


def test_an_answer_does_not_take_the_drafts_cells_of_one_that_runs(tiny_gguf: Path) -> None:
    """Answers that may not be computed together come one after the other, and must not push each other out at every step."""
    adapter = write_tiny_adapter(tiny_gguf.parent / "zero.gguf")
    calls = Calls(tiny_gguf, tiny_gguf, adapters=[{"name": "zero", "path": str(adapter), "scale": 0.0}])
    context = calls.drafting._context
    assert context is not None
    before = context.decodes
    numbers = [calls.submit(LONG, max_tokens=100, model=model) for model in ("m", "m:zero")]
    for number in numbers:
        calls.end(number)
    # Of a hundred tokens nine a step, eight decodes of the draft each; a few for the prompts; twice.
    assert context.decodes - before < 2 * (12 * 8 + 10)
    assert calls.engine.counters().draft_accepted == calls.engine.counters().draft_tokens > 150
    calls.close()


def test_answers_of_one_call_are_drafted_for_too(plain: Calls, drafted: Calls) -> None:
    params = {"n": 2, "temperature": 0.9, "seed": 21}
    alone, with_draft = plain.submit(**params), drafted.submit(**params)
    wanted, got = plain.end(alone), drafted.end(with_draft)
    assert got.further
    assert got.further[0].text == wanted.further[0].text != got.text == wanted.text
    assert [drafted.tokens(with_draft, index) for index in (0, 1)] == [plain.tokens(alone, index) for index in (0, 1)]


@pytest.mark.parametrize("draft", ["tiny_gguf", "other_gguf"])
def test_answers_that_are_sent_away_and_come_back_say_the_same(
    draft: str, plain: Calls, tiny_gguf: Path, request: pytest.FixtureRequest
) -> None:
    """Slots that share the cells of one context, used up: in the model's cache and in the draft's."""
    calls = Calls(tiny_gguf, request.getfixturevalue(draft), kv_tokens=512)
    prompts = ["first " + HELLO, "second " + HELLO]
    wanted = [plain.ask(prompt, max_tokens=250)[0] for prompt in prompts]
    numbers = [calls.submit(prompt, max_tokens=250) for prompt in prompts]
    for number in numbers:
        calls.end(number)
    counters = calls.engine.counters()
    assert counters.preemptions > 0
    assert counters.draft_tokens > 0
    assert [calls.tokens(number) for number in numbers] == wanted
    calls.close()


def test_where_the_drafts_cells_do_not_hold_both_nothing_is_computed_for_them(tiny_gguf: Path) -> None:
    calls = Calls(tiny_gguf, tiny_gguf, kv_tokens=512)
    answers: Any = [type("A", (), {"tokens": [7] * 300})() for _ in range(2)]
    context = calls.drafting._context
    assert context is not None
    assert context.shared
    assert not calls.drafting._make_room(context, [0, 1], sum(len(answer.tokens) + 8 for answer in answers))
    assert calls.drafting._make_room(context, [0, 1], 512)
    calls.close()


def test_adapters_change_the_text_and_the_draft_does_not(tiny_gguf: Path, tmp_path: Path) -> None:
    adapter = {"name": "blue", "path": str(write_tiny_adapter(tmp_path / "blue.gguf")), "scale": 1.0}
    alone, calls = (Calls(tiny_gguf, draft, adapters=[adapter]) for draft in (None, tiny_gguf))
    wanted = {model: alone.ask(model=model)[0] for model in ("m", "m:blue")}
    numbers = {model: calls.submit(model=model) for model in ("m:blue", "m")}
    for model, number in numbers.items():
        calls.end(number)
        assert calls.tokens(number) == wanted[model]
    assert wanted["m"] != wanted["m:blue"]
    assert calls.ask(model="m:blue")[0] == wanted["m:blue"]
    assert calls.engine.counters().draft_tokens > 0
    alone.close()
    calls.close()


def test_an_answer_can_be_saved_between_its_drafted_steps(plain: Calls, drafted: Calls, tmp_path: Path) -> None:
    wanted = plain.ask("saved " + HELLO, max_tokens=200)[0]
    number = drafted.submit("saved " + HELLO, max_tokens=200)
    drafted.until(number, 5)
    (tmp_path / "state").touch(0o600)
    saving = drafted.thread.submit(SaveParams(sequence=number, path=str(tmp_path / "state")))
    while saving not in drafted.ends:
        drafted.take()
    saved = drafted.ends[saving]
    if isinstance(saved, Saved):  # else the answer was whole by then
        assert saved.generated == wanted[: len(saved.generated)]
        with pytest.raises(TarsError):
            drafted.end(number)
    else:
        assert drafted.end(number)


# --- what goes wrong -----------------------------------------------------------------------------------------------------


def test_numbers_that_are_none_end_their_call_in_the_middle_of_a_drafted_step(
    plain: Calls, drafted: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two answers with eight proposals each; the fourth row of the first is poisoned."""
    from tars.workers.llama_context import Context, Rows

    real, poisoned = Context.decode, threading.Event()

    def decode(context: Context, *arguments: Any) -> Rows:
        rows = real(context, *arguments)
        if len(rows) == 18 and not poisoned.is_set():
            poisoned.set()
            rows = rows.copy()
            rows[3] = np.nan
        return rows

    wanted = {prompt: plain.ask(prompt, max_tokens=80)[0] for prompt in ("bad " + HELLO, "good " + HELLO)}
    monkeypatch.setattr(Context, "decode", decode)
    numbers = {drafted.submit(prompt, max_tokens=80): prompt for prompt in wanted}
    failed = 0
    for number, prompt in numbers.items():
        try:
            drafted.end(number)
        except ReplicaFailed:
            failed += 1
            assert drafted.tokens(number) == wanted[prompt][: len(drafted.tokens(number))]
            # The first token, whole steps of nine, and three of this one; the last may be held back until its text is certain.
            assert len(drafted.tokens(number)) % 9 in (3, 4)
        else:
            assert drafted.tokens(number) == wanted[prompt]
    assert (poisoned.is_set(), failed) == (True, 1)
    for prompt in wanted:
        assert drafted.ask(prompt, max_tokens=80)[0] == wanted[prompt], "spoilt cells were kept"


def in_the_draft(calls: Calls, monkeypatch: pytest.MonkeyPatch, act: Callable[[Any], None]) -> threading.Event:
    """Let every decode of the draft begin with `act` from now on; the event says that one did."""
    from tars.workers.llama_context import Context, Rows

    real, begun, draft = Context.decode, threading.Event(), calls.drafting._context

    def decode(context: Context, *arguments: Any) -> Rows:
        if context is draft:
            begun.set()
            act(context)
        return real(context, *arguments)

    monkeypatch.setattr(Context, "decode", decode)
    return begun


def hang(context: Any) -> None:
    """A step that ends only when it is stopped."""
    from tars.workers.llama_context import Aborted

    deadline = time.monotonic() + 30
    while not context.abort.is_set:
        assert time.monotonic() < deadline, "nobody stopped the draft's step"
    raise Aborted


def test_a_call_can_be_cancelled_while_the_draft_computes(drafted: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = drafted.ask()[0]
    with monkeypatch.context() as patch:
        begun = in_the_draft(drafted, patch, hang)
        number = drafted.submit(max_tokens=200)
        assert begun.wait(30)
        drafted.engine.cancel(number)
        with pytest.raises(Cancelled):
            drafted.end(number)
    proposed = drafted.counted(lambda: drafted.ask())[1]
    assert proposed > 0, "somebody's cancellation is no reason to give the draft up"
    assert drafted.ask()[0] == wanted


def test_a_draft_that_hangs_is_stopped_and_given_up_and_the_answer_goes_on(
    plain: Calls, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = Calls(tiny_gguf, tiny_gguf)
    begun = in_the_draft(calls, monkeypatch, hang)
    number = calls.submit()
    assert begun.wait(30)
    assert calls.engine.abort_step(), "the watchdog must be able to stop it"
    calls.end(number)
    assert calls.tokens(number) == plain.ask()[0]
    assert "not used any more" in capsys.readouterr().err
    assert calls.counted(lambda: calls.ask())[1] == 0
    calls.close()


def test_an_unload_does_not_wait_for_the_draft(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(tiny_gguf, tiny_gguf)
    begun = in_the_draft(calls, monkeypatch, hang)
    calls.submit()
    assert begun.wait(30)
    calls.thread.close()


@pytest.mark.parametrize("error", [RuntimeError("llama_decode returned -3"), "no room"])
def test_a_draft_that_cannot_compute_takes_only_its_proposals_along(
    plain: Calls, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch, error: Exception | str
) -> None:
    from tars.workers.llama_context import NoRoom

    def fail(context: Any) -> None:
        raise NoRoom if isinstance(error, str) else error

    calls = Calls(tiny_gguf, tiny_gguf)
    wanted = plain.ask()[0]
    with monkeypatch.context() as patch:
        begun = in_the_draft(calls, patch, fail)
        assert calls.ask()[0] == wanted
        assert begun.is_set()
    _, proposed, accepted = calls.counted(lambda: calls.ask())
    # What found no room is begun anew; what failed is not asked again.
    assert (proposed > 0, proposed == accepted) == (isinstance(error, str), True)
    calls.close()


def test_nothing_is_proposed_beyond_what_the_draft_was_trained_for(drafted: Calls, plain: Calls) -> None:
    wanted = plain.ask(max_tokens=100)[0]
    before, draft = drafted.drafting._model.context_trained, drafted.drafting._model
    draft.context_trained = 60
    try:
        _, few, _ = drafted.counted(lambda: drafted.ask(LONG))
        tokens = drafted.ask(max_tokens=100)[0]
    finally:
        draft.context_trained = before
    assert (few, tokens) == (0, wanted)


# --- the load --------------------------------------------------------------------------------------------------------------


def test_the_load_says_that_there_is_a_draft(drafted: Calls, plain: Calls) -> None:
    assert drafted.thread.info.backend.endswith(", with a draft model")
    assert "draft" not in plain.thread.info.backend
    loading = [percent for stage, percent in drafted.thread.stages if stage == "load"]
    assert loading == sorted(loading)
    assert any(80.0 < percent < 82.0 for percent in loading), "a big draft's load must not look hung"


def test_the_drafts_context_is_as_large_as_the_estimate_says(drafted: Calls) -> None:
    context = drafted.drafting._context
    assert context is not None
    assert (context.streams, context.most) == (DRAFTED_MOST, DRAFT_BATCH)


def test_a_draft_that_would_slow_the_model_down_is_not_used(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "measure", lambda *arguments: HOPELESS)
    closed: list[object] = []
    real = module.Drafting.close
    monkeypatch.setattr(module.Drafting, "close", lambda drafting: (closed.append(drafting), real(drafting)))
    calls = Calls(tiny_gguf, tiny_gguf)
    assert calls.thread.info.backend.endswith(", without its draft model (slower with it)")
    assert calls.engine._drafting is None
    assert len(closed) == 1
    assert calls.counted(lambda: calls.ask())[1:] == (0, 0)
    calls.close()


def test_every_shape_is_measured_and_leaves_both_contexts_empty(tiny_gguf: Path, other_gguf: Path) -> None:
    calls = Calls(tiny_gguf, other_gguf)
    target, context = calls.engine._context, calls.drafting._context
    assert target is not None
    assert context is not None
    costs = MEASURE(target, context, 10, DRAFTED_MOST, lambda: None)
    assert set(costs.draft) == set(costs.plain) == set(EVERY)
    assert set(costs.checked) == {(count, length) for count in EVERY for length in LENGTHS}
    assert all(seconds > 0 for each in (costs.draft, costs.plain, costs.checked) for seconds in each.values())
    assert calls.ask()[1].usage.completion_tokens == 40
    calls.close()


def test_exact_mode_takes_no_draft_and_says_so(tiny_gguf: Path) -> None:
    calls = Calls(tiny_gguf, tiny_gguf, exact=True)
    assert calls.thread.info.backend.endswith(", without its draft model (exact mode)")
    assert calls.engine._drafting is None
    calls.close()


def test_a_missing_a_damaged_and_a_cut_off_draft_are_named(tiny_gguf: Path, tmp_path: Path) -> None:
    damaged, cut = tmp_path / "damaged.gguf", tmp_path / "cut.gguf"
    damaged.write_bytes(b"GGUF" + b"\xff" * 400)
    cut.write_bytes(tiny_gguf.read_bytes()[:-3000])
    for path in (tmp_path / "none.gguf", damaged, cut):
        with pytest.raises(BadModelFile, match=r"^The draft model: .*(?:Copy or download it again|The worker's lines)"):
            Calls(tiny_gguf, path)


def test_another_vocabulary_is_refused_and_padding_is_not(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plain: Calls
) -> None:
    real = tiny.vocabulary
    swapped = real()
    swapped[-1], swapped[-2] = swapped[-2], swapped[-1]
    for number, rows in enumerate((real()[:-129], swapped)):
        with monkeypatch.context() as patch:
            patch.setattr(tiny, "vocabulary", lambda words, rows=rows: rows)
            draft = write_tiny_gguf(tmp_path / f"{number}.gguf")
        with pytest.raises(BadModelFile, match=r"The draft model has another vocabulary.*same family"):
            Calls(tiny_gguf, draft)
    with monkeypatch.context() as patch:
        patch.setattr(tiny, "vocabulary", lambda words: real()[:-3])
        draft = write_tiny_gguf(tmp_path / "short.gguf")
    calls = Calls(tiny_gguf, draft)
    assert calls.ask()[0] == plain.ask()[0]
    # The draft lacks the last tokens: an answer that holds one is not drafted for.
    lacking = calls.engine._model.pieces[calls.engine._model.tokens - 1].decode()
    _, proposed, _ = calls.counted(lambda: calls.ask(f"hello {lacking}"))
    assert proposed == 0
    calls.close()


def test_weights_that_give_no_numbers_are_refused(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tars.workers.llama_context import Context, Rows

    real = Context.decode

    def decode(context: Context, *arguments: Any) -> Rows:
        rows = real(context, *arguments)
        return np.full_like(rows, np.nan) if context.most == DRAFT_BATCH else rows

    monkeypatch.setattr(Context, "decode", decode)
    with pytest.raises(BadModelFile, match=r"^The draft model: "):
        Calls(tiny_gguf, tiny_gguf)


def test_memory_that_the_draft_does_not_find_is_its_own(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **named: object) -> None:
        raise DoesNotFit("The device ran out of memory.")

    monkeypatch.setattr(module, "Context", full)
    with pytest.raises(DoesNotFit, match=r"^The draft model: The device ran out of memory\."):
        Calls(tiny_gguf, tiny_gguf)
