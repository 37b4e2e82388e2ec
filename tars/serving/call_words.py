"""A call's record in people's words, for `tars explain call`.

Law of this file: it phrases what `messages.calls` says, and knows nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from tars.messages.calls import AttemptDescription, CallDescription, WaitDescription

_ENDS = {
    "answered": "answered",
    "late": "given up: it was late",
    "hedge_lost": "stopped: the other one was faster",
    "cancelled": "stopped: the caller went away",
    "running": "runs now",
    "overloaded": "its queue was full",
    "peer_unreachable": "the connection to it broke, or none came about",
    "worker_crashed": "its worker died",
    "draining": "its node is being drained, and gave the call back",
    "stale_route": "it has no such replica any more",
    "still_loading": "it was still loading",
    "deadline_exceeded": "the call's time was over",
}
"""How an attempt ended; what is not here is an error's kind, and said as such."""
_WAITS = {
    "load": "for the model to be loaded",
    "backoff": "before trying again",
    "replica": "for a replica that could take it",
    "idempotency_key": "for the nodes that keep its idempotency key, or for the first call under it",
}
SHOWN_WAIT_SECONDS = 0.005
"""A shorter wait explains nothing."""


def explained(calls: Sequence[CallDescription]) -> str:
    """Some lines for each call."""
    return "\n\n".join(_call(each) for each in calls)


def _call(call: CallDescription) -> str:
    at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(call.started_at))
    lines = [f"Call {call.id}: {call.method} of {call.model or 'no model'}, for {call.caller} over {call.face}"]
    if call.forwarded_by is None:
        lines.append(f"  began {at} at {call.node_name}; {_ended(call)}")
    else:
        lines.append(
            f"  came {at} to {call.node_name} from node {call.forwarded_by}, which knows the whole of it; here: {_ended(call)}"
        )
    steps: list[AttemptDescription | WaitDescription] = [
        *call.attempts,
        *(each for each in call.waits if each.seconds is None or each.seconds >= SHOWN_WAIT_SECONDS),
    ]
    for step in sorted(steps, key=lambda each: each.after_seconds):
        lines += _attempt(step) if isinstance(step, AttemptDescription) else [_wait(step)]
    if not call.attempts and call.outcome not in ("repeated", "running"):
        lines.append("  no replica was asked")
    return "\n".join(lines)


def _ended(call: CallDescription) -> str:
    took = "" if call.seconds is None else f" after {_seconds(call.seconds)}"
    match call.outcome:
        case "running":
            return "it runs now"
        case "answered":
            return f"answered{took}{_tries(call)}"
        case "repeated":
            of = f" of call {call.repeats}" if call.repeats else ""
            return f"got{took} the answer{of} under the same idempotency key"
        case "cancelled":
            return f"its caller went away{took}, and the work was stopped"
        case kind:
            return f"failed{took}{_tries(call)} with {kind}: {call.error}"


def _tries(call: CallDescription) -> str:
    return f", with {len(call.attempts)} attempts" if len(call.attempts) > 1 else ""


def _attempt(attempt: AttemptDescription) -> list[str]:
    where = f"{attempt.node_name}, {attempt.device_name}" if attempt.device_name else attempt.node_name
    lines = [f"  {attempt.after_seconds:8.3f} s  asked {where} ({attempt.replica}): {attempt.reason}"]
    lines += [f"{'':14}not {each}" for each in attempt.passed_over]
    given = f", {attempt.tokens} tokens came" if attempt.tokens else ""
    took = "" if attempt.seconds is None else f" after {_seconds(attempt.seconds)}"
    lines.append(f"{'':14}-> {_ENDS.get(attempt.outcome, f'failed with {attempt.outcome}')}{took}{given}")
    return lines


def _wait(wait: WaitDescription) -> str:
    what = _WAITS.get(wait.what, f"for {wait.what}")
    if wait.seconds is None:
        return f"  {wait.after_seconds:8.3f} s  waits {what}"
    return f"  {wait.after_seconds:8.3f} s  waited {_seconds(wait.seconds)} {what}"


def _seconds(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"
