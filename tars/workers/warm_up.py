"""The last part of a chat model's load: its context, its first decodes, and how its steps are cut here.

Law of this file: it chooses settings, those that an earlier load of the same measured or what `self_measurement` finds now, and refuses
what cannot be had on this device. A little is computed in any case: that pages the weights in, and refuses weights that give no numbers.
The context is empty afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tars.errors import BadModelFile, ReplicaFailed
from tars.messages.node import MeasuredSpeeds, TunedSettings
from tars.workers import self_measurement as measurement
from tars.workers.adapters import Adapters
from tars.workers.batcher import ALONE_SECONDS, JOIN_SECONDS, Shapes
from tars.workers.drafting import Drafting
from tars.workers.engine import LoadSpec, Progress
from tars.workers.llama_context import Context, shares_cells, spare_streams
from tars.workers.llama_library import NativeLog
from tars.workers.llama_model import Model
from tars.workers.llama_sampling import check_finite

EXACT_CHUNK = 64
"""Prefill borders of exact mode. A constant, not a measurement: replicas on other PCs must have the same."""


@dataclass(frozen=True, slots=True)
class Warm:
    """What the load is to go on with."""

    context: Context
    tuned: TunedSettings
    shapes: Shapes
    drafts: bool
    """Whether the draft model is worth its time; True where there is none."""


def warm_up(
    spec: LoadSpec,
    model: Model,
    adapters: Adapters,
    drafting: Drafting | None,
    log: NativeLog,
    progress: Progress,
    *,
    on_device: bool,
    mark: Callable[[], None],
) -> Warm:
    """Percent is of the whole load: from 85 to 99; `mark` is called as it gets on; `on_device`: a card computes. Raises
    `BadModelFile`, `DoesNotFit` or `ReplicaFailed`.
    """
    known = spec.tuned
    most = min(spec.context, max(spec.micro_batch, EXACT_CHUNK if spec.exact else 1))
    room = spec.context
    if spec.kv_tokens is not None and shares_cells(spec):
        room = max(2, spec.kv_tokens // spec.slots)

    def made(flash_attention: bool) -> Context:
        spare = spare_streams(spec, model)
        return Context(model, spec, log, chunk=most, flash_attention=flash_attention, spare=spare)

    def measured_now(context: Context) -> measurement.Measurement:
        return measurement.measure(context, model, room=room, chunk=most, mark=mark)

    flash = spec.flash_attention if known is None or known.flash_attention is None else known.flash_attention
    context = made(flash)
    progress("warm", 85.0)
    ordinary = next((token for token in range(model.tokens) if model.pieces[token]), 0)
    try:
        check_finite(context.decode([ordinary], [0], [0], [0])[0])
    except ReplicaFailed as error:
        raise BadModelFile(error.message) from None
    context.forget(0, 0)
    mark()
    if known is not None and known.chunk is not None:
        speeds = known.speeds
    else:
        progress("warm", 88.0)
        measured = measured_now(context)
        # A card's kernels are known (core.tuning), a quantised cache needs flash attention, and exact mode needs one order of sums.
        given = on_device or spec.kv_type != "f16" or spec.exact
        if not given and measured.decode_one < measurement.SLOW_SECONDS:
            progress("warm", 93.0)
            context.close()
            context = made(not flash)
            other = measured_now(context)
            if other.typical < measurement.FLASH_WORTH * measured.typical:
                measured, flash = other, not flash
            else:
                context.close()
                context = made(flash)
        speeds = measured.speeds
    least_rows = _least_exact_rows(context, model, adapters, room) if spec.exact else 1
    adapters.try_out(context, ordinary)
    drafts = True
    if drafting is not None:
        progress("warm", 97.0)
        drafts = drafting.warm_up(context, ordinary, flash_attention=flash, mark=mark)
    context.native_seconds, context.decodes = 0.0, 0
    progress("warm", 99.0)
    shapes = _shapes(spec, speeds, least_rows, model.forgets_partly)
    return Warm(context, TunedSettings(flash_attention=flash, chunk=shapes.chunk, speeds=speeds), shapes, drafts)


def _least_exact_rows(context: Context, model: Model, adapters: Adapters, room: int) -> int:
    """Rows of one decode at least. Raises `ReplicaFailed` where no number of them makes the others' company indifferent."""
    # With each adapter: its matrices may go through other kernels than the model's.
    least = [measurement.least_exact_rows(context, model, room) for _ in adapters.each(context)]
    if None in least:
        raise ReplicaFailed(
            "On this device a sequence's numbers depend on how many others are computed with it, so several slots cannot be exact. "
            'Deploy the model with slots = 1, or set `continuation = "fast"` under [engines].'
        )
    return max(rows for rows in least if rows is not None)


def _shapes(spec: LoadSpec, speeds: MeasuredSpeeds, least_rows: int, forgets_partly: bool) -> Shapes:
    most = min(spec.micro_batch, spec.context)

    def chunk(milliseconds: float) -> int:
        return measurement.chunk_for(speeds, milliseconds, most)

    return Shapes(
        chunk=min(EXACT_CHUNK, spec.context) if spec.exact else chunk(spec.inter_token_ms),
        alone=chunk(ALONE_SECONDS * 1000),
        joined=chunk(JOIN_SECONDS * 1000),
        most=most,
        bound=spec.inter_token_ms / 1000,
        # An idle stream that is computed along must be able to forget that token again.
        gap=measurement.gap_worth_filling(speeds, spec.slots) if forgets_partly else 0,
        exact=spec.exact,
        least_rows=least_rows,
    )
