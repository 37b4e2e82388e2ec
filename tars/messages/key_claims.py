"""Params and results of `mesh.claim`, `mesh.settle` and `mesh.await_answer`: who runs a call under an idempotency key, among nodes.

Law of this file: `core.idempotency_claims`' questions and replies as JSON. `key` and `body` are digests, so that no home learns what a
caller asked; the answer is there for those who repeat the call.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tars.messages.base import Message

_DIGEST = "^[0-9a-f]{64}$"


class KeyClaim(Message):
    """The right of a node to run the call of one key."""

    owner: str = Field(min_length=1, max_length=64)
    token: str = Field(min_length=1, max_length=64)
    epoch: int = Field(1, ge=1, le=2**31)


class ClaimKeyParams(Message):
    """`mesh.claim`: may the sender run it? It claims for itself only."""

    key: str = Field(pattern=_DIGEST, description="Of the caller, the method and the caller's key.")
    body: str = Field(pattern=_DIGEST, description="Of the call's params.")
    claim: KeyClaim
    gone: str | None = Field(None, max_length=64, description="The token of a claim that the sender found abandoned.")


class SettleKeyParams(Message):
    """`mesh.settle`: what came of it."""

    key: str = Field(pattern=_DIGEST)
    body: str = Field(pattern=_DIGEST)
    claim: KeyClaim
    answer: str | None = Field(
        None, description="The result as JSON text; None where it is too large: the owner has it."
    )
    failed: bool = False


class AwaitAnswerParams(Message):
    """`mesh.await_answer`, to the one who runs the call: what came of it?"""

    key: str = Field(pattern=_DIGEST)
    body: str = Field(pattern=_DIGEST)
    wait_ms: int = Field(ge=0, le=10_000, description="How long the question is kept while the call runs.")


class KeyResult(Message):
    """What the node says of the key."""

    state: Literal["granted", "running", "answered", "conflict", "unknown"]
    claim: KeyClaim | None = None
    answer: str | None = None
