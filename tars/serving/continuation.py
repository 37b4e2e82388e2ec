"""One call's answers as its caller has them, so that another replica can go on where this one broke.

Law of this file: pure bookkeeping; it runs nothing and decides nothing. What the caller has is known by token ids alone: a replica that
gets them gives the same text for them, and only what comes after them. What a replica cannot know of the part before it (log
probabilities, when the call began) is kept here and put back.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from typing import TypeVar, cast

from tars.messages.base import ResumeMeta, SavedState
from tars.messages.inference import ChatParams, CompleteParams, Delta, Generated, TokenLogprob

SEEDS = 2**32

Generation = TypeVar("Generation", bound="ChatParams | CompleteParams")


def seeded(work: Generation) -> Generation:
    """The same with a seed, where it has none: every replica that works on it draws the same numbers."""
    if work.seed is not None:
        return work
    return cast("Generation", work.model_copy(update={"seed": secrets.randbelow(SEEDS)}))


class StreamSoFar:
    """See the module's law. `work` must have its seed (`seeded`). `now` is the monotonic clock."""

    __slots__ = ("_began", "_ended", "_first", "_logprobs", "_now", "_tokens", "_work")

    def __init__(self, work: ChatParams | CompleteParams, now: Callable[[], float] = time.monotonic) -> None:
        if work.seed is None:
            raise ValueError("a call without a seed cannot be continued")
        self._work = work
        self._now = now
        self._began = now()
        self._first: float | None = None
        self._tokens: list[list[int]] = [[] for _ in range(work.n)]
        self._logprobs: list[list[TokenLogprob]] = [[] for _ in range(work.n)]
        self._ended: set[int] = set()

    def take(self, delta: Delta) -> None:
        """The caller gets this."""
        if self._first is None:
            self._first = self._now()
        self._tokens[delta.index] += delta.token_ids
        if delta.logprobs is not None:
            self._logprobs[delta.index] += delta.logprobs
        if delta.ended:
            self._ended.add(delta.index)

    @property
    def tokens(self) -> tuple[tuple[int, ...], ...]:
        """Of each answer, those that the caller has."""
        return tuple(map(tuple, self._tokens))

    def resume(
        self, saved: SavedState | None = None, generated: Sequence[Sequence[int]] | None = None
    ) -> ResumeMeta | None:
        """What the next replica is told; None where the caller has nothing and it begins from the beginning.

        `saved`: the state of a planned move; `generated`: the tokens that it holds, which begin with `tokens` (the default), and may be
        more: those were held back. Tokens that do not begin so, or a state of them, are of no use and left out.
        """
        assert self._work.seed is not None
        answers = self._tokens
        if generated is not None and self._usable(generated):
            answers = [list(tokens) for tokens in generated]
        elif generated is not None:
            saved = None
        if not (saved or self._ended or any(answers)):
            return None
        return ResumeMeta(
            answers=[list(tokens) for tokens in answers],
            handed_out=None if answers is self._tokens else [len(tokens) for tokens in self._tokens],
            ended=sorted(self._ended),
            seed=self._work.seed,
            state=saved,
        )

    def merged(self, finished: Generated) -> Generated:
        """The whole call's answer, by the event with which its last replica ended: with the log probabilities of before, which that one
        never knew, and with the call's own time to the first token and to the end. Where nothing broke it is not needed.
        """
        now = self._now()
        spent = now - self._began
        first = None if self._first is None else self._first - self._began
        # Of all answers together, as an engine says it: the first token comes out of the prompt.
        later = finished.usage.completion_tokens - 1
        speed = round(later / (spent - first), 2) if first is not None and later > 0 and spent > first else None
        timings = finished.timings.model_copy(
            update={
                "first_token_ms": None if first is None else round(first * 1000, 3),
                "total_ms": round(spent * 1000, 3),
                "tokens_per_second": speed,
            }
        )
        update: dict[str, object] = {"timings": timings}
        if self._work.logprobs is not None:
            # Every one went out with a piece of its answer.
            update["logprobs"] = self._logprobs[0]
            update["further"] = [
                each.model_copy(update={"logprobs": self._logprobs[each.index]}) for each in finished.further
            ]
        return finished.model_copy(update=update)

    def _usable(self, generated: Sequence[Sequence[int]]) -> bool:
        if len(generated) != len(self._tokens):
            return False
        begins = all(list(more[: len(had)]) == had for more, had in zip(generated, self._tokens, strict=True))
        # Tokens that were held back have log probabilities that only the replica knew which computed them.
        return begins and (self._work.logprobs is None or list(map(list, generated)) == self._tokens)
