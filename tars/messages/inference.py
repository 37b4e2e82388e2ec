"""Params, deltas and results of `inference.*`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from tars.messages.base import MAX_NAME_LENGTH, Message

FinishReason = Literal["stop", "length", "cancelled"]


class ChatMessage(Message):
    """One turn of a chat."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str


class GenerationParams(Message):
    """What chat and completion share. Defaults are llama.cpp's own."""

    model: str | None = Field(
        None,
        max_length=MAX_NAME_LENGTH,
        description="Model name or alias; may be left out where the node serves only one of the kind.",
    )
    max_tokens: int | None = Field(
        None, ge=1, le=1_048_576, description="At most so many new tokens; default: what the context leaves."
    )
    temperature: float = Field(0.8, ge=0, le=5, description="0 is greedy.")
    top_k: int = Field(40, ge=0, le=100_000, description="0: off.")
    top_p: float = Field(0.95, gt=0, le=1)
    min_p: float = Field(0.05, ge=0, le=1)
    repeat_penalty: float = Field(1.0, gt=0, le=10)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    seed: int | None = Field(None, ge=0, le=2**32 - 1)
    stop: list[str] = Field(
        default_factory=list,
        max_length=64,
        description="Generation ends before the first of these; not part of the text.",
    )
    logprobs: int | None = Field(
        None, ge=0, le=20, description="Log probability of each token, and of so many alternatives."
    )
    logit_bias: dict[str, float] = Field(default_factory=dict, description="Token id -> bias, -100..100.")
    json_schema: dict[str, Any] | None = Field(None, description="The text will be JSON that this schema accepts.")
    grammar: str | None = Field(
        None, max_length=262_144, description="GBNF grammar that the text follows; not with json_schema."
    )

    @model_validator(mode="after")
    def _one_constraint(self) -> GenerationParams:
        if self.json_schema is not None and self.grammar is not None:
            raise ValueError("give json_schema or grammar, not both")
        if any(not text for text in self.stop):
            raise ValueError("stop must not contain an empty string")
        return self


class ChatParams(GenerationParams):
    """`inference.chat`."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=10_000)


class CompleteParams(GenerationParams):
    """`inference.complete`."""

    prompt: str


class TokenLogprob(Message):
    """One generated token's log probability (natural logarithm) and its best alternatives."""

    token: str
    token_id: int
    logprob: float
    # Not strict on the pairs themselves (a field's own strict=False reaches only the list): JSON has no tuples.
    top: list[Annotated[tuple[str, float], Field(strict=False)]] = Field(
        default_factory=list, description="[token text, logprob], best first."
    )


class Delta(Message):
    """One piece of a streamed answer: `inference.delta`. Text is whole UTF-8, never a stop string's beginning that may yet be withheld."""

    text: str
    token_ids: list[int] = Field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None


class Usage(Message):
    """Counted tokens."""

    prompt_tokens: int
    completion_tokens: int = 0
    total_tokens: int


class Timings(Message):
    """Where the time went, in milliseconds on the serving node."""

    queue_ms: float = 0.0
    first_token_ms: float | None = None
    total_ms: float = 0.0
    tokens_per_second: float | None = None


class Attempt(Message):
    """One replica that was tried for a call, and how it went."""

    replica: str
    node: str
    outcome: str


class ServedBy(Message):
    """Who answered. `simulated` is true where the device is a declared one that computes on the CPU."""

    node: str
    replica: str
    device: str
    simulated: bool = False
    attempts: list[Attempt] = Field(default_factory=list)


class Generated(Message):
    """What an engine ends a generation with (the worker's answer; `text` is the whole text)."""

    text: str
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    logprobs: list[TokenLogprob] | None = None


class ChatResult(Message):
    """`inference.chat`'s answer."""

    model: str
    message: ChatMessage
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    served_by: ServedBy
    logprobs: list[TokenLogprob] | None = None


class CompleteResult(Message):
    """`inference.complete`'s answer."""

    model: str
    text: str
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    served_by: ServedBy
    logprobs: list[TokenLogprob] | None = None


class EmbedParams(Message):
    """`inference.embed`."""

    model: str | None = Field(None, max_length=MAX_NAME_LENGTH)
    input: str | list[str] = Field(description="One text or up to 2,048 of them.")
    encoding_format: Literal["float", "base64"] = Field("float", description="base64: little-endian float32 bytes.")
    truncate: bool = Field(
        True, description="False: a text longer than the model's limit is an error instead of being cut."
    )

    @model_validator(mode="after")
    def _some_texts(self) -> EmbedParams:
        count = 1 if isinstance(self.input, str) else len(self.input)
        if not 1 <= count <= 2048:
            raise ValueError("input needs 1 to 2048 texts")
        return self


class Embedded(Message):
    """The worker's answer: `vectors` holds base64 of little-endian float32, one string a text, each of `dimensions` values, unit length."""

    vectors: list[str]
    dimensions: int
    truncated: list[int] = Field(default_factory=list, description="Indices of the texts that were cut.")
    prompt_tokens: int
    timings: Timings


class EmbedResult(Message):
    """`inference.embed`'s answer: unit-length float32 vectors in the order of the input."""

    model: str
    embeddings: list[list[float]] | list[str]
    dimensions: int
    truncated: list[int]
    usage: Usage
    timings: Timings
    served_by: ServedBy


class TokenizeParams(Message):
    """`inference.tokenize`."""

    model: str | None = Field(None, max_length=MAX_NAME_LENGTH)
    text: str
    add_special: bool = True


class Tokenized(Message):
    """The worker's answer."""

    tokens: list[int]


class TokenizeResult(Message):
    """`inference.tokenize`'s answer."""

    model: str
    tokens: list[int]
    count: int
