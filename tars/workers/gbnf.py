"""GBNF, llama.cpp's grammar notation, read into numbered symbols and checked.

Law of this file: pure; a text in, a `Grammar` out, or `BadGrammar` that names the line and the rule. What may multiply is bounded here
(`SYMBOLS_MOST`), and what could never end is refused (left recursion, through rules that may be empty too). Syntax: llama.cpp,
`grammars/README.md` and `src/llama-grammar.cpp`; without its `<token>` elements, which bind a grammar to one model's vocabulary.

Why not llama.cpp's own parser: a chain of rules with two alternatives each keeps its search for left recursion busy for ever, it misses
left recursion behind a rule that is empty only through another one (and then fills the memory), and `"long text"{2000}` is copied out.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from dataclasses import dataclass
from typing import NoReturn

from tars.errors import BadGrammar

NESTING_MOST = 200
"""Brackets within brackets: this parser recurses, twice a bracket, and Python stops at 1,000."""

SYMBOLS_MOST = 500_000
"""Characters, classes and references after repetitions are written out: twice what 262,144 characters of literals hold."""

END = -1
"""What stands behind an alternative's last symbol in `Grammar.symbols`."""

LAST_CHARACTER = 0x10FFFF

Ranges = tuple[tuple[int, int], ...]
"""Code points, first and last of each range."""

_SPACE = re.compile(r"(?:[ \t]|#[^\r\n]*)*")
_SPACE_AND_LINES = re.compile(r"(?:[ \t\r\n]|#[^\r\n]*)*")
_NAME = re.compile(r"[a-zA-Z0-9-]+")
_COUNTS = re.compile(r"\{\s*([0-9]{1,9})\s*(?:(,)\s*([0-9]{1,9})?\s*)?\}")
_ESCAPES = {"t": "\t", "r": "\r", "n": "\n", "\\": "\\", '"': '"', "[": "[", "]": "]", "-": "-"}
_HEXADECIMAL = {"x": 2, "u": 4, "U": 8}


@dataclass(frozen=True, slots=True)
class Grammar:
    """Positions are indices of `symbols`; a symbol is `END`, a rule's number, or -2 - a terminal's number."""

    symbols: list[int]
    starts: list[list[int]]
    """Of each rule: where its alternatives begin."""
    nullable: list[bool]
    rank: list[int]
    """Of each rule: smaller than that of every rule that it may begin with."""
    root: int
    borders: list[int]
    """Characters between two of these (ascending, the first is 0) are all alike to this grammar: a class of characters."""
    terminal_edges: list[list[int]]
    """Of each terminal: ascending classes at which it begins, ends, begins ... to match (a set would be as long as the alphabet)."""

    def character_class(self, character: str) -> int:
        """Which class of characters this one belongs to."""
        return bisect_right(self.borders, ord(character)) - 1


def parse(text: str) -> Grammar:
    """Read and check a grammar; its texts are those of rule `root`. Raises `BadGrammar`."""
    if not text.strip() or "\0" in text:
        raise BadGrammar("The grammar is empty, or holds a NUL character.")
    parser = _Parser(text)
    parser.read()
    return _checked(parser)


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.size = 0
        self.numbers: dict[str, int] = {}
        self.names: list[str] = []
        self.rules: list[list[list[int]] | None] = []
        """Alternatives of each rule; a symbol as in `Grammar`."""
        self.terminals: dict[Ranges, int] = {}

    def read(self) -> None:
        self._skip(lines=True)
        while self.at < len(self.text):
            name = self._name("Here a rule has to begin: name ::= ...")
            number = self._number(name)
            self._skip(lines=False)
            if not self.text.startswith("::=", self.at):
                self._fail(f"After the name {name[:40]} has to stand ::=")
            self.at += 3
            self._skip(lines=True)
            self.rules[number] = self._alternatives(name, 0)
            if self.at < len(self.text) and self.text[self.at] not in "\r\n":
                self._fail(f"In rule {name[:40]}: this character belongs to nothing")
            self._skip(lines=True)

    def _fail(self, why: str) -> NoReturn:
        line = self.text.count("\n", 0, self.at) + 1
        raise BadGrammar(f"The grammar could not be compiled, line {line}: {why}.")

    def _skip(self, *, lines: bool) -> None:
        found = (_SPACE_AND_LINES if lines else _SPACE).match(self.text, self.at)
        assert found is not None
        self.at = found.end()

    def _name(self, otherwise: str) -> str:
        found = _NAME.match(self.text, self.at)
        if found is None:
            self._fail(otherwise)
        self.at = found.end()
        return found.group()

    def _number(self, name: str) -> int:
        if name not in self.numbers:
            self.numbers[name] = self._new_rule(name)
        return self.numbers[name]

    def _new_rule(self, name: str, alternatives: list[list[int]] | None = None) -> int:
        self.names.append(name)
        self.rules.append(alternatives)
        return len(self.names) - 1

    def _grow(self, symbols: int) -> None:
        self.size += symbols
        if self.size > SYMBOLS_MOST:
            self._fail(
                f"Written out, its repetitions make more than {SYMBOLS_MOST} characters and references; repeat less"
            )

    def _alternatives(self, name: str, depth: int) -> list[list[int]]:
        if depth > NESTING_MOST:
            self._fail(
                f"The grammar nests brackets more than {NESTING_MOST} deep. Give the inner parts rules of their own"
            )
        alternatives = [self._sequence(name, depth)]
        while self.text.startswith("|", self.at):
            self.at += 1
            self._skip(lines=True)
            alternatives.append(self._sequence(name, depth))
        return alternatives

    def _sequence(self, name: str, depth: int) -> list[int]:
        symbols: list[int] = []
        last: list[int] | None = None
        while self.at < len(self.text):
            one = self.text[self.at]
            if one == '"':
                last = self._literal()
            elif one == "[":
                last = [self._class()]
            elif one == ".":
                self.at += 1
                last = [self._terminal(((0, LAST_CHARACTER),))]
            elif one == "(":
                self.at += 1
                self._skip(lines=True)
                last = [self._new_rule(name, self._alternatives(name, depth + 1))]
                if not self.text.startswith(")", self.at):
                    self._fail("An opening bracket has no closing one")
                self.at += 1
            elif one in "*+?{":
                least, most = self._counts()
                if last is None:
                    self._fail(f"There is nothing that {one} could repeat")
                del symbols[len(symbols) - len(last) :]
                last = self._repeated(name, last, least, most)
            elif _NAME.match(one):
                last = [self._number(self._name(""))]
            elif one in "<!":
                self._fail("Tokens (<name>, !<name>) are not supported; write the text itself, in quotes")
            else:
                break
            self._grow(len(last))
            symbols += last
            self._skip(lines=depth > 0)
        return symbols

    def _repeated(self, name: str, what: list[int], least: int, most: int | None) -> list[int]:
        if most is not None and most < least:
            self._fail(f"A repetition of at least {least} and at most {most} times")
        if len(what) != 1:
            # So that a long literal is not copied.
            what = [self._new_rule(name, [what])]
        self._grow(least + 3 * (1 if most is None else most - least))
        symbols = what * least
        if most is None:
            again = self._new_rule(name)
            self.rules[again] = [[*what, again], []]
            return [*symbols, again]
        optional: list[int] = []
        for _ in range(most - least):
            optional = [self._new_rule(name, [[*what, *optional], []])]
        return symbols + optional

    def _counts(self) -> tuple[int, int | None]:
        one = self.text[self.at]
        if one != "{":
            self.at += 1
            return {"*": (0, None), "+": (1, None), "?": (0, 1)}[one]
        found = _COUNTS.match(self.text, self.at)
        if found is None:
            self._fail("A repetition is written {3}, {3,} or {3,5}")
        self.at = found.end()
        least = int(found.group(1))
        if found.group(3) is not None:
            return least, int(found.group(3))
        return least, None if found.group(2) else least

    def _terminal(self, ranges: Ranges) -> int:
        return -2 - self.terminals.setdefault(ranges, len(self.terminals))

    def _literal(self) -> list[int]:
        self.at += 1
        symbols = []
        while not self.text.startswith('"', self.at):
            code = self._character('A text has no closing "')
            symbols.append(self._terminal(((code, code),)))
        self.at += 1
        return symbols

    def _class(self) -> int:
        self.at += 1
        negated = self.text.startswith("^", self.at)
        self.at += negated
        ranges: list[tuple[int, int]] = []
        while not self.text.startswith("]", self.at):
            first = last = self._character("A class of characters has no closing ]")
            if self.text.startswith("-", self.at) and not self.text.startswith("-]", self.at):
                self.at += 1
                last = self._character("A class of characters has no closing ]")
            ranges.append((first, last))
        self.at += 1
        merged = _merged(ranges)
        if negated:
            merged = _without(merged)
        if not merged:
            self._fail("A class of characters matches nothing")
        return self._terminal(merged)

    def _character(self, unfinished: str) -> int:
        one = self.text[self.at : self.at + 1]
        if not one:
            self._fail(unfinished)
        self.at += 1
        if one != "\\":
            return ord(one)
        kind = self.text[self.at : self.at + 1]
        self.at += 1
        if kind in _HEXADECIMAL:
            digits = self.text[self.at : self.at + _HEXADECIMAL[kind]]
            if not re.fullmatch(r"[0-9a-fA-F]+", digits) or len(digits) < _HEXADECIMAL[kind]:
                self._fail(f"\\{kind} needs {_HEXADECIMAL[kind]} hexadecimal digits")
            self.at += len(digits)
            if int(digits, 16) > LAST_CHARACTER:
                self._fail(f"\\{kind}{digits} is no character")
            return int(digits, 16)
        if kind not in _ESCAPES or not kind:
            self._fail(f'The escape \\{kind} is not known; there are \\x \\u \\U \\t \\r \\n \\\\ \\" \\[ \\] \\-')
        return ord(_ESCAPES[kind])


def _merged(ranges: list[tuple[int, int]]) -> Ranges:
    """Ascending and apart; a range that runs backwards holds nothing."""
    merged: list[tuple[int, int]] = []
    for first, last in sorted(one for one in ranges if one[0] <= one[1]):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(last, merged[-1][1]))
        else:
            merged.append((first, last))
    return tuple(merged)


def _without(ranges: Ranges) -> Ranges:
    """Every character that is in none of them."""
    found = []
    at = 0
    for first, last in ranges:
        if at < first:
            found.append((at, first - 1))
        at = last + 1
    return (*found, (at, LAST_CHARACTER)) if at <= LAST_CHARACTER else tuple(found)


def _checked(parser: _Parser) -> Grammar:
    rules: list[list[list[int]]] = []
    for number, alternatives in enumerate(parser.rules):
        if alternatives is None:
            raise BadGrammar(f"The grammar could not be compiled: the rule {parser.names[number][:40]} does not exist.")
        rules.append(alternatives)
    if "root" not in parser.numbers:
        raise BadGrammar("The grammar could not be compiled: it has no rule root, with which every text begins.")
    ending = _closure(rules, terminals=True)
    if not ending[parser.numbers["root"]]:
        raise BadGrammar(
            "The grammar, or the JSON schema behind it, has no text that ends: every way through it needs the same rule again. "
            "Give that rule an alternative without itself (in a schema: do not require the property that refers back)."
        )
    # What cannot be finished must not be begun.
    rules = [[one for one in alternatives if all(it < 0 or ending[it] for it in one)] for alternatives in rules]
    nullable = _closure(rules, terminals=False)
    symbols: list[int] = []
    starts: list[list[int]] = []
    for alternatives in rules:
        starts.append([])
        for alternative in alternatives:
            starts[-1].append(len(symbols))
            symbols += [*alternative, END]
    borders = sorted(
        {0} | {edge for ranges in parser.terminals for first, last in ranges for edge in (first, last + 1)}
    )
    place = {border: index for index, border in enumerate(borders)}
    edges = [[place[edge] for first, last in ranges for edge in (first, last + 1)] for ranges in parser.terminals]
    return Grammar(
        symbols, starts, nullable, _rank(parser.names, rules, nullable), parser.numbers["root"], borders, edges
    )


def _closure(rules: list[list[list[int]]], *, terminals: bool) -> list[bool]:
    """Which rules have an alternative of such rules only; `terminals`: and of terminals, so which have a finite text; else the empty one.

    A queue of rules that were just found: each occurrence is looked at once.
    """
    missing = [[sum(it >= 0 or not terminals for it in one) for one in alternatives] for alternatives in rules]
    occurrences: list[list[tuple[int, int]]] = [[] for _ in rules]
    for rule, alternatives in enumerate(rules):
        for index, alternative in enumerate(alternatives):
            for symbol in alternative:
                if symbol >= 0:
                    occurrences[symbol].append((rule, index))
    found = [not all(one) for one in missing]
    queue = [rule for rule, holds in enumerate(found) if holds]
    while queue:
        for rule, index in occurrences[queue.pop()]:
            missing[rule][index] -= 1
            if not missing[rule][index] and not found[rule]:
                found[rule] = True
                queue.append(rule)
    return found


def begins_with(alternatives: list[list[int]], rule: int, nullable: list[bool]) -> list[int]:
    """Rules that a rule's texts may begin with. Itself as its own last symbol is left out: that only says "or once more"."""
    found: dict[int, None] = {}
    for alternative in alternatives:
        for index, symbol in enumerate(alternative):
            if symbol < 0:
                break
            if symbol != rule or index < len(alternative) - 1 or not index:
                found[symbol] = None
            if not nullable[symbol]:
                break
    return list(found)


def _rank(names: list[str], rules: list[list[list[int]]], nullable: list[bool]) -> list[int]:
    """Ranks by a depth-first search without recursion. Raises `BadGrammar` at a cycle: left recursion."""
    new, open_, done = 0, 1, 2
    state = [new] * len(rules)
    order: list[int] = []
    for first in range(len(rules)):
        if state[first] != new:
            continue
        state[first] = open_
        path = [(first, iter(begins_with(rules[first], first, nullable)))]
        while path:
            rule, following = path[-1]
            after = next(following, None)
            if after is None:
                state[rule] = done
                order.append(rule)
                path.pop()
            elif state[after] == open_:
                raise BadGrammar(
                    f"The grammar could not be compiled: rule {names[after][:40]} begins with itself (left recursion). "
                    "Write `a ::= b a | b` instead of `a ::= a b | b`, or use b+."
                )
            elif state[after] == new:
                state[after] = open_
                path.append((after, iter(begins_with(rules[after], after, nullable))))
    rank = [0] * len(rules)
    for index, rule in enumerate(reversed(order)):
        rank[rule] = index
    return rank
