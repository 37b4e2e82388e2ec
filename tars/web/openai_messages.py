"""What the OpenAI API's requests may say, and what of it TARS can do.

Law of this file: request shapes and their translation into `tars.messages`; no HTTP. Three kinds of fields: those that TARS carries
out, those that may be ignored because the answer means the same without them (`user`, `metadata`...), and those that would change
what the answer means (`n` > 1, tools, audio...): these are refused, unless they stand at the value that asks for nothing.
Shapes follow https://platform.openai.com/docs/api-reference; `top_k`, `min_p`, `repeat_penalty` and `grammar` are TARS's additions,
named as in `inference.chat`.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from tars.errors import InvalidParams
from tars.messages.base import Message
from tars.messages.inference import ChatMessage, ChatParams, CompleteParams, EmbedParams

COMPLETION_MAX_TOKENS = 16
"""The API reference's default of `max_tokens` for /v1/completions; chat has none."""

SEED_MASK = 2**32 - 1
"""OpenAI's seed is any 64-bit integer, negative too; the engine's has 32 bits. The same seed still gives the same number."""

SMALLEST_TOP_P = 1e-6
"""OpenAI allows `top_p` 0; it means what any tiny value means: only the likeliest token."""

MAX_PROMPTS = 256
"""Prompts of one /v1/completions call: they run one after the other under one deadline, so more could never end in time."""

_CANNOT: dict[str, str] = {
    "n": "TARS gives one choice per call; send the call several times, with different seeds",
    "best_of": "TARS generates one candidate; leave best_of out",
    "tools": "TARS does not call tools; leave tools out, or ask for JSON with response_format",
    "tool_choice": "TARS does not call tools; leave tool_choice out",
    "functions": "TARS does not call functions; leave functions out, or ask for JSON with response_format",
    "function_call": "TARS does not call functions; leave function_call out",
    "modalities": "TARS answers in text only; leave modalities out",
    "audio": "TARS answers in text only; leave audio out",
    "web_search_options": "TARS does not search the web; leave web_search_options out",
    "moderation": "TARS does not moderate; leave moderation out",
    "suffix": "TARS does not fill in the middle; leave suffix out",
}
"""Refused field -> why, and what to do."""

_ASKS_NOTHING: dict[str, tuple[object, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
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


class StreamOptions(OpenAIRequest):
    """`stream_options`."""

    ignored = frozenset({"include_obfuscation"})

    include_usage: bool | None = None


class _SamplingRequest(OpenAIRequest):
    """What chat and completions share. None is "not said": the engine's default holds."""

    ignored = frozenset({"user", "metadata", "store", "service_tier", "safety_identifier"})

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = None
    top_p: float | None = Field(None, ge=0, le=1)
    stop: str | list[str] | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    top_k: int | None = None
    min_p: float | None = None
    repeat_penalty: float | None = None
    grammar: str | None = None

    @property
    def wants_usage(self) -> bool:
        """True where the stream is to end with a chunk that carries the usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> _SamplingRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only allowed with stream: true")
        return self

    def _sampling(self) -> dict[str, Any]:
        """The fields of `GenerationParams` that were said, under its names."""
        plain = (
            "model",
            "temperature",
            "presence_penalty",
            "frequency_penalty",
            "top_k",
            "min_p",
            "repeat_penalty",
            "grammar",
        )
        said: dict[str, Any] = {name: value for name in plain if (value := getattr(self, name)) is not None}
        if self.top_p is not None:
            said["top_p"] = max(self.top_p, SMALLEST_TOP_P)
        if self.stop is not None:
            said["stop"] = [self.stop] if isinstance(self.stop, str) else self.stop
        if self.seed is not None:
            said["seed"] = self.seed & SEED_MASK
        if self.logit_bias:
            said["logit_bias"] = self.logit_bias
        return said


class ContentPart(OpenAIRequest):
    """One part of a message's content. Only text is understood."""

    ignored = frozenset({"prompt_cache_breakpoint"})

    type: str
    text: str

    @model_validator(mode="before")
    @classmethod
    def _text_only(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("type") != "text" and isinstance(given.get("type"), str):
            raise refusal(
                "messages",
                f"this model reads text only, and a message has a part of type {given['type'][:40]!r}; leave it out",
            )
        return given


class RequestMessage(OpenAIRequest):
    """One turn. `developer` is the newer name of `system`. Fields that a client copies back from an answer are let through when empty."""

    ignored = frozenset({"name", "tool_call_id", "refusal", "annotations"})

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart]

    @model_validator(mode="before")
    @classmethod
    def _no_tool_calls(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        for name in ("tool_calls", "function_call", "audio"):
            if given.get(name):
                raise refusal("messages", f"TARS does not call tools or play audio, and a message has {name}")
        return {name: value for name, value in given.items() if name not in ("tool_calls", "function_call", "audio")}

    def to_chat_message(self) -> ChatMessage:
        """The same as `inference.chat` takes it; text parts are joined by line breaks."""
        content = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        return ChatMessage(role="system" if self.role == "developer" else self.role, content=content)


class JsonSchemaFormat(OpenAIRequest):
    """`response_format.json_schema`."""

    ignored = frozenset({"description", "strict"})
    """`strict`: TARS always keeps to the schema."""

    name: str | None = None
    json_schema: dict[str, Any] = Field(alias="schema")


class ResponseFormat(OpenAIRequest):
    """`response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    def to_json_schema(self) -> dict[str, Any] | None:
        """The schema that the text must follow, or None for free text."""
        if self.type == "json_schema" and self.json_schema is not None:
            return self.json_schema.json_schema
        return {"type": "object"} if self.type == "json_object" else None

    @model_validator(mode="after")
    def _schema_where_said(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema goes with type json_schema, and only with it")
        return self


class ChatRequest(_SamplingRequest):
    """POST /v1/chat/completions."""

    ignored = _SamplingRequest.ignored | {
        "parallel_tool_calls",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "reasoning_effort",
        "verbosity",
    }

    messages: list[RequestMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def _logprobs_first(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is only allowed with logprobs: true")
        return self

    def to_params(self) -> ChatParams:
        """What `inference.chat` takes. `max_completion_tokens` is the newer name of `max_tokens` and wins."""
        limit = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
        return ChatParams(
            messages=[message.to_chat_message() for message in self.messages],
            max_tokens=limit,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            json_schema=None if self.response_format is None else self.response_format.to_json_schema(),
            **self._sampling(),
        )


class CompletionRequest(_SamplingRequest):
    """POST /v1/completions. Several prompts run one after the other and give numbered choices."""

    prompt: str | list[str]
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=20)

    @field_validator("prompt", mode="before")
    @classmethod
    def _texts(cls, given: Any) -> Any:
        _refuse_tokens("prompt", given)
        return given

    @model_validator(mode="after")
    def _bounds(self) -> CompletionRequest:
        if not 1 <= len(self.prompts) <= MAX_PROMPTS:
            raise ValueError(f"prompt needs 1 to {MAX_PROMPTS} texts")
        if self.echo and self.logprobs is not None:
            raise refusal("echo", "TARS has no log probabilities of the prompt; leave echo or logprobs out")
        return self

    @property
    def prompts(self) -> list[str]:
        """The prompts, also where only one was given."""
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt

    def to_params(self) -> list[CompleteParams]:
        """What `inference.complete` takes, one for each prompt."""
        limit = self.max_tokens if self.max_tokens is not None else COMPLETION_MAX_TOKENS
        said = self._sampling()
        return [CompleteParams(prompt=text, max_tokens=limit, logprobs=self.logprobs, **said) for text in self.prompts]


class EmbeddingRequest(OpenAIRequest):
    """POST /v1/embeddings. `dimensions` must be the model's own: TARS does not cut vectors."""

    ignored = frozenset({"user"})

    model: str | None = None
    input: str | list[str]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = None

    @field_validator("input", mode="before")
    @classmethod
    def _texts(cls, given: Any) -> Any:
        _refuse_tokens("input", given)
        return given

    def to_params(self) -> EmbedParams:
        """What `inference.embed` takes."""
        return EmbedParams(model=self.model, input=self.input, encoding_format=self.encoding_format or "float")


def _refuse_tokens(param: str, given: object) -> None:
    """Token ids belong to OpenAI's own vocabularies: here they would name other words."""
    if isinstance(given, list) and given and isinstance(given[0], int | list):
        raise refusal(
            param, f"{param} must be text: token ids of another vocabulary would be read as other words; send the text"
        )
