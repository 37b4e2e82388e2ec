"""What the OpenAI API's chats and completions may ask for, as TARS's own params.

Law of this file: the request shapes of chat and completions and their translation into `tars.messages`; no HTTP. Shapes follow
https://platform.openai.com/docs/api-reference; `top_k`, `min_p`, `repeat_penalty`, `grammar` and `reasoning` are TARS's additions, named
as in `inference.chat`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from tars.messages.base import MAX_NAME_LENGTH, Priority
from tars.messages.inference import ChatMessage, ChatParams, CompleteParams
from tars.web.openai_request import OpenAIRequest, refusal, refuse_tokens
from tars.web.openai_tools import RequestTool, RequestToolCall, tool_choice_of

COMPLETION_MAX_TOKENS = 16
"""The API reference's default of `max_tokens` for /v1/completions; chat has none."""

SEED_MASK = 2**32 - 1
"""OpenAI's seed is any 64-bit integer, negative too; the engine's has 32 bits. The same seed still gives the same number."""

SMALLEST_TOP_P = 1e-6
"""OpenAI allows `top_p` 0; it means what any tiny value means: only the likeliest token."""

_TIERS: Mapping[str, Priority] = MappingProxyType({"flex": "batch", "batch": "batch", "priority": "interactive"})
"""OpenAI's words for how urgent a call is; the others (`auto`, `default`) ask for nothing."""

MAX_PROMPTS = 256
"""Prompts of one /v1/completions call: they run one after the other under one deadline, so more could never end in time."""


class StreamOptions(OpenAIRequest):
    """`stream_options`."""

    ignored = frozenset({"include_obfuscation"})

    include_usage: bool | None = None


class _SamplingRequest(OpenAIRequest):
    """What chat and completions share. None is "not said": the engine's default holds."""

    ignored = frozenset({"user", "metadata", "store", "safety_identifier"})

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = None
    top_p: float | None = Field(None, ge=0, le=1)
    stop: str | list[str] | None = None
    seed: int | None = None
    n: int | None = Field(None, ge=1)
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    top_k: int | None = None
    min_p: float | None = None
    repeat_penalty: float | None = None
    grammar: str | None = None
    service_tier: str | None = Field(None, max_length=MAX_NAME_LENGTH)

    @property
    def priority(self) -> Priority | None:
        """What the service tier asks for."""
        return _TIERS.get(self.service_tier or "")

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
            "n",
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
    """One turn. `developer` is the newer name of `system`. What a client copies back from an answer is understood, or let through empty.

    `reasoning_content` is what DeepSeek, llama.cpp and vLLM call a turn's reasoning, and so does this API's answer.
    """

    ignored = frozenset({"name", "refusal", "annotations"})

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    reasoning_content: str | None = None
    tool_calls: list[RequestToolCall] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _no_old_calls(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        for name, instead in (("function_call", "tool_calls"), ("audio", "content")):
            if given.get(name):
                raise refusal("messages", f"a message has {name}, which TARS does not read; send {instead}")
        return {name: value for name, value in given.items() if name not in ("function_call", "audio")}

    @model_validator(mode="after")
    def _says_something(self) -> RequestMessage:
        if self.content is None and not self.tool_calls:
            raise ValueError("content is required, unless an assistant's message has tool_calls")
        return self

    def to_chat_message(self) -> ChatMessage:
        """The same as `inference.chat` takes it; text parts are joined by line breaks."""
        content = self.content or ""
        if not isinstance(content, str):
            content = "\n".join(part.text for part in content)
        said: dict[str, Any] = {}
        if self.reasoning_content is not None:
            said["reasoning"] = self.reasoning_content
        if self.tool_calls:
            said["tool_calls"] = [call.to_tool_call() for call in self.tool_calls]
        if self.role == "tool" and self.tool_call_id is not None:
            # Only a tool's turn answers a call; elsewhere the field says nothing.
            said["tool_call_id"] = self.tool_call_id
        return ChatMessage(role="system" if self.role == "developer" else self.role, content=content, **said)


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
        "prediction",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "verbosity",
    }

    messages: list[RequestMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: list[RequestTool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    reasoning: bool | None = None

    @model_validator(mode="after")
    def _calls_may_be_several(self) -> ChatRequest:
        if self.tools and self.parallel_tool_calls is False:
            raise refusal(
                "parallel_tool_calls", "TARS cannot hold a model to one tool call; leave parallel_tool_calls out"
            )
        return self

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
            **self._tools(),
            **self._sampling(),
        )

    def _tools(self) -> dict[str, Any]:
        said: dict[str, Any] = {}
        if self.tools:
            said["tools"] = [tool.to_tool() for tool in self.tools]
        choice = tool_choice_of(self.tool_choice)
        if choice is not None and self.tools:
            said["tool_choice"] = choice
        elif choice not in (None, "none", "auto"):  # which clients send without tools too, where both ask for nothing
            raise refusal(
                "tool_choice", "tool_choice asks for a tool, and there are no tools; send tools, or leave it out"
            )
        if self.reasoning is not None:
            said["reasoning"] = self.reasoning
        elif self.reasoning_effort == "none":
            said["reasoning"] = False
        return said


class CompletionRequest(_SamplingRequest):
    """POST /v1/completions. Several prompts run one after the other and give numbered choices."""

    prompt: str | list[str]
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=20)

    @field_validator("prompt", mode="before")
    @classmethod
    def _texts(cls, given: Any) -> Any:
        refuse_tokens("prompt", given)
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
