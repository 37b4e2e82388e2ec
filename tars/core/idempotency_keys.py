"""Who may run a call under an idempotency key, and what came of it, as a home of the key remembers it.

Law of this file: one node's memory; what it is told and asked goes in, what it answers comes out. Who is asked in which order is
`idempotency_claims`'.

A key has two homes: the first two of the live nodes by rendezvous hash, so that every node asks the same two without agreeing on
anything, and the death of one loses nothing. A home knows one claim for a key: the right of one node to run the call. It passes on only
when its owner is gone (dead as this node sees it, or not found by whoever asks), and then with a higher epoch, so that an owner that thaws
can be told. Another body under a key that is known is refused. What a mesh in two parts does is compute a call twice, once in each part.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from enum import StrEnum

from tars.core.types import Bytes, NodeId

HOMES = 2
"""One may die at any time; two at once within the moments until a third one is told is a power cut."""
KEEP_SECONDS = 600.0
"""How long an answer is kept: longer than any client's retry schedule (AWS and Stripe SDKs give up within minutes)."""
RUNNING_SECONDS = 86_400.0
"""How long a claim is kept of which nothing is heard: the longest time that a call may take."""
KEEP_KEYS = 4096
"""How many answers, and how many claims of running calls: a chat answer is a few KiB, so some 16 MiB."""
KEEP_BYTES = Bytes.mib(64)
"""And how much in all. The oldest go first; a key that went is a new one, and its call is computed again."""
LARGEST_ANSWER = Bytes.mib(4)
"""A larger answer, such as a thousand vectors, is kept by its owner alone: most are never asked for again."""


class KeyState(StrEnum):
    """What a node says of a key."""

    GRANTED = "granted"
    """The call is the asker's to run."""
    RUNNING = "running"
    """The claim's owner runs it."""
    ANSWERED = "answered"
    """It was run; without an `answer` that lies with the claim's owner."""
    CONFLICT = "conflict"
    """The key is another body's."""
    UNKNOWN = "unknown"
    """This node knows no such call, or not any more."""


@dataclass(frozen=True, slots=True)
class Claim:
    """The right of a node to run the call of one key. `token` is its own, 128 bits: an owner that was restarted makes a new one."""

    owner: NodeId
    token: str
    epoch: int = 1
    """One more for each owner that was found gone."""


@dataclass(frozen=True, slots=True)
class KeyReply:
    """What a node says of a key."""

    state: KeyState
    claim: Claim | None = None
    """Whose it is: of the asker where it was granted, with the epoch that it has now."""
    answer: bytes | None = None
    """As it was given to `settle`."""


@dataclass(frozen=True, slots=True)
class KeptKey:
    """One key as its home knows it; `answered` False: it is being run."""

    key: str
    body: str
    claim: Claim
    expires: float
    answered: bool = False
    answer: bytes | None = None

    @property
    def size(self) -> int:
        """Bytes that are counted against `KEEP_BYTES`."""
        return 0 if self.answer is None else len(self.answer)


def homes_of(key: str, nodes: Iterable[NodeId], count: int = HOMES) -> tuple[NodeId, ...]:
    """The nodes that keep `key`, the one that is asked first before the others. Highest random weight (Thaler, Ravishankar 1998): a node
    that comes or goes changes nothing in the order of the others.
    """
    return tuple(sorted(set(nodes), key=lambda node: (_weight(key, node), node), reverse=True)[:count])


def new_homes(
    key: str, before: Collection[NodeId], after: Collection[NodeId], teller: NodeId | None = None
) -> tuple[NodeId, ...]:
    """The homes that `key` has among the live nodes `after` and did not have among those `before`: they are to be told of it.

    With `teller`: those that this node is to tell, which is the first of the old homes that still lives; so one of them tells, not each.
    """
    old = homes_of(key, before)
    if teller is not None and next((node for node in old if node in after), teller) != teller:
        return ()
    return tuple(home for home in homes_of(key, after) if home not in old)


def _weight(key: str, node: NodeId) -> bytes:
    return hashlib.blake2b(f"{key}|{node}".encode("utf-8", "surrogatepass"), digest_size=8).digest()


class KeyTable:
    """See the module's law. One per node. `key` and `body` are digests; `now` is the monotonic clock, in seconds."""

    def __init__(self, *, most_keys: int = KEEP_KEYS, most_bytes: int = KEEP_BYTES):
        self._most_keys = most_keys
        self._most_bytes = most_bytes
        # Apart, each in the order in which its keys end: a flood of answers must not push out the claims of calls that run.
        self._running: OrderedDict[str, KeptKey] = OrderedDict()
        self._answered: OrderedDict[str, KeptKey] = OrderedDict()
        self._bytes = 0

    def claim(
        self,
        key: str,
        body: str,
        claim: Claim,
        now: float,
        *,
        lives: Callable[[NodeId], bool] = lambda node: True,
        gone: str | None = None,
    ) -> KeyReply:
        """May `claim.owner` run the call? GRANTED, RUNNING (by another), ANSWERED or CONFLICT.

        `lives` says whether this node sees a node alive; `gone` is the token of a claim that the asker found abandoned. Its own epoch is
        the highest that another home gave it: a home that was told less follows it. Asking again with the same token changes nothing.
        """
        self._forget(now)
        known = self._known(key)
        if known is None:
            return self._grant(key, body, claim, now)
        if known.body != body:
            return KeyReply(KeyState.CONFLICT)
        if known.claim.token == claim.token and not known.answered:
            return self._grant(key, body, replace(claim, epoch=max(claim.epoch, known.claim.epoch)), now)
        if known.answered and known.answer is not None:
            return KeyReply(KeyState.ANSWERED, known.claim, known.answer)
        if known.claim.token == gone or not lives(known.claim.owner) or self._restarted(known, claim):
            return self._grant(key, body, replace(claim, epoch=max(claim.epoch, known.claim.epoch + 1)), now)
        if known.answered:
            return KeyReply(KeyState.ANSWERED, known.claim)
        if claim.epoch > known.claim.epoch:
            return self._grant(key, body, claim, now)
        return KeyReply(KeyState.RUNNING, known.claim)

    def settle(
        self, key: str, body: str, claim: Claim, now: float, *, answer: bytes | None = None, failed: bool = False
    ) -> KeyReply:
        """What came of a call: its answer (None: too large, it lies with the owner), or `failed`, which frees the key.

        ANSWERED with `claim` itself, and no answer, where it counts. Where another claim has taken over: its ANSWERED, or RUNNING where it
        still runs; the answer is not taken then, so that all who ask get the same one. Of two answers that of the higher epoch stays: who
        took over is right. CONFLICT as `claim` does. After a failure: UNKNOWN.
        """
        self._forget(now)
        known = self._known(key)
        if known is not None and known.body != body:
            return KeyReply(KeyState.CONFLICT)
        if failed:
            if known is not None and known.claim.token == claim.token and not known.answered:
                self._drop(key)
            return KeyReply(KeyState.UNKNOWN)
        if known is not None and known.answered and not (claim.epoch > known.claim.epoch and answer is not None):
            own = known.claim.token == claim.token
            return KeyReply(KeyState.ANSWERED, known.claim, None if own else known.answer)
        if known is not None and known.claim.token != claim.token and known.claim.epoch >= claim.epoch:
            return KeyReply(KeyState.RUNNING, known.claim)
        if answer is not None and len(answer) > LARGEST_ANSWER:
            answer = None
        self._keep(KeptKey(key, body, claim, now + KEEP_SECONDS, answered=True, answer=answer), now)
        return KeyReply(KeyState.ANSWERED, claim)

    def kept(self, now: float) -> tuple[KeptKey, ...]:
        """All that is known now, for a home that is to know it too."""
        self._forget(now)
        return (*self._running.values(), *self._answered.values())

    def __len__(self) -> int:
        return len(self._running) + len(self._answered)

    @property
    def size(self) -> int:
        """Bytes of the answers that are kept."""
        return self._bytes

    @staticmethod
    def _restarted(known: KeptKey, claim: Claim) -> bool:
        """Its owner asks anew, and no node runs a key twice at a time: that call's process is no more, or has given it up."""
        return known.claim.owner == claim.owner

    def _known(self, key: str) -> KeptKey | None:
        return self._answered.get(key) or self._running.get(key)

    def _grant(self, key: str, body: str, claim: Claim, now: float) -> KeyReply:
        self._keep(KeptKey(key, body, claim, now + RUNNING_SECONDS), now)
        return KeyReply(KeyState.GRANTED, claim)

    def _keep(self, kept: KeptKey, now: float) -> None:
        self._drop(kept.key)
        (self._answered if kept.answered else self._running)[kept.key] = kept
        self._bytes += kept.size
        self._forget(now)

    def _drop(self, key: str) -> None:
        dropped = self._answered.pop(key, None) or self._running.pop(key, None)
        if dropped is not None:
            self._bytes -= dropped.size

    def _forget(self, now: float) -> None:
        """Drop what is over its time, then the oldest beyond the bounds."""
        for kept in (self._running, self._answered):
            while kept:
                oldest = next(iter(kept.values()))
                full = len(kept) > self._most_keys or (oldest.answered and self._bytes > self._most_bytes)
                if oldest.expires > now and not full:
                    break
                self._drop(oldest.key)
