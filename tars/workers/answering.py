"""The calls that a chat engine answers: how they begin, get their tokens, are saved for another replica, and end.

Law of this file: it chooses tokens (`llama_sampling`) and hands out what callers see of them (`generation`); whose token is computed when
is its `batcher`'s decision. Belongs to the engine thread.
"""

from __future__ import annotations

import secrets
import time
import traceback
from pathlib import Path

from tars.errors import Draining, InternalError, InvalidParams, ReplicaFailed, TarsError
from tars.messages.inference import ChatParams, CompleteParams, Tokenized, TokenizeParams
from tars.workers.adapters import Adapters, adapter_of
from tars.workers.answer_format import AnswerFormat
from tars.workers.batcher import Batcher, Shapes
from tars.workers.drafting import Drafting
from tars.workers.engine import Emit, LoadSpec, Saved, SaveParams, Submission
from tars.workers.generation import SEEDS, Answer, Call, Emission, SavedCells
from tars.workers.kv_cache import KvCache
from tars.workers.llama_context import Context, Rows
from tars.workers.llama_model import Model
from tars.workers.llama_sampling import Sampler, check_finite, greedy_rows, token_logprob
from tars.workers.preparation import Prepared
from tars.workers.sequence_state import read_state, write_state


class Answering:
    """See the module's law."""

    def __init__(
        self,
        spec: LoadSpec,
        model: Model,
        adapters: Adapters,
        answers: AnswerFormat,
        context: Context,
        cache: KvCache,
        shapes: Shapes,
        drafting: Drafting | None,
        emit: Emit,
        *,
        template_stop: list[str],
    ) -> None:
        """`template_stop`: what ends a chat's answer beside the call's own `stop`."""
        self._spec = spec
        self._model = model
        self._adapters = adapters
        self._format = answers
        self._context = context
        self._emit = emit
        self._template_stop = template_stop
        self._calls: dict[int, Call] = {}
        self.batcher = Batcher(
            context,
            cache,
            shapes,
            room=spec.context,
            choose=self._choose,
            fail=self._fail,
            adapt=lambda adapter: adapters.use(context, adapter),
            drafting=drafting,
        )
        self.out: list[Emission] = []
        """What `flush` hands out next."""
        self.generated = 0
        """Tokens since the load."""

    def flush(self) -> None:
        """Hand out what came."""
        if self.out:
            out, self.out = self.out, []
            self._emit(out)

    # --- calls come and go ---

    def begin(self, prepared: Prepared) -> None:
        """A prepared call: answer it, refuse it, or let its answers wait for streams."""
        submission, work = prepared.submission, prepared.submission.work
        number = submission.sequence
        if prepared.error is not None:
            self.out.append((number, prepared.error))
            return
        if isinstance(work, TokenizeParams):
            self.out.append((number, Tokenized(tokens=prepared.tokens)))
            return
        assert isinstance(work, ChatParams | CompleteParams)
        try:
            self._enter(prepared, work)
        except TarsError as error:
            self.out.append((number, error))
        except Exception:  # noqa: BLE001  # nothing was computed yet, so the others' state is whole: only this call ends
            traceback.print_exc()
            text = "The call could not be prepared; the worker's lines in the node's log say why."
            self.out.append((number, InternalError(text)))

    def save(self, submission: Submission, work: SaveParams) -> bool:
        """Write an answer's state to the file and end it here; False where that can only be done after the next step."""
        call = self._calls.get(work.sequence)
        if call is None or len(call.answers) != 1:
            text = "There is no such running answer here, or it is one of several; nothing was saved."
            self.out.append((submission.sequence, InvalidParams(text)))
            return True
        if self._context.copying:
            return False  # its cells may still be on their way
        answer = call.answers[0]
        try:
            cells = answer.saved
            if answer.stream is not None and answer.position:
                cells = SavedCells(self._context.state(answer.stream), answer.position)
            size = write_state(Path(work.path), answer.tokens, cells, call.adapter)
        except (OSError, MemoryError, InternalError):
            traceback.print_exc()
            text = "The answer's state could not be written (is the disk or the memory full?); it goes on here."
            self.out.append((submission.sequence, InternalError(text)))
            return True
        generated = answer.tokens[answer.prompt_length :]
        saved = Saved(bytes=size, prompt_tokens=answer.prompt_length, generated=generated, seed=call.seed)
        self._fail(call, Draining("The answer moves to another replica; go on with it there."))
        self.out.append((submission.sequence, saved))
        return True

    def end_late(self, cancelled: set[int], now: float) -> None:
        """End the calls that were cancelled, or whose time is up."""
        for call in list(self._calls.values()):
            if (error := call.ending(cancelled, now)) is not None:
                self._fail(call, error)

    def close(self) -> None:
        """End all calls, without a word."""
        for call in list(self._calls.values()):
            self._close(call)

    def _enter(self, prepared: Prepared, work: ChatParams | CompleteParams) -> None:
        """Make the call and its answers, and let them wait for streams. Raises what its sampling settings make impossible."""
        number = prepared.submission.sequence
        resume = prepared.submission.resume
        drawn = secrets.randbelow(SEEDS) if work.seed is None else work.seed
        seed = drawn if resume is None else resume.seed
        call = Call(
            prepared.submission,
            prepared.tokens,
            seed=seed,
            context=self._spec.context,
            answers=self._format,
            prompt_end=prepared.prompt_end,
            adapter=adapter_of(work.model, self._spec.model, self._adapters.names),
            template_stop=self._template_stop if isinstance(work, ChatParams) else (),
        )
        if any(not 0 <= token < self._model.tokens for one in call.begun for token in one.tokens):
            raise InvalidParams("The answer to be continued holds tokens that this model does not have.")
        try:
            for answer in call.answers:
                generated = answer.tokens[answer.prompt_length :]
                answer.sampler = Sampler(self._model, work, prepared.tokens, generated, answer.seed, prepared.grammar)
                if resume is not None and (delta := answer.replay(self._model.pieces)) is not None:
                    self.out.append((number, delta))
        except BaseException:
            for answer in call.answers:
                answer.close()
            raise
        for answer in call.answers:
            if answer.finish_reason is not None:  # it was whole already when it was broken off
                answer.close()
        if call.ended:
            self.out.append((number, call.result(time.monotonic())))
            return
        if resume is not None and resume.path is not None and work.n == 1:
            call.answers[0].saved = read_state(Path(resume.path), call.answers[0].tokens, call.adapter)
        self._calls[number] = call
        self.batcher.add([answer for answer in call.answers if answer.finish_reason is None])

    def _fail(self, call: Call, error: TarsError) -> None:
        # Cells behind numbers that are none would spoil every prompt that begins alike.
        self._close(call, keep=not isinstance(error, ReplicaFailed))
        self.out.append((call.number, error))

    def _close(self, call: Call, *, keep: bool = True) -> None:
        self._calls.pop(call.number, None)
        self.batcher.drop(call, keep=keep)
        for answer in call.answers:
            answer.close()

    # --- tokens ---

    def _choose(self, answers: list[Answer], rows: Rows) -> None:
        """Sample the next token of each answer from its row of logits, and hand out what that makes certain."""
        now = time.monotonic()
        if all(answer.sampler is not None and answer.sampler.plain_greedy for answer in answers):
            greedy = greedy_rows(rows)
            for answer, token, row in zip(answers, greedy, rows, strict=True):
                self._take_token(answer, token, row, now)
            return
        for answer, row in zip(answers, rows, strict=True):
            self._take_token(answer, None, row, now)

    def _take_token(self, answer: Answer, token: int | None, row: Rows, now: float) -> None:
        """`token` None: it is still to be sampled, or the row holds something that is not a number."""
        if answer.call.number not in self._calls:
            return  # another answer of the same call has just failed it
        assert isinstance(answer.sampler, Sampler)
        work = answer.call.work
        try:
            if token is None:
                check_finite(row)
                token = answer.sampler.sample(row)
            logprob = None if work.logprobs is None else token_logprob(self._model, row, token, work.logprobs)
            ended = token in self._model.end_tokens
            delta = answer.finish("stop") if ended else answer.accept(token, self._model.pieces[token], logprob)
        except TarsError as error:
            self._fail(answer.call, error)
            return
        except Exception:  # noqa: BLE001  # sampling and text are this call's alone: whatever went wrong in them is no reason to end the others
            traceback.print_exc()
            text = "The answer's next token could not be chosen or read; the worker's lines in the node's log say why."
            self._fail(answer.call, InternalError(text))
            return
        if answer.first_token is None:
            answer.first_token = now
        self.generated += 1
        if delta is not None:
            self.out.append((answer.call.number, delta))
        if answer.finish_reason is not None:
            self._finish(answer)

    def _finish(self, answer: Answer) -> None:
        self.batcher.leave(answer)
        answer.close()
        call = answer.call
        if call.ended:
            self._calls.pop(call.number, None)
            self.out.append((call.number, call.result(time.monotonic())))
