"""Requests for embeddings and reranking: OpenAI's /v1/embeddings, and /v1/rerank as Cohere and Jina shape it.

Law of this file: request shapes and their translation into `tars.messages`; no HTTP. Of /v1/embeddings, `output_type`, `truncate`,
`overflow`, `input_type` and `prompt` are TARS's additions, of /v1/rerank `truncate`; named as in `inference.embed` and `inference.rerank`.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from tars.messages.inference import EmbedParams, RerankParams
from tars.web.openai_request import OpenAIRequest, refusal, refuse_tokens


class EmbeddingRequest(OpenAIRequest):
    """POST /v1/embeddings."""

    ignored = frozenset({"user"})

    model: str | None = None
    input: str | list[str]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    output_type: Literal["float", "int8", "binary"] | None = None
    truncate: bool | None = None
    overflow: Literal["mean"] | None = None
    input_type: Literal["query", "passage"] | None = None
    prompt: str | None = None

    @field_validator("input", mode="before")
    @classmethod
    def _texts(cls, given: Any) -> Any:
        refuse_tokens("input", given)
        return given

    def to_params(self) -> EmbedParams:
        """What `inference.embed` takes."""
        said = {name: value for name, value in self.__dict__.items() if value is not None}
        if said.get("output_type", "float") != "float":
            # The openai client asks for base64 by itself and reads it as float32, whatever it is: whole numbers it leaves alone.
            said["encoding_format"] = "float"
        return EmbedParams(**said)


class RerankRequest(OpenAIRequest):
    """POST /v1/rerank."""

    ignored = frozenset({"user"})

    model: str | None = None
    query: str
    documents: list[str] = Field(description="Texts, or objects with a `text`.")
    top_n: int | None = None
    return_documents: bool | None = None
    truncate: bool | None = None

    @field_validator("query", mode="before")
    @classmethod
    def _one_text(cls, given: Any) -> Any:
        return _text_of("query", given)

    @field_validator("documents", mode="before")
    @classmethod
    def _texts(cls, given: Any) -> Any:
        return [_text_of("documents", one) for one in given] if isinstance(given, list) else given

    def to_params(self) -> RerankParams:
        """What `inference.rerank` takes."""
        return RerankParams(**{name: value for name, value in self.__dict__.items() if value is not None})


def _text_of(param: str, given: Any) -> Any:
    """The text of an object that has one; what is no object as it is, for the validation to judge."""
    if not isinstance(given, dict):
        return given
    if not isinstance(given.get("text"), str):
        raise refusal(param, f'{param} takes texts, or objects like {{"text": "..."}}; one has no text')
    return given["text"]
