"""Which tokens are computed together, step after step: many sequences in one context, prompts in chunks between the decodes.

Law of this file: it owns the waiting and the running answers and the KV cache's bookkeeping; it knows no caller and samples nothing. How
one decode is made is `decoding`'s business. Rows of logits go to `choose`, calls whose steps do not end go to `fail`.

A step is one token for every running answer in one decode, then at most one chunk of the prompts that come in, in another: so a long prompt
holds up the others by a chunk and no more, which may take as long as `Shapes.bound` says, or twice as long as the decode. Prompts are
computed in the order they came; where one begins like another that is in the cache by then, it takes that over.

Calls that come together while nothing runs are brought in first, one after the other, each with its first token as soon as its prompt is
done: with decodes of the first few in between, all of them would end later.

An answer that was broken off elsewhere is at the front, for its caller is in the middle of it: it may have a stream beyond the slots where
there is one, else that of an answer that has given nothing yet, and its tokens are computed before other prompts.

Exact mode computes every prompt alone in chunks on fixed borders and takes only whole chunks over from the cache: then, in split streams, a
sequence's numbers do not depend on what else runs.
"""

from __future__ import annotations

import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from tars.errors import InternalError, TarsError, WorkerCrashed
from tars.workers.decoding import Decoding, stream_of
from tars.workers.drafting import Drafting
from tars.workers.generation import Answer, Call, SavedCells
from tars.workers.kv_cache import LEFT, KvCache, common_beginning
from tars.workers.llama_context import Context, Rows
from tars.workers.pace import Pace

ALONE_SECONDS = 0.5
"""What a chunk of prompts may take while nothing runs: so long may a call that comes meanwhile have to wait for it."""

ALONE_LEAST = 32
"""Prompt tokens of a chunk at least while nothing runs, however slow: fewer read the weights for too little."""

JOIN_SECONDS = 0.1
"""Prompts are computed together up to about so long: the first token of each comes when all of them are done."""

TOGETHER_SECONDS = 4.0
"""Answers that came together begin together: so long may the second token of the first wait for the prompts of the others."""

WORTH_WAITING = 64
"""Tokens of a prompt that are being computed for another one, for which it waits a step: fewer are computed again in the same pass."""

DECODES_AVERAGED = 8
"""Over so many of the last ones, about, the seconds of a decode of all running answers are averaged."""

CHUNK_TO_DECODE = 2.0
"""How many times as long as a decode a chunk may take: with less, prompts of 200 tokens for answers of 100 never fill 16 streams."""

WORTH_MOVING = 8
"""Tokens that an answer may still have, from which it is moved beside the others: the copy costs about as much as two gaps."""

SWAPPED_MOST = 2**30
"""Bytes of KV cells of preempted answers that are kept in RAM; beyond it they are computed again."""


@dataclass(frozen=True, slots=True)
class Shapes:
    """How a step is cut."""

    chunk: int
    """Prompt tokens between two decodes; where it begins, and in exact mode stays."""
    alone: int
    """The same while nothing runs."""
    joined: int
    """Prompt tokens of a decode from which no further prompt joins it."""
    most: int
    """Prompt tokens of one decode at most."""
    bound: float
    """Seconds that a chunk may take while answers run, if a decode of all of them is quick."""
    gap: int
    """Idle streams between two running ones that are computed along with them."""
    exact: bool
    least_rows: int = 1
    """Rows of one decode at least (exact mode)."""


class Batcher:
    """See the module's law."""

    def __init__(
        self,
        context: Context,
        cache: KvCache,
        shapes: Shapes,
        *,
        room: int,
        choose: Callable[[list[Answer], Rows], None],
        fail: Callable[[Call, TarsError], None],
        adapt: Callable[[str], None],
        drafting: Drafting | None = None,
    ) -> None:
        """`room`: tokens of one sequence at most. `adapt` lets the next decodes compute with the adapter of that name."""
        self._context = context
        self._cache = cache
        self._shapes = shapes
        self._pace = Pace(shapes.chunk, shapes.most, shapes.bound)
        self._pace_alone = Pace(shapes.alone, shapes.most, ALONE_SECONDS, least=ALONE_LEAST)
        self._fail = fail
        self._decode_seconds = 0.0
        self._drafting = drafting
        self.decoding = Decoding(
            context,
            cache,
            room=room,
            gap=shapes.gap,
            least_rows=shapes.least_rows,
            chunk=shapes.chunk if shapes.exact else 0,
            choose=choose,
            adapt=adapt,
            no_room=self._no_room,
            stood_still=self._stood_still,
        )
        self.waiting: deque[Answer] = deque()
        """Prepared answers without a stream: first those that have tokens (preempted, or begun elsewhere), then in the order they came."""
        self.running: list[Answer] = []
        """Answers with a stream, in the order they got it."""
        self.prompt_tokens = 0
        self.prompt_tokens_cached = 0
        self.preemptions = 0
        self._swapped = 0

    @property
    def busy(self) -> bool:
        """True while an answer waits or runs."""
        return bool(self.running or self.waiting)

    def add(self, answers: Sequence[Answer]) -> None:
        """Let answers wait for their streams. Saved cells beyond what may be kept are computed again."""
        for answer in answers:
            if answer.saved is not None and not self._keeps(len(answer.saved.data)):
                answer.saved = None
            if answer.generated:
                self.waiting.insert(self._begun_ones(), answer)
            else:
                self.waiting.append(answer)

    def _begun_ones(self) -> int:
        """How many at the front of the queue have tokens."""
        return next((index for index, answer in enumerate(self.waiting) if not answer.generated), len(self.waiting))

    def drop(self, call: Call, *, keep: bool = True) -> None:
        """A call is over: its answers' streams and places in the queue are free. `keep`: its cells are good for others."""
        for answer in call.answers:
            self.leave(answer, keep=keep)
        if any(answer.call is call for answer in self.waiting):
            self.waiting = deque(answer for answer in self.waiting if answer.call is not call)

    def leave(self, answer: Answer, *, keep: bool = True) -> None:
        """Free an answer's stream; `keep`: its cells stay for prompts that begin alike."""
        self._forget_saved(answer)
        if answer.stream is not None:
            self._context.perform(self._cache.release(answer.stream, keep=keep))
            self.running.remove(answer)
            answer.stream, answer.position = None, 0

    def _forget_saved(self, answer: Answer) -> None:
        if answer.saved is not None:
            self._swapped -= len(answer.saved.data)
            answer.saved = None

    def _keeps(self, size: int) -> bool:
        """Whether so many more bytes of cells may be kept in RAM; they count then."""
        if self._swapped + size > SWAPPED_MOST:
            return False
        self._swapped += size
        return True

    def step(self, between: Callable[[], None]) -> None:
        """One token for every running answer, then a chunk of the prompts that come in; `between` the two the first's tokens go out."""
        self._make_way()
        rows = [answer for answer in self.running if self._is_row(answer)]
        if rows and self._came_together(rows) and self._prefill_for(self._pace_alone):
            return
        if rows:
            began = time.perf_counter()
            self._decode_rows(rows)
            self._decode_seconds += (time.perf_counter() - began - self._decode_seconds) / DECODES_AVERAGED
            self._pace.bound = max(self._shapes.bound, CHUNK_TO_DECODE * self._decode_seconds)
            if self.waiting or any(not self._is_row(answer) for answer in self.running):
                between()  # what the rows brought must not wait for the chunk
        self._prefill_for(self._pace if rows else self._pace_alone)

    def _make_way(self) -> None:
        """Where a begun answer finds no stream, one that has given nothing yet goes back to the queue: its caller notices nothing."""
        while self.waiting and self.waiting[0].generated and not self._cache.streams_free():
            victim = next((answer for answer in reversed(self.running) if not answer.generated), None)
            if victim is None:
                return
            self.leave(victim)
            self.waiting.insert(self._begun_ones(), victim)
            self.preemptions += 1

    def _came_together(self, rows: Sequence[Answer]) -> bool:
        """Whether all that runs has had its first token a moment ago and no second one, and what comes in was there by then."""
        begun = [answer.first_token for answer in rows if answer.first_token is not None and answer.generated == 1]
        if len(begun) < len(rows) or time.monotonic() >= min(begun) + TOGETHER_SECONDS:
            return False
        coming = next((answer for answer in self.running if not self._is_row(answer)), None)
        if coming is None and self.waiting:
            coming = self.waiting[0]
        return coming is not None and coming.call.received <= min(begun)

    def _prefill_for(self, pace: Pace) -> bool:
        """A chunk of the prompts that come in, as long as its pace allows; False where nothing was computed."""
        prefilling = [answer for answer in self.running if not self._is_row(answer)]
        if not prefilling and not self.waiting:
            return False
        return self._prefill(prefilling, pace)

    def _is_row(self, answer: Answer) -> bool:
        """Whether it takes part in the step's decode with one token: it generates, or (exact) replays what it generated."""
        if self._shapes.exact:
            return answer.position >= answer.prompt_length
        return answer.pending == 1 and answer.generated > 0

    def _decode_rows(self, rows: list[Answer]) -> None:
        if self._drafting is not None:
            rows = self._without_draft(self._drafting, rows)
            if not rows:
                return
        while (actions := self._cache.room_for(len(rows))) is None:
            rows = self._preempt_youngest(rows)
            if not rows:
                return
        self._context.perform(actions)
        self._close_up(rows)
        for group in self._groups(rows):
            # Where llama.cpp found no room for an earlier group, one of this may have been sent away.
            still = sorted((answer for answer in group if answer.stream is not None), key=stream_of)
            if still:
                self.decoding.compute([(answer, 1) for answer in still], fill=True)

    def _without_draft(self, drafting: Drafting, rows: list[Answer]) -> list[Answer]:
        """Compute what is worth drafting for, together where that may be, else one after the other; the rows that are left."""
        if len(rows) > drafting.most:
            return rows
        ordered = sorted(rows, key=stream_of)
        together = all(self._may_join(left, right) for left, right in pairwise(ordered))
        left: list[Answer] = []
        for group in [ordered] if together else [[answer] for answer in ordered]:
            # One may have been sent away, or failed, with the group before it.
            still = [answer for answer in group if answer.stream is not None]
            if still and not self.decoding.compute_drafted(drafting, still):
                left += still
        return [answer for answer in left if answer.stream is not None]

    def _close_up(self, rows: Sequence[Answer]) -> None:
        """Move an answer into a gap between the others, where it has enough tokens before it to be worth the copy."""
        streams = [stream_of(answer) for answer in rows]
        if len(rows) < 2 or max(streams) - min(streams) + 1 == len(rows) or self._context.copying:
            return
        ends = (min(streams), max(streams))
        if any(answer.call.most - answer.generated < WORTH_MOVING for answer in rows if answer.stream in ends):
            return
        moved = self._cache.close_up()
        if moved is None:
            return
        source, target, actions = moved
        self._context.perform(actions)
        for answer in self.running:
            if answer.stream == source:
                answer.stream = target

    def _groups(self, rows: list[Answer]) -> list[list[Answer]]:
        """Answers that may be computed together: those of one adapter. First the one that is in use, for a switch costs time."""
        groups: dict[str, list[Answer]] = {}
        for answer in rows:
            groups.setdefault(answer.call.adapter, []).append(answer)
        return [groups[adapter] for adapter in sorted(groups, key=lambda adapter: adapter != self.decoding.adapter)]

    def _prefill(self, prefilling: list[Answer], pace: Pace) -> bool:
        """A chunk of the oldest prompts, newly started ones included; whether any of it was computed."""
        parts: list[tuple[Answer, int]] = []
        budget = pace.chunk
        prefilling = sorted(prefilling, key=lambda answer: not answer.generated)
        while budget > 0:
            if sum(count for _, count in parts) >= self._shapes.joined:
                break
            answer = prefilling[0] if prefilling else None
            if answer is None or (not answer.generated and self.waiting and self.waiting[0].generated):
                if self._waits_for_a_beginning(parts):
                    break
                answer = self._start_next() or answer
            if answer is None:
                break
            if prefilling and answer is prefilling[0]:
                prefilling.pop(0)
            if self._is_row(answer):
                continue  # its cells were restored: it goes on with the next decode
            if parts and not self._may_join(parts[-1][0], answer):
                break
            count = self._part(answer, budget)
            parts.append((answer, count))
            budget -= count
            if self._shapes.exact:
                break
        parts = self._make_room(parts)
        if not parts:
            return False
        # Neither the swapping that made room nor a decode that was stopped says anything of the next chunk.
        began = time.perf_counter()
        if not self.decoding.compute(parts, fill=False):
            return False
        pace.took(sum(count for _, count in parts), time.perf_counter() - began)
        return True

    def _waits_for_a_beginning(self, parts: Sequence[tuple[Answer, int]]) -> bool:
        """Whether the next prompt begins like one of this chunk: after it, it can take that over instead of computing it once more."""
        if not parts or not self.waiting or self.waiting[0].saved is not None:
            return False
        coming = self.waiting[0]
        most = len(coming.tokens) - LEFT
        shared = max(
            (
                common_beginning(answer.tokens, coming.tokens, min(most, answer.position + count))
                for answer, count in parts
                if answer.call.adapter == coming.call.adapter
            ),
            default=0,
        )
        if shared < WORTH_WAITING:
            return False
        return shared - self._cache.beginning(coming.tokens, coming.call.adapter) >= WORTH_WAITING

    def _part(self, answer: Answer, budget: int) -> int:
        """How many of its pending tokens are computed next."""
        if self._shapes.exact:
            # Up to the next fixed border, never beyond the prompt.
            border = (answer.position // self._shapes.chunk + 1) * self._shapes.chunk
            return min(border, answer.prompt_length) - answer.position
        count = min(answer.pending, budget)
        # A rest of one token would go through other kernels (see kv_cache.LEFT).
        return count - 1 if answer.pending - count == 1 and count > LEFT else count

    def _may_join(self, last: Answer, answer: Answer) -> bool:
        """Whether two prompts' parts belong into one decode: in split streams only neighbours are computed together."""
        assert last.stream is not None
        assert answer.stream is not None
        return last.call.adapter == answer.call.adapter and (self._context.shared or answer.stream == last.stream + 1)

    def _make_room(self, parts: list[tuple[Answer, int]]) -> list[tuple[Answer, int]]:
        """Cells for these parts; those of them that are left."""
        needed = sum(count for _, count in parts)
        while (actions := self._cache.room_for(needed)) is None:
            # The youngest gives way; where only this one is left, its own call fits alone, so there is room.
            self._preempt_youngest([answer for answer, _ in parts])
            parts = [(answer, count) for answer, count in parts if answer.stream is not None]
            needed = sum(count for _, count in parts)
        self._context.perform(actions)
        return parts

    def _start_next(self) -> Answer | None:
        """Give the first waiting answer a stream; None where there is none to be had, or no room for what it has to compute."""
        if not self.waiting or not self._may_start(self.waiting[0]):
            return None
        answer = self.waiting[0]
        prompt = self._to_look_for(answer)
        place = self._cache.take(prompt, answer.call.adapter, aside=answer.saved is None)
        assert place is not None
        self.waiting.popleft()
        answer.stream, answer.position = place.stream, place.kept
        if not self._context.perform(place.actions):
            self._context.forget(place.stream, 0)
            self._cache.forget(place.stream)
            answer.position = 0
        self.running.append(answer)
        now = time.monotonic()
        if answer.started is None:
            answer.started = now
            answer.cached = min(answer.position, answer.prompt_length)
            self.prompt_tokens += answer.prompt_length
            self.prompt_tokens_cached += answer.cached
        if answer.saved is not None:
            self._restore(answer)
        return answer

    def _may_start(self, answer: Answer) -> bool:
        """Whether there is a stream for it (beyond the slots only if it has tokens) and room for what it has to compute."""
        if not self._cache.streams_free() or (not answer.generated and len(self.running) >= self._context.slots):
            return False
        if answer.saved is not None and self._context.copying:
            return False  # it may come into the stream that is copied from; this step's decode copies
        if not (self._context.shared and self.running):
            return True
        prompt = self._to_look_for(answer)
        needed = self._cache.lacking(prompt, answer.call.adapter) if prompt else len(answer.tokens)
        spare = len(self.running)  # a token for each of the others, so that it is not sent away again at once
        return self._cache.free + self._cache.cached >= needed + spare

    def _to_look_for(self, answer: Answer) -> Sequence[int]:
        """The tokens whose beginning may be in the cache; none, where its cells are saved."""
        if answer.saved is not None:
            return ()
        # What another call's prompt computed in chunks is not, to the bit, what this answer's decodes computed.
        return answer.tokens[: answer.prompt_length] if self._shapes.exact else answer.tokens

    def _restore(self, answer: Answer) -> None:
        assert answer.saved is not None
        assert answer.stream is not None
        saved = answer.saved
        actions = self._cache.room_for(saved.tokens)
        if actions is not None:
            self._context.perform(actions)
            if self._context.set_state(answer.stream, saved.data, saved.tokens):
                chunks = answer.prompt_length // self._shapes.chunk * self._shapes.chunk if self._shapes.exact else 0
                self._cache.restore(answer.stream, answer.tokens[: saved.tokens], chunks)
                answer.position = saved.tokens
        self._forget_saved(answer)

    def _preempt_youngest(self, rows: list[Answer]) -> list[Answer]:
        """Send the answer that got its stream last back to the front of the queue; the rows that are left."""
        victim = self.running[-1]
        assert len(self.running) > 1, "a call that fits the context alone must fit the cache alone"
        assert victim.stream is not None
        saved = None
        if victim.position:
            try:
                data = self._context.state(victim.stream)
            except (InternalError, MemoryError):
                traceback.print_exc()  # it is computed again
            else:
                if self._keeps(len(data)):
                    saved = SavedCells(data, victim.position)
        self.leave(victim, keep=False)
        victim.saved = saved
        self.waiting.appendleft(victim)
        self.preemptions += 1
        return [answer for answer in rows if answer is not victim]

    # --- decodes that came to nothing ---

    def _stood_still(self, answers: list[Answer], tokens: int) -> None:
        """The watchdog stopped a decode of so many tokens: it is tried once more, and then its calls fail."""
        # A machine that became very slow computes a few tokens in the time that it had for many.
        for pace in (self._pace, self._pace_alone):
            pace.broken_off(tokens)
        for answer in answers:
            answer.aborted += 1
        for call in {answer.call for answer in answers if answer.aborted > 1}:
            self._fail(
                call,
                WorkerCrashed(
                    "A computing step did not end, twice, and was stopped. Send the call again.",
                    retry_after_ms=1000,
                ),
            )

    def _no_room(self, answers: list[Answer]) -> None:
        """The cache said that there is room and llama.cpp found none: give up what is kept for later, else the youngest."""
        if actions := self._cache.drop_oldest():
            self._context.perform(actions)
        elif len(self.running) > 1:
            self._preempt_youngest(answers)
        else:
            raise RuntimeError("llama.cpp has no room for a sequence that has the whole KV cache to itself")
