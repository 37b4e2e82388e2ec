"""What a node and a worker say to each other over the pipe.

Law of this file: names and shapes only, shared by both ends. Requests go from the node to the worker, notifications both ways:

| method | from | params | answered by |
|---|---|---|---|
| `worker.load` | node | a `LoadSpec` | `LoadedInfo`, after `worker.progress`es |
| `worker.chat` `.complete` `.embed` `.rerank` `.tokenize` `.save` | node | `{work, timeout_ms, resume}` | the `Finished`, after deltas |
| `worker.ping` | node | none | `Pong` |
| `worker.cancel` (notification) | node | `{id}` | the cancelled call's error |
| `worker.shutdown` (notification) | node | none | the end of the process |
| `worker.progress` (notification) | worker | a `LoadProgress` | |
| `worker.step` (notification) | worker | `[row, ...]`, see `Row` | |

A call's id is its sequence number in the engine. One step of the engine is one write: a `worker.step` with the deltas of all calls, and
behind it the answers of the calls that ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tars.errors import InternalError, TarsError
from tars.messages.base import Message
from tars.messages.inference import (
    ChatParams,
    CompleteParams,
    Delta,
    Embedded,
    EmbedParams,
    Generated,
    Reranked,
    RerankParams,
    Tokenized,
    TokenizeParams,
)
from tars.messages.node import EngineCounters
from tars.workers.engine import Finished, Saved, SaveParams, Work

LOAD = "worker.load"
PING = "worker.ping"
CANCEL = "worker.cancel"
SHUTDOWN = "worker.shutdown"
PROGRESS = "worker.progress"
STEP = "worker.step"

WORK_OF: dict[str, type[Work]] = {
    "worker.chat": ChatParams,
    "worker.complete": CompleteParams,
    "worker.embed": EmbedParams,
    "worker.rerank": RerankParams,
    "worker.tokenize": TokenizeParams,
    "worker.save": SaveParams,
}
"""The params model of each kind of work."""

METHOD_OF: dict[type[Work], str] = {work: method for method, work in WORK_OF.items()}

RESULT_OF: dict[type[Work], type[Finished]] = {
    ChatParams: Generated,
    CompleteParams: Generated,
    EmbedParams: Embedded,
    RerankParams: Reranked,
    TokenizeParams: Tokenized,
    SaveParams: Saved,
}
"""What ends each kind of work well."""


Row = Sequence[Any]
"""A delta on the pipe: `[id, index, text, token_ids]`, and where it has more than a token's text a fifth element, the other fields by name.

Names would be most of the bytes, and a model's dump and its check most of the time: this is the one message that comes every few
milliseconds for each sequence.
"""


def row_of(sequence: int, delta: Delta) -> Row:
    """A delta as it goes over the pipe."""
    if delta.logprobs is None and not delta.reasoning and not delta.tool_calls and not delta.ended:
        return (sequence, delta.index, delta.text, delta.token_ids)
    more = delta.model_dump(include={"logprobs", "reasoning", "tool_calls", "ended"})
    return (sequence, delta.index, delta.text, delta.token_ids, more)


def delta_of(row: Row) -> Delta:
    """The delta of a row."""
    if len(row) == 4:
        # The checked constructor is compiled; `model_construct` is Python and slower.
        return Delta(text=row[2], token_ids=row[3], index=row[1])
    return Delta.model_validate({"text": row[2], "token_ids": row[3], "index": row[1], **row[4]})


class Pong(Message):
    """A worker's answer to `worker.ping`, made by its event loop while the engine works."""

    mark: int
    """The engine's progress mark."""
    in_flight: int
    memory_bytes: int
    counters: EngineCounters | None = None


def request(number: int, method: str, params: dict[str, Any]) -> dict[str, Any]:
    """A JSON-RPC request."""
    return {"jsonrpc": "2.0", "id": number, "method": method, "params": params}


def notification(method: str, params: dict[str, Any] | Sequence[Row]) -> dict[str, Any]:
    """A JSON-RPC notification."""
    return {"jsonrpc": "2.0", "method": method, "params": params}


def result(number: int, value: Message) -> dict[str, Any]:
    """A JSON-RPC success."""
    return {"jsonrpc": "2.0", "id": number, "result": value.model_dump()}


def failure(number: int, error: Exception) -> dict[str, Any]:
    """A JSON-RPC error; whatever is not a `TarsError` is named a bug, without its text."""
    if not isinstance(error, TarsError):
        error = InternalError("The worker failed on this call; the node's log has the details.")
    return {"jsonrpc": "2.0", "id": number, "error": error.to_json()}
