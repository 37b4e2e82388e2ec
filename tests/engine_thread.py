"""A real engine in a thread of its own, as a worker runs it, without the worker."""

from __future__ import annotations

import queue
import threading
import time

from tars.messages.node import LoadedInfo
from tars.workers.engine import Engine, Event, LoadSpec, Submission, Work


class EngineThread:
    """Loads on construction (a failed load is raised here); `events` gets everything that the engine emits."""

    def __init__(self, engine: Engine, spec: LoadSpec) -> None:
        self.engine = engine
        self.spec = spec
        self.stages: list[tuple[str, float]] = []
        self.numbers = iter(range(1, 10**9))
        self.events: queue.Queue[tuple[int, Event | Exception]] = queue.Queue()
        loaded: queue.Queue[LoadedInfo | Exception] = queue.Queue()

        def main() -> None:
            try:
                info = engine.load(
                    spec,
                    lambda stage, percent: self.stages.append((stage, percent)),
                    lambda events: [self.events.put(one) for one in events] and None,
                )
            except Exception as error:  # noqa: BLE001  # raised again below, in the test's thread
                loaded.put(error)
                return
            loaded.put(info)
            engine.run()

        self.thread = threading.Thread(target=main, daemon=True)
        self.thread.start()
        info = loaded.get(timeout=120)
        if isinstance(info, Exception):
            raise info
        self.info = info

    def submit(self, work: Work, seconds: float | None = 60) -> int:
        number = next(self.numbers)
        deadline = None if seconds is None else time.monotonic() + seconds
        self.engine.submit(Submission(number, work, deadline))
        return number

    def close(self) -> None:
        self.engine.unload()
        self.thread.join(20)
        assert not self.thread.is_alive()
