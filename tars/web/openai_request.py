"""The base of the OpenAI API's requests: which fields are carried out, which are ignored, which are refused.

Law of this file: no field of any one request stands here. Three kinds of fields: those that TARS carries out, those that may be ignored
because the answer means the same without them (`user`, `metadata`...), and those that would change what the answer means (audio, old
function calls...): these are refused, unless they stand at the value that asks for nothing.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import model_validator

from tars.errors import InvalidParams
from tars.messages.base import Message

_CANNOT: dict[str, str] = {
    "best_of": "TARS returns every candidate that it generates; ask for them with n and choose one",
    "functions": "functions is the old name of tools; send tools",
    "function_call": "function_call is the old name of tool_choice; send tool_choice",
    "modalities": "TARS answers in text only; leave modalities out",
    "audio": "TARS answers in text only; leave audio out",
    "web_search_options": "TARS does not search the web; leave web_search_options out",
    "moderation": "TARS does not moderate; leave moderation out",
    "suffix": "TARS does not fill in the middle; leave suffix out",
}
"""Refused field -> why, and what to do."""

_ASKS_NOTHING: dict[str, tuple[object, ...]] = {
    "best_of": (1,),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "moderation": (),
    "suffix": ("",),
}
"""Refused field -> the values at which it asks for nothing and is let through (null always is)."""


def refusal(param: str, message: str) -> InvalidParams:
    """For a field that would change what the answer means. No ValueError, so that pydantic lets it through."""
    return InvalidParams(f"{message}. Nothing was run.", details={"errors": [{"at": param, "problem": message}]})


class OpenAIRequest(Message):
    """Base of the requests: an unknown field is an error, as at OpenAI, so that a typing mistake is seen."""

    ignored: ClassVar[frozenset[str]] = frozenset()
    """Known fields that change nothing in the meaning of the answer: dropped before validation."""

    @model_validator(mode="before")
    @classmethod
    def _drop_and_refuse(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        kept = {}
        for name, value in given.items():
            if name in cls.ignored:
                continue
            if name in _CANNOT and name not in cls.model_fields:
                if value is None or any(value == allowed for allowed in _ASKS_NOTHING[name]):
                    continue
                raise refusal(str(name), _CANNOT[name])
            kept[name] = value
        return kept


def refuse_tokens(param: str, given: object) -> None:
    """Token ids belong to OpenAI's own vocabularies: here they would name other words."""
    if isinstance(given, list) and given and isinstance(given[0], int | list):
        raise refusal(
            param, f"{param} must be text: token ids of another vocabulary would be read as other words; send the text"
        )
