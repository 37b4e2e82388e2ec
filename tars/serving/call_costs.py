"""What a replica takes at once, and what a call takes of it: as expected when it comes, and as known when it has ended.

Law of this file: numbers for the gate, which decides with them. A generation costs the tokens that it generates, its prompt's counted in
them, and takes a slot for each of its answers; texts cost their tokens, and take room for as many.
"""

from __future__ import annotations

from dataclasses import dataclass

from tars.core.prefix_affinity import tokens_in
from tars.core.routing import PREFILL_PART, UNITS_PER_CALL
from tars.errors import TarsError
from tars.messages.inference import (
    ChatParams,
    CompleteParams,
    Embedded,
    EmbedParams,
    Generated,
    GenerationParams,
    Reranked,
    RerankParams,
)
from tars.messages.node import LoadedInfo
from tars.workers.engine import Finished, Work

AHEAD_PART = 0.25
"""Of the slots: calls that the engine has beside those that it computes, so that a slot which ends is filled in the next step."""
BATCHES_AHEAD = 16
"""Token budgets of texts that the engine has: it puts texts of like lengths together, and finds few of them among few."""
LEAST_CALLS = 16
"""Calls of many texts that are let in at least; the engine takes turns between them, so that one of 2,000 texts holds up nobody."""
TEXT_BUDGET = 4096
"""Tokens of one forward pass where the replica does not say."""
SPEED_TOKENS = 128
"""Tokens of the texts with which a replica measures its texts a second (`workers.embedding_choice.SPEED_LENGTH`)."""
MEAN_WEIGHT = 0.1
"""Of the newest answer in the mean length of answers; of the first ones more, so that it is their plain mean."""
LEFT_PART = 0.5
"""What a running call still costs, of what it was expected to: on the average they are half way."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """What a ready replica takes at once. `room` and the room of a call are slots of a generation, tokens of texts."""

    room: float
    full: float
    """Room from which on nothing more would be computed at once."""
    most_calls: int
    own_word: float | None
    """Units a second of all that it computes together, as it measured itself."""
    most_tokens: int | None = None
    """Of one text; longer ones are cut."""
    generates: bool = True


def capacity_of(info: LoadedInfo, queue_limit: int) -> Capacity:
    """Of a loaded replica; `queue_limit`: calls that may wait inside the worker at most."""
    speeds = info.speeds
    if info.model_kind == "chat":
        slots = float(info.slots)
        room = slots + max(1.0, slots * AHEAD_PART // 1)
        speed = speeds.decode_tokens_per_second_all_slots or speeds.decode_tokens_per_second
        return Capacity(room, slots, info.slots + queue_limit, speed)
    budget = float(info.tuned.batch_tokens or TEXT_BUDGET)
    speed = None if speeds.texts_per_second is None else speeds.texts_per_second * SPEED_TOKENS
    return Capacity(budget * BATCHES_AHEAD, budget, 1 + queue_limit, speed, info.max_input_tokens, generates=False)


class Costs:
    """What the calls of one replica cost; it learns how long answers are."""

    def __init__(self) -> None:
        self._usual = UNITS_PER_CALL
        """Tokens of an answer."""
        self._answers = 0

    def expected(self, work: Work, capacity: Capacity) -> tuple[float, float]:
        """Of a call that comes: its units, and its room."""
        if isinstance(work, GenerationParams):
            tokens = self._usual * work.n
            if work.max_tokens is not None:
                tokens = min(tokens, float(work.max_tokens * work.n))
            return tokens + _prompt_tokens(work) / PREFILL_PART, float(work.n)
        most = float(capacity.most_tokens or TEXT_BUDGET)
        tokens = _text_tokens(work, most)
        return tokens, min(tokens, capacity.room / LEAST_CALLS)

    def real(
        self, work: Work, end: Finished | TarsError | None, *, expected: float, room: float, tokens: float
    ) -> float:
        """The units of one that has ended with `end` (None: its caller left); `expected` and `room` as they were said, `tokens` as many
        as were generated."""
        match end:
            case Generated(usage=usage):
                # Answers of many tokens that one caller asks for say little of the next caller's: `max_tokens` bounds them.
                self._answers += 1
                weight = max(MEAN_WEIGHT, 1 / self._answers)
                self._usual += weight * (usage.completion_tokens / max(1.0, room) - self._usual)
                return usage.completion_tokens + max(0, usage.prompt_tokens - usage.cached_tokens) / PREFILL_PART
            case Embedded(prompt_tokens=computed) | Reranked(prompt_tokens=computed):
                return float(computed)
            case _ if isinstance(work, GenerationParams):
                # Broken off, by the engine or by its caller. What is counted too high here makes the replica look faster than it is, just
                # when its calls end too late.
                return tokens
            case TarsError():
                return 0.0
            case _:
                # Of texts that were given up nobody knows how many were computed.
                return expected * LEFT_PART


def _prompt_tokens(work: GenerationParams) -> float:
    match work:
        case CompleteParams():
            return tokens_in(work.prompt)
        case ChatParams():
            return sum(tokens_in(turn.content) for turn in work.messages)
        case _:
            return 0.0


def _text_tokens(work: Work, most: float) -> float:
    match work:
        case EmbedParams():
            texts = [work.input] if isinstance(work.input, str) else work.input
            whole = work.overflow is not None
            return sum(max(1.0, tokens_in(text) if whole else min(most, tokens_in(text))) for text in texts)
        case RerankParams():
            query = tokens_in(work.query)
            return sum(max(1.0, min(most, query + tokens_in(text))) for text in work.documents)
        case _:
            return 0.0
