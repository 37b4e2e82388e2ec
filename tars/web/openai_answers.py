"""What the OpenAI API's answers look like, made from `tars.messages`.

Law of this file: pure shapes, messages in and plain JSON out; no HTTP, no clock, no randomness (ids and times are arguments).
Shapes follow https://platform.openai.com/docs/api-reference and are tested with the `openai` client's own types.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from tars.errors import (
    CallerError,
    DeadlineExceeded,
    Forbidden,
    JoinRefused,
    ModelError,
    NotAMember,
    Overloaded,
    ServerStateError,
    TarsError,
    Unauthorized,
)
from tars.messages.inference import (
    ChatResult,
    Choice,
    CompleteResult,
    Delta,
    EmbedResult,
    FinishReason,
    Progress,
    RerankResult,
    TokenLogprob,
    Usage,
)
from tars.messages.node import ModelDescription
from tars.web.openai_tools import tool_call_pieces, tool_calls_body

Json = dict[str, Any]


def progress_comment(progress: Progress) -> bytes:
    """How far the load is that a stream waits for, as a comment, which every reader of event streams skips."""
    where = f" on {progress.node}" if progress.node else ""
    text = f"the model is being loaded{where}: {progress.stage}, {progress.percent:.0f} %"
    return f": {' '.join(text.split())}\n\n".encode("utf-8", "replace")


_ERROR_TYPES: tuple[tuple[type[TarsError], str], ...] = (
    (Unauthorized, "authentication_error"),
    (Forbidden, "permission_error"),
    (NotAMember, "permission_error"),
    (JoinRefused, "permission_error"),
    (Overloaded, "rate_limit_error"),
    (DeadlineExceeded, "timeout_error"),
    (CallerError, "invalid_request_error"),
    (ServerStateError, "service_unavailable_error"),
)
"""First row that fits wins; what fits none is decided by its HTTP status."""


def error_body(error: TarsError, trace_id: str) -> Json:
    """`{error: {message, type, param, code}}`; `code` is the stable `kind`. `trace_id` is TARS's addition: it finds the call in the log."""
    return {
        "error": {
            "message": error.message,
            "type": _error_type(error),
            "param": _first_param(error),
            "code": error.kind,
            "trace_id": trace_id,
        }
    }


def _error_type(error: TarsError) -> str:
    for cls, name in _ERROR_TYPES:
        if isinstance(error, cls):
            return name
    if isinstance(error, ModelError):
        return "invalid_request_error" if error.http_status < 500 else "service_unavailable_error"
    return "server_error"


def _first_param(error: TarsError) -> str | None:
    errors = error.details.get("errors")
    if isinstance(errors, list) and errors and isinstance(errors[0], dict):
        name = errors[0].get("at")
        return name if isinstance(name, str) and name else None
    return "model" if error.kind in ("unknown_model", "wrong_model_kind") else None


def usage_body(usage: Usage) -> Json:
    """`usage`."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def total_usage(usages: Iterable[Usage]) -> Usage:
    """The sum, for a call that ran several prompts."""
    counted = list(usages)
    prompt_tokens = sum(usage.prompt_tokens for usage in counted)
    completion_tokens = sum(usage.completion_tokens for usage in counted)
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
        cached_tokens=sum(usage.cached_tokens for usage in counted),
    )


def finish_reason(reason: FinishReason) -> str:
    """OpenAI has no word for a cancelled answer; `length` says what matters, that the text is not whole."""
    return "length" if reason == "cancelled" else reason


def chat_logprobs(logprobs: Sequence[TokenLogprob] | None) -> Json | None:
    """`choices[].logprobs` of a chat answer."""
    if logprobs is None:
        return None

    def one(token: str, logprob: float) -> Json:
        # Half a character is shown as U+FFFD, and its true bytes are lost: null says so.
        whole = None if "\ufffd" in token else list(token.encode("utf-8", "surrogatepass"))
        return {"token": token, "logprob": logprob, "bytes": whole}

    return {
        "content": [
            one(entry.token, entry.logprob) | {"top_logprobs": [one(token, value) for token, value in entry.top]}
            for entry in logprobs
        ],
        "refusal": None,
    }


def completion_logprobs(logprobs: Sequence[TokenLogprob] | None, offset: int = 0) -> Json | None:
    """`choices[].logprobs` of a completion; `offset`: characters of the answer's text before the first of these tokens."""
    if logprobs is None:
        return None
    offsets: list[int] = []
    for entry in logprobs:
        offsets.append(offset)
        offset += len(entry.token)
    return {
        "tokens": [entry.token for entry in logprobs],
        "token_logprobs": [entry.logprob for entry in logprobs],
        # Two halves of characters look the same here: the likelier one, which comes first, stays.
        "top_logprobs": [dict(reversed(entry.top)) for entry in logprobs],
        "text_offset": offsets,
    }


def chat_answer(answer_id: str, created: int, result: ChatResult) -> Json:
    """A whole `chat.completion`. `seed` is TARS's addition, in a stream's last choices too: sent again, it gives the same text again."""
    return {
        "id": answer_id,
        "object": "chat.completion",
        "created": created,
        "model": result.model,
        "choices": [
            {
                "index": choice.index,
                "message": _message(choice),
                "logprobs": chat_logprobs(choice.logprobs),
                "finish_reason": finish_reason(choice.finish_reason),
            }
            for choice in result.choices()
        ],
        "usage": usage_body(result.usage),
        "system_fingerprint": None,
        **_seed(result),
    }


def _seed(result: ChatResult | CompleteResult) -> Json:
    return {} if result.seed is None else {"seed": result.seed}


def _message(choice: Choice) -> Json:
    """`content` is null where the model only calls tools. `reasoning_content` is DeepSeek's, llama.cpp's and vLLM's."""
    said: Json = {"role": "assistant", "content": choice.text, "refusal": None}
    if choice.reasoning is not None:
        said["reasoning_content"] = choice.reasoning
    if choice.tool_calls:
        said["content"] = choice.text or None
        said["tool_calls"] = tool_calls_body(choice.tool_calls)
    return said


def completion_answer(answer_id: str, created: int, results: Sequence[CompleteResult], echoed: Sequence[str]) -> Json:
    """A whole `text_completion`: the answers to the first prompt, then those to the next; `echoed[i]` stands before those to prompt i."""
    made = [(choice, echo) for result, echo in zip(results, echoed, strict=True) for choice in result.choices()]
    return {
        "id": answer_id,
        "object": "text_completion",
        "created": created,
        "model": results[0].model,
        "choices": [
            {
                "index": index,
                "text": echo + choice.text,
                "logprobs": completion_logprobs(choice.logprobs),
                "finish_reason": finish_reason(choice.finish_reason),
            }
            for index, (choice, echo) in enumerate(made)
        ],
        "usage": usage_body(total_usage(result.usage for result in results)),
        "system_fingerprint": None,
        # Each prompt draws its own where none was given.
        **(_seed(results[0]) if len(results) == 1 else {}),
    }


class ChatChunks:
    """The chunks of one streamed chat answer. With `usage` every chunk but the last says `usage: null`, as the reference does."""

    def __init__(self, answer_id: str, created: int, model: str, *, usage: bool):
        self._head: Json = {"id": answer_id, "object": "chat.completion.chunk", "created": created, "model": model}
        self._tail: Json = {"usage": None} if usage else {}

    def role(self, index: int = 0) -> Json:
        """The first chunk of choice `index`: who speaks."""
        return self._chunk(index, {"role": "assistant", "content": "", "refusal": None}, None, None)

    def text(self, delta: Delta) -> Json:
        """One piece of an answer: text, reasoning, tool calls."""
        said: Json = {}
        if delta.reasoning:
            said["reasoning_content"] = delta.reasoning
        if delta.tool_calls:
            said["tool_calls"] = tool_call_pieces(delta.tool_calls)
        if delta.text or not said:
            said["content"] = delta.text
        return self._chunk(delta.index, said, chat_logprobs(delta.logprobs), None)

    def ends(self, result: ChatResult) -> list[Json]:
        """Why each choice ended."""
        return [
            self._chunk(choice.index, {}, None, finish_reason(choice.finish_reason)) | _seed(result)
            for choice in result.choices()
        ]

    def usage(self, usage: Usage) -> Json:
        """The last chunk where the caller asked for the usage: no choice."""
        return {**self._head, "choices": [], "usage": usage_body(usage)}

    def _chunk(self, index: int, delta: Json, logprobs: Json | None, reason: str | None) -> Json:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return {**self._head, "choices": [choice], **self._tail}


class CompletionChunks:
    """The chunks of one streamed completion of one or more prompts."""

    def __init__(self, answer_id: str, created: int, model: str, *, usage: bool):
        self._head: Json = {"id": answer_id, "object": "text_completion", "created": created, "model": model}
        self._tail: Json = {"usage": None} if usage else {}
        self._offsets: dict[int, int] = {}

    def echo(self, index: int, prompt: str) -> Json:
        """The prompt, where the caller wants it before the text."""
        return self._chunk(index, prompt, None, None)

    def text(self, index: int, delta: Delta) -> Json:
        """One piece of text of choice `index`."""
        offset = self._offsets.get(index, 0)
        self._offsets[index] = offset + sum(len(entry.token) for entry in delta.logprobs or ())
        return self._chunk(index, delta.text, completion_logprobs(delta.logprobs, offset), None)

    def ends(self, first: int, result: CompleteResult) -> list[Json]:
        """Why each choice of a prompt ended; `first` is the number of its first one."""
        return [
            self._chunk(first + choice.index, "", None, finish_reason(choice.finish_reason)) | _seed(result)
            for choice in result.choices()
        ]

    def usage(self, usages: Sequence[Usage]) -> Json:
        """The last chunk where the caller asked for the usage: the sum over the prompts."""
        return {**self._head, "choices": [], "usage": usage_body(total_usage(usages))}

    def _chunk(self, index: int, text: str, logprobs: Json | None, reason: str | None) -> Json:
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
        return {**self._head, "choices": [choice], **self._tail}


def embeddings_answer(result: EmbedResult) -> Json:
    """A `list` of embeddings. `truncated` and `split` are TARS's additions: the indices of the texts that were cut to the model's limit,
    and of those that were split and averaged.
    """
    return {
        "object": "list",
        "model": result.model,
        "data": [
            {"object": "embedding", "index": index, "embedding": vector}
            for index, vector in enumerate(result.embeddings)
        ],
        "usage": {"prompt_tokens": result.usage.prompt_tokens, "total_tokens": result.usage.total_tokens},
        "truncated": result.truncated,
        "split": result.split,
    }


def rerank_answer(answer_id: str, result: RerankResult) -> Json:
    """The best documents first, as Cohere and Jina say it. `truncated` is TARS's addition."""
    results: list[Json] = []
    for scored in result.results:
        one: Json = {"index": scored.index, "relevance_score": scored.score}
        if scored.document is not None:
            one["document"] = {"text": scored.document}
        results.append(one)
    return {
        "id": answer_id,
        "object": "list",
        "model": result.model,
        "results": results,
        "usage": {"prompt_tokens": result.usage.prompt_tokens, "total_tokens": result.usage.total_tokens},
        "truncated": result.truncated,
    }


def model_body(model: ModelDescription, created: int) -> Json:
    """One `model`. `kind`, `state` and `aliases` are TARS's additions."""
    return {
        "id": model.name,
        "object": "model",
        "created": created,
        "owned_by": "tars",
        "kind": model.model_kind,
        "state": model.state,
        "aliases": model.aliases,
    }
