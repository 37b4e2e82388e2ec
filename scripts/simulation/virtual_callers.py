"""Those who call the simulated mesh, and what they were promised: every answer whole and once, in time where anybody could give it.

Law of this file: callers know a gateway and what came from it. What must hold of every call is checked here, at every token, every end and
every half second; a `Breach` says what does not. Like the clients that TARS ships, a caller whose gateway died asks another one.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from breach import Breach
from virtual_engine import Work, token_of
from virtual_fleet import content_of
from virtual_gateway import GatewayCall, VirtualGateway
from virtual_keys import Entry

from tars.core.call_effects import LATE, Failure
from tars.core.call_machine import CallMachine
from tars.core.replica_ledger import Observation
from tars.core.types import ModelKind, ReplicaState

if TYPE_CHECKING:
    from virtual_node import VirtualNode
    from world import World

LOOK_SECONDS = 0.5
FAILED_SECONDS = 4.0
"""A replica that was there for so long, with nothing amiss, is one that a call must have found before it fails."""
OPEN_SECONDS = 9.0
"""And one that must have answered by then: a silence of 2.5 s, a wait of 2 s, and the longest answer."""
OVERDUE_SECONDS = 0.5
"""After its deadline a call is over, wherever its gateway runs."""


@dataclass(slots=True)
class Tally:
    """What calls came to. `attempts` are those of gateways; peers make one more for each that is forwarded."""

    sent: int = 0
    answered: int = 0
    shed: int = 0
    failed: int = 0
    gateways_lost: int = 0
    calls: int = 0
    attempts: int = 0
    continuations: int = 0
    hedges: int = 0
    late: int = 0
    joined: int = 0

    def add(self, other: Tally) -> None:
        """Together with these."""
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


class Caller:
    """One call of somebody outside. With a `key` its answer comes in one piece, and others may want the same."""

    def __init__(self, callers: Callers, work: Work, key: str | None):
        self.work = work
        self.key = key
        self.gateway: VirtualNode | None = None
        self.file: str | None = None
        self.got: list[list[int]] = []
        self.sending: Sending | None = None
        self.outcome: str | None = None
        self.began = callers.world.time.now
        self.live_since: float | None = None
        self._callers = callers
        self._world = callers.world

    def send(self) -> None:
        """To some gateway, from the beginning."""
        if self.outcome is not None:
            return
        nodes = self._world.running()
        if self._world.time.now >= self.work.deadline or not nodes:
            self.over("nobody to call")
            return
        self.gateway = self._callers.dice.choice(nodes)
        self.got = [[] for _ in range(self.work.answers)]
        self.file = None
        self.sending = Sending(self)
        self._world.log("caller", "%s at %s", self.work, self.gateway.name)
        self.gateway.hears(self.sending.begin)()

    def gateway_died(self) -> None:
        """The connection broke."""
        self._callers.tally.gateways_lost += 1
        self.sending = None
        self._world.time.after(self._callers.dice.uniform(0.05, 0.5), self.send)

    def leave(self) -> None:
        """Nobody wants the answer any more."""
        if self.outcome is None and self.sending is not None:
            sending, self.sending = self.sending, None
            self.over("left")
            sending.leave()

    def gave(self, index: int, ids: Sequence[int], file: str) -> None:
        """A piece of the answer: the next one, of the very file that began it."""
        if self.outcome is not None:
            raise Breach(f"{self.work.id} gets tokens after it was {self.outcome}")
        self.file = self.file or file
        so_far = self.got[index]
        for token in ids:
            wanted = token_of(self.file, self.work.seed, index, len(so_far))
            if token != wanted:
                raise Breach(
                    f"{self.work.id} got {token} from {file} as token {len(so_far)} of {self.file}, not {wanted}"
                )
            so_far.append(token)

    def answered(self) -> None:
        """The end of the answer."""
        wanted = self.work.length if self.work.streams else 1
        if any(len(each) != wanted for each in self.got):
            raise Breach(f"{self.work.id} was answered with {[len(each) for each in self.got]} of {wanted} tokens")
        self.over("answered")

    def failed(self, failure: Failure) -> None:
        """The call failed; that is only right where nobody could answer, or everybody had too much to do."""
        if failure.kind == "overloaded":
            self.over("shed")
        elif self.could_be_answered(FAILED_SECONDS):
            raise Breach(f"{self.work.id} failed ({failure.kind}), and {self._callers.why_live(self)}")
        else:
            self.over("failed")

    def same_answer(self, answer: bytes) -> None:
        """It came under a key, whoever computed it."""
        self._callers.answered_under_key(self, answer)

    def over(self, outcome: str) -> None:
        if self.outcome is not None:
            raise Breach(f"{self.work.id} was {self.outcome}, and then {outcome}")
        self.outcome = outcome
        self._world.log("caller", "%s is over: %s", self.work.id, outcome)
        self._callers.over(self)

    def could_be_answered(self, seconds: float) -> bool:
        """Whether for so long somebody could, and nothing was amiss."""
        now = self._world.time.now
        since = max(self.began, self._callers.amiss_until)
        return self.live_since is not None and now - max(since, self.live_since) >= seconds


class Sending:
    """One try of a caller at one gateway; what comes from it after the caller has gone to another one counts for nothing."""

    def __init__(self, caller: Caller):
        self._caller = caller
        self._gateway: VirtualGateway
        self._call: GatewayCall | None = None
        self._entry: Entry | None = None
        self._whole: list[tuple[int, Sequence[int], str]] = []

    @property
    def _current(self) -> bool:
        return self._caller.sending is self

    def begin(self) -> None:
        caller = self._caller
        assert caller.gateway is not None
        self._gateway = caller.gateway.gateway
        if not self._current or caller.outcome is not None:
            return
        if caller.key is None:
            self._call = self._gateway.take(caller.work, self)
        else:
            self._gateway.keys.claim(
                caller.key, caller.work.model, caller.work.deadline, self._run, self._known, self.failed
            )

    def leave(self) -> None:
        if self._call is not None:
            self._call.cancel()
        if self._entry is not None:
            self._gateway.keys.fail(self._entry)

    # --- as a `Reader` ------------------------------------------------------------------------------------------------

    def gave(self, index: int, ids: Sequence[int], file: str) -> None:
        if not self._caller.work.shown:
            self._whole.append((index, ids, file))
        elif self._current:
            self._caller.gave(index, ids, file)

    def begun_anew(self) -> None:
        if self._current and any(self._caller.got):
            raise Breach(f"{self._caller.work.id} begins anew, and its caller has tokens")
        self._whole.clear()

    def answered(self, seen: Observation | None) -> None:
        if self._entry is not None:
            said = json.dumps([self._entry.claim.token, self._whole]).encode()
            self._gateway.keys.succeed(self._entry, said, self._known)
        elif self._current:
            self._give()

    def failed(self, failure: Failure) -> None:
        if self._entry is not None:
            self._gateway.keys.fail(self._entry)
        if self._current and self._caller.outcome is None:
            self._caller.failed(failure)

    # --- under a key --------------------------------------------------------------------------------------------------

    def _run(self, entry: Entry) -> None:
        self._entry = entry
        if not self._current:
            self._gateway.keys.fail(entry)
            return
        self._call = self._gateway.take(self._caller.work, self)

    def _known(self, answer: bytes) -> None:
        if not self._current or self._caller.outcome is not None:
            return
        self._whole = json.loads(answer)[1]
        self._give()
        self._caller.same_answer(answer)

    def _give(self) -> None:
        for index, ids, file in self._whole:
            self._caller.gave(index, ids, file)
        self._caller.answered()


@dataclass(slots=True)
class Answers:
    """What was answered under one key."""

    first: float
    one_piece: bool
    """All nodes saw each other when the first of them called."""
    given: bytes | None = None


class Callers:
    """All of them; see the module's law."""

    def __init__(self, world: World):
        self.world = world
        self.dice = random.Random(f"{world.seed}/callers")
        self.tally = Tally()
        self.amiss_until = 0.0
        """Until when something was amiss that explains a delay."""
        self._open: dict[Caller, None] = {}
        self._keys: dict[str, Answers] = {}
        self._looks = False
        self._number = 0

    def call(
        self,
        model: str,
        kind: ModelKind,
        *,
        key: str | None = None,
        work: Work | None = None,
        patience: float = 25.0,
        length: int | None = None,
    ) -> Caller:
        """Somebody calls; gives back who."""
        now, dice = self.world.time.now, self.dice
        if work is None:
            self._number += 1
            streams = kind is ModelKind.CHAT
            length = length or (dice.randint(1, 20) if streams else 4)
            answers = 2 if streams and dice.random() < 0.1 else 1
            name = f"call-{self._number}"
            shown = streams and key is None and dice.random() < 0.8
            work = Work(name, model, self._number, length, now + patience, answers, streams, shown)
        self.tally.sent += 1
        caller = Caller(self, work, key)
        if key is not None:
            self._keys.setdefault(key, Answers(now, self._one_piece()))
        self._open[caller] = None
        if not self._looks:
            self._looks = True
            self._look()
        caller.live_since = now if self.why_live(caller) else None
        caller.send()
        return caller

    def gateway_died(self, node: VirtualNode) -> None:
        """Its process ended."""
        for caller in list(self._open):
            if caller.gateway is node and caller.sending is not None:
                caller.gateway_died()

    def over(self, caller: Caller) -> None:
        del self._open[caller]
        caller.sending = None
        tally = self.tally
        match caller.outcome:
            case "answered":
                tally.answered += 1
            case "shed":
                tally.shed += 1
            case _:
                tally.failed += 1

    def attempted(self, machine: CallMachine) -> None:
        """A gateway's call is over."""
        tally = self.tally
        tally.calls += 1
        tally.attempts += len(machine.attempts)
        tally.continuations += machine.continuations
        tally.hedges += sum(each.hedge for each in machine.attempts)
        tally.late += sum(each.outcome == LATE for each in machine.attempts)

    def answered_under_key(self, caller: Caller, answer: bytes) -> None:
        """All who ask under a key get the same answer, as long as the mesh is in one piece and nothing happens to it."""
        assert caller.key is not None
        known = self._keys[caller.key]
        if known.given is None:
            known.given = answer
        elif known.given != answer:
            if known.one_piece and self.amiss_until <= known.first:
                raise Breach(f"{caller.work.id} got another answer under {caller.key} than was given before")
        else:
            self.tally.joined += 1

    def _one_piece(self) -> bool:
        running = {node.id for node in self.world.nodes if node.runs and not node.removed}
        return all({node.id, *node.gateway.keys.others()} == running for node in self.world.running())

    def check_over(self) -> None:
        """In the end: nobody waits who could be answered, and nothing computes for nobody."""
        self._check()
        wanted = {id(caller.work) for caller in self._open}
        for node in self.world.running():
            for call in node.gateway.calls:
                if call.forwarded is None and id(call.work) not in wanted:
                    raise Breach(f"{node.name} still works on {call.work.id}, which is over")
            if not self._open and node.engine.busy():
                raise Breach(f"{node.name} still computes for nobody")

    def why_live(self, caller: Caller) -> str | None:
        """Who could answer the call, as its gateway knows, in words; None: nobody."""
        for gateway in self.world.running() if caller.gateway is None else (caller.gateway,):
            if not gateway.up or gateway.removed:
                continue
            for candidate in gateway.gateway.fleet.candidates(caller.work.model):
                if candidate.state is not ReplicaState.READY or caller.file not in (None, candidate.file_sha256):
                    continue
                node = self.world.node_of(candidate.node)
                if node is None or not node.up or node.removed or not self.world.reach(gateway, node):
                    continue
                if any(
                    each.assignment.replica == candidate.replica
                    and each.state is ReplicaState.READY
                    and content_of(each.assignment) == candidate.file_sha256
                    and not node.engine.frozen(candidate.replica)
                    for each in node.executor.all()
                ):
                    return f"{gateway.name} knows {candidate.replica} on {node.name}, which is well"
        return None

    # --- inside -------------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        if not self._open:
            self._looks = False
            return
        self._check()
        self.world.time.after(LOOK_SECONDS, self._look)

    def _check(self) -> None:
        world = self.world
        now = world.time.now
        if not world.network.whole or not world.network.weather_is_fair:
            self.amiss_until = now
        for caller in list(self._open):
            why = self.why_live(caller)
            if why is None:
                caller.live_since = None
            elif caller.live_since is None:
                caller.live_since = now
            elif caller.could_be_answered(OPEN_SECONDS):
                raise Breach(f"{caller.work.id} was not answered for {OPEN_SECONDS:.0f} s, and {why}")
            gateway = caller.gateway
            if now > caller.work.deadline + OVERDUE_SECONDS:
                if gateway is not None and gateway.up and self.amiss_until < caller.work.deadline:
                    raise Breach(f"{caller.work.id} is not over after its deadline")
                if gateway is None or not gateway.up:
                    caller.over("overdue")
