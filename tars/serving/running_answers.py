"""The generations that run on this node's own replicas, and how they leave it while they run: a planned move to another replica.

Law of this file: it knows workers, files of states and the calls' events; where a call goes on is its gateway's decision. An answer that
leaves ends with `Draining`, whose details say where its state is (`saved`) and which tokens it has (`tokens`, a list each). The state
is exact, and saves its successor the recomputation. Whatever goes wrong with it (no room, a slow wire, another build of llama.cpp), the
tokens alone suffice, so nothing here is an error to a caller but that `Draining`, which is retryable.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from tars.core.types import Deadline, ReplicaId
from tars.errors import Draining, TarsError
from tars.messages.base import CallContext, SavedState
from tars.messages.inference import Delta, GenerationParams
from tars.serving.kept_states import KeptStates
from tars.workers.calls import CallHandle
from tars.workers.engine import Event, Resume
from tars.workers.supervisor import ReplicaWorker, SavedSequence

log = logging.getLogger(__name__)

SAVE_SECONDS = 2.0
"""For the engine to write a state: at most a gigabyte, between two of its steps. The caller's text stands still meanwhile."""
FETCH_SECONDS = 1.5
"""For a state to come from the node that keeps it; a longer gap than that is worse for the caller than computing the tokens again, and
their successor's gateway takes it for late at 2 s."""


Start = Callable[[Resume | None, CallHandle], AsyncGenerator[Event]]
"""Begins the generation: what is resumed, and the handle to name its call by."""


class PeerStates(Protocol):
    """How a state comes from the peer that keeps it; `rpc.peer_states` has the real one."""

    async def fetch(self, saved: SavedState, seconds: float) -> Path:
        """A new file that only this user can read, with the bytes that `saved` promises. Raises `TarsError` or `OSError`; then without."""


@dataclass(eq=False, slots=True)
class RunningAnswer:
    """A generation under way on a replica of this node."""

    replica: ReplicaId
    worker: ReplicaWorker
    work: GenerationParams
    from_peer: bool
    """Its gateway is another node."""
    handle: CallHandle = field(default_factory=CallHandle)
    tokens: list[int] = field(default_factory=list)
    """What the caller has, where there is one answer only."""
    waiting: asyncio.Timeout | None = None
    """While it has no event yet: it may not have reached the worker."""
    leaving: asyncio.Future[SavedSequence | None] | None = None
    """Set once it is to leave; its result is its state, if there is one."""
    over: bool = False
    """Nobody waits for it any more."""

    def drop_state(self) -> None:
        """Remove the state's file, where there is one by now."""
        if self.leaving is not None and self.leaving.done() and (sequence := self.leaving.result()) is not None:
            sequence.path.unlink(missing_ok=True)


class RunningAnswers:
    """See the module's law. `peers` None: there are none."""

    def __init__(
        self, kept: KeptStates, peers: PeerStates | None = None, now: Callable[[], float] = time.monotonic
    ) -> None:
        self.kept = kept
        self._peers = peers
        self._now = now
        self._running: set[RunningAnswer] = set()
        self._moves: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        """Answers that run now."""
        return len(self._running)

    async def run(
        self,
        replica: ReplicaId,
        worker: ReplicaWorker,
        work: GenerationParams,
        call: CallContext,
        resume: Resume | None = None,
        state: SavedState | None = None,
        *,
        start: Start,
    ) -> AsyncGenerator[Event]:
        """The events of a generation that `start` begins on the worker, at once or when it is its turn; closing it cancels the work.
        `state` saves computing `resume`'s tokens again, where it can be had.

        Raises what `start` raises; `Draining` with `saved` and `tokens` in its details where the answer left with its state.
        """
        answer = RunningAnswer(replica, worker, work, call.peer is not None)
        path: Path | None = None
        self._running.add(answer)
        try:
            if resume is not None:
                if work.n == 1:
                    answer.tokens += resume.generated[0][: resume.handed_out[0]]
                if (
                    state is not None
                    and state.layout == layout_of(worker)
                    and (path := await self._had(state, call)) is not None
                ):
                    resume = resume.model_copy(update={"path": str(path)})
                    log.info("an answer goes on at %s with its state, %d bytes", replica, state.bytes)
            if answer.leaving is not None:
                raise moved()  # meanwhile
            async with aclosing(start(resume, answer.handle)) as events:
                event = await self._first(events, answer)
                if path is not None:
                    # The engine has read it before it said anything.
                    path.unlink(missing_ok=True)
                    path = None
                while True:
                    if isinstance(event, Delta):
                        answer.tokens += event.token_ids
                    yield event
                    try:
                        event = await anext(events)
                    except StopAsyncIteration:
                        return
        except Draining as error:
            if answer.leaving is None:
                raise
            raise await self._last_word(answer, error) from None
        finally:
            answer.over = True
            answer.drop_state()
            self._running.discard(answer)
            if path is not None:
                path.unlink(missing_ok=True)

    async def hand_over(self, leaves: Callable[[RunningAnswer], bool]) -> int:
        """Let each answer that `leaves` go to another replica, all at once; returns how many, when they have left.

        Whoever asks has made sure that there is another one for each.
        """
        leaving = [each for each in self._running if each.leaving is None and leaves(each)]
        for answer in leaving:
            answer.leaving = asyncio.get_running_loop().create_future()
        await asyncio.gather(*(self._move(answer, answer.leaving) for answer in leaving if answer.leaving is not None))
        return len(leaving)

    def hand_over_soon(self, leaves: Callable[[RunningAnswer], bool]) -> None:
        """The same, in the background."""
        task = asyncio.get_running_loop().create_task(self._logged(leaves), name="hand over running answers")
        self._moves.add(task)
        task.add_done_callback(self._moves.discard)

    async def close(self) -> None:
        """End what is in the background, and remove every file."""
        for task in list(self._moves):
            task.cancel()
        if self._moves:
            await asyncio.wait(self._moves)
        self.kept.close()

    async def _first(self, events: AsyncGenerator[Event], answer: RunningAnswer) -> Event:
        """The first event, unless the answer is to leave before it reaches the worker."""
        try:
            async with asyncio.timeout(None) as answer.waiting:
                return await anext(events)
        except TimeoutError:
            if answer.waiting is None or not answer.waiting.expired():
                raise
            raise moved() from None
        finally:
            answer.waiting = None

    # --- leaving -----------------------------------------------------------------------------------------------------

    async def _logged(self, leaves: Callable[[RunningAnswer], bool]) -> None:
        try:
            await self.hand_over(leaves)
        except Exception:
            log.exception("handing over running answers failed; they end here")

    async def _move(self, answer: RunningAnswer, left: asyncio.Future[SavedSequence | None]) -> None:
        sequence: SavedSequence | None = None
        try:
            # One of several answers cannot be saved, and one without a token has nothing worth it.
            if answer.work.n == 1 and answer.tokens and answer.handle.number is not None:
                sequence = await answer.worker.save(answer.handle, Deadline(self._now() + SAVE_SECONDS))
        except (TarsError, OSError) as error:
            log.debug("the state of an answer of %s was not saved (%s): its tokens suffice", answer.replica, error)
        finally:
            left.set_result(sequence)
            if answer.over:
                answer.drop_state()  # its caller went away meanwhile
            if answer.handle.number is not None:
                answer.worker.break_off(answer.handle, moved())
            elif answer.waiting is not None and not answer.waiting.expired():
                answer.waiting.reschedule(asyncio.get_running_loop().time())

    async def _last_word(self, answer: RunningAnswer, error: Draining) -> Draining:
        """What the gateway needs to go on elsewhere."""
        assert answer.leaving is not None
        sequence = await asyncio.shield(answer.leaving)
        if sequence is None:
            return moved()
        generated = sequence.saved.generated
        if generated[: len(answer.tokens)] != answer.tokens:
            log.error("a state of %s does not begin with what its caller has, so it was not used", answer.replica)
            return moved()
        saved = await self.kept.keep(sequence.path, layout_of(answer.worker))
        if saved is None:
            return moved()
        return moved({"saved": saved.model_dump(), "tokens": [generated]})

    # --- coming ------------------------------------------------------------------------------------------------------

    async def _had(self, state: SavedState, call: CallContext) -> Path | None:
        """A state's file, from this node's own or from the peer that keeps it; None where it does not come in time."""
        own = self.kept.handed_on(state.id)
        if own is not None or self._peers is None:
            return own
        seconds = min(FETCH_SECONDS, call.deadline.remaining(self._now()))
        try:
            return await self._peers.fetch(state, seconds)
        except (TarsError, OSError) as error:
            why = error.kind if isinstance(error, TarsError) else type(error).__name__
            log.info("a state of %d bytes did not come (%s): its tokens are computed again", state.bytes, why)
            return None


def layout_of(worker: ReplicaWorker) -> str:
    """What must be equal for one engine to take another's state: llama.cpp refuses cells of another type, or that flash attention lays out
    otherwise; and a state that is refused was fetched for nothing.
    """
    info = worker.info
    if info is None:
        return ""
    build, _, _ = info.backend.partition(",")
    return f"{build}, {worker.spec.kv_type}, flash attention {info.tuned.flash_attention}"


def moved(details: dict[str, object] | None = None) -> Draining:
    """What an attempt ends with whose answer goes on elsewhere."""
    return Draining(
        "The replica gives its answers to others. Send the call again: another one goes on.", details=details
    )
