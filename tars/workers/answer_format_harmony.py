"""Reading an answer in gpt-oss's harmony format: messages in channels.

Law of this file: as `answer_format_stream`'s. `analysis` is what the model thinks, `final` and what `commentary` says to nobody is the
answer's text, `commentary` to `functions.name` is a call. A message to anybody else comes out as it was written.
Format: https://github.com/openai/harmony, docs/format.md.
"""

from __future__ import annotations

import re
from typing import Literal

from tars.workers.answer_format_calls import Tools, WrittenCall, json_object
from tars.workers.answer_format_stream import HEADER_MOST, AnswerStream, first_mark, held_from

_MESSAGE = "<|message|>"
_START = "<|start|>"
_ENDS = ("<|end|>", "<|return|>", "<|call|>")

HARMONY_MARKS = frozenset({_START, _MESSAGE, "<|channel|>", "<|constrain|>", *_ENDS})

_OPENINGS = ("<|channel|>", _START, _MESSAGE, "<|constrain|>", "to=")
"""What a header may go on with after `<|start|>assistant`."""

_CHANNEL = re.compile(r"<\|channel\|>\s*([a-z]+)")
_RECIPIENT = re.compile(r"\bto=([^\s<]+)")

Kind = Literal["text", "reasoning", "call", "raw"]


class HarmonyStream(AnswerStream):
    """One answer; `prompt_end` says in which message it begins."""

    def __init__(self, tools: Tools, prompt_end: str) -> None:
        super().__init__(tools)
        opening = prompt_end.rpartition(_START)[2] if _START in prompt_end else ""
        header, message, inside = opening.partition(_MESSAGE)
        self._kind: Kind | None = None
        """Of the message that is being read; None within a header."""
        self._name = ""
        self._header = ""
        """The call's header as the model wrote it."""
        self._fresh = False
        """Nothing of this message came out yet."""
        if message and first_mark(inside, _ENDS) is None:
            self._open_message(header, "")
            header = ""
        self._given = header
        """What the prompt says of the first header."""
        self._closed = False
        """A message has ended: blanks between two of them are nobody's text."""

    def _open_message(self, header: str, written: str) -> None:
        channel, recipient = _CHANNEL.search(header), _RECIPIENT.search(header)
        self._fresh = True
        if recipient is None:
            self._kind = "reasoning" if channel is not None and channel[1] == "analysis" else "text"
            return
        self._name = recipient[1].removeprefix("functions.")
        self._header = written
        self._kind = "call" if self._name in self._tools else "raw"
        if self._kind == "raw":
            self._say(written)

    def _step(self) -> bool:
        if self._kind is None:
            return self._read_header()
        found = first_mark(self._buffer, (*_ENDS, _START))
        if self._kind == "call":
            if found is not None:
                self._end_call(self._take(found[0]), found[1])
                self._close_message(found[1])
            return found is not None
        sure = found[0] if found else held_from(self._buffer, (*_ENDS, _START))
        if sure:
            self._say(self._take(sure))
        if not found:
            return False
        if self._kind == "raw" and found[1] != _START:
            self._say(found[1])
        self._close_message(found[1])
        return True

    def _close_message(self, mark: str) -> None:
        if mark != _START:
            self._take(len(mark))
        self._kind, self._given, self._closed = None, "", True

    def _read_header(self) -> bool:
        begun = self._buffer.lstrip()
        if not begun:
            return False
        if not any(begun.startswith(opening) for opening in _OPENINGS):
            if any(opening.startswith(begun) for opening in _OPENINGS):
                return False
            return self._plain()
        at = self._buffer.find(_MESSAGE)
        if at < 0:
            return len(self._buffer) >= HEADER_MOST + len(_MESSAGE) and self._plain()
        if at > HEADER_MOST:
            return self._plain()
        header = self._take(at + len(_MESSAGE))
        self._open_message(self._given + header, header)
        return True

    def _plain(self) -> bool:
        """No header: whatever stands here is the answer's text."""
        self._kind, self._fresh = "text", False
        # A start mark that begins no header would be found again at once.
        if self._buffer.lstrip().startswith(_START):
            self._say(self._take(self._buffer.index(_START) + len(_START)))
        return True

    def _say(self, text: str) -> None:
        into = self._reasoning if self._kind == "reasoning" else self._text
        if self._fresh and into:
            into.append("\n\n")
        self._fresh = False
        into.append(text)

    def _end_call(self, body: str, mark: str) -> None:
        arguments = json_object(body)
        if arguments is None:
            self._kind = "raw"
            self._say(self._header + body + ("" if mark == _START else mark))
        else:
            self._called([WrittenCall(self._name, arguments)])

    def _end(self) -> None:
        if self._kind == "call":
            self._end_call(self._buffer, "")
        elif self._buffer and (self._kind is not None or not self._closed or self._buffer.strip()):
            self._kind = self._kind or "raw"
            self._say(self._buffer)
