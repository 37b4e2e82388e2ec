"""When a step of the engine counts as hung, so that it is broken off before the whole worker is killed.

Law of this file: pure; the time and the engine's progress mark come in as arguments. `lifecycle.py` judges the process, this the step.
"""

from __future__ import annotations

ABORT_SECONDS = 20.0
"""Several times the longest honest step (a prefill chunk on a slow CPU), and a third of the patience with a whole worker: the engine's
second try fits in before the worker is judged hung."""


class StepWatchdog:
    """Says when a progress mark has stood still for `patience` seconds while calls were in flight."""

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._mark: int | None = None
        self._since = 0.0

    @property
    def interval(self) -> float:
        """Seconds between two looks: a tenth of the patience, at most a second."""
        return min(1.0, self._patience / 10)

    def is_stuck(self, mark: int, busy: bool, now: float) -> bool:
        """True once in each `patience` seconds without progress: after an abort the engine's second try gets the same time again."""
        if not busy or mark != self._mark:
            self._mark, self._since = mark, now
            return False
        if now - self._since < self._patience:
            return False
        self._since = now
        return True
