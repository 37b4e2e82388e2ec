"""What has to be done with a call before its first token can be computed: render, tokenize, compile its grammar.

Law of this file: no context and no KV cache, so that it may run beside the engine thread. What takes milliseconds is done in the engine
thread at once; a long text or a grammar goes to a thread of its own, for it must not hold up the running answers: tokenizing 4 MB takes
seconds, and llama.cpp's grammars can take for ever.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tars.errors import BadGrammar, InternalError, InvalidParams, Overloaded, PromptTooLong, TarsError
from tars.messages.inference import ChatMessage, ChatParams, CompleteParams, TokenizeParams
from tars.workers.answer_format import AnswerFormat
from tars.workers.chat_template import ChatTemplate
from tars.workers.engine import Submission

if TYPE_CHECKING:  # importing these imports llama_cpp, which is the load's stage `import`
    from tars.workers.llama_model import Model
    from tars.workers.llama_sampling import CompiledGrammar

LONG_TEXT = 32_768
"""Characters from which a text is tokenized apart: below it takes about 10 ms."""

APART_MOST = 4
"""Calls that are prepared beside each other; one more waits its turn."""

GIVE_UP_SECONDS = 20.0
"""A preparation that takes longer is abandoned with its thread: a 4 MB text takes 5 to 17 s, an honest grammar a fraction of one."""

ABANDONED_MOST = 4
"""Threads that were abandoned and still run; with so many no further grammar is taken, or they would eat the machine."""

STACK_BYTES = 256 * 2**20
"""llama.cpp's pre-tokenizers use `std::regex`, which recurses once per character; only touched pages cost memory."""

PROMPT_END = 400
"""Characters of the rendered prompt's end that say how the answer begins (`<think>` opened by the template)."""


@dataclass(slots=True)
class Prepared:
    """A call whose tokens are known, or why it cannot be served."""

    submission: Submission
    tokens: list[int] = field(default_factory=list)
    grammar: CompiledGrammar | None = None
    prompt_end: str = ""
    error: TarsError | None = None


class Preparation:
    """See the module's law. `hand_back` gets each `Prepared` that was made in another thread; it must be thread-safe."""

    def __init__(
        self,
        model: Model,
        template: ChatTemplate,
        answers: AnswerFormat,
        context: int,
        hand_back: Callable[[Prepared], None],
    ) -> None:
        self._model = model
        self._template = template
        self._answers = answers
        self._context = context
        self._hand_back = hand_back
        self._apart: dict[int, tuple[Submission, float]] = {}
        """Sequence -> submission, when its thread began."""
        self._queue: list[Submission] = []
        self._abandoned: list[threading.Thread] = []
        self._threads: dict[int, threading.Thread] = {}

    @property
    def busy(self) -> int:
        """Calls that are being prepared apart, or wait for that."""
        return len(self._apart) + len(self._queue)

    def prepare(self, submission: Submission) -> Prepared | None:
        """The call, prepared; None where that goes on in another thread."""
        if not _takes_long(submission):
            return self._made(submission)
        self._queue.append(submission)
        self._start_some()
        return None

    def done(self, prepared: Prepared) -> bool:
        """Note that something was handed back; False where it had been given up, or its call is over: then nobody wants it."""
        number = prepared.submission.sequence
        self._threads.pop(number, None)
        wanted = self._apart.pop(number, None) is not None
        self._start_some()
        return wanted

    def drop(self, number: int) -> bool:
        """The call is over; its thread, where it has one, ends by itself. True where the call was being prepared here."""
        queued = len(self._queue)
        self._queue = [submission for submission in self._queue if submission.sequence != number]
        if number not in self._apart:
            return len(self._queue) < queued
        del self._apart[number]
        if number in self._threads:  # one that was refused has none
            self._abandoned.append(self._threads.pop(number))
        self._start_some()
        return True

    def pending(self) -> list[Submission]:
        """The calls that are being prepared, or wait for it."""
        return [submission for submission, _ in self._apart.values()] + self._queue

    def late(self, now: float) -> list[tuple[int, TarsError]]:
        """Give up what takes too long: the calls' numbers and errors."""
        ended: list[tuple[int, TarsError]] = []
        for number, (submission, began) in list(self._apart.items()):
            if now - began > GIVE_UP_SECONDS:
                self.drop(number)
                ended.append((number, _gave_up(submission)))
        return ended

    def _start_some(self) -> None:
        self._abandoned = [thread for thread in self._abandoned if thread.is_alive()]
        while self._queue and len(self._apart) < APART_MOST:
            submission = self._queue.pop(0)
            self._apart[submission.sequence] = (submission, time.monotonic())
            if len(self._abandoned) >= ABANDONED_MOST:
                error: TarsError | None = Overloaded(
                    "This replica is still busy with grammars or texts that it gave up. Send the call again later, "
                    "or without a grammar.",
                    retry_after_ms=10_000,
                )
            else:
                error = self._start(submission)
            if error is not None:
                # Through the same door as all others: the caller of `prepare` was told that it goes on elsewhere.
                self._hand_back(Prepared(submission, error=error))

    def _start(self, submission: Submission) -> TarsError | None:
        """Prepare it in a thread; why there is none."""
        thread = threading.Thread(
            target=lambda: self._hand_back(self._made(submission)),
            name=f"prepare {submission.sequence}",
            daemon=True,
        )
        # The stack's size is the process's setting, and only the engine thread starts threads once the model is loaded.
        before = threading.stack_size(STACK_BYTES)
        try:
            thread.start()
        except RuntimeError:  # no more threads, or no address space for so large a stack (ulimit -v)
            traceback.print_exc()
            return Overloaded(
                "The system gives this replica no further thread to prepare the call in. Send it again later, or a shorter text without "
                "a grammar.",
                retry_after_ms=1000,
            )
        finally:
            threading.stack_size(before)
        self._threads[submission.sequence] = thread
        return None

    def _made(self, submission: Submission) -> Prepared:
        prepared = Prepared(submission)
        work = submission.work
        try:
            if isinstance(work, TokenizeParams):
                prepared.tokens = self._model.tokenize(encode(work.text), add_special=work.add_special)
            elif isinstance(work, ChatParams | CompleteParams):
                self._prepare_generation(work, prepared)
        except TarsError as error:
            prepared.error = error
        except Exception:  # noqa: BLE001  # whatever a caller's schema or template provokes must not take everybody's worker along
            traceback.print_exc()
            prepared.error = InternalError(
                "The call could not be prepared; the worker's lines in the node's log say why."
            )
        return prepared

    def _prepare_generation(self, work: ChatParams | CompleteParams, prepared: Prepared) -> None:
        from tars.workers.llama_sampling import compile_grammar

        if isinstance(work, ChatParams):
            text = self._template.prompt(work)
            prepared.prompt_end = text[-PROMPT_END:]
        else:
            text = work.prompt
        prepared.tokens = self._tokens(text, chat=isinstance(work, ChatParams))
        constrained: ChatParams | CompleteParams = work
        if isinstance(work, ChatParams):
            constraint = self._answers.constraint(work, text, own=self._template.own_tools)
            constrained = work if constraint is None else work.model_copy(update={"grammar": constraint})
        prepared.grammar = compile_grammar(self._model, constrained)

    def _tokens(self, text: str, *, chat: bool) -> list[int]:
        encoded = encode(text)
        fewest = self._model.fewest_tokens(encoded)
        if fewest >= self._context:
            raise _too_long(fewest, self._context, "at least ")
        bos_text = self._model.special_text(self._model.bos)
        # A template that spells the beginning-of-sequence token out must not get a second one.
        add_special = not (chat and bos_text and text.startswith(bos_text))
        tokens = self._model.tokenize(encoded, add_special=add_special)
        if not tokens and self._model.bos >= 0:
            tokens = [self._model.bos]
        if not tokens:
            raise InvalidParams("The prompt is empty, and this model has no token to begin with. Give it some text.")
        if len(tokens) >= self._context:
            raise _too_long(len(tokens), self._context, "")
        return tokens


def _takes_long(submission: Submission) -> bool:
    work = submission.work
    if isinstance(work, TokenizeParams):
        return len(work.text) > LONG_TEXT
    if isinstance(work, CompleteParams):
        return len(work.prompt) > LONG_TEXT or work.grammar is not None or work.json_schema is not None
    if isinstance(work, ChatParams):
        constrained = work.grammar is not None or work.json_schema is not None or bool(work.tools)
        return constrained or sum(_characters(message) for message in work.messages) > LONG_TEXT
    return False


def _characters(message: ChatMessage) -> int:
    return len(message.content) + len(message.reasoning or "") + sum(len(call.arguments) for call in message.tool_calls)


def _gave_up(submission: Submission) -> TarsError:
    work = submission.work
    if isinstance(work, ChatParams | CompleteParams) and (work.grammar is not None or work.json_schema is not None):
        return BadGrammar(
            f"The grammar or JSON schema took more than {GIVE_UP_SECONDS:g} s to compile and was given up. Make it simpler: fewer "
            "alternatives that refer to each other, smaller repetition counts."
        )
    return InvalidParams(
        f"The text took more than {GIVE_UP_SECONDS:g} s to tokenize and was given up. Send a shorter one."
    )


def encode(text: str) -> bytes:
    """UTF-8; half of a surrogate pair becomes a question mark instead of an exception."""
    return text.encode("utf-8", "replace")


def _too_long(tokens: int, context: int, at_least: str) -> PromptTooLong:
    return PromptTooLong(
        f"The prompt has {at_least}{tokens} tokens and the context {context}, which has to hold the answer too. "
        "Shorten it, or deploy the model with a larger context.",
        details={"prompt_tokens": tokens, "context": context},
    )
