"""Questions about idempotency keys on their way to a peer, and a peer's on their way here.

Law of this file: `core.idempotency_claims`' questions to and from messages, with the time that each may take; it decides nothing. A peer
that does not answer in time is left out for a moment, so that a frozen one does not hold up every call with a key.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from pydantic import ValidationError

from tars.core.idempotency_claims import AnswerQuestion, ClaimQuestion, Question, Settlement, patience
from tars.core.idempotency_keys import Claim, KeyReply, KeyState
from tars.core.types import NodeId
from tars.errors import InvalidParams, TarsError
from tars.messages.key_claims import AwaitAnswerParams, ClaimKeyParams, KeyClaim, KeyResult, SettleKeyParams
from tars.serving.peer_target import PeerConnection

log = logging.getLogger(__name__)

SILENT_SECONDS = 2.0
"""A home that did not answer is not asked for so long, unless it is heard of: membership knows within 5 s whether it is dead."""


class KeysAtPeers:
    """Asks the peers. `node` is this one; `live` gives the others that may keep keys, `connection` the way to one of them (raises
    `PeerUnreachable` where no address of it is known)."""

    def __init__(
        self,
        node: NodeId,
        live: Callable[[], Sequence[NodeId]],
        connection: Callable[[NodeId], PeerConnection],
        now: Callable[[], float] = time.monotonic,
    ):
        self.node = node
        self.live = live
        self._connection = connection
        self._now = now
        self._silent: dict[NodeId, float] = {}

    def heard(self, node: NodeId) -> None:
        """A sign of life: it is asked again at once."""
        self._silent.pop(node, None)

    async def ask(self, node: NodeId, question: Question) -> KeyReply | None:
        """What a peer says; None where it says nothing that can be used."""
        if not isinstance(question, AnswerQuestion) and self._silent.get(node, 0.0) > self._now():
            return None
        seconds = patience(question)
        method, params = _message(question)
        try:
            async with asyncio.timeout(seconds):
                said = await self._connection(node).call(method, params, timeout=seconds)
            reply = reply_of(KeyResult.model_validate(said))
        except TimeoutError:
            log.debug("node %s does not answer %s", node, method)
            self._silent[node] = self._now() + SILENT_SECONDS
            return None
        except (TarsError, ValidationError) as error:
            log.debug("node %s does not take %s: %s", node, method, error)
            return None
        self.heard(node)
        return reply


def _message(question: Question) -> tuple[str, dict[str, Any]]:
    common = {"key": question.key, "body": question.body}
    match question:
        case ClaimQuestion():
            params: dict[str, Any] = {**common, "claim": _claim_json(question.claim)}
            return "mesh.claim", params if question.gone is None else {**params, "gone": question.gone}
        case Settlement():
            params = {**common, "claim": _claim_json(question.claim), "failed": question.failed}
            return "mesh.settle", params if question.answer is None else {**params, "answer": question.answer.decode()}
        case AnswerQuestion():
            return "mesh.await_answer", {**common, "wait_ms": round(question.wait * 1000)}


def question_of(params: ClaimKeyParams | SettleKeyParams | AwaitAnswerParams, sender: str) -> Question:
    """A peer's question. Raises `InvalidParams` for a claim in another node's name."""
    match params:
        case ClaimKeyParams():
            if params.claim.owner != sender:
                raise InvalidParams("A node claims an idempotency key for itself only, so nothing was granted.")
            return ClaimQuestion(params.key, params.body, _claim(params.claim), params.gone)
        case SettleKeyParams():
            answer = None if params.answer is None else params.answer.encode()
            return Settlement(params.key, params.body, _claim(params.claim), answer, params.failed)
        case AwaitAnswerParams():
            return AnswerQuestion(params.key, params.body, params.wait_ms / 1000, NodeId(sender))


def result_of(reply: KeyReply) -> KeyResult:
    """As it is sent."""
    claim = reply.claim
    return KeyResult(
        state=reply.state.value,
        claim=None if claim is None else KeyClaim(owner=claim.owner, token=claim.token, epoch=claim.epoch),
        answer=None if reply.answer is None else reply.answer.decode(),
    )


def reply_of(result: KeyResult) -> KeyReply:
    """As it was sent."""
    return KeyReply(
        KeyState(result.state),
        None if result.claim is None else _claim(result.claim),
        None if result.answer is None else result.answer.encode(),
    )


def _claim(claim: KeyClaim) -> Claim:
    return Claim(NodeId(claim.owner), claim.token, claim.epoch)


def _claim_json(claim: Claim) -> dict[str, Any]:
    return {"owner": claim.owner, "token": claim.token, "epoch": claim.epoch}
