"""The one place where a worker's event loop hands work to its engine thread.

Law of this file: thread-safe, knows no engine. The engine thread takes everything that came since it last looked, at the top of a step.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

from tars.workers.engine import Submission


@dataclass(frozen=True, slots=True)
class Taken:
    """What came since the last `take`, in order."""

    submissions: list[Submission]
    cancelled: set[int]
    closed: bool
    handed_back: list[Any] = field(default_factory=list)
    """What a thread of the engine's own finished."""


class Inbox:
    """Submissions, cancellations and the end."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._submissions: list[Submission] = []
        self._cancelled: set[int] = set()
        self._handed_back: list[Any] = []
        self._closed = False

    def put(self, submission: Submission) -> None:
        """Hand over one piece of work."""
        with self._condition:
            self._submissions.append(submission)
            self._condition.notify()

    def cancel(self, sequence: int) -> None:
        """Ask for the end of a sequence, whether it was taken yet or not."""
        with self._condition:
            self._cancelled.add(sequence)
            self._condition.notify()

    def hand_back(self, item: Any) -> None:
        """Give the engine thread something that another thread of its engine made for it."""
        with self._condition:
            self._handed_back.append(item)
            self._condition.notify()

    def close(self) -> None:
        """Ask the engine thread to end."""
        with self._condition:
            self._closed = True
            self._condition.notify()

    def take(self, *, wait: bool, seconds: float | None = None) -> Taken:
        """Everything new. With `wait` it blocks until there is something, at most `seconds`."""
        with self._condition:
            if wait:
                self._condition.wait_for(self._anything, seconds)
            taken = Taken(self._submissions, self._cancelled, self._closed, self._handed_back)
            self._submissions, self._cancelled, self._handed_back = [], set(), []
            return taken

    def _anything(self) -> bool:
        return bool(self._submissions or self._cancelled or self._handed_back or self._closed)
