"""Is an answer right? Compared with the answer to the same call in an undisturbed mesh.

Law of this file: pure. Exact mode allows no difference. In fast mode an answer may leave the undisturbed one where two next tokens nearly
tied there, as the undisturbed run's log probabilities say, and nowhere else: a token that is missing, or there twice, is no near tie. From
there on only its length and its end can be held against it. What was streamed must be what the result says, in both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from chaos_deck import Call, Kind

NEAR_TIE = 0.3
"""Nats between the likeliest token and another one that rounding may put in its place. Kernels for one row and for many differ by some
hundredths in the logits of a model quantised to 4 to 8 bits."""
EMBEDDING_TOLERANCE = 1e-5
_LOOK_BACK = 4
"""Tokens before the one in which two texts part: another token may begin with the same characters."""


@dataclass(frozen=True, slots=True)
class Step:
    """One generated token of the undisturbed run: its text, and [text, log probability] of what else it might have been, best first."""

    text: str
    token_id: int
    logprob: float
    alternatives: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class Text:
    """One of a call's `n` answers. `pieces`: what was streamed, put together; `token_ids`: where they came along."""

    text: str
    finish_reason: str
    pieces: str | None = None
    token_ids: tuple[int, ...] | None = None
    steps: tuple[Step, ...] = ()


@dataclass(frozen=True, slots=True)
class Heard:
    """A whole answer, however it came. `run` tells one computation of it from another one: who, when, how long."""

    texts: tuple[Text, ...] = ()
    completion_tokens: int | None = None
    vectors: tuple[tuple[float, ...], ...] = ()
    run: str = ""


@dataclass(frozen=True, slots=True)
class Verdict:
    """`problems`: none where it is right. `parted`: right, and another text than the undisturbed one since a near tie."""

    problems: tuple[str, ...] = ()
    parted: bool = False


def judge(call: Call, undisturbed: Heard, heard: Heard, *, exact: bool) -> Verdict:
    """What is wrong with `heard`, in a person's words."""
    if call.kind is Kind.EMBEDDING:
        return Verdict(tuple(_vector_problems(undisturbed.vectors, heard.vectors)))
    if len(heard.texts) != len(undisturbed.texts):
        return Verdict((f"{len(heard.texts)} answers instead of {len(undisturbed.texts)}",))
    problems: list[str] = []
    parted = False
    for index, (right, text) in enumerate(zip(undisturbed.texts, heard.texts, strict=True)):
        found, here = _text_problems(call, right, text, exact=exact)
        problems += [f"answer {index}: {problem}" if len(heard.texts) > 1 else problem for problem in found]
        parted = parted or here
    if not parted and heard.completion_tokens is not None and heard.completion_tokens != undisturbed.completion_tokens:
        problems.append(f"usage says {heard.completion_tokens} tokens instead of {undisturbed.completion_tokens}")
    return Verdict(tuple(problems), parted and not problems)


def _vector_problems(right: Sequence[Sequence[float]], heard: Sequence[Sequence[float]]) -> list[str]:
    if [len(vector) for vector in right] != [len(vector) for vector in heard]:
        return [f"{len(heard)} vectors instead of {len(right)}, or of another length"]
    worst = max(
        (
            abs(one - other)
            for a, b in zip(right, heard, strict=True)
            for one, other in zip(a, b, strict=True)
        ),
        default=0.0,
    )  # fmt: skip
    if not worst <= EMBEDDING_TOLERANCE:
        return [f"a vector is another one: {worst:.1e} off in one dimension"]
    return []


def _text_problems(call: Call, right: Text, heard: Text, *, exact: bool) -> tuple[list[str], bool]:
    problems = []
    if heard.pieces is not None and heard.pieces != heard.text:
        problems.append(f"what was streamed is not the result: {_where(heard.text, heard.pieces)}")
    same_tokens = heard.token_ids is None or right.token_ids is None or heard.token_ids == right.token_ids
    if heard.text == right.text and same_tokens:
        if heard.finish_reason != right.finish_reason:
            problems.append(f"finish reason {heard.finish_reason} instead of {right.finish_reason}")
        return problems, False
    if exact:
        what = _where(right.text, heard.text) if heard.text != right.text else "the same text of other tokens"
        return [*problems, f"not the undisturbed answer: {what}"], False
    if not _parts_at_a_near_tie(call, right, heard):
        return [*problems, f"parts from the undisturbed answer at no near tie: {_where(right.text, heard.text)}"], False
    most = call.params["max_tokens"]
    if heard.finish_reason not in ("stop", "length"):
        problems.append(f"finish reason {heard.finish_reason}")
    if heard.token_ids is not None:
        length = len(heard.token_ids)
        if length > most or (heard.finish_reason == "length" and length != most):
            problems.append(f"{length} tokens with {most} asked for and finish reason {heard.finish_reason}")
    if any(stop in heard.text for stop in call.params.get("stop", ())):
        problems.append("a stop string stands in the text")
    return problems, True


def _parts_at_a_near_tie(call: Call, right: Text, heard: Text) -> bool:
    """Whether another token, about as likely there as the undisturbed one, begins what was heard instead."""
    starts = [0]
    for step in right.steps:
        starts.append(starts[-1] + len(step.text))
    common = _common_length(right.text, heard.text)
    parted = sum(start <= common for start in starts[1:])
    if heard.token_ids is not None and right.token_ids is not None:
        by_token = _common_length(right.token_ids, heard.token_ids)
        # One stream is as far as the other one, and its result is not known by tokens: the text alone says where.
        if by_token < min(len(right.token_ids), len(heard.token_ids)):
            parted = by_token
    if parted >= len(right.steps) and right.finish_reason == "stop" and not call.params.get("stop"):
        # What else might have come instead of its end is not told. A drawn one may have gone on; the likeliest one is clear mostly.
        return not call.greedy
    for at in range(parted, max(-1, parted - _LOOK_BACK), -1):
        if at >= len(right.steps):
            continue
        step, rest = right.steps[at], heard.text[starts[at] :]
        for text, logprob in step.alternatives:
            # Not by the likeliest one of all: that may be forbidden, and log probabilities are told as if nothing was.
            near = logprob >= step.logprob - NEAR_TIE or not call.greedy
            ends = heard.finish_reason == "stop" and not rest
            if near and text != step.text and (rest.startswith(text) if text and not ends else ends):
                return True
    return False


def _common_length(one: Sequence[object], other: Sequence[object]) -> int:
    """How many elements both begin with."""
    for index, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return index
    return min(len(one), len(other))


def _where(right: str, heard: str) -> str:
    """The first difference, with its surroundings."""
    at = _common_length(right, heard)
    begin = max(0, at - 12)
    return f"after {at} characters {heard[begin : at + 24]!r} instead of {right[begin : at + 24]!r}"
