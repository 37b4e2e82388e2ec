"""What an error of a target means to a call's machine, in the words of `core.call_effects`.

Law of this file: an error in, values out.
"""

from __future__ import annotations

from math import inf

from tars.core.call_effects import Failure
from tars.errors import (
    CallerError,
    Draining,
    ModelError,
    PeerUnreachable,
    ServerStateError,
    StillLoading,
    TarsError,
    WorkerCrashed,
)

SAVED = "saved"
"""In the details of `Draining`: the state that the serving node saved of the answer."""


def failure_of(error: TarsError) -> Failure:
    """See `Failure`. `saved` is the error's details where they hold a saved state."""
    details = error.details
    retry_after = None if error.retry_after_ms is None else error.retry_after_ms / 1000
    if details.get("reason") == "late":
        # It would begin too late there, now and after any wait: only another replica can still help this call.
        retry_after = inf
    return Failure(
        error.kind,
        retryable=error.retryable,
        # A peer that was never reached, and a worker that was not there, say so.
        sent=isinstance(error, WorkerCrashed | PeerUnreachable) and bool(details.get("sent", True)),
        retry_after=retry_after,
        callers_fault=isinstance(error, CallerError | ModelError) and not error.retryable,
        known=isinstance(error, Draining) or bool(details.get("silent") or details.get("dead")),
        saved=details if SAVED in details else None,
        error=error,
    )


def worth_waiting(error: TarsError) -> bool:
    """Whether a model that has no replica now, for this reason, may have one soon without anybody's doing."""
    return error.retryable and isinstance(error, StillLoading | ServerStateError)
