"""A repeated idempotency key gets the first call's answer, or joins it while it runs: on this node, and on every other one of the mesh.

Law of this file: only answers are kept, never errors: after a failure the key is free again, so that a retry really retries. What a key
is and who may run its call is `core.idempotency_keys`' and `core.idempotency_claims`'; this file performs it. Calls of this node under the
same key are one call for the mesh: the first one claims, the others wait for it here.

What is promised: while the mesh is in one piece, and no two of a key's owner and its two homes die within the same moments, a call under a
key is computed once, and everybody who repeats it within ten minutes of its answer gets that answer. Otherwise it is computed again: nobody
waits for what is lost, and no call fails for it.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import secrets
from collections import Counter, OrderedDict
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, TypeVar

from tars.core.idempotency_claims import (
    AnswerQuestion,
    Ask,
    ClaimQuestion,
    Known,
    Pause,
    Question,
    Refused,
    Replies,
    Run,
    Settlement,
    Steps,
    at_home,
    claiming,
    freeing,
    gives_its_own,
    settling,
)
from tars.core.idempotency_keys import (
    KEEP_BYTES,
    KEEP_KEYS,
    KEEP_SECONDS,
    KeyReply,
    KeyState,
    KeyTable,
    homes_of,
    new_homes,
)
from tars.core.idempotency_keys import Claim as KeyClaim
from tars.core.types import NodeId
from tars.errors import IdempotencyConflict
from tars.messages.base import CallContext, Message
from tars.messages.key_claims import AwaitAnswerParams, ClaimKeyParams, KeyResult, SettleKeyParams
from tars.serving.kept_answers import Answer, answer_of, bytes_for_homes, bytes_of, read
from tars.serving.key_peers import question_of, result_of

Outcome = TypeVar("Outcome")


class OtherNodes(Protocol):
    """The rest of the mesh, for keys; `key_peers.KeysAtPeers` is it."""

    @property
    def node(self) -> NodeId:
        """This node's own id."""
        ...

    def live(self) -> Sequence[NodeId]:
        """The others, as far as they live."""
        ...

    async def ask(self, node: NodeId, question: Question) -> KeyReply | None:
        """What one of them says; None: nothing. Raises nothing."""
        ...

    def heard(self, node: NodeId) -> None:
        """It lives."""
        ...


class Alone:
    """A node without a mesh."""

    node = NodeId("here")

    def live(self) -> Sequence[NodeId]:
        """Nobody."""
        return ()

    async def ask(self, node: NodeId, question: Question) -> KeyReply | None:
        """Nothing."""
        return None

    def heard(self, node: NodeId) -> None:
        """Nobody is."""


def key_of(call: CallContext) -> str:
    """The mesh's name for a call's key: the caller's and the method's own, and nothing that tells what they said. 64 hex digits.

    Whoever calls without a key of the mesh is `local` on every node: the people of one household or lab.
    """
    said = f"{call.caller}\0{call.method}\0{call.idempotency_key}"
    return hashlib.blake2b(said.encode("utf-8", "surrogatepass"), digest_size=32).hexdigest()


def seed_of(call: CallContext) -> int | None:
    """The seed of a call with a key whose caller gave none, so that a second computation says the same; None: no key, draw one."""
    if call.idempotency_key is None:
        return None
    return int.from_bytes(hashlib.blake2b(key_of(call).encode(), digest_size=4).digest(), "little")


@dataclass(slots=True, eq=False)
class _Entry:
    """A call of this node under one key."""

    body: str
    claim: KeyClaim
    expires: float
    answer: asyncio.Future[Message | None]
    """None: it failed, or the answer is another node's to give."""
    size: int = 0
    run: Run | None = None
    joins: bool = False
    """It waits for another node, and nobody shall wait for it meanwhile."""
    told: bool = False
    """The homes hear of its end, or have heard."""
    own: Message | None = None
    """Computed here, before it is known whether it is the one to give."""
    waits_for: KeyClaim | None = None
    """Whose answer is the one to give."""


class Claim:
    """The right, and the duty, to run a call: end it with `succeed` or `fail`. `with` it: it fails unless it has succeeded."""

    def __init__(self, answers: IdempotentAnswers | None = None, key: str = "", entry: _Entry | None = None):
        """Without arguments: of a call without a key."""
        self._answers = answers
        self._key = key
        self._entry = entry

    def __enter__(self) -> Claim:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.fail()

    async def succeed(self, answer: Answer, size: int, *, shown: bool = False) -> Answer:
        """Keep the answer, and give it to all who joined; returns the one to give to the caller. `size`: about the bytes that it takes in
        memory. `shown`: its caller has seen a part of it, so that no other will do.

        It is another one only where this node was thought gone (frozen) and another one took over: all who asked get the same one then.
        """
        if self._answers is None or self._entry is None:
            return answer
        return await self._answers.succeeded(self._key, self._entry, answer, size, shown)

    def fail(self) -> None:
        """Free the key, unless `succeed` came first; one of those who joined takes over."""
        if self._answers is not None and self._entry is not None:
            self._answers.failed(self._key, self._entry)


class IdempotentAnswers:
    """See the module's law. One per node; `now` is the monotonic clock."""

    def __init__(self, now: Callable[[], float], others: OtherNodes | None = None, dice: random.Random | None = None):
        self._now = now
        self._others: OtherNodes = others or Alone()
        self._me = self._others.node
        self._dice = dice or random.Random()
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        """In the order of their ends, but for those that run."""
        self._bytes = 0
        self._table = KeyTable()
        self._live: frozenset[NodeId] = frozenset()
        self._tasks: set[asyncio.Task[Any]] = set()
        self.outcomes: Counter[str] = Counter()
        """Calls with a key since the node started: those that it `run`s, that were `repeated` (an earlier answer, or a running call's), and
        `refused` (another body)."""

    # --- this node's calls -------------------------------------------------------------------------------------------

    async def claim_or_answer(self, call: CallContext, params: Message) -> Claim | Message:
        """The kept (or joined) answer, or a `Claim` to run the call. Keys are per caller and method.

        Raises `IdempotencyConflict` for another body under the same key.
        """
        if call.idempotency_key is None:
            return Claim()
        key = key_of(call)
        body = hashlib.sha256(params.model_dump_json().encode()).hexdigest()
        while True:
            self._expire()
            entry = self._entries.get(key)
            if entry is None:
                break
            if entry.body != body:
                self._refuse()
            answer = await asyncio.shield(entry.answer)
            if answer is not None:
                self.outcomes["repeated"] += 1
                return answer
        return await self._claimed(key, body, call.method)

    async def _claimed(self, key: str, body: str, method: str) -> Claim | Message:
        claim = KeyClaim(self._me, secrets.token_hex(16))
        entry = _Entry(body, claim, self._now() + KEEP_SECONDS, asyncio.get_running_loop().create_future())
        self._entries[key] = entry

        def joining(joins: bool) -> None:
            entry.joins = joins

        try:
            outcome = await self._drive(claiming(key, body, claim, lambda: self._homes(key), self._dice, joining))
            answer = None if not isinstance(outcome, Known) else answer_of(method, outcome.answer)
        except BaseException:
            # The caller's time is over, or it left: whoever waits here claims for itself.
            self.failed(key, entry)
            raise
        if isinstance(outcome, Run):
            entry.run = outcome
            self.outcomes["run"] += 1
            return Claim(self, key, entry)
        # The homes, or the owner, keep it: nothing is to be told.
        entry.told = True
        self._end(key, entry, answer, forget=True)
        if isinstance(outcome, Refused):
            self._refuse()
        if answer is None:
            return Claim()
        self.outcomes["repeated"] += 1
        return answer

    async def succeeded(self, key: str, entry: _Entry, answer: Answer, size: int, shown: bool) -> Answer:
        """See `Claim.succeed`."""
        assert entry.run is not None
        if entry.told:
            return answer
        entry.told = True
        if self._entries.get(key) is entry:
            entry.size = size
            self._bytes += size
            entry.expires = self._now() + KEEP_SECONDS
            self._entries.move_to_end(key)
        alone = self._homes(key) == (self._me,) == entry.run.homes
        # Alone, the answer is kept once, as it is; a node that joins later finds its owner here.
        said = None if alone else bytes_for_homes(answer)
        entry.own = answer

        def waiting(winner: KeyClaim | None) -> None:
            entry.waits_for = winner

        steps = settling(
            key,
            entry.body,
            entry.run,
            lambda: self._homes(key),
            said,
            wait=not shown,
            lives=self._lives,
            waiting=waiting,
        )
        # A task of its own: the caller may leave now, and the answer is there all the same.
        return await asyncio.shield(self._start(self._settled(key, entry, answer, steps, shown)))

    async def _settled(
        self, key: str, entry: _Entry, answer: Answer, steps: Steps[Known | None], shown: bool
    ) -> Answer:
        given = answer
        try:
            winner = await self._drive(steps)
            if winner is not None and not shown:
                given = read(type(answer), winner.answer) or answer
        finally:
            entry.own = None
            self._end(key, entry, given)
        return given

    def failed(self, key: str, entry: _Entry) -> None:
        """See `Claim.fail`."""
        if entry.told:
            return
        entry.told = True
        self._end(key, entry, None, forget=True)
        steps = freeing(key, entry.body, entry.claim, entry.run, lambda: self._homes(key))
        if self._others.live():
            self._start(self._drive(steps))
        else:
            self._table.settle(key, entry.body, entry.claim, self._now(), failed=True)

    # --- what peers ask ----------------------------------------------------------------------------------------------

    async def asked(self, params: ClaimKeyParams | SettleKeyParams | AwaitAnswerParams, sender: str) -> KeyResult:
        """`mesh.claim`, `mesh.settle`, `mesh.await_answer`. Raises `InvalidParams`."""
        self._others.heard(NodeId(sender))
        reply = await self._here(question_of(params, sender))
        return result_of(reply)

    def members_changed(self) -> None:
        """Nodes came or went: what this node knows of keys is told to those that are their homes now and were not before."""
        before, after = self._live, frozenset(self._others.live())
        self._live = after
        if after - before or before - after:
            self._start(self._tell(before | {self._me}, after | {self._me}))

    async def _tell(self, before: frozenset[NodeId], after: frozenset[NodeId]) -> None:
        for kept in self._table.kept(self._now()):
            if kept.answered:
                for home in new_homes(kept.key, before, after, self._me):
                    await self._ask(Ask(home, Settlement(kept.key, kept.body, kept.claim, kept.answer)))
        for key, entry in list(self._entries.items()):
            if entry.told:
                continue
            # Of a running call only its owner knows whether it still runs, so the owner tells.
            for home in new_homes(key, before, after):
                if entry.run is not None and not entry.told:  # it may have ended meanwhile
                    await self._ask(Ask(home, ClaimQuestion(key, entry.body, entry.run.claim)))

    async def idle(self) -> None:
        """Wait until what is told in the background has been told."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    # --- inside ------------------------------------------------------------------------------------------------------

    def _homes(self, key: str) -> tuple[NodeId, ...]:
        return homes_of(key, (self._me, *self._others.live()))

    def _lives(self, node: NodeId) -> bool:
        return node == self._me or node in self._others.live()

    async def _drive(self, steps: Steps[Outcome]) -> Outcome:
        """Perform a protocol."""
        replies: Replies | None = None
        try:
            while True:
                try:
                    asks = next(steps) if replies is None else steps.send(replies)
                except StopIteration as ended:
                    outcome: Outcome = ended.value
                    return outcome
                if isinstance(asks, Pause):
                    await asyncio.sleep(asks.seconds)
                    replies = ()
                elif len(asks) == 1:
                    replies = (await self._ask(asks[0]),)
                else:
                    replies = await asyncio.gather(*map(self._ask, asks))
        finally:
            steps.close()

    async def _ask(self, ask: Ask) -> KeyReply | None:
        if ask.node == self._me:
            return await self._here(ask.question)
        return await self._others.ask(ask.node, ask.question)

    async def _here(self, question: Question) -> KeyReply:
        if isinstance(question, AnswerQuestion):
            return await self._own_answer(question)
        return at_home(self._table, question, self._now(), self._lives)

    async def _own_answer(self, question: AnswerQuestion) -> KeyReply:
        self._expire()
        entry = self._entries.get(question.key)
        if entry is None or entry.joins:
            return KeyReply(KeyState.UNKNOWN)
        if entry.body != question.body:
            return KeyReply(KeyState.CONFLICT)
        if gives_its_own(entry.claim, entry.waits_for, question.asker):
            answer = entry.own
        else:
            done, _ = await asyncio.wait({entry.answer}, timeout=question.wait)
            if not done:
                return KeyReply(KeyState.RUNNING, entry.claim)
            answer = entry.answer.result()
        said = None if answer is None else bytes_of(answer)
        return KeyReply(KeyState.UNKNOWN) if said is None else KeyReply(KeyState.ANSWERED, entry.claim, said)

    def _end(self, key: str, entry: _Entry, answer: Message | None, *, forget: bool = False) -> None:
        if not entry.answer.done():
            entry.answer.set_result(answer)
        if forget and self._entries.get(key) is entry:
            self._drop(key)

    def _drop(self, key: str) -> None:
        self._bytes -= self._entries.pop(key).size

    def _refuse(self) -> None:
        self.outcomes["refused"] += 1
        raise IdempotencyConflict(
            "this idempotency key was used for a call with other params; use a new key for a new call"
        )

    def _start(self, work: Coroutine[Any, Any, Outcome]) -> asyncio.Task[Outcome]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _expire(self) -> None:
        now = self._now()
        for key, entry in list(self._entries.items()):
            full = len(self._entries) > KEEP_KEYS or self._bytes > KEEP_BYTES
            if entry.expires > now and not full:
                break
            if entry.answer.done():
                self._drop(key)
