"""Text of a token stream: whole characters, no stop string, and the invariant that continuation rests on."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tars.workers.text_stream import Released, TextStream


def run(pieces: list[bytes], stop: list[str]) -> tuple[list[Released[int]], bool]:
    stream: TextStream[int] = TextStream(stop)
    released = []
    for number, piece in enumerate(pieces):
        released.append(stream.push(number, piece, -number))
        if stream.stopped:
            break
    released.append(stream.finish())
    return released, stream.stopped


def texts(pieces: list[bytes], stop: list[str]) -> list[str]:
    return [one.text for one in run(pieces, stop)[0]]


@pytest.mark.parametrize(
    ("pieces", "stop", "expected"),
    [
        ([b"a", b"b"], [], ["a", "b", ""]),
        # A character of four bytes in three tokens comes with its last token.
        ([b"x", b"\xf0\x9f", b"\x99", b"\x82y"], [], ["x", "", "", "🙂y", ""]),
        # An unfinished character at the end, and one that turns out to be none.
        ([b"x", b"\xe2\x82"], [], ["x", "", "\ufffd"]),
        ([b"\xe2\x82", b"z"], [], ["", "\ufffdz", ""]),
        # What may become a stop string waits for whole tokens, and is freed when it does not.
        ([b"ab", b"cX", b"Yd"], ["XYZ"], ["ab", "", "cXYd", ""]),
        ([b"ab", b"cX", b"Y", b"Zd"], ["XYZ"], ["ab", "", "", "c", ""]),
        # The earliest stop string ends the text.
        ([b"one two three"], ["three", "two"], ["one ", ""]),
        # An overlap: the held text begins again inside itself.
        ([b"a", b"a", b"b", b"!"], ["aab"], ["", "", "", ""]),
        ([b"a", b"a", b"a", b"b"], ["aab"], ["", "", "a", "", ""]),
        ([b"", b"x", b""], [], ["", "x", "", ""]),
    ],
)
def test_what_is_released_when(pieces: list[bytes], stop: list[str], expected: list[str]) -> None:
    assert texts(pieces, stop) == expected


def test_held_tokens_are_released_at_the_end_without_a_stop() -> None:
    released, stopped = run([b"ab", b"X"], ["XY"])
    assert not stopped
    assert released[-1] == Released("X", [1], [-1])


def test_what_somebody_has_seen_stays_and_is_no_part_of_a_stop_string_any_more() -> None:
    stream: TextStream[int] = TextStream(["XYZ", "ab"])
    assert stream.shown_before([0, 1], b"abX", ended=False) == "abX"
    assert stream.push(2, b"YZ", 2) == Released("YZ", [2], [2])
    assert not stream.stopped
    assert stream.push(3, b"XYZ", 3) == Released("", [3], [3])
    assert stream.stopped


def test_an_answer_that_had_ended_is_read_to_its_end_at_once() -> None:
    stopped: TextStream[int] = TextStream(["XYZ", "Y"])
    assert stopped.shown_before([0, 1], b"aXYZb", ended=True) == "a"
    assert stopped.stopped
    half: TextStream[int] = TextStream(["XYZ"])
    assert half.shown_before([0, 1], b"aX\xf0\x9f", ended=True) == "aX\ufffd"
    assert not half.stopped
    assert half.finish() == Released()


@given(st.lists(st.sampled_from([b"a", b"X", b"YZ", b"\xf0\x9f", b"\x99\x82", b"\xc3", b""]), max_size=12))
def test_all_at_once_reads_as_one_after_the_other(pieces: list[bytes]) -> None:
    one_by_one, stopped = run(pieces, ["XYZ", "aa"])
    taken = [number for part in one_by_one for number in part.token_ids]
    at_once: TextStream[int] = TextStream(["XYZ", "aa"])
    data = b"".join(pieces[: len(taken)])
    assert at_once.shown_before(taken, data, ended=True) == "".join(part.text for part in one_by_one)
    assert at_once.stopped == stopped


def test_an_empty_stop_string_is_a_mistake_of_the_program() -> None:
    with pytest.raises(ValueError, match="empty"):
        TextStream([""])


SMALL = st.lists(
    st.binary(min_size=0, max_size=4) | st.sampled_from([b"ab", b"ba", "€".encode(), "🙂".encode()]), max_size=30
)
STOPS = st.lists(st.text("ab€", min_size=1, max_size=4), max_size=3)


@given(SMALL, STOPS)
def test_released_text_is_always_the_text_of_the_released_tokens(pieces: list[bytes], stop: list[str]) -> None:
    released, stopped = run(pieces, stop)
    ids = [number for one in released for number in one.token_ids]
    text = "".join(one.text for one in released)
    whole = b"".join(pieces[: len(ids)]).decode("utf-8", "replace")
    assert ids == list(range(len(ids)))
    assert [-number for number in ids] == [extra for one in released for extra in one.extras]
    if stopped:
        assert whole.startswith(text)
        assert any(whole[len(text) :].startswith(one) for one in stop)
    else:
        assert text == whole
        assert len(ids) == len(pieces)
    assert not any(one in text for one in stop)


@given(SMALL, STOPS)
def test_before_the_last_release_the_text_so_far_is_exactly_that_of_the_tokens_so_far(
    pieces: list[bytes], stop: list[str]
) -> None:
    stream: TextStream[None] = TextStream(stop)
    text, count = "", 0
    for number, piece in enumerate(pieces):
        released = stream.push(number, piece, None)
        if stream.stopped:
            return
        text += released.text
        count += len(released.token_ids)
        # No final flush: a released token never ends inside a character.
        assert b"".join(pieces[:count]).decode("utf-8", "replace") == text
