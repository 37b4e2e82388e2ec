"""What a run of `scripts/bench chaos` came to: records of calls and faults in, numbers and verdicts out.

Law of this file: pure arithmetic. "Added" is what a call took beyond the median of its kind in the calm minutes before the first fault.
"""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from chaos_callers import CallRecord
from chaos_faults import FaultKind, FaultRecord
from engine_results import Aim, quantile

AIM_GAP_SECONDS = 3.0
GATEWAY_MARGIN_SECONDS = 10.0
"""After a gateway came back, its callers may still find a connection broken, or not have asked it again."""
SHOWN_PROBLEMS = 40


@dataclass(frozen=True, slots=True)
class FaultSummary:
    """One kind of fault. Seconds; None: nothing was seen."""

    kind: str
    count: int
    detected: float | None
    detected_most: float | None
    recovered: float | None
    recovered_most: float | None
    mended: float | None
    mended_most: float | None
    longest_gap: float | None


@dataclass(frozen=True, slots=True)
class Summary:
    """All of it. Times are seconds."""

    sent: int
    by_outcome: Mapping[str, int]
    duplicated: int
    twins: int
    sent_again: int
    unexplained: int
    parted: int
    attempted_elsewhere: int
    continued: int
    refusals: int
    attempts_a_call: float
    """Of the steady calls, outside overloads."""
    overload_attempts_a_call: float | None
    added_p50: float
    added_p99: float
    overload_added_p50: float | None
    overload_added_p99: float | None
    longest_gap: float
    longest_gap_cut_off: float
    """Of streams whose gateway was cut off from all others meanwhile: without a replica of its own it has nothing to go on with."""
    longest_gap_sent_again: float
    calm_gap: float
    faults: Sequence[FaultSummary]
    unmended: int
    problems: Sequence[str] = field(default=())

    @property
    def aims(self) -> list[Aim]:
        """What the exit status is about comes first."""
        return [
            Aim("calls lost", self.by_outcome.get("lost", 0), at_most=0),
            Aim("calls answered wrongly", self.by_outcome.get("wrong", 0), at_most=0),
            Aim("calls computed twice under one idempotency key", self.duplicated, at_most=0),
            Aim("calls without an answer at the end", self.by_outcome.get("running", 0), at_most=0),
            Aim("times that a gateway was gone without a fault there", self.unexplained, at_most=0),
            Aim("faults that the mesh did not mend", self.unmended, at_most=0),
            Aim(
                "seconds, the longest gap in a stream whose gateway lived and reached others",
                self.longest_gap,
                at_most=AIM_GAP_SECONDS,
            ),
        ]

    @property
    def nothing_lost(self) -> bool:
        """No call lost, wrong, computed twice or without an end."""
        return all(aim.reached for aim in self.aims[:4])

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "aims": [aim.to_json() for aim in self.aims]}


def medians_by_kind(records: Iterable[CallRecord]) -> dict[tuple[str, int], float]:
    """Of right answers: (kind, number of the call) -> median seconds; the number -1 stands for the whole kind."""
    taken: dict[tuple[str, int], list[float]] = defaultdict(list)
    for record in records:
        if record.outcome == "right":
            taken[record.kind, record.call].append(record.seconds)
            taken[record.kind, -1].append(record.seconds)
    return {key: statistics.median(values) for key, values in taken.items()}


def duplicates(records: Iterable[CallRecord]) -> list[str]:
    """Pairs of calls under one key whose answers come from two computations; each in a line."""
    pairs: dict[int, list[CallRecord]] = defaultdict(list)
    for record in records:
        if record.twin is not None and record.outcome in ("right", "wrong") and record.run:
            pairs[record.twin].append(record)
    return [
        f"call {pair[0].call} ({pair[0].kind}) ran twice under one key: {pair[0].run} and {pair[1].run}"
        for pair in pairs.values()
        if len(pair) == 2 and pair[0].run != pair[1].run
    ]


def summarise(calm: Sequence[CallRecord], chaos: Sequence[CallRecord], faults: Sequence[FaultRecord]) -> Summary:
    """`calm`: the same load before the first fault, right answers of which give the baseline. Raises ValueError without any."""
    usual = medians_by_kind(calm)
    if not usual:
        raise ValueError("no call of the calm minutes was answered rightly: there is nothing to compare with")

    def added(record: CallRecord) -> float:
        kind = usual.get((record.kind, -1), statistics.median(usual.values()))
        return record.seconds - usual.get((record.kind, record.call), kind)

    bursts = [(fault.struck, fault.over) for fault in faults if fault.kind is FaultKind.OVERLOAD]
    right = [record for record in chaos if record.outcome == "right"]
    steady = [record for record in right if record.phase == "chaos" and not _within(record, bursts)]
    loaded = [record for record in right if record.phase == "chaos" and _within(record, bursts)]
    everything = [*calm, *chaos]
    twice = duplicates(everything)
    bad = [record for record in everything if record.outcome not in ("right", "refused")]
    problems = [
        f"{record.outcome}: call {record.call} ({record.kind}, {record.face}): {'; '.join(record.problems)}"
        for record in bad
    ]
    problems += twice
    problems += [
        f"fault {fault.number + 1} ({fault.kind}, {fault.node}): {each}" for fault in faults for each in fault.problems
    ]
    unexplained = [
        (record, gateway)
        for record in everything
        for at, gateway in record.sent_again
        if not any(fault.in_force(at, gateway, GATEWAY_MARGIN_SECONDS) for fault in faults)
    ]
    problems += [
        f"gateway {gateway} was gone without a fault for call {record.call} ({record.kind}, {record.face})"
        for record, gateway in unexplained
    ]
    return Summary(
        sent=len(everything),
        by_outcome=dict(Counter(record.outcome for record in everything)),
        duplicated=len(twice),
        twins=len({record.twin for record in everything if record.twin is not None}),
        sent_again=sum(len(record.sent_again) for record in everything),
        unexplained=len(unexplained),
        parted=sum(record.parted for record in everything),
        attempted_elsewhere=sum(bool(_failed_attempts(record)) for record in everything),
        continued=sum(any(each.get("tokens") for each in _failed_attempts(record)) for record in everything),
        refusals=sum(record.refusals for record in everything),
        attempts_a_call=_attempts(chaos, lambda record: not _within(record, bursts)) or 0.0,
        overload_attempts_a_call=_attempts(chaos, lambda record: _within(record, bursts)),
        added_p50=quantile([added(record) for record in steady], 0.5) if steady else 0.0,
        added_p99=quantile([added(record) for record in steady], 0.99) if steady else 0.0,
        overload_added_p50=quantile([added(record) for record in loaded], 0.5) if loaded else None,
        overload_added_p99=quantile([added(record) for record in loaded], 0.99) if loaded else None,
        longest_gap=_longest_gap(record for record in chaos if not record.sent_again and not _was_cut_off(record, faults)),
        longest_gap_cut_off=_longest_gap(record for record in chaos if not record.sent_again and _was_cut_off(record, faults)),
        longest_gap_sent_again=_longest_gap(record for record in chaos if record.sent_again),
        calm_gap=_longest_gap(calm),
        faults=[_of_kind(kind, faults, chaos) for kind in FaultKind if any(each.kind is kind for each in faults)],
        unmended=sum(fault.mended is None for fault in faults),
        problems=problems[:SHOWN_PROBLEMS],
    )  # fmt: skip


def _attempts(records: Iterable[CallRecord], of: Callable[[CallRecord], bool]) -> float | None:
    """The mean of calls that say their attempts: JSON-RPC's."""
    counts = [len(record.attempts) for record in records if record.attempts and of(record)]
    return statistics.mean(counts) if counts else None


def _failed_attempts(record: CallRecord) -> list[dict[str, Any]]:
    return [each for each in record.attempts if each.get("outcome") != "answered"]


def _within(record: CallRecord, spans: Iterable[tuple[float, float | None]]) -> bool:
    """Whether the call was under way in one of them."""
    ended = record.ended if record.ended is not None else record.sent
    return any(record.sent <= (end if end is not None else ended) and begin <= ended for begin, end in spans)


def _longest_gap(records: Iterable[CallRecord]) -> float:
    return max((gap[1] for record in records if (gap := record.longest_gap) is not None), default=0.0)


def _was_cut_off(record: CallRecord, faults: Iterable[FaultRecord]) -> bool:
    """Whether its gateway reached nobody else in its longest gap."""
    if (gap := record.longest_gap) is None:
        return False
    began, ended = gap[0], gap[0] + gap[1]
    return any(
        fault.kind.needs_links
        and fault.node == record.gateway
        and fault.struck <= ended
        and (fault.over is None or began <= fault.over)
        for fault in faults
    )


def next_piece_after(record: CallRecord, at: float) -> float | None:
    """Seconds from `at` until a stream that had begun went on, or was whole; None: it had not begun, or was over."""
    if not record.pieces or record.pieces[0] > at or record.ended is None or record.ended < at:
        return None
    return min((piece for piece in record.pieces if piece > at), default=record.ended) - at


def _of_kind(kind: FaultKind, faults: Sequence[FaultRecord], chaos: Sequence[CallRecord]) -> FaultSummary:
    struck = [fault for fault in faults if fault.kind is kind]
    detected = [fault.detected - fault.struck for fault in struck if fault.detected is not None]
    mended = [fault.mended - fault.struck for fault in struck if fault.mended is not None]
    recovered, gaps = [], []
    for fault in struck:
        streams = [record for record in chaos if record.kind.streams and not record.sent_again]
        waits = [wait for record in streams if (wait := next_piece_after(record, fault.struck)) is not None]
        if waits:
            recovered.append(max(waits))
        over = fault.over if fault.over is not None else fault.struck
        gaps += [
            gap[1]
            for record in streams
            if (gap := record.longest_gap) is not None and gap[0] <= over and gap[0] + gap[1] >= fault.struck
        ]
    return FaultSummary(
        kind=kind,
        count=len(struck),
        detected=_median(detected),
        detected_most=max(detected, default=None),
        recovered=_median(recovered),
        recovered_most=max(recovered, default=None),
        mended=_median(mended),
        mended_most=max(mended, default=None),
        longest_gap=max(gaps, default=None),
    )


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None
