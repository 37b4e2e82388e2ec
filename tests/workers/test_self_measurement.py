"""What a load measures, on real (tiny) contexts; and what follows from the numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tars.messages.node import MeasuredSpeeds
from tars.workers.engine import LoadSpec

if TYPE_CHECKING:
    from tars.workers.llama_context import Context, Rows
    from tars.workers.llama_model import Model

pytestmark = pytest.mark.model  # importing the module loads llama.cpp


def speeds(prefill: float | None = None, one: float | None = None, every: float | None = None) -> MeasuredSpeeds:
    return MeasuredSpeeds(
        prefill_tokens_per_second=prefill,
        decode_tokens_per_second=one,
        decode_tokens_per_second_all_slots=every,
    )


@pytest.mark.parametrize(
    ("prefill", "milliseconds", "most", "chunk"),
    [
        (1000.0, 100.0, 512, 96),  # 100, in whole steps of 8
        (1000.0, 500.0, 512, 496),
        (1000.0, 5000.0, 512, 512),
        (30.0, 100.0, 512, 16),  # never fewer than the least
        (None, 100.0, 512, 16),
        (1000.0, 100.0, 10, 10),  # but not more than the context computes at once
        (1000.0, 0.0, 0, 1),
    ],
)
def test_a_chunk_takes_as_long_as_a_token_may_wait(
    prefill: float | None, milliseconds: float, most: int, chunk: int
) -> None:
    from tars.workers.self_measurement import chunk_for

    assert chunk_for(speeds(prefill), milliseconds, most) == chunk


@pytest.mark.parametrize(
    ("one", "every", "slots", "gap"),
    [
        (10.0, 10.0, 4, 0),  # a row costs what a pass costs: nothing is worth computing along
        (10.0, 8.0, 4, 0),
        (10.0, 40.0, 4, 4),  # rows cost nothing
        (10.0, 50.0, 4, 4),
        (10.0, 20.0, 4, 2),  # 0.1 s a pass with its row, 0.0333 s each further row: a pass is worth two rows
        (10.0, 20.0, 1, 0),
        (None, 20.0, 4, 0),
        (10.0, None, 4, 0),
    ],
)
def test_idle_streams_are_computed_along_where_another_pass_costs_more(
    one: float | None, every: float | None, slots: int, gap: int
) -> None:
    from tars.workers.self_measurement import gap_worth_filling

    assert gap_worth_filling(speeds(one=one, every=every), slots) == pytest.approx(gap, abs=0)


def test_seconds_become_speeds_and_one_number_to_compare_by() -> None:
    from tars.workers.self_measurement import Measurement

    measured = Measurement(prefill=0.5, prefill_tokens=100, decode_one=0.02, decode_all=0.04, slots=4)
    assert measured.speeds == speeds(200.0, 50.0, 100.0)
    assert measured.typical == pytest.approx(0.5 + 4 * 0.04 + 4 * 0.02)
    slower = Measurement(prefill=0.5, prefill_tokens=100, decode_one=0.03, decode_all=0.04, slots=4)
    assert slower.typical > measured.typical


class Loaded:
    """A model and a context of it, as a load makes them."""

    def __init__(self, path: Path, slots: int, kv_tokens: int | None, context: int) -> None:
        from tars.workers.llama_context import Context
        from tars.workers.llama_library import NativeLog
        from tars.workers.llama_model import Model

        spec = LoadSpec(
            replica="r", model="m", engine="llama", path=str(path), context=context, slots=slots, kv_tokens=kv_tokens
        )
        self.room = context if kv_tokens is None else kv_tokens // slots
        """Tokens that a sequence may have while all others have as many."""
        log = NativeLog()
        self.model: Model = Model(spec, log, lambda percent: None)
        self.context: Context = Context(self.model, spec, log, chunk=min(64, context), flash_attention=False)

    def lengths(self) -> list[int]:
        from llama_cpp import llama_cpp as api

        return [
            api.llama_memory_seq_pos_max(self.context._memory, stream) + 1 for stream in range(self.context.streams)
        ]

    def close(self) -> None:
        self.context.close()
        self.model.close()


@pytest.fixture(params=[(1, None, 256), (4, None, 256), (4, 256, 256), (3, None, 2)], ids=str)
def loaded(request: pytest.FixtureRequest, tiny_gguf: Path) -> Iterator[Loaded]:
    slots, kv_tokens, context = request.param
    loaded = Loaded(tiny_gguf, slots, kv_tokens, context)
    yield loaded
    loaded.close()


@pytest.fixture
def four(tiny_gguf: Path) -> Iterator[Loaded]:
    loaded = Loaded(tiny_gguf, 4, None, 256)
    yield loaded
    loaded.close()


def test_a_measurement_has_numbers_for_everything_and_leaves_the_context_empty(loaded: Loaded) -> None:
    from tars.workers.self_measurement import measure

    marks: list[int] = []
    context = loaded.context
    before = context.decodes
    measured = measure(
        context, loaded.model, room=loaded.room, chunk=min(64, loaded.room), mark=lambda: marks.append(context.decodes)
    )
    assert min(measured.prefill, measured.decode_one, measured.decode_all) > 0
    assert measured.slots == context.streams
    assert 1 <= measured.prefill_tokens <= min(64, loaded.room - 1)
    if context.streams == 1:
        assert measured.decode_all == measured.decode_one
    assert marks == list(range(before + 1, context.decodes + 1)), "a watchdog sees every decode"
    assert loaded.lengths() == [0] * context.streams


def test_the_measured_tokens_come_behind_a_chats_first_hundreds(four: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    from tars.workers.llama_context import Context
    from tars.workers.self_measurement import DEPTH, measure

    decode, single = Context.decode, []

    def noted(context: Context, tokens: Sequence[int], positions: Sequence[int], *others: Sequence[int]) -> Rows:
        if len(tokens) in (1, 4):
            single.append((len(tokens), positions[0]))
        return decode(context, tokens, positions, *others)

    monkeypatch.setattr(Context, "decode", noted)
    measure(four.context, four.model, room=256, chunk=64, mark=lambda: None)
    assert single[-1] == (4, DEPTH)
    assert (1, DEPTH) in single


def test_the_best_of_several_tries_counts(four: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process that takes the cores for a while is not the model's speed."""
    from tars.workers import self_measurement
    from tars.workers.llama_context import Context

    decode, clock, count = Context.decode, [0.0], [0]

    def timed(context: Context, tokens: Sequence[int], *others: Sequence[int]) -> Rows:
        count[0] += 1
        clock[0] += 0.001 * len(tokens) * (10 if count[0] % 3 == 0 else 1)
        return decode(context, tokens, *others)

    monkeypatch.setattr(Context, "decode", timed)
    monkeypatch.setattr(self_measurement.time, "perf_counter", lambda: clock[0])
    measured = self_measurement.measure(four.context, four.model, room=256, chunk=64, mark=lambda: None)
    assert measured.decode_one == pytest.approx(0.001)
    assert measured.decode_all == pytest.approx(0.004)
    assert measured.prefill == pytest.approx(0.001 * measured.prefill_tokens)


def test_a_slow_model_is_measured_with_few_tries(four: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    from tars.workers import self_measurement
    from tars.workers.llama_context import Context

    decode, clock, sizes = Context.decode, [0.0], []

    def slow(context: Context, tokens: Sequence[int], *others: Sequence[int]) -> Rows:
        clock[0] += 3.0 * len(tokens)
        sizes.append(len(tokens))
        return decode(context, tokens, *others)

    monkeypatch.setattr(Context, "decode", slow)
    monkeypatch.setattr(self_measurement.time, "perf_counter", lambda: clock[0])
    measured = self_measurement.measure(four.context, four.model, room=256, chunk=64, mark=lambda: None)
    assert measured.decode_one == pytest.approx(3.0)
    assert len(sizes) <= 5, "each part once, and no depth"
    assert four.lengths() == [0] * 4


def shifted(monkeypatch: pytest.MonkeyPatch, shift: dict[int, float]) -> None:
    """Let a decode's logits depend on how many rows it has, as other kernels do."""
    from tars.workers.llama_context import Context

    decode = Context.decode

    def changed(context: Context, tokens: Sequence[int], *others: Sequence[int]) -> Rows:
        rows = decode(context, tokens, *others)
        return (rows + shift.get(len(tokens), 0.0)).astype(rows.dtype)

    monkeypatch.setattr(Context, "decode", changed)


def the_same_logits_in_any_company(loaded: Loaded, least: int) -> bool:
    """Whether the last stream's next token has the same logits with `least` rows and with all."""
    context, tokens = loaded.context, [300, 301, 302]
    for stream in range(context.streams):
        context.decode(tokens, [0, 1, 2], [stream] * 3, [])

    def row(count: int) -> bytes:
        company = range(context.streams - count, context.streams)
        logits = context.decode([303] * count, [3] * count, list(company), [count - 1])[0].tobytes()
        for stream in company:
            context.forget(stream, 3)
        return logits

    return len({row(count) for count in range(least, context.streams + 1)}) == 1


def test_the_least_rows_of_this_machine_really_make_no_difference(four: Loaded) -> None:
    from tars.workers.self_measurement import least_exact_rows

    least = least_exact_rows(four.context, four.model, room=256)
    assert least in (1, 2)
    assert four.lengths() == [0] * 4
    assert the_same_logits_in_any_company(four, least)


@pytest.mark.parametrize(
    ("shift", "least"),
    [({1: 0.5}, 2), ({4: 0.5}, None), ({1: 0.5, 3: 0.25}, None), ({1: 0.5, 2: 0.5, 3: 0.5, 4: 0.5}, 1)],
)
def test_kernels_that_depend_on_the_number_of_rows_are_found(
    four: Loaded, monkeypatch: pytest.MonkeyPatch, shift: dict[int, float], least: int | None
) -> None:
    from tars.workers.self_measurement import least_exact_rows

    if least_exact_rows(four.context, four.model, room=256) != 1:
        pytest.skip("this machine's kernels for one row are others by themselves")
    shifted(monkeypatch, shift)
    assert least_exact_rows(four.context, four.model, room=256) == least
    assert four.lengths() == [0] * 4


def test_one_slot_is_always_alone(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tars.workers.self_measurement import least_exact_rows

    loaded = Loaded(tiny_gguf, 1, None, 64)
    shifted(monkeypatch, {1: 0.5})
    assert least_exact_rows(loaded.context, loaded.model, room=64) == 1
    loaded.close()


@pytest.mark.parametrize(("shift", "least"), [({}, 1), ({1: 0.5}, None)])
def test_a_model_that_forgets_only_whole_sequences_has_each_row_at_the_same_depth(
    four: Loaded, monkeypatch: pytest.MonkeyPatch, shift: dict[int, float], least: int | None
) -> None:
    """And nothing is computed along with its single rows, for that could not be taken back."""
    from tars.workers.llama_context import Context
    from tars.workers.self_measurement import least_exact_rows

    if least_exact_rows(four.context, four.model, room=256) != 1:
        pytest.skip("this machine's kernels for one row are others by themselves")
    forget = Context.forget

    def whole(context: Context, stream: int, position: int) -> bool:
        forget(context, stream, 0)
        return position == 0

    monkeypatch.setattr(Context, "forget", whole)
    four.model.forgets_partly = False
    shifted(monkeypatch, shift)
    assert least_exact_rows(four.context, four.model, room=256) == least
    assert four.lengths() == [0] * 4
