"""What measurements say: answers with the time of each token in, medians, ratios and verdicts out.

Law of this file: pure arithmetic. No clock is read, no server is known; times are seconds on whatever clock the answers were taken.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True, slots=True)
class Answer:
    """One streamed answer. `token_times` has one entry a token; tokens that came in one piece have the same time."""

    sent: float
    token_times: tuple[float, ...]
    ended: float
    prompt_tokens: int = 0
    cached_tokens: int = 0

    @property
    def gaps(self) -> list[float]:
        """Seconds between a token and the one before it; those that came in one piece are 0 apart."""
        return [later - earlier for earlier, later in zip(self.token_times, self.token_times[1:], strict=False)]


@dataclass(frozen=True, slots=True)
class Measurement:
    """One load on one server. Tokens are generated ones; times are milliseconds."""

    tokens_per_second: float
    first_token_ms: float
    inter_token_p50_ms: float
    inter_token_p99_ms: float
    inter_token_max_ms: float


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of the values do not exceed (nearest rank). Raises ValueError for no values."""
    if not values:
        raise ValueError("no values")
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def summarise(answers: Sequence[Answer]) -> Measurement:
    """Of answers that ran together. Raises ValueError where no answer has two tokens."""
    gaps = [gap * 1000 for answer in answers for gap in answer.gaps]
    tokens = sum(len(answer.token_times) for answer in answers)
    wall = max(answer.ended for answer in answers) - min(answer.sent for answer in answers)
    return Measurement(
        tokens_per_second=tokens / wall,
        first_token_ms=statistics.median((answer.token_times[0] - answer.sent) * 1000 for answer in answers),
        inter_token_p50_ms=quantile(gaps, 0.5),
        inter_token_p99_ms=quantile(gaps, 0.99),
        inter_token_max_ms=max(gaps),
    )


def median_of(rounds: Sequence[Measurement]) -> Measurement:
    """Each number's median over the rounds."""
    return Measurement(
        **{field.name: statistics.median(getattr(each, field.name) for each in rounds) for field in fields(Measurement)}
    )


def best_setting(rounds: Mapping[str, Sequence[Measurement]]) -> str:
    """The name of the setting with the highest median tokens/s. Its latencies are compared too, for nobody runs two settings at once."""
    return max(rounds, key=lambda name: statistics.median(each.tokens_per_second for each in rounds[name]))


def paired_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median of the rounds' ratios: what slowed a whole round down does not become a ratio."""
    return statistics.median(one / other for one, other in zip(ours, theirs, strict=True))


@dataclass(frozen=True, slots=True)
class Aim:
    """One number that the issue asks for."""

    what: str
    value: float
    at_least: float | None = None
    at_most: float | None = None

    @property
    def reached(self) -> bool:
        """Whether the value is within the aim; a value that is no number never is."""
        return (self.at_least is None or self.value >= self.at_least) and (
            self.at_most is None or self.value <= self.at_most
        )

    def __str__(self) -> str:
        bound = f"at least {self.at_least:g}" if self.at_least is not None else f"at most {self.at_most:g}"
        return f"{'reached    ' if self.reached else 'NOT reached'}  {self.value:8.3f}  ({bound})  {self.what}"

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "reached": self.reached}


def verdict(aims: Sequence[Aim]) -> str:
    """`5 of 6 aims reached`."""
    return f"{sum(aim.reached for aim in aims)} of {len(aims)} aims reached"


def chat_aims(
    ours: Mapping[int, Sequence[Measurement]], theirs: Mapping[int, Mapping[str, Sequence[Measurement]]], model: str
) -> list[Aim]:
    """Issue 3's aims against llama-server's best setting at each number of callers; both by rounds."""
    aims, ratios = [], []
    for callers, rounds in ours.items():
        best = theirs[callers][best_setting(theirs[callers])]

        def ratio(name: str, rounds: Sequence[Measurement] = rounds, best: Sequence[Measurement] = best) -> float:
            return paired_ratio([getattr(each, name) for each in rounds], [getattr(each, name) for each in best])

        ratios.append(ratio("tokens_per_second"))
        where = f"{model}, {callers} callers, to llama-server's best"
        aims += [
            Aim(f"tokens/s, {where}", ratios[-1], at_least=1.0),
            Aim(f"median first token, {where}", ratio("first_token_ms"), at_most=1.0),
            Aim(f"inter-token p99, {where}", ratio("inter_token_p99_ms"), at_most=1.5),
        ]
    aims.append(Aim(f"tokens/s, {model}, geometric mean", statistics.geometric_mean(ratios), at_least=1.1))
    return aims


def prefix_aims(
    ours: Mapping[int, Sequence[Measurement]], theirs: Mapping[int, Mapping[str, Sequence[Measurement]]]
) -> list[Aim]:
    """Issue 3's aims for prompts with a common beginning."""
    aims = []
    for callers, rounds in ours.items():
        best = theirs[callers][best_setting(theirs[callers])]
        where = f"shared prefix, {callers} callers, to llama-server's best"
        rates = paired_ratio([each.tokens_per_second for each in rounds], [each.tokens_per_second for each in best])
        firsts = paired_ratio([each.first_token_ms for each in rounds], [each.first_token_ms for each in best])
        aims += [
            Aim(f"tokens/s, {where}", rates, at_least=1.1),
            Aim(f"median first token, {where}", firsts, at_most=0.7),
        ]
    return aims


@dataclass(frozen=True, slots=True)
class Trend:
    """A line through samples over time, by Theil and Sen: the median of all pairs' slopes, which a few odd samples do not move."""

    first: float
    growth: float
    """From the first sample to the last, along the line."""

    def flat(self, *, share: float, least: float) -> bool:
        """Whether it grew by no more than `share` of its first value, or by `least`."""
        return self.growth <= max(self.first * share, least)


def trend(samples: Sequence[tuple[float, float]]) -> Trend:
    """Of (seconds, value), at least two with different times; thinned to 400 for the quadratic number of pairs."""
    step = max(1, math.ceil(len(samples) / 400))
    thinned = samples[::step]
    slopes = [
        (later[1] - earlier[1]) / (later[0] - earlier[0])
        for index, earlier in enumerate(thinned)
        for later in thinned[index + 1 :]
        if later[0] != earlier[0]
    ]
    if not slopes:
        raise ValueError("a trend needs two samples at different times")
    slope = statistics.median(slopes)
    level = statistics.median(value - slope * at for at, value in thinned)
    return Trend(first=level + slope * samples[0][0], growth=slope * (samples[-1][0] - samples[0][0]))
