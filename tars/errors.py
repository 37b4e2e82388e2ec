"""Every error that a caller, a peer or an operator can meet, as one tree.

Law of this file: `CallerError` means "you misused it" (never retried), `ServerStateError` means "not now" (mostly retryable),
`ModelError` is the domain's. `kind` is the stable key; the message says what happened, what it means and what to do.
No message carries exception text, a path or a secret from the inside. A subclass is a row: code, kind, retryable.
"""

from __future__ import annotations

from typing import Any, ClassVar


class TarsError(Exception):
    """Root of the tree. `code` is the JSON-RPC code, `http_status` what the REST and OpenAI faces answer."""

    code: ClassVar[int] = -32603
    kind: ClassVar[str] = "internal"
    http_status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, retry_after_ms: int | None = None, details: dict[str, Any] | None = None):
        super().__init__(message)
        self.message = message
        self.retry_after_ms = retry_after_ms
        self.details = details or {}
        self.trace_id = ""
        """Of an error that a node sent: the id of its call, for `tars explain call ID`."""

    def to_json(self, *, node: str = "", trace_id: str = "") -> dict[str, Any]:
        """The JSON-RPC error object: `{code, message, data: {kind, retryable, retry_after_ms, node, trace_id, ...details}}`."""
        return {
            "code": self.code,
            "message": self.message,
            "data": {
                "kind": self.kind,
                "retryable": self.retryable,
                "retry_after_ms": self.retry_after_ms,
                "node": node,
                "trace_id": trace_id,
                **self.details,
            },
        }


class InternalError(TarsError):
    """A bug in TARS. The trace id finds the traceback in the node's log; nothing of it is sent."""


# --- you misused it -------------------------------------------------------------------------------------------------


class CallerError(TarsError):
    """The caller must change the call; sending it again cannot help."""

    code = -32600
    kind = "invalid_request"
    http_status = 400


class ParseError(CallerError):
    """The body is not JSON."""

    code = -32700
    kind = "parse_error"


class InvalidRequest(CallerError):
    """JSON, but not a JSON-RPC 2.0 request."""


class MethodNotFound(CallerError):
    """No such method."""

    code = -32601
    kind = "method_not_found"
    http_status = 404


class InvalidParams(CallerError):
    """Wrong, missing or unknown parameter; `details["errors"]` lists each with its place."""

    code = -32602
    kind = "invalid_params"


class LimitExceeded(CallerError):
    """Over a bound: body size, batch length, nesting depth, string length. `details` carries `limit` and `actual`."""

    code = -32016
    kind = "limit_exceeded"
    http_status = 413


class Unauthorized(CallerError):
    """No API key, or a wrong one."""

    code = -32017
    kind = "unauthorized"
    http_status = 401


class Forbidden(CallerError):
    """A Host or Origin that this node does not serve (DNS rebinding)."""

    code = -32018
    kind = "forbidden"
    http_status = 403


class NotAMember(CallerError):
    """A node that is no member of this mesh: never admitted, removed, or with another key than it was admitted with."""

    code = -32022
    kind = "not_a_member"
    http_status = 403


class JoinRefused(CallerError):
    """A join that was not granted; `details["reason"]`: `malformed`, `unknown`, `used`, `expired`, `revoked`, `other_mesh`, `clock`..."""

    code = -32023
    kind = "join_refused"
    http_status = 403


class UnknownCall(CallerError):
    """No node that answers knows a call of that id, or it is another caller's: `calls.explain`."""

    code = -32024
    kind = "unknown_call"
    http_status = 404


class UnsupportedMediaType(CallerError):
    """A body that is not declared as JSON, which a web page could send without asking, or a compressed one."""

    code = -32019
    kind = "unsupported_media_type"
    http_status = 415


# --- not now --------------------------------------------------------------------------------------------------------


class ServerStateError(TarsError):
    """The call is fine; this node cannot take it now."""

    code = -32000
    kind = "server_error"
    http_status = 503
    retryable = True


class Overloaded(ServerStateError):
    """Queue or concurrency bound reached, or the call would begin too late for its deadline; `details["reason"]`."""

    code = -32010
    kind = "overloaded"
    http_status = 429


class DeadlineExceeded(ServerStateError):
    """The call's time budget is gone; the work was stopped."""

    code = -32011
    kind = "deadline_exceeded"
    http_status = 504


class PeerUnreachable(ServerStateError):
    """The peer that holds the replica does not answer."""

    code = -32012
    kind = "peer_unreachable"


class BadPeerAnswer(ServerStateError):
    """What answered is no JSON-RPC answer to the call: another program on that port, or a proxy's page. Not retried there."""

    code = -32020
    kind = "bad_peer_answer"
    http_status = 502
    retryable = False


class StaleRoute(ServerStateError):
    """A peer sent a call for a model of which this node has no ready replica any more. The peer tries another node."""

    code = -32021
    kind = "stale_route"


class Draining(ServerStateError):
    """The node or the process is being drained or stopped."""

    code = -32013
    kind = "draining"


class WorkerCrashed(ServerStateError):
    """The worker process died, was killed or hung while it had this call. It is being restarted."""

    code = -32014
    kind = "worker_crashed"


class Cancelled(ServerStateError):
    """The caller went away or cancelled."""

    code = -32015
    kind = "cancelled"
    http_status = 499
    retryable = False


# --- the domain's ---------------------------------------------------------------------------------------------------


class ModelError(TarsError):
    """About a model: positive codes."""

    code = 1000
    kind = "model_error"
    http_status = 400


class UnknownModel(ModelError):
    """No such model here; `details["known"]` lists what is."""

    code = 1001
    kind = "unknown_model"
    http_status = 404


class DoesNotFit(ModelError):
    """Fits on no device; `details["devices"]` has bytes needed against bytes free for each."""

    code = 1002
    kind = "does_not_fit"
    http_status = 507


class StillLoading(ModelError):
    """Known and placed, not ready; `details` has `stage` and `percent`."""

    code = 1003
    kind = "still_loading"
    http_status = 503
    retryable = True


class WrongModelKind(ModelError):
    """An embedding model was asked to chat, or the reverse."""

    code = 1004
    kind = "wrong_model_kind"


class PromptTooLong(ModelError):
    """Prompt tokens do not fit the context; `details` has `prompt_tokens`, `context`."""

    code = 1005
    kind = "prompt_too_long"


class BadModelFile(ModelError):
    """Not a GGUF, truncated, corrupt or of an unknown architecture."""

    code = 1006
    kind = "bad_model_file"
    http_status = 422


class BadGrammar(ModelError):
    """A grammar or JSON schema that cannot be compiled."""

    code = 1007
    kind = "bad_grammar"


class IdempotencyConflict(ModelError):
    """The same idempotency key came with another body."""

    code = 1008
    kind = "idempotency_conflict"
    http_status = 409


class ReplicaFailed(ModelError):
    """The replica could not be loaded and TARS gave up; the operator must act."""

    code = 1009
    kind = "replica_failed"
    http_status = 503


class DiskFull(ModelError):
    """No room to write the state or a model file."""

    code = 1010
    kind = "disk_full"
    http_status = 507
    retryable = True


class ModelFileMissing(ModelError):
    """The catalogue knows the model, but its file is not on this PC."""

    code = 1011
    kind = "model_file_missing"
    http_status = 409


class TransferFailed(ModelError):
    """A model's file could not be brought here now: peers or the hub did not answer, or gave wrong bytes; `details["tried"]` lists each."""

    code = 1012
    kind = "transfer_failed"
    http_status = 502
    retryable = True


# --- the operator's, before a node serves ---------------------------------------------------------------------------


class ConfigError(TarsError):
    """A configuration that cannot be used: file, line, key and the nearest right key stand in the message."""

    kind = "config_error"


def _tree(root: type[TarsError]) -> list[type[TarsError]]:
    return [root, *(below for child in root.__subclasses__() for below in _tree(child))]


def from_json(error: dict[str, Any]) -> TarsError:
    """The error that a peer or a worker sent, as the class of its `kind`; an unknown kind becomes `TarsError` itself."""
    data = error.get("data") if isinstance(error.get("data"), dict) else {}
    assert isinstance(data, dict)
    # A branch without a kind of its own shares that of its plainest child, which comes later here and wins.
    kinds = {cls.kind: cls for cls in _tree(TarsError)}
    known = {"kind", "retryable", "retry_after_ms", "node", "trace_id"}
    made = kinds.get(str(data.get("kind")), TarsError)(
        str(error.get("message", "")),
        retry_after_ms=data.get("retry_after_ms"),
        details={key: value for key, value in data.items() if key not in known},
    )
    made.trace_id = str(data.get("trace_id") or "")
    if type(made) is TarsError and isinstance(error.get("code"), int):
        made.code = error["code"]  # type: ignore[misc]  # an unknown kind keeps the sender's code on the instance
        made.kind = str(data.get("kind", "internal"))  # type: ignore[misc]  # likewise
    return made
