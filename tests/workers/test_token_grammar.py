"""Tokens under a grammar, with a small vocabulary: whole words, single bytes, pieces of characters."""

from __future__ import annotations

import pytest

from tars.errors import BadGrammar
from tars.workers.token_grammar import Place, TokenGrammar, TokenTexts, unfinished

END = 0
PIECES = [b"", b"", *(bytes([byte]) for byte in range(256))]
PIECES += [text.encode() for text in ("hello", "hell", "help", "he", '"}', "é", "日本", "🙂", "aé", "a\0")]
PIECES += ["é".encode() + b"\xe6", b"\x97\xa5x", b"\xa9z", b"\xf0\x9f", b"\x99\x82"]
TEXTS = TokenTexts(PIECES, [END])


def token(piece: bytes | str) -> int:
    return PIECES.index(piece.encode() if isinstance(piece, str) else piece)


def place_after(grammar: TokenGrammar, *pieces: bytes | str) -> Place | None:
    place: Place | None = grammar.start
    for piece in pieces:
        assert place is not None
        place = grammar.after(place, token(piece))
    return place


GRAMMARS = [
    'root ::= "hello" "!"?',
    'root ::= "{" "\\"" [^"\\x00-\\x1f]* "\\"}"',
    "root ::= [é日🙂-🙏a]+",
    "root ::= [^a]*",
    'root ::= "日本語" | "日x"',
    r'root ::= [^"\\]* ("\"" "}"? | "\\" [^a-f])',
]


@pytest.mark.parametrize("text", GRAMMARS)
def test_the_mask_is_what_each_token_alone_would_be_told(text: str) -> None:
    grammar = TokenGrammar(text, TEXTS)
    frontier, seen = [grammar.start], set()
    for _ in range(60):  # places as they come, breadth first
        if not frontier:
            break
        place = frontier.pop(0)
        mask = grammar.mask(place)
        following = [grammar.after(place, one) for one in range(len(PIECES))]
        assert mask.tolist() == [one is not None for one in following]
        assert grammar.mask(place).tolist() == mask.tolist(), "kept as bits"
        for one in following:
            if one is not None and (one.state, one.unfinished) not in seen:
                seen.add((one.state, one.unfinished))
                frontier.append(one)


def test_control_tokens_and_nul_never_come_and_the_end_only_where_the_text_may_end() -> None:
    grammar = TokenGrammar('root ::= "he" .*', TEXTS)
    assert grammar.after(grammar.start, END) is None
    begun = place_after(grammar, "he")
    assert begun is not None
    assert grammar.after(begun, END) == begun
    assert grammar.after(begun, 1) is None
    assert grammar.after(begun, token(b"\0")) is None
    assert grammar.after(begun, token("a\0")) is None


def test_characters_may_come_in_pieces_but_only_those_that_are_allowed() -> None:
    grammar = TokenGrammar('root ::= [é日🙂] "x"', TEXTS)
    assert place_after(grammar, b"\xe6", b"\x97\xa5x") is not None
    assert place_after(grammar, b"\xf0\x9f", b"\x99\x82", "x") is not None
    assert place_after(grammar, b"\xc3", b"\xa9") is not None
    assert place_after(grammar, b"\xc2") is None, "no character that begins so is allowed"
    assert place_after(grammar, b"\xe6", b"\x98") is None
    assert place_after(grammar, b"\xc3", b"\xa9z") is None
    assert place_after(grammar, b"\xa9z") is None
    # Every byte that may begin a character has to be continued by one, never by a quote or an end.
    anything = TokenGrammar("root ::= .*", TEXTS)
    begun = place_after(anything, b"\xe6")
    assert begun is not None
    assert anything.after(begun, END) is None
    assert anything.after(begun, token('"')) is None
    assert anything.after(begun, token("hello")) is None
    for broken in (b"\xff", b"\xc0", b"\x80", b"\xf5"):
        assert place_after(anything, broken) is None
    for first, second in ((b"\xed", b"\xa0"), (b"\xe0", b"\x80"), (b"\xf0", b"\x80"), (b"\xf4", b"\x90")):
        assert place_after(anything, first) is not None
        assert place_after(anything, first, second) is None, "a surrogate, an overlong form, beyond the last character"


def test_work_is_bounded_between_allowances() -> None:
    grammar = TokenGrammar('root ::= "h" root root root "b"? | "h"', TEXTS)

    def write(grammar: TokenGrammar, tokens: int) -> None:
        place: Place | None = grammar.start
        for _ in range(tokens):
            grammar.allow(3_000)
            assert place is not None
            place = grammar.after(place, token("h"))

    write(grammar, 10)
    with pytest.raises(BadGrammar, match="too ambiguous"):
        write(grammar, 300)
    write(TokenGrammar('root ::= "h"*', TEXTS), 10_000)  # a plain one goes on for ever
    grammar.allow(10_000)
    write(grammar, 10)


def test_a_long_list_of_words_is_not_ambiguous() -> None:
    words = " | ".join(f'"{number:x}z{number}"' for number in range(15_000))
    grammar = TokenGrammar(f"root ::= ({words})*", TEXTS)
    grammar.allow(100_000)
    assert grammar.mask(grammar.start).sum() == 16 + 1
    assert place_after(grammar, "1", "0", "z", "1", "6") is not None
    assert place_after(grammar, "1", "0", "z", "1", "7") is None


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
    assert unfinished(data) == rest
