"""The end of a load: which settings are taken, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from engine_thread import TUNED, Collected
from tiny_gguf import write_tiny_adapter, write_tiny_gguf

from tars.errors import BadModelFile, ReplicaFailed
from tars.messages.node import TunedSettings
from tars.workers.engine import AdapterSpec, LoadSpec
from tars.workers.llama_engine import LlamaEngine

if TYPE_CHECKING:
    from tars.workers.warm_up import Warm

pytestmark = pytest.mark.model


class Load:
    """A model, and its warm-up with any settings."""

    def __init__(self, path: Path) -> None:
        from tars.workers.llama_library import NativeLog
        from tars.workers.llama_model import Model

        self.path = path
        self.log = NativeLog()
        self.model = Model(self.spec(), self.log, lambda percent: None)
        self.stages: list[tuple[str, float]] = []
        self.marks = 0
        self.contexts: list[Any] = []

    def spec(self, **changes: object) -> LoadSpec:
        return LoadSpec.model_validate(
            {"replica": "r", "model": "m", "engine": "llama", "path": str(self.path), "context": 256, **changes}
        )

    def warm(self, *, on_device: bool = False, adapters: list[AdapterSpec] | None = None, **changes: object) -> Warm:
        from tars.workers.adapters import Adapters
        from tars.workers.warm_up import warm_up

        def mark() -> None:
            self.marks += 1

        made = warm_up(
            self.spec(**changes),
            self.model,
            Adapters(self.model, adapters or [], self.log),
            None,
            self.log,
            lambda stage, percent: self.stages.append((stage, percent)),
            on_device=on_device,
            mark=mark,
        )
        self.contexts.append(made.context)
        return made


@pytest.fixture
def load(tiny_gguf: Path) -> Iterator[Load]:
    load = Load(tiny_gguf)
    yield load
    for context in load.contexts:
        context.close()
    load.model.close()


def measured(monkeypatch: pytest.MonkeyPatch, *seconds: float) -> list[bool]:
    """Let each measurement find that a decode takes the next of these; with flash attention or without, one after the other."""
    from tars.workers import self_measurement

    left, flash = list(seconds), []
    made = self_measurement.Context.__init__

    def noted(context: Any, *arguments: Any, flash_attention: bool, **more: Any) -> None:
        flash.append(flash_attention)
        made(context, *arguments, flash_attention=flash_attention, **more)

    def measure(*arguments: object, **more: object) -> self_measurement.Measurement:
        one = left.pop(0)
        return self_measurement.Measurement(one, 100, one, one, 1)

    monkeypatch.setattr(self_measurement.Context, "__init__", noted)
    monkeypatch.setattr(self_measurement, "measure", measure)
    return flash


def test_what_an_earlier_load_measured_is_taken_over(tiny_gguf: Path) -> None:
    first = Collected(LlamaEngine(), tiny_gguf)
    tuned = first.thread.info.tuned
    first.thread.close()
    second = Collected(LlamaEngine(), tiny_gguf, tuned=tuned)
    assert second.thread.info.tuned == tuned
    assert second.engine.counters().steps == 0
    assert second.ask("hello").usage.completion_tokens > 0
    second.thread.close()


def test_known_settings_are_not_measured_again(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    flash = measured(monkeypatch)
    warm = load.warm(tuned=TUNED, flash_attention=True)
    assert flash == [TUNED.flash_attention]
    assert warm.tuned.speeds == TUNED.speeds
    assert [percent for _, percent in load.stages] == [85.0, 99.0]
    assert load.marks == 1, "a little is computed in any case"
    assert warm.context.decodes == 0


def test_what_is_known_of_the_attention_alone_is_taken_and_the_rest_measured(load: Load) -> None:
    warm = load.warm(tuned=TunedSettings(flash_attention=True), exact=True)
    assert warm.tuned.flash_attention
    assert warm.tuned.speeds.decode_tokens_per_second
    assert load.marks > 1


@pytest.mark.parametrize(
    ("first", "other", "tried"),
    [(0.010, 0.005, [False, True]), (0.010, 0.0099, [False, True, False]), (0.010, 0.02, [False, True, False])],
)
def test_flash_attention_is_taken_on_a_processor_where_it_is_worth_it(
    load: Load, monkeypatch: pytest.MonkeyPatch, first: float, other: float, tried: list[bool]
) -> None:
    flash = measured(monkeypatch, first, other)
    warm = load.warm()
    assert flash == tried
    assert warm.tuned.flash_attention is tried[-1]
    best = min(first, other) if tried[-1] else first
    assert warm.tuned.speeds.decode_tokens_per_second == pytest.approx(1 / best, rel=0.01)


@pytest.mark.parametrize(
    ("seconds", "settings"),
    [
        (0.01, {"on_device": True}),
        (0.01, {"exact": True}),
        (0.30, {}),
    ],
)
def test_attention_that_is_given_and_a_slow_model_are_not_compared(
    load: Load, monkeypatch: pytest.MonkeyPatch, seconds: float, settings: dict[str, Any]
) -> None:
    flash = measured(monkeypatch, seconds)
    warm = load.warm(**settings)
    assert flash == [settings.get("flash_attention", False)]
    assert warm.tuned.flash_attention is flash[0]


def test_a_quantised_cache_keeps_the_flash_attention_that_it_needs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # Blocks of 32: the head has to be as wide.
    load = Load(write_tiny_gguf(tmp_path / "wide.gguf", embedding=128))
    flash = measured(monkeypatch, 0.01)
    warm = load.warm(kv_type="q8_0", flash_attention=True)
    assert flash == [True]
    warm.context.close()
    load.model.close()


def test_weights_that_give_no_numbers_are_refused(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(row: object) -> None:
        raise ReplicaFailed("not a number")

    monkeypatch.setattr("tars.workers.warm_up.check_finite", refuse)
    with pytest.raises(BadModelFile, match="not a number"):
        load.warm()


@pytest.mark.parametrize(("found", "least"), [([1, 1], 1), ([1, 2], 2), ([2, 1], 2), ([1, None], None)])
def test_exact_mode_has_as_many_rows_as_the_model_and_each_adapter_need(
    load: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, found: list[int | None], least: int | None
) -> None:
    left = list(found)
    monkeypatch.setattr("tars.workers.self_measurement.least_exact_rows", lambda *arguments: left.pop(0))
    adapters = [AdapterSpec(name="blue", path=str(write_tiny_adapter(tmp_path / "blue.gguf")))]
    if least is None:
        with pytest.raises(ReplicaFailed, match="cannot be exact"):
            load.warm(exact=True, slots=4, tuned=TUNED, adapters=adapters)
    else:
        assert load.warm(exact=True, slots=4, tuned=TUNED, adapters=adapters).shapes.least_rows == least
    assert left == []


def test_a_steps_shape_follows_from_the_speeds(load: Load) -> None:
    shapes = load.warm(tuned=TUNED, slots=4, inter_token_ms=5.0, context=512).shapes
    assert (shapes.chunk, shapes.bound) == (48, 0.005)  # 10,000 tokens a second, in steps of 8
    assert (shapes.alone, shapes.joined, shapes.most) == (512, 512, 512)
    assert shapes.gap > 0
    assert (shapes.exact, shapes.least_rows) == (False, 1)
    exact = load.warm(tuned=TUNED, slots=1, inter_token_ms=5.0, exact=True).shapes
    assert (exact.chunk, exact.exact) == (64, True)
    small = load.warm(tuned=TUNED, slots=1, exact=True, context=16).shapes
    assert small.chunk == 16


def test_a_model_that_forgets_only_whole_sequences_computes_no_idle_streams_along(load: Load) -> None:
    load.model.forgets_partly = False
    assert load.warm(tuned=TUNED, slots=4).shapes.gap == 0
