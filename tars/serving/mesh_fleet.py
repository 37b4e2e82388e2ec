"""Every replica of the mesh as this node's router sees it: its own, and those that peers advertise.

Law of this file: it reads what is known here and asks nobody; a call costs no round trip before it starts. What a peer advertises is its
own word, and whether it lives is membership's: a node that is dead or has left has no replicas, however fresh its advert looks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from tars.core.coordination_view import FETCH
from tars.core.health import BreakerState
from tars.core.mesh_messages import MemberState
from tars.core.records import NodeAdvert, ReplicaReport, Wish
from tars.core.replica_ledger import ReplicaLedger
from tars.core.replicated_map import ReplicatedMap, adverts, wishes
from tars.core.routing import Candidate
from tars.core.types import DeviceSnapshot, ModelEntry, NodeId, ReplicaId, ReplicaState
from tars.errors import ModelError, PeerUnreachable, ReplicaFailed, StillLoading, TarsError
from tars.messages.inference import ServedBy
from tars.serving.fleet import Fleet, ServedModel
from tars.serving.peer_pulses import PING_SECONDS, PeerPulses
from tars.serving.peer_target import PeerConnection, PeerTarget
from tars.serving.targets import Target

ASKED = frozenset({MemberState.ALIVE, MemberState.SUSPECT, MemberState.DRAINING})
"""Peers in these states may get calls; the router asks them in this order."""

SILENT_SECONDS = 30.0
"""A silent peer's breaker closes with its first sign of life; until then nobody need try."""
RETURN_SECONDS = 30.0
"""A model that fits only on a node that went so lately is waited for: a PC that restarts, or whose cable was out, is back by then."""


class Peers(Protocol):
    """What this node knows of the others."""

    @property
    def version(self) -> int:
        """Another number whenever adverts or wishes changed (`ReplicatedMap.root`)."""
        ...

    def adverts(self) -> Mapping[NodeId, NodeAdvert]:
        """By node; this node's own may be among them."""
        ...

    def wishes(self) -> Mapping[str, Wish]:
        """What is wanted in the mesh, by model."""
        ...

    def state(self, node: NodeId) -> MemberState | None:
        """How this node sees a peer; None where it is no member."""
        ...

    def connection(self, node: NodeId) -> PeerConnection:
        """The way to a peer. Raises `PeerUnreachable` where no address of it is known."""
        ...


class MappedPeers:
    """`Peers` from the replicated map; `state` is membership's, `connection` the mTLS connections'."""

    def __init__(
        self,
        records: ReplicatedMap,
        state: Callable[[NodeId], MemberState | None],
        connection: Callable[[NodeId], PeerConnection],
    ):
        self._records = records
        self.state = state
        self.connection = connection

    @property
    def version(self) -> int:
        """The map's hash."""
        return self._records.root

    def adverts(self) -> Mapping[NodeId, NodeAdvert]:
        """Those in the map."""
        return adverts(self._records)

    def wishes(self) -> Mapping[str, Wish]:
        """Those in the map."""
        return wishes(self._records)


@dataclass(frozen=True, slots=True)
class _Remote:
    """One replica of a peer."""

    advert: NodeAdvert
    report: ReplicaReport

    @property
    def node(self) -> NodeId:
        return self.advert.node.id

    @property
    def device(self) -> DeviceSnapshot | None:
        return next((each for each in self.advert.node.devices if each.id == self.report.assignment.device), None)


@dataclass(frozen=True, slots=True)
class _Index:
    """Adverts and wishes in the order in which calls ask for them."""

    version: int | None
    by_model: Mapping[str, tuple[_Remote, ...]]
    by_replica: Mapping[ReplicaId, _Remote]
    entries: Mapping[str, ModelEntry]
    """Of wanted models that the local fleet may not know."""
    served: Mapping[str, ServedModel]
    """The same as the router wants them."""


@dataclass(frozen=True, slots=True)
class _Went:
    """A peer that died or left, at a time of the clock of `tell`, with models that it had or was loading."""

    at: float
    name: str
    had: frozenset[str]


class MeshFleet:
    """See the module's law, and `router.Fleet` for the methods. `find` is the catalogue's."""

    def __init__(
        self, node: NodeId, local: Fleet, peers: Peers, find: Callable[[str], ModelEntry | None] = lambda model: None
    ):
        self._node = node
        self._local = local
        self._peers = peers
        self._find = find
        self._index = _Index(None, {}, {}, {}, {})
        self.pulses = PeerPulses(self._ping, name=self._name)
        """Which of the peers that have calls of this node live."""
        self._ledger = ReplicaLedger()
        self._now: Callable[[], float] = time.monotonic
        self._went: dict[NodeId, _Went] = {}

    def models(self) -> list[ServedModel]:
        """What is wanted anywhere. A model that cannot be loaded here is still served where a peer has it."""
        index = self._indexed()
        served = [self._served(each, index) for each in self._local.models()]
        known = {each.name for each in served}
        return [*served, *(model for name, model in index.served.items() if name not in known)]

    def loadable(self) -> Sequence[ServedModel]:
        """What a call may have loaded, on any node."""
        return self._local.loadable()

    async def wait_change(self) -> None:
        """News of peers end in a placement round of this node, which its own fleet hears of."""
        await self._local.wait_change()

    async def ask_to_load(self, model: str) -> None:
        """Its own fleet asks for the whole mesh."""
        await self._local.ask_to_load(model)

    def entries(self) -> Mapping[str, ModelEntry]:
        """The wanted models' catalogue entries, also of those that only peers know."""
        return self._indexed().entries

    def candidates(self, model: str) -> list[Candidate]:
        """This node's own first, then those of peers that may get calls."""
        found = list(self._local.candidates(model))
        for remote in self._indexed().by_model.get(model, ()):
            standing = self._standing(remote)
            if standing in ASKED:
                found.append(_candidate(remote, standing))
        return found

    def target(self, replica: ReplicaId) -> Target:
        """The worker here, or the peer. Raises `KeyError` for a replica that went away, `PeerUnreachable` where no way to it is known."""
        remote = self._indexed().by_replica.get(replica)
        if remote is None or self._standing(remote) not in ASKED:
            return self._local.target(replica)
        device = remote.device
        served_by = ServedBy(
            node=remote.node,
            replica=replica,
            device=remote.report.assignment.device if device is None else device.name,
            simulated=device is not None and device.simulated,
        )
        lifeline, connection = self.pulses.lifeline(remote.node), self._peers.connection(remote.node)
        return PeerTarget(
            served_by,
            remote.advert.node.name,
            connection,
            lifeline,
            spare=lambda: self._has_spare(remote),
            file_sha256=remote.report.file_sha256,
        )

    def tell(self, ledger: ReplicaLedger, now: Callable[[], float]) -> None:
        """Have a peer's breaker open while the peer is silent."""
        self._ledger = ledger
        self._now = now
        self.pulses.silent = lambda node: ledger.failed(node, SILENT_SECONDS, now())
        self.pulses.heard = ledger.works

    def peer_died(self, node: NodeId) -> None:
        """Membership gives a peer up: what waits for it is answered elsewhere, or told so."""
        self.pulses.died(node)

    def peer_went(self, node: NodeId) -> None:
        """A peer died or said good-bye: what only it has room for is waited for, as long as it may be restarting."""
        had = {
            name
            for name, remotes in self._indexed().by_model.items()
            if any(each.node == node and not _gave_up(each.report.state) for each in remotes)
        }
        now = self._now()
        self._went = {each: went for each, went in self._went.items() if went.at > now - RETURN_SECONDS}
        self._went[node] = _Went(now, self._name(node), frozenset(had))

    def not_ready(self, model: str) -> TarsError:
        """The clearest error for a model that nobody can answer now.

        In this order: it is being loaded somewhere (where, stage, percent); the node that has it does not answer, and it is loaded
        elsewhere or the node may be back in a moment; it failed somewhere (where, why); else this node's own word: refused, planned, or
        nothing yet.
        """
        remotes = self._indexed().by_model.get(model, ())
        own = self._local.not_ready(model)
        if any(not _gave_up(each.state) for each in self._local.candidates(model)):
            return own
        there = [each for each in remotes if self._standing(each) in ASKED]
        loading = [each for each in there if not _gave_up(each.report.state)]
        if loading:
            furthest = max(loading, key=lambda each: each.report.percent or 0.0)
            return _loading(model, furthest)
        lost = [each for each in remotes if each not in there and each.report.state is ReplicaState.READY]
        if lost and not there and (own.retryable or not isinstance(own, ModelError)):
            names = {each.node: each.advert.node.name for each in lost}
            return _lost(
                model, names, "does not answer. It is loaded elsewhere where it fits; try again in a moment, or"
            )
        lately = self._lately(model)
        if lately and not there:
            why = own.message.rstrip(".")
            return _lost(model, lately, f"went a moment ago and may be back soon. Until then {why}. Try again, or")
        failed = next((each for each in there if each.report.state is ReplicaState.FAILED), None)
        if failed is not None and not self._local.candidates(model):
            why = failed.report.error or "its log says why"
            return ReplicaFailed(
                f"{model} could not be loaded on {failed.advert.node.name}: {why}",
                details={"node": failed.node, "replica": failed.report.assignment.replica},
            )
        return own

    async def close(self) -> None:
        """Ask no peer any more."""
        await self.pulses.close()

    # --- inside ------------------------------------------------------------------------------------------------------

    def _has_spare(self, remote: _Remote) -> bool:
        """Whether another replica of the same file, in good standing and on a node that is heard, could take a call from this one."""
        file, now = remote.report.file_sha256, self._now()
        return any(
            each.state is ReplicaState.READY
            and each.node != remote.node
            and each.standing is MemberState.ALIVE
            and (file is None or each.file_sha256 in (None, file))
            and not self.pulses.is_silent(each.node)
            and BreakerState.OPEN not in (self._ledger.breaker(each.replica, now), self._ledger.breaker(each.node, now))
            for each in self.candidates(remote.report.assignment.model)
        )

    async def _ping(self, node: NodeId) -> object:
        return await self._peers.connection(node).call("node.ping", timeout=PING_SECONDS)

    def _name(self, node: NodeId) -> str:
        advert = self._peers.adverts().get(node)
        return node if advert is None else f"{advert.node.name} ({node})"

    def _served(self, model: ServedModel, index: _Index) -> ServedModel:
        """Without this node's own problem, where a peer has, or is loading, the model, or had it a moment ago."""
        if model.unavailable is None:
            return model
        there = any(
            self._standing(each) in ASKED and each.report.state is not ReplicaState.FAILED
            for each in index.by_model.get(model.name, ())
        )
        return replace(model, unavailable=None) if there or self._lately(model.name) else model

    def _lately(self, model: str) -> dict[NodeId, str]:
        """Nodes that had it and went so lately that they may be back soon: their ids and names."""
        since = self._now() - RETURN_SECONDS
        return {node: went.name for node, went in self._went.items() if went.at > since and model in went.had}

    def _standing(self, remote: _Remote) -> MemberState | None:
        state = self._peers.state(remote.node)
        # A node that was told to drain says so itself before membership has heard of it.
        return MemberState.DRAINING if state is MemberState.ALIVE and remote.advert.node.draining else state

    def _indexed(self) -> _Index:
        version = self._peers.version
        if self._index.version != version:
            self._index = self._made(version)
        return self._index

    def _made(self, version: int) -> _Index:
        by_model: dict[str, list[_Remote]] = {}
        by_replica: dict[ReplicaId, _Remote] = {}
        offered: dict[str, ModelEntry] = {}
        for node, advert in sorted(self._peers.adverts().items()):
            if node == self._node:
                continue
            offered.update((entry.name, entry) for entry in advert.models)
            for report in advert.replicas:
                remote = _Remote(advert, report)
                by_model.setdefault(report.assignment.model, []).append(remote)
                by_replica[report.assignment.replica] = remote
        entries: dict[str, ModelEntry] = {}
        for model, wish in self._peers.wishes().items():
            entry = wish.entry or self._find(model) or offered.get(model)
            if entry is not None:
                entries[model] = entry
        served = {
            name: ServedModel(
                entry.name, entry.kind, entry.aliases, adapters=tuple(adapter.name for adapter in entry.adapters)
            )
            for name, entry in entries.items()
        }
        return _Index(version, {model: tuple(each) for model, each in by_model.items()}, by_replica, entries, served)


def _candidate(remote: _Remote, standing: MemberState) -> Candidate:
    report = remote.report
    assignment = report.assignment
    return Candidate(
        replica=assignment.replica,
        model=assignment.model,
        kind=report.kind,
        state=report.state,
        node=remote.node,
        local=False,
        standing=standing,
        slots=report.slots,
        speed=report.speed,
        prefill_speed=report.prefill_speed,
        cache_tokens=assignment.settings.kv_tokens,
        file_sha256=report.file_sha256,
        exact=report.exact,
    )


def _lost(model: str, nodes: Mapping[NodeId, str], what: str) -> PeerUnreachable:
    """`nodes` had it: their ids and names."""
    return PeerUnreachable(
        f"{model} was served by {', '.join(sorted(nodes.values()))}, which {what} see `tars explain {model}`",
        retry_after_ms=5000,
        details={"nodes": sorted(nodes)},
    )


def _gave_up(state: ReplicaState) -> bool:
    return state in (ReplicaState.FAILED, ReplicaState.STOPPING, ReplicaState.STOPPED)


def _loading(model: str, remote: _Remote) -> StillLoading:
    """Where it is loaded, and how far that is."""
    report = remote.report
    device = remote.device
    where = remote.advert.node.name + ("" if device is None else f" ({device.name})")
    stage, percent = report.stage or "planned", report.percent or 0.0
    doing = "its file is being copied" if stage == FETCH else f"stage {stage}"
    return StillLoading(
        f"{model} is still loading on {where}: {doing}, {percent:.0f} %; try again shortly",
        retry_after_ms=1000,
        details={"stage": stage, "percent": percent, "node": remote.node, "node_name": remote.advert.node.name},
    )
