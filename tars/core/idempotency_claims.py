"""What a node asks its peers before and after it runs a call under an idempotency key.

Law of this file: who is asked what, in which order, and what follows from the answers. The protocols are generators without I/O: each
yields the questions to put now (or a pause), is sent the replies in their order (None: that node did not answer), and returns what came of
it. The serving node puts them over the mesh, the simulation through its own network.

The homes are asked one after the other, the first one first: of two nodes that claim a key at once, the first common home tells the second
one who came first. What is known counts in the order answered, running, free. Whoever finds the call running waits at its owner; where
that is not there, or does not know the call any more, it claims again and says so.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import TypeAlias, TypeVar

from tars.core.idempotency_keys import Claim, KeyReply, KeyState, KeyTable
from tars.core.probe_order import Dice
from tars.core.types import NodeId

WAIT_SECONDS = 1.0
"""How long the owner of a running call keeps a question before it says that it still runs: so the asker learns that the owner lives."""
ASK_SECONDS = 1.0
"""For a home's word: a LAN's round trip and a busy loop; 4 MiB of an answer take 40 ms on Gigabit Ethernet."""
OWNER_SECONDS = 2.5
"""And for an owner's, beyond the time that it was told to keep the question: the longest silence of a living node (see the pulse). After it
the call is run a second time."""
PAUSE_SECONDS = 0.05
"""At least, before a key is claimed again whose owner gave it up: two that meet so part by chance."""
MOST_WAITS = 60
"""A finished answer is kept from its caller for so many waits at another owner at most, each of `WAIT_SECONDS`."""


@dataclass(frozen=True, slots=True)
class ClaimQuestion:
    """To a home: may this node run the call? `KeyTable.claim` answers."""

    key: str
    body: str
    claim: Claim
    gone: str | None = None


@dataclass(frozen=True, slots=True)
class AnswerQuestion:
    """To an owner: what came of the call? ANSWERED with the answer, RUNNING after `wait` seconds, CONFLICT, or UNKNOWN where it does not
    run it (any more, or waits for another owner itself). `asker` goes by its certificate, not by its word."""

    key: str
    body: str
    wait: float
    asker: NodeId | None = None


@dataclass(frozen=True, slots=True)
class Settlement:
    """To a home: what came of the call. `KeyTable.settle` answers."""

    key: str
    body: str
    claim: Claim
    answer: bytes | None = None
    failed: bool = False


Question: TypeAlias = ClaimQuestion | AnswerQuestion | Settlement


def patience(question: Question) -> float:
    """How long a peer's reply is waited for, in seconds; after that it gives none."""
    return question.wait + OWNER_SECONDS if isinstance(question, AnswerQuestion) else ASK_SECONDS


@dataclass(frozen=True, slots=True)
class Ask:
    """Put `question` to `node`, which may be this one."""

    node: NodeId
    question: Question


@dataclass(frozen=True, slots=True)
class Pause:
    """Go on after so many seconds; no reply is sent in."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Run:
    """The call is this node's to run under `claim`; `homes` know of it. End it with `settling`."""

    claim: Claim
    homes: tuple[NodeId, ...]


@dataclass(frozen=True, slots=True)
class Known:
    """The call was answered."""

    answer: bytes


@dataclass(frozen=True, slots=True)
class Refused:
    """The key is another body's."""


Replies: TypeAlias = Sequence[KeyReply | None]
Outcome = TypeVar("Outcome")
Steps: TypeAlias = Generator[tuple[Ask, ...] | Pause, Replies, Outcome]


def at_home(
    table: KeyTable,
    question: ClaimQuestion | Settlement,
    now: float,
    lives: Callable[[NodeId], bool] = lambda node: True,
) -> KeyReply:
    """What a home says to a question, out of its memory; `lives` as in `KeyTable.claim`."""
    if isinstance(question, ClaimQuestion):
        return table.claim(question.key, question.body, question.claim, now, lives=lives, gone=question.gone)
    return table.settle(
        question.key, question.body, question.claim, now, answer=question.answer, failed=question.failed
    )


def claiming(
    key: str,
    body: str,
    claim: Claim,
    homes: Callable[[], Sequence[NodeId]],
    dice: Dice,
    joining: Callable[[bool], None] = lambda joins: None,
) -> Steps[Run | Known | Refused]:
    """Run the call, or get the answer of the one who does, however long that takes: the driver closes it at the call's deadline and then
    frees the homes with `freeing`.

    `homes` gives the key's homes as this node sees them now. `joining` is told True while this node waits for another owner (and then
    answers `AnswerQuestion`s for the key with UNKNOWN, so that nobody waits in a circle) and False when it claims again.
    """
    gone: str | None = None
    while True:
        joining(False)
        claim = replace(claim, epoch=1)
        asked = tuple(homes())
        granted: list[NodeId] = []
        found: KeyReply | None = None
        for home in asked:
            (reply,) = yield (Ask(home, ClaimQuestion(key, body, claim, gone)),)
            if reply is None:
                continue
            if reply.state is KeyState.GRANTED and reply.claim is not None:
                claim = replace(claim, epoch=max(claim.epoch, reply.claim.epoch))
                granted.append(home)
            else:
                found = reply
                break
        if found is None:
            return Run(claim, asked)
        if found.state is KeyState.ANSWERED and found.answer is not None and found.claim is not None:
            if granted:
                # Those did not know it: they came to be its home since. Under the asker's claim, which they hold.
                yield tuple(Ask(home, Settlement(key, body, claim, found.answer)) for home in granted)
            return Known(found.answer)
        if granted:
            yield tuple(Ask(home, Settlement(key, body, claim, failed=True)) for home in granted)
        if found.state is KeyState.CONFLICT:
            return Refused()
        if found.claim is None:
            # No home says this; whoever does has nothing that can be waited for.
            yield Pause(PAUSE_SECONDS * (1 + dice.random()))
            continue
        joining(True)
        ended = yield from _join(key, body, found.claim.owner, claim.owner)
        if ended is not None:
            return ended
        gone = found.claim.token
        yield Pause(PAUSE_SECONDS * (1 + dice.random()))


def settling(
    key: str,
    body: str,
    run: Run,
    homes: Callable[[], Sequence[NodeId]],
    answer: bytes | None,
    *,
    wait: bool = True,
    lives: Callable[[NodeId], bool] = lambda node: True,
    waiting: Callable[[Claim | None], None] = lambda winner: None,
) -> Steps[Known | None]:
    """Tell the homes that the call is answered (`answer` None: it is too large to be sent about).

    Returns the answer to give instead, where this node was thought gone and another one has taken over: all who ask get the same one.
    `wait` False: not for one that still runs. `lives` says whether this node sees another one alive: one that it does not (it was removed,
    say, and runs on for itself) must not keep a finished answer from its caller. `waiting` is told the claim whose answer it waits for, and
    None when it waits no more: see `gives_its_own`.
    """
    me = run.claim.owner
    told = tuple(dict.fromkeys((*homes(), *run.homes)))
    others = tuple(home for home in told if home != me)
    ended = Settlement(key, body, run.claim, answer)
    said: dict[NodeId, KeyReply | None] = {}
    if others:
        replies = yield tuple(Ask(home, ended) for home in others)
        said.update(zip(others, replies, strict=True))
    if me in told and _counts(told, said, run.claim, higher_only=True) is None:
        # Itself last: while this node stood still, the others may have heard of what it has not.
        (said[me],) = yield (Ask(me, ended),)
    winner = _counts(told, said, run.claim)
    if winner is None or winner.claim is None:
        return None
    given = None if winner.answer is None else Known(winner.answer)
    if given is None and wait and lives(winner.claim.owner):
        waiting(winner.claim)
        joined = yield from _join(key, body, winner.claim.owner, me, MOST_WAITS)
        waiting(None)
        given = joined if isinstance(joined, Known) else None
    behind = tuple(home for home in told if (reply := said.get(home)) is None or reply.claim != winner.claim)
    if given is not None and behind:
        yield tuple(Ask(home, Settlement(key, body, winner.claim, given.answer)) for home in behind)
    return given


def _counts(
    told: Sequence[NodeId], said: Mapping[NodeId, KeyReply | None], claim: Claim, *, higher_only: bool = False
) -> KeyReply | None:
    """What a home says of another claim that counts: one with a higher epoch, else the first home's word. None: this one counts.

    An earlier claim of the very same node, of before its restart say, has no answer to wait for: what a home says of that counts for
    nothing.
    """
    known = [
        (reply.claim, reply)
        for home in told
        if (reply := said.get(home)) is not None
        and reply.claim is not None
        and (reply.claim.owner != claim.owner or reply.claim.token == claim.token or reply.answer is not None)
    ]
    if not known:
        return None
    highest, over = max(known, key=lambda each: each[0].epoch)
    if highest.epoch > claim.epoch:
        return over
    first, word = known[0]
    return None if higher_only or first.token == claim.token else word


def freeing(key: str, body: str, claim: Claim, run: Run | None, homes: Callable[[], Sequence[NodeId]]) -> Steps[None]:
    """Tell the homes that the call failed or was given up, so that the next one may run it. `run` None: it was not granted yet."""
    told = dict.fromkeys((*homes(), *(run.homes if run is not None else ())))
    yield tuple(Ask(home, Settlement(key, body, claim, failed=True)) for home in told)


def gives_its_own(mine: Claim, waits_for: Claim | None, asker: NodeId | None) -> bool:
    """Whether a node that has an answer, and waits for another node's in its place, gives its own to whoever asks.

    Two nodes may have computed a call and each have heard of the other one from a home (where the first home's word was lost on the way to
    one of them): they wait for each other, and the answer of the one with the smaller token is both's.
    """
    return waits_for is not None and waits_for.owner == asker and mine.token < waits_for.token


def _join(key: str, body: str, owner: NodeId, asker: NodeId, most: int | None = None) -> Steps[Known | Refused | None]:
    """Wait at the owner for as long as it runs the call, `most` times at most. None: it is not there, or knows it no more."""
    for _ in count() if most is None else range(most):
        (reply,) = yield (Ask(owner, AnswerQuestion(key, body, WAIT_SECONDS, asker)),)
        if reply is not None and reply.state is KeyState.ANSWERED and reply.answer is not None:
            return Known(reply.answer)
        if reply is not None and reply.state is KeyState.CONFLICT:
            return Refused()
        if reply is None or reply.state is not KeyState.RUNNING:
            return None
    return None
