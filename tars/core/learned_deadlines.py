"""How long a replica may take until it counts as late, learned from what it took before.

Law of this file: pure; time comes as an argument. The estimator is TCP's (Jacobson, 1988; RFC 6298): a moving mean and a moving mean
deviation, and late is what exceeds mean + 4 deviations. Where something was given up as late, the bound doubles until the next measurement
(Karn and Partridge, 1987): what was cut off was not measured, and a replica that has become slower would be cut off for ever.

With a token each 10 ms that estimator forgets within 0.1 s, so the slowest of late counts as well, half of it 30 s later.

Late is no verdict: a late attempt is given up only for a better one, which is the caller's to see.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict, deque
from dataclasses import dataclass, field

from tars.core.types import ReplicaId

FIRST_LEAST_SECONDS, FIRST_UNKNOWN_SECONDS, FIRST_MOST_SECONDS = 2.0, 10.0, 30.0
"""Beyond the prediction: nobody calls for help for less; where nothing was measured, room for what a new worker does once; a caller's
patience."""
PREDICTION_FACTOR = 2.0
"""A predicted queue may take twice as long before that alone is late: the calls ahead are only guessed."""
GAP_LEAST_SECONDS, GAP_UNKNOWN_SECONDS, GAP_MOST_SECONDS = 1.0, 5.0, 10.0
"""Between two tokens: an engine that computes others' prompts pauses 0.1 to 0.4 s (field notes); a step of a slow CPU; its longest one."""
FIRST_SLOW_SECONDS, GAP_SLOW_SECONDS = 10.0, 2.0
"""What took longer was a stop (frozen, preempted), which does not make the next stop more usual."""
SLOW_FACTOR, SLOW_HALF_LIFE = 1.5, 30.0
DEVIATIONS = 4.0
MEAN_WEIGHT, DEVIATION_WEIGHT = 1 / 8, 1 / 4
"""RFC 6298."""
MEASURED_SECONDS = 600.0
"""What was measured longer ago is forgotten."""
MOST_KEPT = 4096
"""Replicas kept in mind."""

HEDGE_SAMPLES = 20
"""Answers of a size that must have been seen before its 95th percentile means anything: one of them lies beyond it."""
WINDOW = 200
"""Answers of a size that count."""
MOST_SIZES = 1024
"""Sizes of answers (model, and power of two of its units) kept in mind."""


@dataclass(slots=True)
class _Estimate:
    """A moving mean and deviation, in seconds. `least`, `unknown` and `most` are the bound's; `slow`: what is longer was a stop."""

    least: float
    unknown: float
    most: float
    slow: float
    mean: float = 0.0
    deviation: float = 0.0
    at: float = float("-inf")
    slowest: float = 0.0
    slowest_at: float = 0.0
    given_up: int = 0
    said: float = 0.0
    """The last bound."""

    def saw(self, seconds: float, now: float) -> None:
        if now - self.at > MEASURED_SECONDS:
            self.mean, self.deviation = seconds, seconds / 2
        else:
            self.deviation += DEVIATION_WEIGHT * (abs(seconds - self.mean) - self.deviation)
            self.mean += MEAN_WEIGHT * (seconds - self.mean)
        self.at = now
        if self.given_up:
            # It goes on for others: what was given up was slow, and not at its end.
            self.given_up = 0
            seconds = max(seconds, self.said)
        if self.slow >= seconds >= self._slowest(now):
            self.slowest, self.slowest_at = seconds, now

    def bound(self, now: float) -> float:
        if now - self.at <= MEASURED_SECONDS:
            learned = max(self.least, self.mean + DEVIATIONS * self.deviation, SLOW_FACTOR * self._slowest(now))
        else:
            learned = self.unknown
        self.said = float(min(self.most, learned * 2.0 ** min(self.given_up, 10)))
        return self.said

    def _slowest(self, now: float) -> float:
        return float(self.slowest * 0.5 ** ((now - self.slowest_at) / SLOW_HALF_LIFE))


@dataclass(slots=True)
class _Book:
    first: _Estimate = field(
        default_factory=lambda: _Estimate(
            FIRST_LEAST_SECONDS, FIRST_UNKNOWN_SECONDS, FIRST_MOST_SECONDS, FIRST_SLOW_SECONDS
        )
    )
    gap: _Estimate = field(
        default_factory=lambda: _Estimate(GAP_LEAST_SECONDS, GAP_UNKNOWN_SECONDS, GAP_MOST_SECONDS, GAP_SLOW_SECONDS)
    )


_UNKNOWN = _Book()
"""Of whom nothing was measured; nothing is learned in it."""


@dataclass(slots=True)
class _Answers:
    """The last answers of one size: in order of time, and sorted."""

    order: deque[tuple[float, float]] = field(default_factory=deque)
    sorted: list[float] = field(default_factory=list)

    def saw(self, seconds: float, now: float) -> None:
        self.order.append((now, seconds))
        insort(self.sorted, seconds)
        self.forget(now)

    def forget(self, now: float) -> None:
        while self.order and (len(self.order) > WINDOW or now - self.order[0][0] > MEASURED_SECONDS):
            _, seconds = self.order.popleft()
            del self.sorted[bisect_left(self.sorted, seconds)]


class LearnedDeadlines:
    """Of all replicas that a node sends calls to; see the module's law. All times are as seen from here, the way included."""

    def __init__(self) -> None:
        self._books: OrderedDict[ReplicaId, _Book] = OrderedDict()
        self._answers: OrderedDict[tuple[str, int], _Answers] = OrderedDict()

    # --- what was seen -----------------------------------------------------------------------------------------------

    def saw_first_token(self, replica: ReplicaId, seconds: float, predicted: float, now: float) -> None:
        """The first event of an answer (a call without a stream: the answer) came after `seconds`, where `predicted` were predicted."""
        self._book(replica).first.saw(max(0.0, seconds - predicted), now)

    def saw_gap(self, replica: ReplicaId, seconds: float, now: float) -> None:
        """Two pieces of a stream came so far apart. Only time in which the replica was waited for, never time in which the caller read."""
        self._book(replica).gap.saw(seconds, now)

    def saw_answer(self, model: str, units: float, seconds: float, now: float) -> None:
        """A call without a stream (embeddings, reranking) was answered, first try or not."""
        size = (model, _size_of(units))
        answers = self._answers.get(size)
        if answers is None:
            answers = self._answers[size] = _Answers()
            if len(self._answers) > MOST_SIZES:
                self._answers.popitem(last=False)
        self._answers.move_to_end(size)
        answers.saw(seconds, now)

    def gave_up_first(self, replica: ReplicaId) -> None:
        """An attempt was given up before its first token, as late: the next one gets twice the time."""
        self._book(replica).first.given_up += 1

    def gave_up_gap(self, replica: ReplicaId) -> None:
        """A stream was given up as late."""
        self._book(replica).gap.given_up += 1

    def forget(self, replica: ReplicaId) -> None:
        """Its worker started anew, or it was unloaded: what it did before says nothing about its first calls."""
        self._books.pop(replica, None)

    # --- the bounds --------------------------------------------------------------------------------------------------

    def first_token(self, replica: ReplicaId, predicted: float, now: float) -> float:
        """Seconds from the start of an attempt until it is late with its first event. `predicted`: until then, in seconds (queue and
        prefill; of a call without a stream all of it)."""
        book = self._books.get(replica, _UNKNOWN)
        return PREDICTION_FACTOR * max(0.0, predicted) + book.first.bound(now)

    def gap(self, replica: ReplicaId, now: float) -> float:
        """Seconds from one piece of a stream until the next is late."""
        book = self._books.get(replica, _UNKNOWN)
        return book.gap.bound(now)

    def answer_p95(self, model: str, units: float, now: float) -> float | None:
        """Seconds within which 95 of 100 answers about this large came; None until `HEDGE_SAMPLES` were seen. Nearest rank."""
        answers = self._answers.get((model, _size_of(units)))
        if answers is None:
            return None
        answers.forget(now)
        count = len(answers.sorted)
        return None if count < HEDGE_SAMPLES else answers.sorted[-(-95 * count // 100) - 1]

    # --- inside ------------------------------------------------------------------------------------------------------

    def _book(self, replica: ReplicaId) -> _Book:
        book = self._books.get(replica)
        if book is None:
            book = self._books[replica] = _Book()
            if len(self._books) > MOST_KEPT:
                self._books.popitem(last=False)
        self._books.move_to_end(replica)
        return book


def _size_of(units: float) -> int:
    """Which answers are about equally large: those between two powers of two."""
    return max(0, int(units)).bit_length()
