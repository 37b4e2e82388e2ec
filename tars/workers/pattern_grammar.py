"""A JSON schema's `pattern` as the inside of a GBNF rule.

Law of this file: pure; text in, text out. What comes out matches a subset of what the pattern matches, which is all that generating needs:
the whole string is the match (a pattern may be searched for anywhere, so its match alone is accepted too), and `.` and `[^...]` leave out
what JSON has to escape. Refused, by name, is what a context-free grammar cannot say: look-around, back-references, word borders.

GBNF: llama.cpp, `grammars/README.md`. Patterns: ECMA-262, the part that JSON Schema recommends (2020-12, section 6.4).
"""

from __future__ import annotations

import json

from tars.errors import BadGrammar

REPETITION_MOST = 1_000
"""Largest repeat count: half of llama.cpp's own bound, which counts what nested repetitions multiply to."""

PATTERN_MOST = 2_000
"""Characters of a pattern; honest ones have less than a hundred."""

NESTING_MOST = 50
"""Groups within groups: this parser recurses once per group."""

CLASSES = {"d": "0-9", "w": "0-9A-Za-z_", "s": " "}
"""`\\s` only as a blank: tabs and line ends would have to be escaped in JSON."""

NOT_IN_STRINGS = r"\"\\\x00-\x1F"
"""What JSON does not allow raw inside a string, as the inside of a GBNF class."""

ESCAPED = {"t": "\t", "n": "\n", "r": "\r", "f": "\f", "v": "\v", "0": "\0"}


def literal(text: str) -> str:
    """`text` as a GBNF literal."""
    return '"' + "".join(_character(one, keep=" '-^[]") for one in text) + '"'


def _character(one: str, keep: str = "") -> str:
    return one if one.isalnum() or one in keep else f"\\U{ord(one):08X}"


def _in_json(one: str) -> str:
    """A character of the string's value as it stands in JSON text, as a GBNF literal."""
    return literal(json.dumps(one, ensure_ascii=False)[1:-1])


def pattern_rule(pattern: str) -> str:
    """A GBNF expression for the inside of a JSON string that `pattern` matches. Raises `BadGrammar`."""
    if len(pattern) > PATTERN_MOST:
        raise BadGrammar(f"A pattern in the JSON schema has more than {PATTERN_MOST} characters. Make it shorter.")
    body = pattern.removeprefix("^")
    if body.endswith("$") and not body.endswith("\\$"):
        body = body[:-1]
    parser = _Parser(body)
    rule = parser.alternatives(0)
    if parser.at < len(body):
        raise _refused("a bracket that nothing opened")
    return rule


def _refused(what: str) -> BadGrammar:
    return BadGrammar(
        f"A pattern in the JSON schema holds {what}, which cannot be turned into a grammar. Supported: characters, classes, groups, "
        "alternatives and repetitions."
    )


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def _peek(self) -> str:
        return self.text[self.at : self.at + 1]

    def _next(self) -> str:
        if self.at >= len(self.text):
            raise _refused("an unfinished part")
        self.at += 1
        return self.text[self.at - 1]

    def alternatives(self, depth: int) -> str:
        if depth > NESTING_MOST:
            raise _refused(f"more than {NESTING_MOST} groups within groups")
        branches = [self._sequence(depth)]
        while self._peek() == "|":
            self.at += 1
            branches.append(self._sequence(depth))
        return " | ".join(branches)

    def _sequence(self, depth: int) -> str:
        parts: list[str] = []
        while self._peek() not in ("", "|", ")"):
            parts.append(self._atom(depth) + self._quantifier())
        return " ".join(parts) or '""'

    def _atom(self, depth: int) -> str:
        one = self._next()
        if one == "(":
            if self._peek() == "?":
                if self.text[self.at : self.at + 2] != "?:":
                    raise _refused("a look-around or a named group")
                self.at += 2
            inner = self.alternatives(depth + 1)
            if self._next() != ")":
                raise _refused("a group without its end")
            return f"({inner})"
        if one == "[":
            return self._class()
        if one == ".":
            return f"[^{NOT_IN_STRINGS}]"
        if one == "\\":
            return self._escape()
        if one in "*+?{":
            raise _refused("a repetition of nothing")
        if one in "^$":
            raise _refused("^ or $ in its middle")
        return _in_json(one)

    def _escape(self) -> str:
        one = self._next()
        if one in CLASSES:
            return f"[{CLASSES[one]}]"
        if one.lower() in CLASSES:
            return f"[^{CLASSES[one.lower()]}{NOT_IN_STRINGS}]"
        return _in_json(self._escaped_character(one))

    def _escaped_character(self, one: str) -> str:
        if one in ESCAPED:
            return ESCAPED[one]
        if one in "xu":
            digits = "".join(self._next() for _ in range(2 if one == "x" else 4))
            if not all(digit in "0123456789abcdefABCDEF" for digit in digits) or 0xD800 <= int(digits, 16) <= 0xDFFF:
                raise _refused("an escape that is no character")
            return chr(int(digits, 16))
        if one.isalnum():
            raise _refused(f"the escape \\{one}")
        return one

    def _class(self) -> str:
        negated = self._peek() == "^"
        self.at += negated
        inside = ""
        while (one := self._next()) != "]":
            if one == "\\":
                letter = self._next()
                if letter in CLASSES:
                    inside += CLASSES[letter]
                    continue
                if letter.lower() in CLASSES:
                    raise _refused(f"\\{letter} inside a class")
                one = self._escaped_character(letter)
            if self._peek() == "-" and self.text[self.at + 1 : self.at + 2] not in ("]", ""):
                self.at += 1
                last = self._next()
                last = self._escaped_character(self._next()) if last == "\\" else last
                if last < one:
                    raise _refused("a range that runs backwards")
                inside += f"{_character(one)}-{_character(last)}"
            else:
                inside += _character(one)
            if not negated and _needs_escape(one):
                raise _refused("a quote, a backslash or a control character inside a class")
        if not inside:
            raise _refused("an empty class")
        return f"[^{inside}{NOT_IN_STRINGS}]" if negated else f"[{inside}]"

    def _quantifier(self) -> str:
        one = self._peek()
        if one in ("*", "+", "?"):
            self.at += 1
            text = one
        elif one == "{":
            end = self.text.find("}", self.at)
            text = self.text[self.at : end + 1].replace(" ", "")
            counts = text[1:-1].split(",")
            if end < 0 or len(counts) > 2 or not counts[0].isdigit() or not all(not c or c.isdigit() for c in counts):
                raise _refused("a repetition that is none")
            if any(len(count) > 6 or int(count or 0) > REPETITION_MOST for count in counts):
                raise _refused(f"a repetition of more than {REPETITION_MOST} times")
            self.at = end + 1
        else:
            return ""
        if self._peek() == "?":
            self.at += 1  # lazy: the same language
        return text


def _needs_escape(one: str) -> bool:
    return one in '"\\' or one < " "
