"""This node's part in a mesh, put together: identity, map, gossip, the port for peers, discovery. `node` makes one where there is a mesh.

Law of this file: wiring only, like `node`; what the parts do with each other is theirs to say.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Iterable, Sequence

from tars import __version__
from tars.config import Config, ListenAddress
from tars.core.addresses import Viewer, own_addresses, parse
from tars.core.membership import MembershipSettings
from tars.core.mesh_events import CoordinatorChanged, LoadHeard, MemberChanged, MeshView, RecordsChanged
from tars.core.mesh_machine import MeshMachine, MeshSettings
from tars.core.mesh_messages import MemberState
from tars.core.peer import LIVE
from tars.core.records import Member, NodeAdvert
from tars.core.replicated_map import MEMBER, adverts, members
from tars.core.types import NodeId
from tars.mesh.administration import Administration
from tars.mesh.client_keys import ClientKeys
from tars.mesh.coordinator import Coordinator
from tars.mesh.discovery import Discovery
from tars.mesh.file_server import FileServer
from tars.mesh.gossip import Gossip, Notice
from tars.mesh.identity import Identity
from tars.mesh.join_tokens import Invitation, JoinTokens
from tars.mesh.joining import Admitting, take_place
from tars.mesh.member_check import MemberCheck
from tars.mesh.model_store import FileStore
from tars.mesh.network_interfaces import NetworkWatch
from tars.mesh.replicated_store import ReplicatedStore
from tars.mesh.seeds import Seeds
from tars.messages.node import PeerDescription
from tars.rpc.dispatcher import Dispatcher
from tars.rpc.file_routes import add_file_routes
from tars.rpc.http_client import RpcConnection
from tars.rpc.join_client import Applicant, enter_mesh
from tars.rpc.mesh_listener import MeshListener
from tars.rpc.options import RpcOptions
from tars.rpc.peer_connections import PeerConnections
from tars.rpc.peer_files import HttpPeerFiles
from tars.rpc.peer_states import HttpPeerStates
from tars.rpc.state_routes import add_state_routes
from tars.serving.key_peers import KeysAtPeers
from tars.serving.local_service import LocalNodeService
from tars.serving.mesh_fleet import MappedPeers
from tars.state_folder import SEQUENCES, StateFolder

log = logging.getLogger(__name__)


def asks_for_mesh(config: Config) -> bool:
    """Whether a node that is in no mesh yet begins one: it can be reached from elsewhere, or says where peers shall reach it."""
    return config.exposed or config.mesh.listen is not None


def mesh_address(config: Config) -> ListenAddress:
    """Where peers reach a node that is in a mesh: [mesh] listen, else the port after the clients'.

    Clients may be local only (the default); peers never are, and prove who they are: then all addresses.
    """
    if config.mesh.listen is not None:
        return ListenAddress.parse(config.mesh.listen)
    address = config.node.address
    # Port 0 lets the system choose, and the last port has none after it.
    return ListenAddress(
        address.host if config.exposed else "0.0.0.0", address.port + 1 if 0 < address.port < 65535 else 0
    )


async def enter(
    config: Config, folder: StateFolder, join: Invitation | None
) -> tuple[Identity | None, ReplicatedStore]:
    """This node's identity, and its copy of the map: as it was, by joining, or as the first of a new mesh; no identity: a node alone.

    Raises `JoinRefused`, `ConfigError`, `PeerUnreachable`, `DiskFull` and other `TarsError`s; then nothing was changed.
    """
    node = folder.node_id()
    identity = Identity.load_or_none(folder.path, node)
    store = ReplicatedStore(folder, node)
    if join is not None:
        grant = await enter_mesh(
            join,
            folder,
            Applicant(config.node.name, _addresses(config)),
            identity,
            knows=lambda peer: isinstance(store.map.get(MEMBER + peer), Member),
        )
        if grant is not None:
            joined = ReplicatedStore(folder, grant.node)
            joined.adopt(grant.records)
            return grant.save(folder), joined
    if identity is None and asks_for_mesh(config):
        identity = Identity.create(folder.path, node)
    if identity is not None:
        take_place(identity, store, config.node.name, _addresses(config))
    return identity, store


def founded(identity: Identity, store: ReplicatedStore) -> bool:
    """Whether this node began the mesh."""
    own = store.map.get(MEMBER + identity.node)
    return not isinstance(own, Member) or own.admitted_by in (None, identity.node)


def _addresses(config: Config) -> tuple[str, ...]:
    """Before the port is open: what is known of it. A port that the system chooses is told later, by gossip."""
    address = mesh_address(config)
    if address.port == 0 and not config.mesh.advertise:
        return ()
    return own_addresses(address.host, max(1, address.port), NetworkWatch().addresses, config.mesh.advertise)


class NodeMesh:
    """See the module's law. Make it, hand its parts to the coordinator and the service, then `start`."""

    def __init__(
        self,
        config: Config,
        identity: Identity,
        store: ReplicatedStore,
        folder: StateFolder,
        keys: ClientKeys,
        files: FileStore,
        join: Invitation | None = None,
    ):
        self._config = config
        self._identity = identity
        self._store = store
        self._keys = keys
        self._files = files
        self._joined_at = join
        self._watch = NetworkWatch()
        self._viewed = (self._watch.current, Viewer.of(self._watch.addresses))
        self._check = MemberCheck(store.map, lost=store.lost)
        settings = MeshSettings(membership=MembershipSettings.paced(config.mesh.probe_seconds))
        machine = MeshMachine(identity.node, store.map, settings, random.Random())
        self.connections = PeerConnections(
            identity, self._check, lambda node: self.gossip.addresses(node), thrown_out=self._removed
        )
        self.gossip = Gossip(machine, self.connections, store, viewer=self._viewer, load=self._load)
        self.tokens = JoinTokens(folder, identity.ca_hash)
        self.admitting = Admitting(identity, self.tokens, store)
        self.peers = MappedPeers(store.map, self._state, self._connection)
        self.keys_at = KeysAtPeers(identity.node, self._live, self._connection)
        files.peers = HttpPeerFiles(self.live_adverts, self._connection)
        self.states = HttpPeerStates(self._connection, config.node.state_dir / SEQUENCES)
        self._listener: MeshListener | None = None
        self._file_server: FileServer | None = None
        self._seeds: Seeds | None = None
        self._discovery: Discovery | None = None
        self._service: LocalNodeService | None = None
        self._coordinator: Coordinator | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._cut_off = self._thrown_out = False

    # --- what the other parts ask -------------------------------------------------------------------------------------

    def view(self) -> MeshView:
        """How this node sees its peers."""
        return self.gossip.view()

    def addresses(self) -> tuple[str, ...]:
        """Where peers reach this node, best first; empty before `start`."""
        if self._listener is None:
            return ()
        host = mesh_address(self._config).host
        return own_addresses(host, self._listener.port, self._watch.addresses, self._config.mesh.advertise)

    @property
    def port(self) -> int | None:
        """Of the port for peers; None before `start`."""
        return None if self._listener is None else self._listener.port

    @property
    def takes_part(self) -> bool:
        """False once this node has learned that it was removed."""
        return not self._thrown_out

    def names(self) -> list[str]:
        """Of the other members, by name."""
        own = self._identity.node
        return sorted(each.name for each in members(self._store.map).values() if each.node != own and not each.removed)

    def file_bytes_sent(self) -> int:
        """Bytes of model files that peers got from here."""
        return 0 if self._file_server is None else self._file_server.bytes_sent

    def administration(self) -> Administration:
        """What administrators and peers ask of the mesh."""
        return Administration(
            self._keys,
            self._store,
            admitting=self.admitting,
            tokens=self.tokens,
            hear=self.gossip.handle,
            addresses=self.addresses,
        )

    def invitation(self) -> str | None:
        """What the next PC gives to `--join`, where this node is still the only one of its mesh; else None."""
        reached = self.addresses()
        if self.names() or not reached:
            return None
        token, _ = self.tokens.new()
        return f"{token}@{reached[0]}"

    def described(self) -> list[PeerDescription]:
        """The peers, by name, for `mesh.peers`."""
        view, known, told = self.view(), members(self._store.map), adverts(self._store.map)
        found = []
        for node, seen in view.members.items():
            advert = told.get(node)
            member = known.get(node)
            found.append(
                PeerDescription(
                    node=node,
                    name=advert.node.name if advert is not None else member.name if member is not None else node,
                    state=seen.state.value,
                    addresses=list(self.gossip.addresses(node) or seen.addresses),
                    coordinator=view.coordinator == node,
                    version="" if advert is None else advert.version,
                    client_url=None if advert is None else advert.client_url,
                    since=round(time.time() - (time.monotonic() - seen.since)),
                )
            )
        return sorted(found, key=lambda each: (each.name, each.node))

    def live_adverts(self) -> Sequence[NodeAdvert]:
        """Of the peers that may be asked for a file."""
        seen = self.view().members
        return [
            advert for node, advert in adverts(self._store.map).items() if node in seen and seen[node].state in LIVE
        ]

    # --- its life -----------------------------------------------------------------------------------------------------

    async def start(
        self, dispatcher: Dispatcher, options: RpcOptions, service: LocalNodeService, coordinator: Coordinator
    ) -> None:
        """Open the port for peers and take part. Raises `ConfigError` where the port cannot be bound."""
        self._service, self._coordinator = service, coordinator
        address = mesh_address(self._config)
        listener = MeshListener(self._identity, self._check, dispatcher, options)
        cap = self._config.files.most_mib_per_second
        self._file_server = FileServer(self._files.shared, most_bytes_per_second=None if cap is None else cap * 2**20)
        add_file_routes(listener.app, self._file_server)
        add_state_routes(listener.app, service.kept_states)
        await listener.start(address.host, address.port)
        self._listener = listener
        self.gossip.listen(self._noticed)
        self.gossip.readdress(self.addresses())
        self.gossip.drain(coordinator.draining.on)
        seeds = [*self._config.mesh.seeds]
        if self._joined_at is not None:
            seeds.append(str(parse(str(self._joined_at.address))))
        self._seeds = Seeds(dict.fromkeys(seeds), self.gossip.seed, self._reached)
        self._watch.on_change(self._network_changed)
        parts = [
            ("gossip", self.gossip.run()),
            ("seeds", self._seeds.run()),
            ("network interfaces", self._watch.run()),
            ("certificate renewal", self._identity.keep_renewed()),
        ]
        if self._config.mesh.mdns and not address.is_loopback:
            self._discovery = Discovery(
                self._identity.node,
                self._identity.mesh_id,
                __version__,
                self._seeds,
                addresses=self.addresses,
                interfaces=lambda: self._watch.current,
            )
            parts.append(("discovery", self._discovery.run()))
        self._tasks = [asyncio.create_task(part, name=name) for name, part in parts]
        for task in self._tasks:
            task.add_done_callback(_say_why)

    async def leave(self) -> None:
        """Tell the peers that this node goes."""
        if self._tasks:
            await self.gossip.leave()

    async def stop(self) -> None:
        """End everything; idempotent."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        self._tasks = []
        if self._service is not None:
            await self._service.leave_peers()
        if self._listener is not None:
            await self._listener.close()
            self._listener = None
        await self.connections.close()

    # --- inside -------------------------------------------------------------------------------------------------------

    def _noticed(self, notice: Notice) -> None:
        assert self._coordinator is not None
        match notice:
            case RecordsChanged(keys=keys):
                self._records_changed(keys)
                self._coordinator.heard(keys)
            case LoadHeard(load=load):
                if self._service is not None:
                    self._service.load_told(load)
            case MemberChanged(node=node, before=before, after=after):
                log.log(
                    logging.WARNING if after is MemberState.DEAD else logging.INFO,
                    "node %s is %s now (was %s)",
                    self._name(node),
                    "no member" if after is None else after.value,
                    "no member" if before is None else before.value,
                )
                if self._service is not None:
                    if after in (MemberState.DEAD, None):
                        self._service.peer_died(node)
                    elif after is MemberState.ALIVE:
                        self._service.peer_lives(node)
                        self.keys_at.heard(node)
                    if after in (MemberState.DEAD, MemberState.LEFT):
                        self._service.peer_went(node)
                    self._service.keys.members_changed()
                self._coordinator.wake()
                self._say_whether_cut_off(before)
                if self._seeds is not None and (self._cut_off or self.view().isolated):
                    self._seeds.hurry()
            case CoordinatorChanged(node=node):
                log.info("%s coordinates the mesh now", "nobody" if node is None else self._name(node))
                self._coordinator.wake()

    def _say_whether_cut_off(self, before: MemberState | None) -> None:
        """Once when the last peer is gone without a word, and once when one is back: a person then looks at this PC's cable first."""
        states = [seen.state for seen in self.view().members.values()]
        reached = any(state in LIVE for state in states)
        if self._cut_off and reached:
            log.warning("this node reaches its mesh again")
            self._cut_off = False
        elif not (self._cut_off or self._thrown_out) and not reached and MemberState.DEAD in states and before in LIVE:
            log.warning(
                "this node is isolated: none of its peers answers any more. It serves the models that it has, and goes on looking "
                "for them; look first at this PC's own network"
            )
            self._cut_off = True

    def _records_changed(self, keys: Iterable[str]) -> None:
        keys = tuple(keys)
        self._keys.refresh(keys)
        self.connections.members_changed(keys)
        if self._listener is not None:
            self._listener.members_changed(keys)
        if MEMBER + self._identity.node in keys:
            own = self._store.map.get(MEMBER + self._identity.node)
            if isinstance(own, Member) and own.removed:
                self._removed()

    def _removed(self) -> None:
        if not self._thrown_out:
            log.error(
                "this node was removed from the mesh, so its peers no longer talk to it; what it serves, it serves alone. To let it "
                "in again: `tars token new` on a node of the mesh, then `tars-node --join` here"
            )
        self._thrown_out = True

    def _network_changed(self) -> None:
        self.gossip.network_changed()
        self.gossip.readdress(self.addresses())
        if self._seeds is not None:
            self._seeds.hurry()
        if self._discovery is not None:
            self._discovery.refresh()

    def _viewer(self) -> Viewer:
        # Each call at a peer asks for its addresses in their order, and reading networks takes longer than all else of choosing one.
        if self._viewed[0] is not self._watch.current:
            self._viewed = (self._watch.current, Viewer.of(self._watch.addresses))
        return self._viewed[1]

    def _load(self) -> tuple[tuple[str, int, int], ...]:
        return () if self._service is None else tuple(self._service.load())

    def _state(self, node: NodeId) -> MemberState | None:
        seen = self.view().members.get(node)
        return None if seen is None else seen.state

    def _live(self) -> list[NodeId]:
        """The peers that may keep idempotency keys; none where this node was removed, or sees nobody."""
        return [node for node, seen in self.view().members.items() if seen.state in LIVE]

    def _connection(self, node: NodeId) -> RpcConnection:
        return self.connections.connection(node)

    def _reached(self, address: str) -> bool:
        """Whether a living member is known there, or this node itself."""
        if address in self.addresses():
            return True
        return any(
            address in (*seen.addresses, *self.gossip.addresses(node))
            for node, seen in self.view().members.items()
            if seen.state in LIVE and seen.incarnation >= 0
        )

    def _name(self, node: NodeId) -> str:
        member = self._store.map.get(MEMBER + node)
        return f"{member.name} ({node})" if isinstance(member, Member) else node


def _say_why(task: asyncio.Task[None]) -> None:
    """A part that ends by itself is a fault of TARS; without it the mesh is worse, and the node goes on."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("the mesh's %s ended by a fault of TARS", task.get_name(), exc_info=error)
