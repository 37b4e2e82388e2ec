"""What a simulation raises when something that must always hold does not."""


class Breach(AssertionError):
    """An invariant does not hold; the message says which and where."""
