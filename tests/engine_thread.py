"""A real engine in a thread of its own, as a worker runs it, without the worker."""

from __future__ import annotations

import queue
import threading
import time
from pathlib import Path

from tars.messages.inference import CompleteParams, Delta, Generated
from tars.messages.node import LoadedInfo, MeasuredSpeeds, TunedSettings
from tars.workers.engine import Engine, Event, LoadSpec, Resume, Saved, SaveParams, Submission, Work
from tars.workers.llama_engine import LlamaEngine


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


class EventLog:
    """What came of each call of an engine in a thread, and that nothing came after its end."""

    thread: EngineThread

    def __init__(self) -> None:
        self.deltas: dict[int, list[Delta]] = {}
        self.ends: dict[int, Event | Exception] = {}

    def take(self) -> int:
        """Wait for one event; whose it was."""
        deadline = time.monotonic() + 60
        while True:
            try:
                number, event = self.thread.events.get(timeout=0.5)
                break
            except queue.Empty:
                assert self.thread.thread.is_alive(), "the engine thread died"
                assert time.monotonic() < deadline
        assert number not in self.ends, "something came after the end"
        if isinstance(event, Delta):
            self.deltas.setdefault(number, []).append(event)
        else:
            self.ends[number] = event
        return number

    def event(self, number: int) -> Event | Exception:
        """How a call ended."""
        while number not in self.ends:
            self.take()
        return self.ends[number]

    def saved(self, running: int, file: Path) -> Saved:
        """Save a running answer in a new file, which ends it."""
        file.touch(0o600)
        event = self.event(self.thread.submit(SaveParams(sequence=running, path=str(file))))
        assert isinstance(event, Saved)
        return event

    def end(self, number: int) -> Generated:
        """The answer; a call's error is raised."""
        event = self.event(number)
        if isinstance(event, Exception):
            raise event
        assert isinstance(event, Generated)
        return event


TUNED = TunedSettings(
    flash_attention=False,
    chunk=64,
    speeds=MeasuredSpeeds(
        prefill_tokens_per_second=10_000,
        decode_tokens_per_second=2_000,
        decode_tokens_per_second_all_slots=4_000,
    ),
)
"""Not what the measurement at load finds: with flash attention a row's numbers depend on the others', and texts could not be compared."""


class Collected(EventLog):
    """What came for each call, from all of them at once."""

    def __init__(self, engine: LlamaEngine, path: Path, **changes: object) -> None:
        spec = {
            "replica": "r",
            "model": "m",
            "engine": "llama",
            "path": str(path),
            "context": 512,
            "slots": 4,
            "tuned": TUNED,
            **changes,
        }
        super().__init__()
        self.thread = EngineThread(engine, LoadSpec.model_validate(spec))
        self.engine = engine

    def submit(
        self, prompt: str, *, resume: Resume | None = None, seconds: float | None = None, **params: object
    ) -> int:
        work = CompleteParams.model_validate({"prompt": prompt, "max_tokens": 24, "temperature": 0.0, **params})
        if resume is None:
            return self.thread.submit(work, seconds)
        number = next(self.thread.numbers)
        self.engine.submit(Submission(number, work, None, resume))
        return number

    def until_tokens(self, number: int, count: int) -> list[int]:
        while sum(len(delta.token_ids) for delta in self.deltas.get(number, [])) < count:
            assert number not in self.ends, self.ends[number]
            self.take()
        return [token for delta in self.deltas[number] for token in delta.token_ids]

    def end(self, number: int) -> Generated:
        event = super().end(number)
        told = [delta for delta in self.deltas.get(number, []) if delta.index == 0]
        if told and not event.further and number not in self.resumed:
            assert "".join(delta.text for delta in told) == event.text
        return event

    resumed: set[int] = set()

    def ask(self, prompt: str, **params: object) -> Generated:
        return self.end(self.submit(prompt, **params))
