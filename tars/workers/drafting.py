"""Speculative decoding: a small model of the same vocabulary proposes tokens, which the model then checks in one decode.

Law of this file: it owns the draft model and its context, and proposes; what is accepted is decided by each answer's own sampler, with the
model's own logits, so the text is the model's. The draft's context is kept in step by computing what it lacks; it knows no KV cache's
bookkeeping. What goes wrong in it while answers run takes the proposals away and nothing else. Belongs to the engine thread.
"""

from __future__ import annotations

import math
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tars.core.memory import DRAFT_BATCH, DRAFTED_MOST
from tars.errors import BadModelFile, DoesNotFit, ReplicaFailed
from tars.workers import llama_library as library
from tars.workers.draft_worth import LENGTHS, Costs, DraftWorth
from tars.workers.engine import LoadSpec
from tars.workers.generation import Answer
from tars.workers.kv_cache import common_beginning
from tars.workers.llama_context import Aborted, Context, NoRoom, Rows
from tars.workers.llama_model import Model
from tars.workers.llama_sampling import check_finite

VOCABULARY_DIFFERS_BY = 128
"""Padding tokens at the end of one of the vocabularies (llama.cpp's SPEC_VOCAB_MAX_SIZE_DIFFERENCE)."""

ROUNDS, ROUNDS_SECONDS = 8, 2.0
"""Of all the shapes that are measured at load, one after the other: what else the machine does meanwhile falls on each alike. No round
begins after so many seconds."""


@dataclass(slots=True)
class _Stream:
    """One of the draft's sequences: its tokens, whose they are, and how many of them are surely that answer's."""

    tokens: list[int] = field(default_factory=list)
    owner: Answer | None = None
    sure: int = 0


class Drafting:
    """See the module's law."""

    def __init__(
        self, model: Model, spec: LoadSpec, log: library.NativeLog, on_percent: Callable[[float], None]
    ) -> None:
        """Load the draft model; `on_percent` as in `Model`. Raises `BadModelFile` where it does not suit the model, or `DoesNotFit`."""
        assert spec.draft_path is not None
        self._spec = spec.model_copy(
            update={
                "path": spec.draft_path,
                "draft_path": None,
                "adapters": [],
                "slots": min(spec.slots, DRAFTED_MOST),
                "batch": DRAFT_BATCH,
                "micro_batch": DRAFT_BATCH,
                "gpu_layers": -1 if spec.gpu_layers else 0,
            }
        )
        self._log = log
        log.lines.clear()
        try:
            self._model = Model(self._spec, log, on_percent)
        except (BadModelFile, DoesNotFit) as error:
            raise type(error)(f"The draft model: {error.message}") from None
        self._usable = min(model.tokens, self._model.tokens)
        if not self._model.forgets_partly or not _same_vocabulary(model, self._model):
            reason = (
                f"has another vocabulary ({self._model.tokens} tokens) than the model ({model.tokens} tokens), so that it cannot propose "
                "tokens for it"
                if self._model.forgets_partly
                else f"is of an architecture ({self._model.architecture}) that cannot take back what it proposed"
            )
            self._model.close()
            raise BadModelFile(f"The draft model {reason}. Use a small model of the same family, or take `draft` out.")
        self._context: Context | None = None
        self._streams = [_Stream() for _ in range(self._spec.slots)]
        self._worth: DraftWorth | None = None
        self.proposed = 0
        self.accepted = 0

    def warm_up(self, target: Context, token: int, *, flash_attention: bool, mark: Callable[[], None]) -> bool:
        """Make the draft's context and measure it against the model's (which is empty before and after). False where the draft could never
        make this replica faster: close it then. Raises `BadModelFile`, `DoesNotFit` or `ReplicaFailed`.
        """
        try:
            self._context = Context(
                self._model,
                self._spec,
                self._log,
                chunk=DRAFT_BATCH,
                flash_attention=flash_attention,
                abort=target.abort,
            )
        except (DoesNotFit, ReplicaFailed) as error:
            raise type(error)(f"The draft model: {error.message}") from None
        try:
            check_finite(self._context.decode([token], [0], [0], [0])[0])
        except ReplicaFailed as error:
            raise BadModelFile(f"The draft model: {error.message}") from None
        self._context.forget(0, 0)
        costs = measure(target, self._context, token, min(len(self._streams), target.slots), mark)
        if costs.hopeless:
            self._context.close()
            self._context = None
            return False
        self._context.native_seconds = 0.0
        self._worth = DraftWorth(costs)
        return True

    @property
    def most(self) -> int:
        """Answers that it proposes for at once at most."""
        return len(self._streams)

    @property
    def native_seconds(self) -> float:
        """Seconds inside the draft's decodes."""
        return 0.0 if self._context is None else self._context.native_seconds

    def propose(self, answers: Sequence[Answer], room: int) -> list[list[int]]:
        """Tokens that may follow each answer's, equally many for each; nothing where that is not worth while now, or the draft still has to
        catch up with a prompt. `room`: tokens of a sequence at most.
        """
        if self._context is None or self._worth is None or not 0 < len(answers) <= self.most:
            return []
        # Beyond what it was trained for a draft only babbles, or has no positions at all.
        room = min(room, self._model.context_trained)
        # The pending token and the proposals need cells, and beyond its last token nothing of an answer is looked at.
        most = min(min(room - len(answer.tokens), answer.call.most - answer.generated - 1) for answer in answers)
        if most < 1:
            return []
        count = min(most, self._worth.length(len(answers)))
        if count < 1:
            return []
        try:
            return self._proposed(self._context, answers, count)
        except (Aborted, NoRoom):
            for number in range(len(self._streams)):
                self._empty(self._context, number)
        except RuntimeError:
            traceback.print_exc()
            self.give_up()
        return []

    def took(self, proposed: int, accepted: int, *, ended: bool) -> None:
        """What became of an answer's proposals; `ended`: the answer did, so that those it did not accept were not looked at."""
        assert self._worth is not None
        self.proposed += proposed
        self.accepted += accepted
        self._worth.took(accepted if ended else proposed, accepted)

    def give_up(self) -> None:
        """Propose nothing any more: a step of the draft failed or did not end, and the model goes on without."""
        self._worth = None
        print("The draft model failed and is not used any more until the next load.", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Free everything."""
        if self._context is not None:
            self._context.close()
            self._context = None
        self._model.close()

    def _proposed(self, context: Context, answers: Sequence[Answer], count: int) -> list[list[int]]:
        numbers = self._place(context, answers)
        if not self._make_room(context, numbers, sum(len(answer.tokens) + count for answer in answers)):
            return []
        rows = self._catch_up(context, answers, numbers)
        if rows is None:
            return []
        proposals: list[list[int]] = [[] for _ in answers]
        order = sorted(range(len(answers)), key=lambda index: numbers[index])
        for place in range(count):
            best = rows[:, : self._usable].argmax(axis=1).tolist()
            for index, token in zip(order, best, strict=True):
                proposals[index].append(token)
            if place + 1 < count:
                streams = [self._streams[numbers[index]] for index in order]
                positions = [len(stream.tokens) for stream in streams]
                ascending = [numbers[index] for index in order]
                rows = context.decode(best, positions, ascending, list(range(len(best))))
                for stream, token in zip(streams, best, strict=True):
                    stream.tokens.append(token)
        return proposals

    def _place(self, context: Context, answers: Sequence[Answer]) -> list[int]:
        """The stream of each answer, cut to what is the answer's; at least its last token is to be computed."""
        numbers: dict[int, int] = {}
        for index, answer in enumerate(answers):
            for number, stream in enumerate(self._streams):
                if stream.owner is answer:
                    numbers[index] = number
        for index, answer in enumerate(answers):
            if index not in numbers:
                free = [number for number in range(len(self._streams)) if number not in numbers.values()]
                # Another running answer, which is computed after this one, keeps its own.
                number = max(free, key=lambda number: (self._idle(number), self._common(self._streams[number], answer)))
                stream = self._streams[number]
                stream.sure, stream.owner = self._common(stream, answer), answer
                numbers[index] = number
        for index, answer in enumerate(answers):
            stream = self._streams[numbers[index]]
            known = stream.sure
            most = min(len(stream.tokens), len(answer.tokens) - 1)
            while known < most and stream.tokens[known] == answer.tokens[known]:
                known += 1
            known = min(known, most)
            if known < len(stream.tokens):
                if not context.forget(numbers[index], known):
                    known = 0
                del stream.tokens[known:]
            stream.sure = known
        return [numbers[index] for index in range(len(answers))]

    def _make_room(self, context: Context, numbers: Sequence[int], needed: int) -> bool:
        """Where the streams share their cells, and too few are left, those of ended answers go; False where that is not enough."""
        if not context.shared:
            return True
        assert self._spec.kv_tokens is not None
        if needed > self._spec.kv_tokens:
            return False
        for number, stream in enumerate(self._streams):
            if number not in numbers and needed + len(stream.tokens) > self._spec.kv_tokens:
                self._empty(context, number)
        return True

    def _empty(self, context: Context, number: int) -> None:
        context.forget(number, 0)
        self._streams[number] = _Stream()

    def _idle(self, number: int) -> bool:
        owner = self._streams[number].owner
        return owner is None or owner.stream is None

    def _common(self, stream: _Stream, answer: Answer) -> int:
        return common_beginning(stream.tokens, answer.tokens, len(answer.tokens) - 1)

    def _catch_up(self, context: Context, answers: Sequence[Answer], numbers: Sequence[int]) -> Rows | None:
        """Compute what the draft lacks of the answers; the logits after their last tokens in the streams' order, None where the draft is
        not there yet.
        """
        tokens: list[int] = []
        positions: list[int] = []
        streams: list[int] = []
        wanted: list[int] = []
        for number, answer in sorted(zip(numbers, answers, strict=True), key=lambda pair: pair[0]):
            stream = self._streams[number]
            start = len(stream.tokens)
            part = answer.tokens[start : start + DRAFT_BATCH - len(tokens)]
            if any(token >= self._usable for token in part):
                return None  # a token that the draft's vocabulary lacks
            tokens += part
            positions += range(start, start + len(part))
            streams += [number] * len(part)
            if part and start + len(part) == len(answer.tokens):
                wanted.append(len(tokens) - 1)
        rows = context.decode(tokens, positions, streams, wanted)
        for token, number in zip(tokens, streams, strict=True):
            self._streams[number].tokens.append(token)
        for number in numbers:
            self._streams[number].sure = len(self._streams[number].tokens)
        return rows if len(wanted) == len(answers) else None


def measure(target: Context, draft: Context, token: int, answers: int, mark: Callable[[], None]) -> Costs:
    """Seconds of the steps that drafting replaces and of those it takes; the best of some tries, in empty contexts. `mark` is called after
    every decode.
    """

    def seconds(context: Context, streams: int, count: int) -> float:
        began = time.perf_counter()
        context.decode(
            [token] * (streams * count),
            [position for _ in range(streams) for position in range(count)],
            [stream for stream in range(streams) for _ in range(count)],
            list(range(streams * count)),
        )
        took = max(1e-9, time.perf_counter() - began)
        mark()
        for stream in range(streams):
            context.forget(stream, 0)
        return took

    every = range(1, answers + 1)
    fitting = [length for length in LENGTHS if answers * (length + 1) <= target.most]
    drafted, plain = dict.fromkeys(every, math.inf), dict.fromkeys(every, math.inf)
    checked = {(count, length): math.inf for count in every for length in fitting}
    ends = time.perf_counter() + ROUNDS_SECONDS
    for done in range(ROUNDS):
        if done and time.perf_counter() >= ends:
            break
        for count in every:
            drafted[count] = min(drafted[count], seconds(draft, count, 1))
            plain[count] = min(plain[count], seconds(target, count, 1))
            for length in fitting:
                checked[count, length] = min(checked[count, length], seconds(target, count, length + 1))
    return Costs(drafted, plain, checked)


def _same_vocabulary(model: Model, draft: Model) -> bool:
    """Whether every token that both have is the same text. To be called before `Model.show` changes what is shown of control tokens."""
    count = min(model.tokens, draft.tokens)
    if max(model.tokens, draft.tokens) - count > VOCABULARY_DIFFERS_BY:
        return False
    if model.pieces[:count] != draft.pieces[:count]:
        return False
    control = [token for token in range(count) if not model.pieces[token]]
    return all(model.special_text(token) == draft.special_text(token) for token in control)
