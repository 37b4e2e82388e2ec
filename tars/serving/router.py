"""From a model's name to an answer: which replica, and which one next when that one cannot.

Law of this file: it knows candidates and targets, never workers, sockets or devices, so its tests need two fakes and no network.
Before the first event a retryable failure moves the call to the next-ranked replica; after it the failure is the caller's to see
(continuation of broken streams is a later issue).
"""

from __future__ import annotations

import difflib
import logging
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Protocol, cast

from tars.core.routing import Candidate, rank
from tars.core.types import ModelKind, ReplicaId, ReplicaState
from tars.errors import (
    DeadlineExceeded,
    InvalidParams,
    Overloaded,
    ReplicaFailed,
    ServerStateError,
    StillLoading,
    TarsError,
    UnknownModel,
    WrongModelKind,
)
from tars.messages.base import CallContext
from tars.messages.inference import Attempt, ServedBy
from tars.serving.targets import Target
from tars.workers.engine import Event, Work

log = logging.getLogger(__name__)

MEAN_WEIGHT = 0.2
"""Weight of the newest call in the moving mean of seconds per call: about the last ten calls count (EWMA, as in TCP's RTT)."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model that is wanted here: how it is called, and why it has no replica where it has none."""

    name: str
    kind: ModelKind
    aliases: tuple[str, ...]
    unavailable: TarsError | None = None
    adapters: tuple[str, ...] = ()
    """LoRA adapters: a call names one as `<model>:<adapter>`."""


class Fleet(Protocol):
    """What the router sees of the replicas."""

    def models(self) -> Sequence[ServedModel]:
        """Every deployed model."""
        ...

    def candidates(self, model: str) -> Sequence[Candidate]:
        """Its replicas, in whatever state."""
        ...

    def target(self, replica: ReplicaId) -> Target:
        """The way to one replica. Raises `KeyError` for one that went away."""
        ...

    def not_ready(self, model: str) -> TarsError:
        """The clearest error for a model without a ready replica: still loading (with stage), failed, does not fit."""
        ...


class Router:
    """See the module's law. `now` is the monotonic clock."""

    def __init__(self, fleet: Fleet, now: Callable[[], float] = time.monotonic):
        self._fleet = fleet
        self._now = now
        self._seconds: dict[ReplicaId, float] = {}

    def resolve(self, name: str | None, kind: ModelKind) -> ServedModel:
        """The deployed model that `name` (or an alias) means; None means the only one of its kind that can answer.

        `<model>:<adapter>` is the model; which adapter is for the engine to read from the call. A model whose own name holds a colon wins.
        Raises `UnknownModel`, `WrongModelKind` or, where None is ambiguous, `InvalidParams`.
        """
        models = self._fleet.models()
        of_kind = [model for model in models if model.kind is kind]
        if name is None:
            usable = [model for model in of_kind if model.unavailable is None] or of_kind
            if len(usable) == 1:
                return usable[0]
            if not of_kind:
                raise UnknownModel(
                    f"no {kind.value} model is deployed here; deploy one with `tars deploy MODEL` "
                    "or start the node with --model FILE",
                    details={"known": [model.name for model in models]},
                )
            names = ", ".join(model.name for model in usable)
            raise InvalidParams(
                f"several {kind.value} models are served here: {names}; say which one in `model`",
                details={"known": [model.name for model in usable]},
            )
        named = _called(name, models) or _with_adapter(name, models)
        if named is not None:
            if named.kind is not kind:
                raise WrongModelKind(
                    f"{named.name} is a model for {named.kind.value}, not for {kind.value}"
                    + (f"; try {of_kind[0].name}" if of_kind else ""),
                    details={"known": [each.name for each in of_kind]},
                )
            return named
        known = [model.name for model in models]
        shown = name[:100]
        near = difflib.get_close_matches(shown, [*known, *(a for m in models for a in m.aliases)], n=1)
        raise UnknownModel(
            f"no model {shown!r} is served here"
            + (f"; did you mean {near[0]!r}?" if near else "; `models.list` shows what is"),
            details={"known": known},
        )

    async def run(self, model: ServedModel, work: Work, call: CallContext) -> AsyncGenerator[tuple[Event, ServedBy]]:
        """Events of the first replica that can, each with who served it (tried replicas included). Close it to cancel."""
        ranked = rank(
            [replace(c, seconds_per_call=self._seconds.get(c.replica)) for c in self._fleet.candidates(model.name)],
            call.trace_id,
        )
        log.debug("call %s: %s", call.trace_id, ranked.reasons)
        if not ranked.order:
            raise self._fleet.not_ready(model.name)
        attempts: list[Attempt] = []
        last: TarsError | None = None
        for replica in ranked.order:
            if call.deadline.passed(self._now()):
                raise DeadlineExceeded("the call's time budget ran out before a replica could take it; allow more time")
            try:
                target = self._fleet.target(replica)
            except KeyError:
                continue
            began = False
            started = self._now()
            try:
                async with aclosing(cast("AsyncGenerator[Event]", target.run(work, call.deadline))) as events:
                    async for event in events:
                        if not began:
                            began = True
                            attempts.append(Attempt(replica=replica, node=target.served_by.node, outcome="answered"))
                            served_by = target.served_by.model_copy(update={"attempts": attempts})
                        yield event, served_by
                self._learn(replica, self._now() - started)
                return
            except (ServerStateError, StillLoading) as error:
                if began or not error.retryable or isinstance(error, DeadlineExceeded):
                    raise
                attempts.append(Attempt(replica=replica, node=target.served_by.node, outcome=error.kind))
                last = error
        raise last or self._fleet.not_ready(model.name)

    def seconds_per_call(self) -> Mapping[ReplicaId, float]:
        """The learned means."""
        return self._seconds

    def _learn(self, replica: ReplicaId, seconds: float) -> None:
        before = self._seconds.get(replica)
        self._seconds[replica] = seconds if before is None else before + MEAN_WEIGHT * (seconds - before)


def _called(name: str, models: Sequence[ServedModel]) -> ServedModel | None:
    return next((model for model in models if name == model.name or name in model.aliases), None)


def _with_adapter(name: str, models: Sequence[ServedModel]) -> ServedModel | None:
    """The model before the last colon. Raises `UnknownModel` where it has no adapter of the name behind it."""
    base, _, adapter = name.rpartition(":")
    model = _called(base, models)
    if model is None or adapter in model.adapters:
        return model
    known = [f"{base}:{each}" for each in model.adapters]
    raise UnknownModel(
        f"{model.name} has no adapter {adapter[:100]!r}; "
        + (f"it has {', '.join(known)}" if known else "it has none: name one in `adapters` of its [[model]] table"),
        details={"known": known},
    )


def no_replica_error(states: Sequence[ReplicaState], model: str) -> TarsError:
    """The error for a model none of whose replicas is ready, from their states alone."""
    if states and all(state is ReplicaState.FAILED for state in states):
        return ReplicaFailed(
            f"{model} could not be loaded and TARS gave up; `tars explain {model}` and the node's log say why"
        )
    if any(state in (ReplicaState.STARTING, ReplicaState.LOADING, ReplicaState.RESTARTING) for state in states):
        return StillLoading(f"{model} is still loading; try again shortly", retry_after_ms=1000)
    return Overloaded(f"{model} has no ready replica now; try again shortly", retry_after_ms=2000)
