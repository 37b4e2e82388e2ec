"""A clock that goes on when the test says so."""


class Clock:
    """Says `now`, in seconds, as `time.monotonic` would."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now
