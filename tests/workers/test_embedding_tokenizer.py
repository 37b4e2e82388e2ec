from __future__ import annotations

import pytest
from word_tokenizer import CLS, COLON, PAD, QUERY, SEP, UNK, WORD, A, B, C, word_tokenizer

pytest.importorskip("tokenizers")
from tars.workers.embedding_tokenizer import (
    WINDOW_CHARACTERS,
    Row,
    TextTokenizer,
)  # it needs numpy, which comes with tokenizers' users


def tokenizer(most: int = 6, **options: bool) -> TextTokenizer:
    return TextTokenizer(word_tokenizer(), most, PAD, **options)


def ids(rows: list[Row] | list[tuple[Row, bool]]) -> list[list[int]]:
    return [(row if isinstance(row, Row) else row[0]).ids.tolist() for row in rows]


def test_a_text_has_its_frame_and_its_prompt() -> None:
    rows = tokenizer().texts("query: ", ["a", "", "  b "])
    assert ids(rows) == [[CLS, QUERY, COLON, A, SEP], [CLS, QUERY, COLON, SEP], [CLS, QUERY, COLON, B, SEP]]
    assert [cut for _, cut in rows] == [False, False, False]


def test_what_is_longer_than_the_model_takes_is_cut_and_told() -> None:
    rows = tokenizer().texts("", ["a b c a", "a b c a b"])
    assert ids(rows) == [[CLS, A, B, C, A, SEP], [CLS, A, B, C, A, SEP]]
    assert [cut for _, cut in rows] == [False, True]


def test_blanks_behind_the_first_look_are_read_too() -> None:
    (row, cut), (other, other_cut) = tokenizer().texts("", ["a" + " " * 5000 + "b", "a" + " b" * 5000])
    assert (row.ids.tolist(), cut) == ([CLS, A, B, SEP], False)
    assert (other.ids.tolist(), other_cut) == ([CLS, A, B, B, B, SEP], True)


@pytest.mark.parametrize("text", ["\ud800", "a\udfff", "\0", "\0" * 1000, " \t\n"])
def test_any_text_becomes_a_row(text: str) -> None:
    ((row, _),) = tokenizer().texts("", [text])
    assert row.ids[0] == CLS
    assert row.ids[-1] == SEP


def test_a_tokenizer_without_a_frame_still_makes_one_position_of_nothing() -> None:
    bare = TextTokenizer(word_tokenizer(frame=False), 6, PAD)
    assert ids(bare.texts("", ["", "a"])) == [[PAD], [A]]
    assert ids(bare.pieces("", "")) == [[PAD]]


def test_pairs_have_types_and_lose_from_the_longer_side() -> None:
    rows = tokenizer(8).pairs("a b", ["c", "c c c c c c"])
    assert ids(rows) == [[CLS, A, B, SEP, C, SEP], [CLS, A, B, SEP, C, C, C, SEP]]
    assert rows[0][0].type_ids.tolist() == [0, 0, 0, 0, 1, 1]
    assert [cut for _, cut in rows] == [False, True]


def test_pieces_hold_every_token_once_each_with_frame_and_prompt() -> None:
    rows = tokenizer(6).pieces("query: ", "a b c a b")
    assert ids(rows) == [
        [CLS, QUERY, COLON, A, B, SEP],
        [CLS, QUERY, COLON, C, A, SEP],
        [CLS, QUERY, COLON, B, SEP],
    ]
    assert [row.content for row in rows] == [2, 2, 1]
    assert ids(tokenizer(6).pieces("", "a b c a b")) == [[CLS, A, B, C, A, SEP], [CLS, B, SEP]]


def test_a_prompt_that_fills_the_model_leaves_one_cut_row() -> None:
    assert ids(tokenizer(6).pieces("a b c a b c", "word")) == [[CLS, A, B, C, A, SEP]]


def test_a_prompt_that_does_not_count_is_skipped_in_the_average() -> None:
    ((row, _),) = tokenizer(skip_prompt=True).texts("query: ", ["a"])
    assert row.skip == 3  # [CLS] query :
    ((plain, _),) = tokenizer(skip_prompt=True).texts("", ["a"])
    assert plain.skip == 0
    assert all(piece.skip == 3 for piece in tokenizer(6, skip_prompt=True).pieces("query: ", "a b c a b"))


def test_tokens_of_a_whole_text_however_long() -> None:
    assert tokenizer().tokens("word " * 100, special=False) == [WORD] * 100
    assert tokenizer().tokens("nothing", special=True) == [CLS, UNK, SEP]


def test_a_book_is_read_in_windows_and_gives_the_same_ids() -> None:
    words = tokenizer()
    text = "word  a b " * 5000 + "\tc" * 20000 + "word" * 10000
    windows = list(words._windows(text))
    assert len(windows) > 6
    assert "".join(windows) == text
    assert max(map(len, windows)) <= WINDOW_CHARACTERS
    assert sum(1 for _ in words.reading_tokens("word a b " * 5000, special=True)) == 2
    assert words.tokens("word a b " * 5000, special=True) == [CLS, *[WORD, A, B] * 5000, SEP]
    rows = words.pieces("query: ", "word a b " * 5000)
    assert [token for row in rows for token in row.ids.tolist()[3:-1]] == [WORD, A, B] * 5000


def test_a_text_that_begins_with_a_mark_of_its_own_is_read_in_one_piece() -> None:
    backend = word_tokenizer()
    from tokenizers import normalizers

    backend.normalizer = normalizers.Prepend("a ")
    marked = TextTokenizer(backend, 6, PAD)
    assert marked.tokens("b " * 20000, special=False) == [A, *[B] * 20000]
