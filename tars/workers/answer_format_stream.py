"""Reading a model's answer as it comes: its text, its thoughts, its calls of tools.

Law of this file: pure. What came out after a push is a function of all text pushed so far, never of how it was cut into pieces: an
answer that goes on elsewhere is replayed and then continues exactly. Held back is only what may yet turn out to be a mark, the blanks
before it, and a call until it is whole: a call that cannot be read comes out as the text that it is, so nothing is ever lost.
"""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from tars.messages.inference import ToolCall, ToolCallDelta
from tars.workers.answer_format_calls import CallBlock, JsonEnd, Tools, WrittenCall, json_calls

BARE = CallBlock("", None, json_calls)
"""A call without any mark."""

_BARE_OPENINGS = tuple('{"' + key + '":' for key in ("name", "type", "function", "parameters", "arguments"))

_HEADER_MARKS = ("[CALL_ID]", "[ARGS]")
_HEADER_TEXT = re.compile(r"[A-Za-z0-9_.\-\s]*")

HEADER_MOST = 400
"""Characters between a mark and the JSON of its call, or of a message's header: a tool's name has at most 64."""


@dataclass(frozen=True, slots=True)
class AnswerPiece:
    """What has become certain."""

    text: str = ""
    reasoning: str = ""
    tool_calls: list[ToolCallDelta] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.text or self.reasoning or self.tool_calls)


@dataclass(frozen=True, slots=True)
class Thinking:
    """The marks around a model's thoughts. `switch`: the template itself can be told not to let it think."""

    open: str
    close: str
    switch: bool = False

    def opened_by(self, prompt_end: str) -> bool:
        """True where the prompt has begun the thoughts."""
        return prompt_end.rstrip().endswith(self.open)

    def closed_by(self, prompt_end: str) -> bool:
        """True where the prompt has ended the thoughts."""
        return prompt_end.rstrip().endswith(self.close)


class AnswerStream(ABC):
    """One answer. `push` takes its text as it comes, `finish` gives what was held back; then the properties have all of it."""

    def __init__(self, tools: Tools) -> None:
        self._tools = tools
        self._buffer = ""
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[ToolCall] = []
        self._taken = (0, 0, 0)

    @property
    def text(self) -> str:
        """The answer's text so far."""
        return "".join(self._text)

    @property
    def reasoning(self) -> str | None:
        """The thoughts so far; None where there are none."""
        return "".join(self._reasoning) or None

    @property
    def tool_calls(self) -> list[ToolCall]:
        """The calls so far."""
        return list(self._calls)

    def push(self, text: str) -> AnswerPiece:
        """Take more text; what it makes certain."""
        self._buffer += text
        while self._step():
            pass
        return self._piece()

    def finish(self) -> AnswerPiece:
        """The answer is over: everything that was held back."""
        self._end()
        self._buffer = ""
        return self._piece()

    @abstractmethod
    def _step(self) -> bool:
        """Take what is certain from the buffer; False where nothing more is."""

    @abstractmethod
    def _end(self) -> None:
        """Take all of the buffer."""

    def _take(self, count: int) -> str:
        taken, self._buffer = self._buffer[:count], self._buffer[count:]
        return taken

    def _called(self, calls: Iterable[WrittenCall]) -> None:
        for call in calls:
            own = hashlib.sha256(f"{call.name}\0{call.arguments}".encode("utf-8", "surrogatepass")).hexdigest()
            number = f"call_{len(self._calls)}_{own[:16]}"
            self._calls.append(ToolCall(id=number, name=call.name, arguments=call.arguments))

    def _piece(self) -> AnswerPiece:
        text, reasoning, calls = self._taken
        self._taken = (len(self._text), len(self._reasoning), len(self._calls))
        return AnswerPiece(
            "".join(self._text[text:]),
            "".join(self._reasoning[reasoning:]),
            [
                ToolCallDelta(index=index, id=call.id, name=call.name, arguments=call.arguments)
                for index, call in enumerate(self._calls[calls:], calls)
            ],
        )


def held_from(text: str, marks: Sequence[str]) -> int:
    """Where the longest end of `text` begins that may be a mark's beginning; `len(text)` where there is none."""
    longest = max((len(mark) for mark in marks), default=0)
    for start in range(max(0, len(text) - longest + 1), len(text)):
        if any(mark.startswith(text[start:]) for mark in marks):
            return start
    return len(text)


def first_mark(text: str, marks: Iterable[str]) -> tuple[int, str] | None:
    """The leftmost mark in `text`, the longest of those that begin there."""
    found = [(at, -len(mark), mark) for mark in marks if (at := text.find(mark)) >= 0]
    return (min(found)[0], min(found)[2]) if found else None


State = Literal["start", "thinking", "text", "call"]


class MarkedStream(AnswerStream):
    """Answers whose thoughts and calls stand between marks. `bare`: a call may also be the JSON alone that the answer begins with."""

    def __init__(
        self,
        tools: Tools,
        blocks: Sequence[CallBlock],
        thinking: Thinking | None,
        *,
        opened: bool = False,
        may_open: bool = False,
        bare: bool = False,
    ) -> None:
        super().__init__(tools)
        self._blocks = {block.open: block for block in blocks} if tools else {}
        self._marks = tuple(self._blocks)
        self._thinking = thinking
        self._bare = bare and bool(tools)
        self._state: State = "thinking" if opened else "start" if may_open else "text"
        self._skip_blanks = opened
        """Blanks before the next text belong to a mark."""
        self._bare_here = self._bare
        self._after_call = False
        self._block = BARE
        self._body = 0
        """Where the call's body begins in the buffer."""
        self._json: JsonEnd | None = None

    def _step(self) -> bool:
        if self._skip_blanks:
            self._buffer = self._buffer.lstrip()
            if not self._buffer:
                return False
            self._skip_blanks = False
        if self._state == "start":
            return self._start()
        if self._state == "thinking":
            return self._think()
        return self._read_call() if self._state == "call" else self._write()

    def _start(self) -> bool:
        assert self._thinking is not None
        begun = self._buffer.lstrip()
        if begun.startswith(self._thinking.open):
            self._take(len(self._buffer) - len(begun) + len(self._thinking.open))
            self._state, self._skip_blanks = "thinking", True
        elif self._thinking.open.startswith(begun):
            return False
        else:
            self._state = "text"
        return True

    def _think(self) -> bool:
        assert self._thinking is not None
        close = self._thinking.close
        at = self._buffer.find(close)
        if at >= 0:
            self._reasoning.append(self._take(at).rstrip())
            self._take(len(close))
            self._state, self._skip_blanks = "text", True
            return True
        sure = len(self._buffer[: held_from(self._buffer, (close,))].rstrip())
        if sure:
            self._reasoning.append(self._take(sure))
        return False

    def _write(self) -> bool:
        if self._bare_here and (going_on := self._bare_call()) is not None:
            return going_on
        found = first_mark(self._buffer, self._marks)
        sure = found[0] if found else held_from(self._buffer, self._marks)
        if self._marks:
            sure = len(self._buffer[:sure].rstrip())
        if sure:
            self._text.append(self._take(sure))
            self._after_call = False
        if not found:
            return False
        self._begin_call(self._blocks[found[1]], found[0] - sure + len(found[1]))
        return True

    def _bare_call(self) -> bool | None:
        """A call without marks may begin here: True it does, False wait, None it does not."""
        begun = self._buffer.lstrip(" \t\r\n;," if self._after_call else " \t\r\n")
        dense = "".join(begun.split())
        if any(dense.startswith(opening) for opening in _BARE_OPENINGS):
            self._begin_call(BARE, len(self._buffer) - len(begun))
            return True
        if any(opening.startswith(dense) for opening in _BARE_OPENINGS):
            return False
        self._bare_here = False
        return None

    def _begin_call(self, block: CallBlock, body: int) -> None:
        self._state, self._block, self._body, self._json = "call", block, body, None

    def _read_call(self) -> bool:
        end = self._call_end()
        if end is None:
            return False
        if end < 0:
            # No call after all: its mark is text, and what follows is looked at anew.
            self._no_call(self._body)
        elif (calls := self._block.read(self._inside(end), self._tools)) is None:
            self._no_call(end)
        else:
            self._take(end)
            self._called(calls)
            self._after_call = True
            self._bare_here = self._bare and self._block in (BARE, self._blocks.get("<|python_tag|>"))
        self._state = "text"
        return True

    def _no_call(self, count: int) -> None:
        self._bare_here = False
        if count:
            self._text.append(self._take(count))
            self._after_call = False

    def _inside(self, end: int) -> str:
        return self._buffer[self._body : end - len(self._block.close or "")]

    def _call_end(self) -> int | None:
        """Index in the buffer after the block, -1 where this cannot be one, None while more has to come."""
        close = self._block.close
        if self._json is None:
            start = self._value_start()
            if start is None or start < 0:
                return start
            if close is not None and self._buffer[start] not in "{[":
                at = self._buffer.find(close, self._body)
                return at + len(close) if at >= 0 else None
            self._json = JsonEnd(start)
        while True:
            end = self._json.find(self._buffer)
            if end is None or end < 0 or close is None:
                return end
            rest = self._buffer[end:].lstrip(" \t\r\n,;")
            if rest.startswith(close):
                return len(self._buffer) - len(rest) + len(close)
            if close.startswith(rest):
                return None
            if rest[0] not in "{[":
                return -1
            self._json = JsonEnd(len(self._buffer) - len(rest))

    def _value_start(self) -> int | None:
        """Where the block's content begins; as `_call_end` where it cannot be one or is not there yet."""
        inside = self._buffer[self._body :].lstrip()
        if not inside:
            return None
        at = len(self._buffer) - len(inside)
        if self._block.named:
            return self._named_value_start(at, inside)
        if inside[0] in "{[":
            return at
        begins = (*self._block.begins, *(self._tools if self._block.by_name else ()))
        if any(inside.startswith(beginning) for beginning in begins):
            return at
        return None if any(beginning.startswith(inside) for beginning in begins) else -1

    def _named_value_start(self, at: int, inside: str) -> int | None:
        if inside[0] == "[" and not any(mark.startswith(inside[: len(mark)]) for mark in _HEADER_MARKS):
            return at
        header, brace, _ = inside.partition("{")
        rest = header
        for mark in _HEADER_MARKS:
            rest = rest.replace(mark, "")
        if not brace:
            rest = rest[: held_from(rest, _HEADER_MARKS)]
        if len(header) > HEADER_MOST or not _HEADER_TEXT.fullmatch(rest):
            return -1
        return at + len(header) if brace else None

    def _end(self) -> None:
        if self._state == "thinking":
            self._reasoning.append(self._buffer)
        elif self._state == "call":
            calls = self._block.read(self._buffer[self._body :], self._tools)
            if calls is None:
                self._text.append(self._buffer)
            else:
                self._called(calls)
        elif not (self._after_call and not self._buffer.strip()):
            self._text.append(self._buffer)
