"""What the router sees of the replicas: models that are wanted, candidates, the ways to them, and how to have one loaded.

Law of this file: protocols, and errors from states alone; no coordinator, no peer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from tars.core.routing import Candidate
from tars.core.types import ModelKind, ReplicaId, ReplicaState
from tars.errors import Draining, Overloaded, ReplicaFailed, StillLoading, TarsError
from tars.serving.targets import Target


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model that is wanted here: how it is called, and why it has no replica where it has none."""

    name: str
    kind: ModelKind
    aliases: tuple[str, ...]
    unavailable: TarsError | None = None
    adapters: tuple[str, ...] = ()
    """LoRA adapters: a call names one as `<model>:<adapter>`."""
    deployed: bool = True
    """False for one that nobody deployed and whose file is in the mesh: the first call has it loaded."""


class Fleet(Protocol):
    """What the router sees of the replicas."""

    def models(self) -> Sequence[ServedModel]:
        """Every deployed model."""
        ...

    def loadable(self) -> Sequence[ServedModel]:
        """Models that nobody deployed and whose file is in the mesh; none where loading on demand is off. Made when it is asked for:
        only a name that `models` does not have is looked for here.
        """
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

    async def wait_change(self) -> None:
        """Until something that `candidates` or `not_ready` say may have changed; rather too often than too late."""
        ...

    async def ask_to_load(self, model: str) -> None:
        """Nobody deployed `model`, and a call names it: have a replica loaded, without moving what others run. Returns when that is asked
        for, not when it is there. Raises `TarsError` where it cannot be: it fits nowhere, its file is gone, or loading on demand is off.
        """
        ...


def draining_error() -> Draining:
    """What a call gets that only a node which is being drained could take."""
    return Draining(
        "this node is being drained and takes no new calls; send the call to another node, "
        "or resume this one with `node.resume`",
        retry_after_ms=5000,
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
