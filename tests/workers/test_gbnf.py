"""GBNF read and checked: what it refuses and why, and that it stays quick where llama.cpp's parser does not end."""

from __future__ import annotations

import re
import time

import pytest

from tars.errors import BadGrammar
from tars.workers.gbnf import SYMBOLS_MOST, parse

REFUSED = {
    "empty": (" \n", "empty"),
    "a NUL": ('root ::= "a"\0', "NUL"),
    "no rule": ('"a"', "line 1: Here a rule has to begin"),
    "no root": ('start ::= "a"', "no rule root"),
    "no definition": ("root = x", "::="),
    "unknown rule": ('root ::= "a" nowhere', "rule nowhere does not exist"),
    "open literal": ('root ::= "abc', "no closing"),
    "open class": ("root ::= [a-z", "no closing ]"),
    "open bracket": ('root ::= ("a"\n', "no closing one"),
    "closing bracket": ('root ::= "a")', "belongs to nothing"),
    "third line": ('root ::= x\nx ::= "a"\nx2 ::= "a" %\n', "line 3"),
    "nothing to repeat": ("root ::= *", "nothing that * could repeat"),
    "bad repetition": ('root ::= "a"{x}', "{3}"),
    "crossed repetition": ('root ::= "a"{3,2}', "at least 3 and at most 2"),
    "bad escape": (r'root ::= "\q"', r"escape \q"),
    "half an escape": (r'root ::= "\u12"', "4 hexadecimal digits"),
    "no character": (r'root ::= "\UFFFFFFFF"', "no character"),
    "empty class": ("root ::= []", "matches nothing"),
    "token": ("root ::= <think>", "not supported"),
    "brackets": ("root ::= " + "(" * 300, "deep"),
    "left recursion": ('root ::= root "a" | "b"', "rule root begins with itself"),
    "a cycle of rules": ('root ::= a\na ::= b "x"\nb ::= c | "y"\nc ::= a "z"', "begins with itself"),
    "only itself": ("root ::= a\na ::= a", "no text that ends"),
    "itself or an end": ('root ::= a\na ::= a | "b"', "begins with itself"),
    "behind what may be empty": ('root ::= e root "a" | "b"\ne ::= f\nf ::= "" | "x"', "begins with itself"),
    "behind a repetition": ('root ::= x\nx ::= " "* x "b" | "c"', "begins with itself"),
    "only itself after nothing": ("root ::= e root\ne ::= f\nf ::= ", "no text that ends"),
    "for ever": ('root ::= "a" x\nx ::= "b" root', "no text that ends"),
    "a bomb of copies": (f'root ::= ("{"x" * 1000}" "y"){{2000}} "z"{{{SYMBOLS_MOST}}}', "Written out"),
    "a bomb of optionals": ('root ::= "x"{0,999999999}', "Written out"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_said(name: str) -> None:
    text, reason = REFUSED[name]
    with pytest.raises(BadGrammar, match=re.escape(reason)) as error:
        parse(text)
    assert not error.value.retryable


@pytest.mark.parametrize(
    "text",
    [
        'root ::= "((((" [((((] # ((((\n',
        r'root ::= "\"((" [\]((] "\x41\u00e9\U0001F642" [\-a] [a-]',
        'root ::= a |\n  b\na ::= ("x"\n | "y" # why\n)\nb ::= ""\r\n',
        "root ::= [^a] . [a-zA-Z_]{2,} [0-9]{3} [0-9]{0,4} x? y* z+\nx ::= [x]\ny ::= [y]\nz ::= [z]",
        'root ::= ("a"*)* (" "? "b"?){0,3}',
        'root ::= "x"{5000}',
    ],
)
def test_what_llama_cpp_documents_is_read(text: str) -> None:
    assert parse(text).symbols


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    [
        # 2**n paths for a search that does not remember where it was.
        "root ::= a0\n" + "".join(f"a{n} ::= a{n + 1} | a{n + 1}\n" for n in range(2000)) + 'a2000 ::= "x"\n',
        # n calls deep for one that recurses.
        "root ::= a0\n" + "".join(f"a{n} ::= a{n + 1}\n" for n in range(15_000)) + 'a15000 ::= "x"\n',
        "root ::= (" + '("a"|""){0,50}' * 300 + ")",
        # Rules that become nullable one after the other, the last first.
        "root ::= a0\n" + "".join(f"a{n} ::= a{n + 1} a{n + 1}\n" for n in range(5000)) + 'a5000 ::= ""\n',
    ],
)
def test_grammars_that_multiply_are_read_in_proportion_to_their_length(text: str) -> None:
    started = time.monotonic()
    parse(text)
    assert time.monotonic() - started < 10, "seconds for 200 KB are too many; 2**n would not end at all"


def test_characters_that_no_rule_tells_apart_are_one_class() -> None:
    grammar = parse('root ::= [a-f] | "c" | [^x]')
    classes = {character: grammar.character_class(character) for character in "abcdefgxyz€🙂"}
    assert classes["a"] == classes["b"] != classes["c"] != classes["d"] == classes["f"]
    assert classes["y"] == classes["z"] == classes["€"] == classes["🙂"] != classes["x"] != classes["g"]
