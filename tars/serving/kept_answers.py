"""An answer under an idempotency key as bytes: so its homes keep it, and so another node reads it.

Law of this file: to JSON and back; it keeps nothing itself.
"""

from __future__ import annotations

import logging
from typing import TypeVar

import orjson
from pydantic import ValidationError

from tars.core.idempotency_keys import LARGEST_ANSWER
from tars.messages.base import Message, fields_of
from tars.messages.inference import ChatResult, CompleteResult, EmbedResult, RerankResult, TokenizeResult

log = logging.getLogger(__name__)

RESULTS: dict[str, type[Message]] = {
    "inference.chat": ChatResult,
    "inference.complete": CompleteResult,
    "inference.embed": EmbedResult,
    "inference.rerank": RerankResult,
    "inference.tokenize": TokenizeResult,
}
"""What a method's answer is, to read one that another node gave."""

Answer = TypeVar("Answer", bound=Message)


def bytes_of(answer: Message) -> bytes | None:
    """As JSON text; None for what JSON cannot say (the caller's own answer fails for it, too)."""
    try:
        return orjson.dumps(answer, default=fields_of)
    except (TypeError, ValueError):
        return None


def bytes_for_homes(answer: Message) -> bytes | None:
    """The same; None, too, for what is so large that its owner keeps it alone."""
    said = bytes_of(answer)
    return said if said is not None and len(said) <= LARGEST_ANSWER else None


def answer_of(method: str, said: bytes) -> Message | None:
    """What another node kept of a call of `method`; None where it is of another version, so that the call is run again."""
    return read(RESULTS.get(method), said)


def read(kind: type[Answer] | None, said: bytes) -> Answer | None:
    """As `answer_of`, of a known kind."""
    if kind is not None:
        try:
            return kind.model_validate_json(said)
        except ValidationError:
            pass
    log.warning(
        "the answer that another node kept under an idempotency key is of another version; the call is run again"
    )
    return None
