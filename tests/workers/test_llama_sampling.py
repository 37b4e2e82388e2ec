from __future__ import annotations

import pytest

from tars.errors import BadGrammar
from tars.messages.inference import CompleteParams

pytestmark = pytest.mark.model  # importing the module loads llama.cpp


@pytest.mark.parametrize(
    ("grammar", "depth"),
    [
        ('root ::= "a"', 0),
        ('root ::= ("a" ("b" | ("c")))', 3),
        ('root ::= "((((" [((((] # ((((\n ("a")', 1),
        (r'root ::= "\"((" [\]((] ("a")', 1),
        ("((((", 4),
    ],
)
def test_nesting_counts_brackets_outside_literals_classes_and_comments(grammar: str, depth: int) -> None:
    from tars.workers.llama_sampling import nesting

    assert nesting(grammar) == depth


@pytest.mark.parametrize(
    ("data", "rest"),
    [
        (b"", b""),
        (b"abc", b""),
        ("é".encode(), b""),
        (b"a\xf0\x9f", b"\xf0\x9f"),
        (b"\xff", None),
        (b"\x80", None),
        (b"\xc3\x28", None),
        (b"\xed\xa0", None),
        (b"\xed\x9f", b"\xed\x9f"),
        (b"\xc0", None),
    ],
)
def test_bytes_that_can_and_cannot_begin_a_text(data: bytes, rest: bytes | None) -> None:
    from tars.workers.llama_sampling import unfinished

    assert unfinished(data) == rest


def test_a_call_without_grammar_has_none_and_a_schema_becomes_one() -> None:
    from tars.workers.llama_sampling import grammar_text

    assert grammar_text(CompleteParams(prompt="x")) is None
    assert grammar_text(CompleteParams(prompt="x", grammar='root ::= "a"')) == 'root ::= "a"'
    assert "root ::= " in str(grammar_text(CompleteParams(prompt="x", json_schema={"type": "string"})))


@pytest.mark.parametrize("grammar", [" ", 'root ::= "a"\0', "root ::= " + "(" * 300])
def test_a_grammar_that_native_code_must_not_see_is_refused(grammar: str) -> None:
    from tars.workers.llama_sampling import grammar_text

    with pytest.raises(BadGrammar):
        grammar_text(CompleteParams(prompt="x", grammar=grammar))
