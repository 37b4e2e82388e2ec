"""Idempotency keys at one simulated node: the real table and the real protocols, driven as `serving.idempotency` drives them.

Law of this file: it puts questions, keeps what this node runs under a key, and decides nothing. An answer is bytes, as it is in the table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from virtual_wire import Reply

from tars.core.call_effects import DEADLINE, Failure
from tars.core.idempotency_claims import (
    AnswerQuestion,
    Ask,
    ClaimQuestion,
    Known,
    Pause,
    Question,
    Refused,
    Run,
    Settlement,
    at_home,
    claiming,
    freeing,
    gives_its_own,
    patience,
    settling,
)
from tars.core.idempotency_keys import Claim, KeyReply, KeyState, KeyTable, homes_of, new_homes
from tars.core.peer import LIVE
from tars.core.types import NodeId

if TYPE_CHECKING:
    from virtual_gateway import VirtualGateway

Told = Callable[[bytes | None], None]
"""Hears the answer under the key; None: the call is the hearer's to run (or to claim again)."""


@dataclass(eq=False)
class Entry:
    """A call of this node under one key."""

    key: str
    body: str
    claim: Claim
    run: Run | None = None
    joins: bool = False
    told: bool = False
    own: bytes | None = None
    waits_for: Claim | None = None
    over: bool = False
    answer: bytes | None = None
    waiting: list[Told] = field(default_factory=list)
    abandoned: bool = False
    """Its call's time is over before it was granted."""


class VirtualKeys:
    """See the module's law. One per process."""

    def __init__(self, gateway: VirtualGateway):
        self._gateway = gateway
        self._node = gateway.node
        self._table = KeyTable()
        self._entries: dict[str, Entry] = {}
        self._live: frozenset[NodeId] = frozenset()

    # --- this node's calls --------------------------------------------------------------------------------------------

    def claim(
        self,
        key: str,
        body: str,
        deadline: float,
        run: Callable[[Entry], None],
        known: Callable[[bytes], None],
        failed: Callable[[Failure], None],
    ) -> None:
        """`run` is called with the right to run the call, or `known` with its answer, or `failed` where neither came in time."""
        now = self._node.time.now
        if now >= deadline:
            failed(DEADLINE)
            return
        entry = self._entries.get(key)
        if entry is not None:

            def again(answer: bytes | None) -> None:
                if answer is None:
                    self.claim(key, body, deadline, run, known, failed)
                else:
                    known(answer)

            if entry.over and entry.answer is not None:
                known(entry.answer)
            else:
                entry.waiting.append(again)
            return
        claim = Claim(self._node.id, f"{self._gateway.dice.getrandbits(64):016x}")
        entry = self._entries[key] = Entry(key, body, claim)

        def joining(joins: bool) -> None:
            entry.joins = joins

        def ended(outcome: Run | Known | Refused) -> None:
            if isinstance(outcome, Run):
                entry.run = outcome
                run(entry)
                return
            entry.told = True
            self._end(entry, outcome.answer if isinstance(outcome, Known) else None, forget=True)
            if isinstance(outcome, Known):
                known(outcome.answer)

        def too_late() -> None:
            if entry.run is None and not entry.told:
                entry.abandoned = True
                self.fail(entry)
                failed(DEADLINE)

        steps = claiming(key, body, claim, lambda: self._homes(key), self._gateway.dice, joining)
        self._drive(steps, ended, lambda: entry.abandoned)
        if entry.run is None and not entry.told:
            self._node.later(deadline - now, too_late)

    def succeed(self, entry: Entry, answer: bytes, give: Callable[[bytes], None]) -> None:
        """Tell the homes; `give` hears the answer to give to the caller."""
        assert entry.run is not None
        if entry.told:
            return
        entry.told = True

        def settled(winner: Known | None) -> None:
            given = answer if winner is None else winner.answer
            self._end(entry, given)
            give(given)

        def waiting(winner: Claim | None) -> None:
            entry.waits_for = winner

        entry.own = answer
        steps = settling(
            entry.key,
            entry.body,
            entry.run,
            lambda: self._homes(entry.key),
            answer,
            lives=self._lives,
            waiting=waiting,
        )
        self._drive(steps, settled)

    def fail(self, entry: Entry) -> None:
        """Free the key, unless it succeeded."""
        if entry.told:
            return
        entry.told = True
        self._end(entry, None, forget=True)
        freed = freeing(entry.key, entry.body, entry.claim, entry.run, lambda: self._homes(entry.key))
        self._drive(freed, lambda _: None)

    # --- what peers ask -----------------------------------------------------------------------------------------------

    def asked(self, question: Question, reply: Reply) -> None:
        """Replies at once, but for an answer that is waited for."""
        if isinstance(question, AnswerQuestion):
            self._own_answer(question, reply)
        else:
            reply(at_home(self._table, question, self._node.time.now, self._lives))

    def members_changed(self) -> None:
        """As `IdempotentAnswers.members_changed`: new homes are told."""
        before, after = self._live, frozenset(self.others())
        self._live = after
        if after == before:
            return
        old, new = before | {self._node.id}, after | {self._node.id}
        for kept in self._table.kept(self._node.time.now):
            if kept.answered:
                for home in new_homes(kept.key, old, new, self._node.id):
                    self._put(Ask(home, Settlement(kept.key, kept.body, kept.claim, kept.answer)), lambda reply: None)
        for key, entry in self._entries.items():
            if entry.run is not None and not entry.told:
                for home in new_homes(key, old, new):
                    self._put(Ask(home, ClaimQuestion(key, entry.body, entry.run.claim)), lambda reply: None)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _own_answer(self, question: AnswerQuestion, reply: Reply) -> None:
        entry = self._entries.get(question.key)
        if entry is None or entry.joins:
            reply(KeyReply(KeyState.UNKNOWN))
            return
        replied = False

        def say(answer: bytes | None) -> None:
            nonlocal replied
            if not replied:
                replied = True
                known = (
                    KeyReply(KeyState.UNKNOWN) if answer is None else KeyReply(KeyState.ANSWERED, entry.claim, answer)
                )
                reply(known)

        def still_runs() -> None:
            nonlocal replied
            if not replied:
                replied = True
                reply(KeyReply(KeyState.RUNNING, entry.claim))

        if entry.over:
            say(entry.answer)
        elif gives_its_own(entry.claim, entry.waits_for, question.asker):
            say(entry.own)
        else:
            entry.waiting.append(say)
            self._node.later(question.wait, still_runs)

    def _end(self, entry: Entry, answer: bytes | None, *, forget: bool = False) -> None:
        entry.over, entry.answer = True, answer
        if forget and self._entries.get(entry.key) is entry:
            del self._entries[entry.key]
        waiting, entry.waiting = entry.waiting, []
        for told in waiting:
            told(answer)

    def _drive(self, steps: Any, ended: Callable[[Any], None], abandoned: Callable[[], bool] = lambda: False) -> None:
        """Perform a protocol of `core.idempotency_claims`."""

        def go_on(replies: tuple[KeyReply | None, ...] | None) -> None:
            if abandoned():
                return
            try:
                asks = steps.send(replies)
            except StopIteration as stop:
                ended(stop.value)
                return
            if isinstance(asks, Pause):
                self._node.later(asks.seconds, lambda: go_on(()))
                return
            heard: dict[int, KeyReply | None] = {}

            def hear(number: int, reply: KeyReply | None) -> None:
                if number not in heard:
                    heard[number] = reply
                    if len(heard) == len(asks):
                        go_on(tuple(heard[each] for each in range(len(asks))))

            for number, ask in enumerate(asks):
                self._put(ask, lambda reply, number=number: hear(number, reply))

        go_on(None)

    def _put(self, ask: Ask, reply: Callable[[KeyReply | None], None]) -> None:
        if ask.node == self._node.id:
            self.asked(ask.question, reply)
            return
        heard = False

        def once(said: Any) -> None:
            nonlocal heard
            if not heard:
                heard = True
                reply(said)

        self._gateway.ask(ask.node, ask.question, once)
        self._node.later(patience(ask.question), lambda: once(None))

    def others(self) -> list[NodeId]:
        """The other nodes that this one sees alive."""
        return [each.node for each in self._node.machine.view().members.values() if each.state in LIVE]

    def _homes(self, key: str) -> tuple[NodeId, ...]:
        return homes_of(key, (self._node.id, *self.others()))

    def _lives(self, node: NodeId) -> bool:
        return node in self.others() or node == self._node.id
