"""What this node tells of itself and of the mesh as it sees it: `node.describe`, `mesh.peers`, `mesh.describe`.

Law of this file: readings and counters in, messages out. It counts nothing itself, and asks no peer.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable

from tars import __version__
from tars.core.replicated_map import adverts
from tars.mesh.coordinator import Coordinator
from tars.mesh.model_store import FileStore
from tars.mesh.plan_report import describe_device
from tars.messages.mesh_state import MeshDescription, MeshParams
from tars.messages.node import AttemptCounts, NodeDescription, PeerCalls, PeerDescription, PeersResult
from tars.serving.call_log import CallLog
from tars.serving.idempotency import IdempotentAnswers
from tars.serving.local_fleet import LocalFleet
from tars.serving.local_view import LocalView
from tars.serving.mesh_fleet import MeshFleet
from tars.serving.mesh_overview import describe_mesh
from tars.serving.router import Router


class NodeDescriber:
    """See the module's law. `others`: the peers as this node sees them; `now` is the monotonic clock, `wall_clock` Unix seconds."""

    def __init__(
        self,
        coordinator: Coordinator,
        view: LocalView,
        fleet: LocalFleet | MeshFleet,
        router: Router,
        calls: CallLog,
        keys: IdempotentAnswers,
        *,
        name: str,
        wsl2: bool,
        addresses: Callable[[], list[str]],
        others: Callable[[], list[PeerDescription]] = list,
        files: FileStore | None = None,
        file_bytes_sent: Callable[[], int] = lambda: 0,
        now: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ):
        self._coordinator = coordinator
        self._view = view
        self._fleet = fleet
        self._router = router
        self._calls = calls
        self._keys = keys
        self._name = name
        self._wsl2 = wsl2
        self._addresses = addresses
        self._others = others
        self._files = files
        self._file_bytes_sent = file_bytes_sent
        self._now = now
        self._started_at = wall_clock()
        self._started = now()

    async def node(self, state: str) -> NodeDescription:
        """Devices, replicas, counters. `state`: the node's own, as `node.ping` says it."""
        snapshot = await self._view.snapshot()
        router = self._router
        return NodeDescription(
            node=self._coordinator.node_id,
            name=self._name,
            version=__version__,
            state=state,
            started_at=self._started_at,
            uptime_seconds=self._now() - self._started,
            platform=f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
            wsl2=self._wsl2,
            devices=[describe_device(device) for device in snapshot.devices],
            replicas=self._view.replicas(),
            calls=self._calls.counters().model_copy(update={"with_key": dict(self._keys.outcomes)}),
            recent_errors=self._calls.recent_errors(),
            sent_to_peers=[
                PeerCalls(peer=peer, outcome=outcome, calls=calls)
                for (peer, outcome), calls in sorted(router.calls_at_peers().items())
            ],
            calls_from_peers=router.calls_from_peers,
            attempts=[
                AttemptCounts(why=why, outcome=outcome, attempts=count)
                for (why, outcome), count in sorted(router.attempts().items())
            ],
            retries_refused=router.state.retries.refused,
            hedged_units=router.state.hedges.extra_units,
            peers_silent=self._fleet.pulses.times_silent if isinstance(self._fleet, MeshFleet) else 0,
            transfers=[] if self._files is None else self._files.transfers(),
            file_bytes_received=0 if self._files is None else self._files.bytes_received,
            file_bytes_sent=self._file_bytes_sent(),
        )

    def peers(self) -> PeersResult:
        """This node first, then its peers."""
        me = PeerDescription(
            node=self._coordinator.node_id,
            name=self._name,
            state="DRAINING" if self._coordinator.draining.on else "ALIVE",
            addresses=self._addresses(),
            coordinator=self._coordinator.coordinates,
            version=__version__,
        )
        view = self._coordinator.mesh()
        return PeersResult(peers=[me, *self._others()], isolated=view is not None and view.isolated)

    def mesh(self, params: MeshParams) -> MeshDescription:
        """As told last; this node too, so that the answer changes only when something did. Raises `InvalidParams`."""
        coordinator, peers = self._coordinator, self.peers()
        return describe_mesh(
            params,
            coordinator.node_id,
            peers.peers,
            adverts(coordinator.records.map),
            plan=coordinator.plan,
            moves=coordinator.moves,
            problems=coordinator.problems,
            isolated=peers.isolated,
        )
