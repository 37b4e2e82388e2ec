"""How one decode is made: the tokens that are due, in one batch, and what is there after it.

Law of this file: it computes what it is told to, notes that in the KV cache, and hands the rows of logits to `choose`; a decode that came
to nothing leaves everything as it was. Whose tokens are computed together is the `batcher`'s decision, and so is what becomes of answers
for which there was no room, or whose step did not end.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from operator import itemgetter

from tars.workers.drafting import Drafting
from tars.workers.generation import Answer
from tars.workers.kv_cache import KvCache
from tars.workers.llama_context import Aborted, Context, NoRoom, Rows


class Decoding:
    """See the module's law."""

    def __init__(
        self,
        context: Context,
        cache: KvCache,
        *,
        room: int,
        gap: int,
        least_rows: int,
        chunk: int,
        choose: Callable[[list[Answer], Rows], None],
        adapt: Callable[[str], None],
        no_room: Callable[[list[Answer]], None],
        stood_still: Callable[[list[Answer], int], None],
    ) -> None:
        """`room`: tokens of one sequence at most; `gap` and `least_rows` as in `Shapes`; `chunk`: of exact mode, 0 elsewhere.

        `adapt` lets the next decodes compute with the adapter of that name. `no_room` is told of answers for which llama.cpp found no
        cells, `stood_still` of those whose decode, of so many tokens, the watchdog stopped.
        """
        self._context = context
        self._cache = cache
        self._room = room
        self._gap = gap
        self._least_rows = least_rows
        self._chunk = chunk
        self._choose = choose
        self._adapt = adapt
        self._no_room = no_room
        self._stood_still = stood_still
        self.adapter = ""
        """Of the last decode: a switch costs time."""
        self.computing: frozenset[int] = frozenset()
        """Calls of the decode that runs now."""
        self.stopped_by_watchdog = False
        """Set before the abort flag, by whoever stops a decode that does not end."""
        self.steps = 0

    def compute(self, parts: list[tuple[Answer, int]], *, fill: bool) -> bool:
        """Decode so many pending tokens of each answer, and choose the next token where that was the last one. False where the decode
        was stopped or found no room. `fill`: idle streams may be computed along.
        """
        tokens: list[int] = []
        positions: list[int] = []
        streams: list[int] = []
        wanted: list[int] = []
        chosen: list[Answer] = []
        fillers = self._companions([stream_of(answer) for answer, _ in parts]) if fill else {}
        entries: list[tuple[int, Answer | None, int]] = [(stream_of(answer), answer, count) for answer, count in parts]
        if fillers:
            entries = sorted([*entries, *((stream, None, 1) for stream in fillers)], key=itemgetter(0))
        for stream, answer, count in entries:
            start = fillers[stream] if answer is None else answer.position
            tokens += [0] if answer is None else answer.tokens[start : start + count]
            positions += range(start, start + count)
            streams += [stream] * count
            if answer is not None and start + count == len(answer.tokens):
                wanted.append(len(tokens) - 1)
                chosen.append(answer)
        rows = self._decode([answer for answer, _ in parts], tokens, positions, streams, wanted, fillers)
        if rows is None:
            return False
        for stream, length in fillers.items():
            self._context.forget(stream, length)
        for answer, count in parts:
            assert answer.stream is not None
            start, answer.position, answer.aborted = answer.position, answer.position + count, 0
            whole = self._chunk > 0 and answer.position <= answer.prompt_length and answer.position % self._chunk == 0
            self._cache.append(answer.stream, answer.tokens[start : answer.position], chunked=whole)
        if chosen:
            self._choose(chosen, rows)
        return True

    def compute_drafted(self, drafting: Drafting, answers: list[Answer]) -> bool:
        """Decode each answer's pending token and those that the draft model proposes after it: as many tokens are taken as the answer's
        sampler chooses too, and the one after them. False where nothing is proposed and nothing was done.
        """
        self.computing = frozenset(answer.call.number for answer in answers)
        try:
            proposals = drafting.propose(answers, self._room)
        finally:
            self.computing = frozenset()
        if not proposals:
            if self.stopped_by_watchdog:
                drafting.give_up()
            return False
        count = 1 + len(proposals[0])
        if (actions := self._cache.room_for(count * len(answers))) is None:
            return False  # nobody is sent away for tokens that may be wrong
        self._context.perform(actions)
        tokens: list[int] = []
        positions: list[int] = []
        streams = [stream_of(answer) for answer in answers]
        for answer, proposed in zip(answers, proposals, strict=True):
            tokens += [answer.tokens[answer.position], *proposed]
            positions += range(answer.position, answer.position + count)
        repeated = [stream for stream in streams for _ in range(count)]
        logits = self._decode(answers, tokens, positions, repeated, list(range(len(tokens))), {})
        if logits is None:
            return True
        going_on = list(range(len(answers)))
        accepted = [0] * len(answers)
        for place in range(count):
            for index in going_on:
                self._cache.append(streams[index], [tokens[index * count + place]])
                answers[index].position += 1
                answers[index].aborted = 0
            self._choose([answers[index] for index in going_on], logits[[index * count + place for index in going_on]])
            # One that ended, or whose call failed, has no stream any more.
            going_on = [
                index
                for index in going_on
                if answers[index].stream is not None
                and place < count - 1
                and answers[index].tokens[-1] == proposals[index][place]
            ]
            for index in going_on:
                accepted[index] += 1
            if not going_on:
                break
        for index, stream in enumerate(streams):
            if not self._context.forget(stream, self._cache.length(stream)):
                self._cache.forget(stream)
                answers[index].position = 0
            drafting.took(count - 1, accepted[index], ended=answers[index].stream is None)
        return True

    def _decode(
        self,
        answers: list[Answer],
        tokens: list[int],
        positions: list[int],
        streams: list[int],
        wanted: list[int],
        fillers: dict[int, int],
    ) -> Rows | None:
        """The decode itself, with the adapter of the answers; None where it was stopped or found no room, which is dealt with then."""
        self.adapter = answers[0].call.adapter
        self._adapt(self.adapter)
        self.computing = frozenset(answer.call.number for answer in answers)
        try:
            return self._context.decode(tokens, positions, streams, wanted)
        except Aborted:
            self._drop_cells(answers, fillers)
            # Else whoever set the flag is in the inbox.
            if self.stopped_by_watchdog:
                self.stopped_by_watchdog = False
                self._stood_still(answers, len(tokens))
        except NoRoom:
            self._no_room(answers)
        finally:
            self.computing = frozenset()
            self.steps += 1
        return None

    def _companions(self, streams: list[int]) -> dict[int, int]:
        """Idle streams that are computed along with these (ascending) ones, each with the position of its token, which is dropped again.

        In split streams every gap costs a pass over the weights, which may be more than the rows in it; and where a single row goes through
        other kernels than several, exact mode never computes one alone.
        """
        if self._context.shared:
            return {}
        along: list[int] = []
        for left, right in pairwise(streams):
            if right - left - 1 <= self._gap:
                along += range(left + 1, right)
        if len(streams) + len(along) < self._least_rows:
            along += [stream for stream in (streams[0] - 1, streams[-1] + 1) if 0 <= stream < self._context.streams][:1]
        return {stream: length for stream in along if (length := self._cache.length(stream)) < self._room}

    def _drop_cells(self, answers: list[Answer], fillers: dict[int, int]) -> None:
        """Some of a stopped batch's cells may be there."""
        for stream, length in fillers.items():
            self._context.forget(stream, length)
        for answer in answers:
            assert answer.stream is not None
            if not self._context.forget(answer.stream, answer.position):
                self._cache.forget(answer.stream)
                answer.position = 0


def stream_of(answer: Answer) -> int:
    """The stream of an answer that has one."""
    assert answer.stream is not None
    return answer.stream
