"""How far a process stands behind others for the processor.

Law of this file: nice(2), for every thread that a process has. Linux keeps it for each thread apart, and a thread that was there before
its process's main one was made nicer is as it was: an engine's threads are made while it loads.
"""

from __future__ import annotations

import os
from contextlib import suppress

LAST = 19
"""The nicest that there is."""


def stand_behind(steps: int) -> None:
    """Add `steps` to the niceness of all threads of this process; later ones have it from whoever starts them."""
    if steps <= 0:
        return
    try:
        threads = [int(name) for name in os.listdir("/proc/self/task")]
    except OSError:
        threads = [0]  # no Linux: there a process has one niceness
    for thread in threads:
        with suppress(ProcessLookupError):  # it ended meanwhile
            os.setpriority(os.PRIO_PROCESS, thread, min(LAST, os.getpriority(os.PRIO_PROCESS, thread) + steps))
