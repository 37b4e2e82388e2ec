"""A repeated idempotency key gets the first call's answer, or joins it while it runs.

Law of this file: only answers are kept, never errors: after a failure the key is free again, so that a retry really retries.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from tars.core.types import Bytes
from tars.errors import IdempotencyConflict
from tars.messages.base import CallContext, Message

KEEP_SECONDS = 600.0
"""How long an answer is kept: longer than any client's retry schedule (AWS and Stripe SDKs give up within minutes)."""
KEEP_ANSWERS = 1024
"""And how many: a chat answer is a few KiB, so a few MiB."""
KEEP_BYTES = Bytes.mib(64)
"""And how much in all: 2,048 vectors as Python floats are some 25 MB, so the newest few such answers. The oldest go first."""


@dataclass(slots=True)
class _Entry:
    body: bytes
    answer: asyncio.Future[Message | None]
    expires: float
    size: int = 0


class Claim:
    """The right, and the duty, to run a call: end it with `succeed` or `fail`."""

    def __init__(self, answers: IdempotentAnswers | None, key: tuple[str, str, str] | None, entry: _Entry | None):
        self._answers = answers
        self._key = key
        self._entry = entry

    def succeed(self, answer: Message, size: int) -> None:
        """Give the answer to all who joined, and keep it. `size`: about the bytes that it takes in memory."""
        if self._entry is not None and not self._entry.answer.done():
            self._entry.size = size
            self._entry.answer.set_result(answer)

    def fail(self) -> None:
        """Free the key, unless `succeed` came first; one of those who joined takes over."""
        if self._entry is None or self._entry.answer.done():
            return
        self._entry.answer.set_result(None)
        assert self._answers is not None
        assert self._key is not None
        self._answers.forget(self._key, self._entry)


class IdempotentAnswers:
    """See the module's law. One per node; `now` is the monotonic clock."""

    def __init__(self, now: Callable[[], float]):
        self._now = now
        self._entries: OrderedDict[tuple[str, str, str], _Entry] = OrderedDict()

    async def claim_or_answer(self, call: CallContext, params: Message) -> Claim | Message:
        """The kept (or joined) answer, or a `Claim` to run the call. Keys are per caller and method.

        Raises `IdempotencyConflict` for another body under the same key.
        """
        if call.idempotency_key is None:
            return Claim(None, None, None)
        key = (call.caller, call.method, call.idempotency_key)
        body = hashlib.sha256(params.model_dump_json().encode()).digest()
        while True:
            self._expire()
            entry = self._entries.get(key)
            if entry is None:
                entry = _Entry(body, asyncio.get_running_loop().create_future(), self._now() + KEEP_SECONDS)
                self._entries[key] = entry
                return Claim(self, key, entry)
            if entry.body != body:
                raise IdempotencyConflict(
                    "this idempotency key was used for a call with other params; use a new key for a new call"
                )
            answer = await asyncio.shield(entry.answer)
            if answer is not None:
                return answer

    def forget(self, key: tuple[str, str, str], entry: _Entry) -> None:
        """Drop the entry, if it is still the key's."""
        if self._entries.get(key) is entry:
            del self._entries[key]

    def _expire(self) -> None:
        now = self._now()
        kept = sum(entry.size for entry in self._entries.values())
        for key, entry in list(self._entries.items()):
            full = len(self._entries) > KEEP_ANSWERS or kept > KEEP_BYTES
            if entry.expires > now and not full:
                break
            if entry.answer.done():
                kept -= entry.size
                del self._entries[key]
