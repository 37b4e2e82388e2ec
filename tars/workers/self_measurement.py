"""How fast a loaded model is here, and what follows for its settings: measured once after the load, in a few seconds.

Law of this file: it computes with a context and decides numbers; the context is empty again afterwards. The best of several tries counts,
not their mean: another process on the same cores is not the model's speed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from tars.messages.node import MeasuredSpeeds
from tars.workers.llama_context import Context
from tars.workers.llama_model import Model
from tars.workers.pace import LEAST, STEP

PART_SECONDS = 1.0
"""For each of the three parts; a big model on a slow CPU must not spend its start-up on being measured. One try is made in any case."""

TRIES = 6

DEPTH = 192
"""Tokens before the measured ones, as far as the context and the time allow: a chat's first hundreds."""

FLASH_WORTH = 0.85
"""Flash attention on a CPU is taken where it needs at most this share of the time without. Two loads of one model on a PC that does other
things differ by a tenth; a choice that changes with that costs more than it gains, for only between replicas that chose alike a running
answer moves with its state. And without it a sequence's numbers depend less on what else runs (README, "The same text again")."""

SLOW_SECONDS = 0.25
"""A single token that takes longer: nothing more is compared, for each try costs seconds."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """Seconds, the best of several tries. `prefill_tokens` in `prefill`; one token of one sequence in `decode_one`, one token of each
    slot in `decode_all`.
    """

    prefill: float
    prefill_tokens: int
    decode_one: float
    decode_all: float
    slots: int

    @property
    def speeds(self) -> MeasuredSpeeds:
        """As the node advertises them."""
        return MeasuredSpeeds(
            prefill_tokens_per_second=round(self.prefill_tokens / self.prefill, 1),
            decode_tokens_per_second=round(1 / self.decode_one, 1),
            decode_tokens_per_second_all_slots=round(self.slots / self.decode_all, 1),
        )

    @property
    def typical(self) -> float:
        """Seconds of a step as a busy replica takes them: what two settings are compared by."""
        return self.prefill + 4 * self.decode_all + 4 * self.decode_one


def chunk_for(speeds: MeasuredSpeeds, inter_token_ms: float, most: int) -> int:
    """Prompt tokens that take about `inter_token_ms` to compute: what may come between two decode steps."""
    speed = speeds.prefill_tokens_per_second or 0.0
    fitting = int(inter_token_ms / 1000 * speed) // STEP * STEP
    return max(1, min(max(LEAST, fitting), most))


def gap_worth_filling(speeds: MeasuredSpeeds, slots: int) -> int:
    """How many idle streams between two running ones are better computed along than skipped: skipping them is one more pass over the
    weights.
    """
    alone, together = speeds.decode_tokens_per_second, speeds.decode_tokens_per_second_all_slots
    if slots < 2 or not alone or not together:
        return 0
    row = (slots / together - 1 / alone) / (slots - 1)
    return slots if row <= 0 else int((1 / alone - row) / row)


def measure(context: Context, model: Model, *, room: int, chunk: int, mark: Callable[[], None]) -> Measurement:
    """Measure an empty context. `room`: tokens that one sequence may have while all the others have as many; `mark` is called after every
    decode.
    """
    ordinary = [token for token in range(model.tokens) if model.pieces[token]] or [0]

    def decode(streams: range, count: int, position: int) -> float:
        tokens = [ordinary[(position + index) % len(ordinary)] for index in range(count)]
        began = time.perf_counter()
        context.decode(
            tokens * len(streams),
            [position + index for _ in streams for index in range(count)],
            [stream for stream in streams for _ in range(count)],
            [(number + 1) * count - 1 for number in range(len(streams))],
        )
        mark()
        return max(1e-9, time.perf_counter() - began)

    def best(streams: range, count: int, position: int) -> float:
        times: list[float] = []
        while not times or (len(times) < TRIES and sum(times) < PART_SECONDS):
            times.append(decode(streams, count, position))
            for stream in streams:
                context.forget(stream, position)
        return min(times)

    first = range(1)
    partly = model.forgets_partly
    decode(first, 1, 0)  # pages the weights in
    context.forget(0, 0)
    single = decode(first, 1, 0)
    context.forget(0, 0)
    # Prefill is at least as fast as decode, so a chunk takes that many singles at most.
    count = max(1, min(chunk, room - 1, int(2 * PART_SECONDS / single)))
    prefill = best(first, count, 0)
    depth = max(0, min(DEPTH, room - 2, int(PART_SECONDS / prefill * count))) if partly else 0
    every = range(context.slots)
    if depth * len(every) * prefill / count > PART_SECONDS:
        depth = 0
    for stream in every if depth else ():
        for start in range(0, depth, chunk):
            decode(range(stream, stream + 1), min(chunk, depth - start), start)
    one = best(first, 1, depth)
    together = best(every, 1, depth) if len(every) > 1 else one
    for stream in every:
        context.forget(stream, 0)
    return Measurement(prefill, count, one, together, len(every))


def least_exact_rows(context: Context, model: Model, room: int) -> int | None:
    """How many rows a decode must have so that a sequence's logits are bitwise the same whatever else is in it: 1, or 2 where a single
    row goes through kernels of its own (measured: F16 weights). None where there is no such number, or where the model could not forget
    the token that is computed along with a single one. The context is empty before and after.
    """
    if context.slots == 1:
        return 1
    ordinary = [token for token in range(model.tokens) if model.pieces[token]] or [0]
    depth = max(1, min(24, room - 2))
    every = range(context.slots)

    def fill() -> None:
        for stream in every:
            tokens = [ordinary[(7 * stream + index) % len(ordinary)] for index in range(depth)]
            context.decode(tokens, list(range(depth)), [stream] * depth, [])

    def empty() -> None:
        for stream in every:
            context.forget(stream, 0)

    def row(company: range) -> bytes:
        """Logits of the first stream's next token, computed with the others of `company`."""
        count = len(company)
        logits = bytes(context.decode([ordinary[0]] * count, [depth] * count, list(company), [0])[0].data)
        if model.forgets_partly:
            for stream in company:
                context.forget(stream, depth)
        else:
            empty()
            fill()
        return logits

    counts = [count for count in (1, 2, 3, 4, 5, 8, 13, 16, context.slots) if count <= context.slots]
    fill()
    rows = {count: row(range(count)) for count in counts}
    empty()
    for least in (1, 2) if model.forgets_partly else (1,):
        if len({logits for count, logits in rows.items() if count >= least}) == 1:
            return least
    return None
