"""`calls.explain`: a call's record, of this node or of the one that had its caller.

Law of this file: it looks and asks; a service hears of its own calls only, and who may hear of all is told to it. Peers are asked at once,
for a moment, and only by the node that was asked itself.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from tars.core.call_effects import AttemptRecord
from tars.core.types import NodeId
from tars.errors import TarsError, UnknownCall
from tars.messages.base import CallContext
from tars.messages.calls import (
    MOST_CALLS,
    AttemptDescription,
    CallDescription,
    ExplainCallParams,
    ExplainCallResult,
    WaitDescription,
)
from tars.serving.call_record import CallRecord, CallRecords
from tars.serving.call_words import explained
from tars.serving.peer_target import PeerConnection

log = logging.getLogger(__name__)

ASK_SECONDS = 2.0
"""For a peer's word: whoever explains a call has time, and a frozen peer must not take all of it."""


class Names:
    """What people call nodes (by id), and the devices of replicas (by replica)."""

    def __init__(self, nodes: Mapping[NodeId, str], devices: Mapping[str, str]):
        self._nodes = nodes
        self._devices = devices

    def node(self, node: str) -> str:
        """A node's name; of one that nobody knows its id."""
        return self._nodes.get(NodeId(node), node)

    def device(self, replica: str) -> str:
        """The name of the device that a replica is on; empty: not known (any more)."""
        return self._devices.get(replica, "")


class CallExplainer:
    """See the module's law. `live` gives the peers that can be asked, `connection` the way to one."""

    def __init__(
        self,
        node: str,
        records: CallRecords,
        names: Callable[[], Names],
        live: Callable[[], Sequence[NodeId]] = tuple,
        connection: Callable[[NodeId], PeerConnection] | None = None,
    ):
        self._node = node
        self._records = records
        self._names = names
        self._live = live
        self._connection = connection

    async def explain(self, params: ExplainCallParams, call: CallContext) -> ExplainCallResult:
        """The calls of an id. Raises `UnknownCall`: none, or none that the caller may hear of."""
        asked = params.id.strip().lower()
        names = self._names()
        calls = [self._described(each, names) for each in self._records.find(asked)]
        if not call.hops and all(each.forwarded_by is not None for each in calls):
            # Only an attempt of it was here, or nothing.
            calls = await self._elsewhere(asked) or calls
        if not call.administrator:
            calls = [each for each in calls if each.caller == call.caller]
        if not calls:
            raise UnknownCall(
                "No node that answers knows a call of that id. Each node keeps its last 1,000 calls until it ends; the id is the "
                "X-Request-Id of an answer, and the trace_id of an error. An API key sees its own calls only."
            )
        calls = sorted(calls, key=lambda each: each.started_at)[-MOST_CALLS:]
        return ExplainCallResult(calls=calls, text=explained(calls))

    async def _elsewhere(self, asked: str) -> list[CallDescription]:
        """What the peers know of it: the calls themselves, where one of them had the caller, else what they know of attempts."""
        found = await asyncio.gather(*(self._ask(node, asked) for node in self._live()))
        calls = [each for calls in found for each in calls]
        return [each for each in calls if each.forwarded_by is None] or calls

    async def _ask(self, node: NodeId, asked: str) -> Iterable[CallDescription]:
        if self._connection is None:
            return ()
        try:
            async with asyncio.timeout(ASK_SECONDS):
                said: Any = await self._connection(node).call(
                    "calls.explain", {"id": asked}, timeout=ASK_SECONDS, hops=1
                )
            return ExplainCallResult.model_validate(said).calls
        except (TarsError, TimeoutError, ValidationError) as error:
            log.debug("node %s tells nothing of call %s: %s", node, asked, error)
            return ()

    def _described(self, record: CallRecord, names: Names) -> CallDescription:
        return CallDescription(
            id=record.id,
            method=record.method,
            model=record.model,
            caller=record.caller,
            face=record.face,
            node=self._node,
            node_name=names.node(self._node),
            forwarded_by=record.forwarded_by,
            started_at=record.at,
            seconds=None if record.ended is None else record.ended - record.started,
            outcome=record.outcome,
            error=record.error,
            repeats=record.repeats,
            attempts=[
                _attempt(each, number, record.started, names) for number, each in enumerate(list(record.attempts))
            ],
            waits=[
                WaitDescription(
                    what=each.what,
                    after_seconds=each.started - record.started,
                    seconds=None if each.ended is None else each.ended - each.started,
                )
                for each in record.waits
            ],
        )


def _attempt(attempt: AttemptRecord, number: int, began: float, names: Names) -> AttemptDescription:
    reasons: Mapping[Any, str] = attempt.ranked.reasons
    return AttemptDescription(
        replica=attempt.replica,
        node=attempt.node,
        node_name=names.node(attempt.node),
        device_name=names.device(attempt.replica),
        after_seconds=attempt.started - began,
        seconds=None if attempt.ended is None else attempt.ended - attempt.started,
        why=attempt.why(number),
        reason=attempt.reason,
        passed_over=[f"{replica}: {reason}" for replica, reason in reasons.items() if replica != attempt.replica],
        outcome=attempt.outcome,
        tokens=attempt.tokens,
    )
