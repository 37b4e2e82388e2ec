"""Params, deltas and results of `inference.*`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from tars.messages.base import MAX_NAME_LENGTH, Message

FinishReason = Literal["stop", "length", "tool_calls", "cancelled"]


class ToolCall(Message):
    """One call of a function that the model asks for. `arguments` is JSON text, as the model wrote it."""

    id: str = Field(max_length=MAX_NAME_LENGTH)
    name: str = Field(max_length=MAX_NAME_LENGTH)
    arguments: str


class ToolCallDelta(Message):
    """A piece of one: `id` and `name` come with its first piece, `arguments` grows."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


ToolName = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_.-]+$")]
"""What OpenAI allows, and the dot of names in namespaces."""


class Tool(Message):
    """A function that the model may call. `parameters` is the JSON schema of its arguments."""

    name: ToolName
    description: str = ""
    parameters: dict[str, Any] = Field(default_factory=lambda: {"type": "object", "properties": {}})


class ChatMessage(Message):
    """One turn of a chat."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str
    reasoning: str | None = Field(None, description="What a reasoning model thought before it answered.")
    tool_calls: list[ToolCall] = Field(default_factory=list, max_length=128)
    tool_call_id: str | None = Field(
        None, max_length=MAX_NAME_LENGTH, description="Of a `tool` turn: which call it answers."
    )

    @model_validator(mode="after")
    def _fits_its_role(self) -> ChatMessage:
        if self.role != "assistant" and (self.tool_calls or self.reasoning is not None):
            raise ValueError("only an assistant's message has tool_calls or reasoning")
        if self.role != "tool" and self.tool_call_id is not None:
            raise ValueError("only a tool's message has tool_call_id")
        return self

    def wire(self) -> dict[str, Any]:
        """Most turns are a role and a text."""
        return {name: value for name, value in self.__dict__.items() if value is not None and value != []}


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
    seed: int | None = Field(None, ge=0, le=2**32 - 1, description="Default: one is drawn, and the answer says which.")
    n: int = Field(1, ge=1, le=16, description="So many answers to the same prompt, which is computed once.")
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
    tools: list[Tool] = Field(default_factory=list, max_length=128)
    tool_choice: str = Field(
        "auto",
        max_length=MAX_NAME_LENGTH,
        description="`auto`, `none`, `required`, or the name of the one tool that must be called.",
    )
    reasoning: bool | None = Field(
        None,
        description="False asks a model that can to answer without thinking first; default: the template's own way.",
    )

    @model_validator(mode="after")
    def _choice_exists(self) -> ChatParams:
        names = [tool.name for tool in self.tools]
        if len(set(names)) < len(names):
            raise ValueError("two tools have the same name")
        if self.tool_choice not in ("auto", "none") and not self.tools:
            raise ValueError("tool_choice asks for a tool, and there are no tools")
        if self.tool_choice not in ("auto", "none", "required", *names):
            raise ValueError("tool_choice must be auto, none, required or the name of one of the tools")
        return self


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
    token_ids: list[int] = Field(default_factory=list, description="All tokens so far accounted for, markup included.")
    logprobs: list[TokenLogprob] | None = None
    index: int = Field(0, description="Which of the `n` answers.")
    reasoning: str = Field("", description="What the model thinks, apart from its answer.")
    tool_calls: list[ToolCallDelta] = Field(default_factory=list)
    ended: bool = Field(
        False,
        description="True in the last piece of one of several answers, and where an answer's last piece is known as such: it is whole.",
    )

    def wire(self) -> dict[str, Any]:
        """Text and tokens always; the rest, which would be longer than both in every piece of every answer, only where it is set."""
        said: dict[str, Any] = {"text": self.text, "token_ids": self.token_ids}
        if self.logprobs is not None:
            said["logprobs"] = self.logprobs
        if self.index:
            said["index"] = self.index
        if self.reasoning:
            said["reasoning"] = self.reasoning
        if self.tool_calls:
            said["tool_calls"] = self.tool_calls
        if self.ended:
            said["ended"] = True
        return said


class Progress(Message):
    """How far the load of a model is that a call waits for: `inference.progress`."""

    stage: str = Field(description="`fetch` while the file is copied, then `spawn`, `import`, `read`, `load`, `warm`.")
    percent: float = Field(ge=0, le=100)
    node: str = Field(description="The name of the node that loads it.")


class Usage(Message):
    """Counted tokens."""

    prompt_tokens: int
    completion_tokens: int = 0
    total_tokens: int
    cached_tokens: int = Field(0, description="Of the prompt's tokens: how many were not computed again.")


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
    tokens: int = Field(0, description="Given to the caller by this attempt before it broke; of all answers.")
    reason: str = Field("", description="Why this replica.")


class ServedBy(Message):
    """Who answered. `simulated` is true where the device is a declared one that computes on the CPU."""

    node: str
    replica: str
    device: str
    simulated: bool = False
    attempts: list[Attempt] = Field(default_factory=list)
    calls_left: int | None = Field(
        None, description="Between nodes: calls that the replica still had when this one was done."
    )
    call: str = Field("", description="The id of the call that this answer was computed for: `tars explain call ID`.")

    def wire(self) -> dict[str, Any]:
        """Clients never see what only nodes tell each other."""
        said = dict(self.__dict__)
        if not self.call:
            del said["call"]
        if self.calls_left is None:
            del said["calls_left"]
        return said


class Choice(Message):
    """One of several answers to a prompt. Its seed is the first one's plus `index`."""

    index: int
    text: str
    finish_reason: FinishReason
    logprobs: list[TokenLogprob] | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCall] = Field(default_factory=list)


class Generated(Message):
    """What an engine ends a generation with (the worker's answer; `text` is the whole text of the first answer)."""

    text: str
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    logprobs: list[TokenLogprob] | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCall] = Field(default_factory=list)
    seed: int | None = None
    further: list[Choice] = Field(default_factory=list, description="The other answers, where `n` asked for several.")


class ChatResult(Message):
    """`inference.chat`'s answer."""

    model: str
    message: ChatMessage
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    served_by: ServedBy
    logprobs: list[TokenLogprob] | None = None
    seed: int | None = Field(None, description="Send it to get the same text again.")
    further: list[Choice] = Field(default_factory=list, description="The other answers, where `n` asked for several.")

    def choices(self) -> list[Choice]:
        """All answers, the first one too."""
        first = Choice(
            index=0,
            text=self.message.content,
            finish_reason=self.finish_reason,
            logprobs=self.logprobs,
            reasoning=self.message.reasoning,
            tool_calls=self.message.tool_calls,
        )
        return [first, *self.further]


class CompleteResult(Message):
    """`inference.complete`'s answer."""

    model: str
    text: str
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    served_by: ServedBy
    logprobs: list[TokenLogprob] | None = None
    seed: int | None = Field(None, description="Send it to get the same text again.")
    further: list[Choice] = Field(default_factory=list, description="The other answers, where `n` asked for several.")

    def choices(self) -> list[Choice]:
        """All answers, the first one too."""
        first = Choice(index=0, text=self.text, finish_reason=self.finish_reason, logprobs=self.logprobs)
        return [first, *self.further]


class EmbedParams(Message):
    """`inference.embed`."""

    model: str | None = Field(None, max_length=MAX_NAME_LENGTH)
    input: str | list[str] = Field(description="One text or up to 2,048 of them.")
    encoding_format: Literal["float", "base64"] = Field(
        "float", description="base64: the vector's little-endian bytes."
    )
    output_type: Literal["float", "int8", "binary"] = Field(
        "float",
        description="int8: each value of the unit vector times 127, rounded. binary: its sign, one bit a value, first value in the "
        "highest bit, as int8 bytes. Both cost neighbours; neither is a default.",
    )
    truncate: bool = Field(
        True, description="False: a text longer than the model's limit is an error instead of being cut."
    )
    overflow: Literal["mean"] | None = Field(
        None,
        description="mean: a text longer than the limit is split, and its pieces' vectors averaged by their tokens.",
    )
    dimensions: int | None = Field(
        None, ge=1, le=65_536, description="Only the first so many values, made unit length again (Matryoshka models)."
    )
    input_type: Literal["query", "passage"] | None = Field(
        None, description="Puts the model's own prefix for queries or passages before each text, where it has one."
    )
    prompt: str | None = Field(
        None, max_length=4096, description="Put before each text instead of the model's own prefix; may be empty."
    )

    @model_validator(mode="after")
    def _some_texts(self) -> EmbedParams:
        count = 1 if isinstance(self.input, str) else len(self.input)
        if not 1 <= count <= 2048:
            raise ValueError("input needs 1 to 2048 texts")
        if self.overflow is not None and not self.truncate:
            raise ValueError("give overflow or truncate: false, not both")
        if self.prompt is not None and self.input_type is not None:
            raise ValueError("give prompt or input_type, not both")
        if self.output_type == "binary" and self.dimensions is not None and self.dimensions % 8:
            raise ValueError("binary output needs dimensions that are a multiple of 8")
        return self


class Embedded(Message):
    """The worker's answer: `vectors` is base64 of little-endian values of the asked type, one string a text; unit length as float."""

    vectors: list[str]
    dimensions: int
    truncated: list[int] = Field(default_factory=list, description="Indices of the texts that were cut.")
    split: list[int] = Field(default_factory=list, description="Indices of the texts that were split and averaged.")
    prompt_tokens: int
    timings: Timings


class EmbedResult(Message):
    """`inference.embed`'s answer: vectors in the order of the input, unit length as float."""

    model: str
    embeddings: list[list[float]] | list[list[int]] | list[str]
    dimensions: int
    truncated: list[int]
    split: list[int] = Field(default_factory=list)
    usage: Usage
    timings: Timings
    served_by: ServedBy


class RerankParams(Message):
    """`inference.rerank`."""

    model: str | None = Field(None, max_length=MAX_NAME_LENGTH)
    query: str
    documents: list[str] = Field(min_length=1, max_length=2048)
    top_n: int | None = Field(None, ge=1, description="Only the best so many; default: all.")
    return_documents: bool = False
    truncate: bool = Field(
        True, description="False: a pair longer than the model's limit is an error instead of being cut."
    )


class Scored(Message):
    """One document's relevance to the query."""

    index: int = Field(description="Its place in `documents`.")
    score: float = Field(
        description="0 to 1 (sigmoid of the model's logit) where the model gives one number; higher is nearer."
    )
    document: str | None = None


class Reranked(Message):
    """The worker's answer: one score a document, in the order of the input."""

    scores: list[float]
    truncated: list[int] = Field(default_factory=list, description="Indices of the documents that were cut.")
    prompt_tokens: int
    timings: Timings


class RerankResult(Message):
    """`inference.rerank`'s answer: best first; equal scores in the order of the input."""

    model: str
    results: list[Scored]
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
