"""Everything between nodes at once, on loopback: join by token, gossip over mutual TLS, keys that work everywhere, removal, restart."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

import pytest
from fake_node import FakeNode
from raw_server import sockets_closed

from tars.core.mesh_events import RecordsChanged
from tars.core.mesh_machine import MeshMachine, MeshSettings
from tars.core.mesh_messages import MemberState
from tars.core.records import Member
from tars.errors import JoinRefused, NotAMember, PeerUnreachable
from tars.mesh.administration import Administration
from tars.mesh.client_keys import ClientKeys
from tars.mesh.gossip import Gossip, Notice
from tars.mesh.identity import Identity
from tars.mesh.join_tokens import Invitation, JoinTokens
from tars.mesh.joining import Admitting, take_place
from tars.mesh.member_check import MemberCheck
from tars.mesh.replicated_store import ReplicatedStore
from tars.messages.admission import KeyNewParams, NodeRemoveParams, TokenNewParams
from tars.rpc.dispatcher import Dispatcher
from tars.rpc.join_client import Applicant, enter_mesh
from tars.rpc.listener import bind
from tars.rpc.mesh_listener import MeshListener
from tars.rpc.methods import handlers_of
from tars.rpc.options import RpcOptions
from tars.rpc.peer_connections import PeerConnections
from tars.state_folder import StateFolder

pytestmark = [
    pytest.mark.slow,  # members must see each other come and go
    # A listener that closes in the middle of a TLS handshake leaves asyncio (3.11) a transport that only the collector closes. A node that
    # stops is a process that ends; here others go on in the same one.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(autouse=True)
async def no_socket_is_left() -> AsyncIterator[None]:
    yield
    await sockets_closed()


class Whole:
    """A node's part in the mesh, wired as the composition root does."""

    def __init__(self, path: Path, name: str, identity: Identity, store: ReplicatedStore, port: int) -> None:
        self.name, self.identity, self.store, self.port = name, identity, store, port
        self.address = f"127.0.0.1:{port}"
        take_place(identity, store, name, (self.address,))
        check = MemberCheck(store.map, lost=store.lost)
        self.keys = ClientKeys(store)
        self.peers = PeerConnections(identity, check, lambda node: self.gossip.addresses(node))
        machine = MeshMachine(identity.node, store.map, MeshSettings(addresses=(self.address,)), random.Random(name))
        self.gossip = Gossip(machine, self.peers, store)
        tokens = JoinTokens(StateFolder(path), identity.ca_hash)
        self.administration = Administration(
            self.keys,
            store,
            admitting=Admitting(identity, tokens, store),
            tokens=tokens,
            hear=self.gossip.handle,
            addresses=lambda: [self.address],
        )
        service = FakeNode()
        service.node_id = identity.node
        service.mesh = self.administration  # type: ignore[assignment]  # the real one in the fake's place
        options = RpcOptions()
        self.listener = MeshListener(identity, check, Dispatcher(handlers_of(service), service, options), options)
        self.gossip.listen(self._noticed)
        self.changed = asyncio.Event()

    def _noticed(self, notice: Notice) -> None:
        if isinstance(notice, RecordsChanged):
            self.keys.refresh(notice.keys)
            self.listener.members_changed(notice.keys)
            self.peers.members_changed(notice.keys)
        self.changed.set()

    def state_of(self, other: Whole) -> MemberState | None:
        member = self.gossip.view().members.get(other.identity.node)
        return None if member is None else member.state

    async def sees(self, condition: Callable[[], bool], seconds: float = 15) -> None:
        async with asyncio.timeout(seconds):
            while not condition():
                self.changed.clear()
                with suppress(TimeoutError):
                    # What is looked at may also change without a notice.
                    async with asyncio.timeout(0.05):
                        await self.changed.wait()


@asynccontextmanager
async def whole(path: Path, name: str, join: str | None = None, port: int = 0) -> AsyncIterator[Whole]:
    folder = StateFolder(path)
    folder.open()
    try:
        if port == 0:
            with bind("127.0.0.1", 0) as free:
                port = free.getsockname()[1]
        identity = Identity.load_or_none(path, folder.node_id())
        applicant = Applicant(name, (f"127.0.0.1:{port}",))
        grant = None if join is None else await enter_mesh(Invitation.parse(join), folder, applicant, identity)
        store = ReplicatedStore(folder, folder.node_id())
        if grant is not None:
            store.adopt(grant.records)
            identity = grant.save(folder)
        if identity is None:
            identity = Identity.create(path, folder.node_id())
        node = Whole(path, name, identity, store, port)
        await node.listener.start("127.0.0.1", port)
        tasks = [asyncio.create_task(node.gossip.run()), asyncio.create_task(store.run())]
        try:
            yield node
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await node.peers.close()
            await node.listener.close()
            store.close()
    finally:
        folder.close()


def invitation(node: Whole) -> str:
    return f"{node.administration.new_token(TokenNewParams()).token}@{node.address}"


async def test_three_pcs_become_a_mesh_by_two_tokens_and_a_key_works_on_each(tmp_path: Path) -> None:
    async with AsyncExitStack() as nodes:
        one = await nodes.enter_async_context(whole(tmp_path / "1", "one"))
        key = one.administration.new_key(KeyNewParams(name="laptop")).key
        two = await nodes.enter_async_context(whole(tmp_path / "2", "two", invitation(one)))
        assert two.keys.holder(key) is not None
        # The third one is let in by the second.
        three = await nodes.enter_async_context(whole(tmp_path / "3", "three", invitation(two)))
        mesh = [one, two, three]
        for node in mesh:
            for other in mesh:
                if other is not node:
                    await node.sees(lambda node=node, other=other: node.state_of(other) is MemberState.ALIVE)
        made = three.administration.new_key(KeyNewParams(name="phone")).key
        for node in mesh:
            await node.sees(lambda node=node: node.keys.holder(made) is not None)
        one.keys.revoke("phone")
        for node in mesh:
            await node.sees(lambda node=node: node.keys.holder(made) is None)
        coordinators = {node.gossip.view().coordinator for node in mesh}
        assert len(coordinators) == 1


async def test_a_removed_node_is_out_everywhere_at_once_and_comes_back_as_another_one(tmp_path: Path) -> None:
    async with AsyncExitStack() as nodes:
        one = await nodes.enter_async_context(whole(tmp_path / "1", "one"))
        two = await nodes.enter_async_context(whole(tmp_path / "2", "two", invitation(one)))
        async with whole(tmp_path / "3", "three", invitation(one)) as three:
            await two.sees(lambda: two.state_of(three) is MemberState.ALIVE)
            await three.sees(lambda: three.state_of(two) is MemberState.ALIVE)
            assert (await three.peers.connection(two.identity.node, two.address).call("node.ping"))["node"]
            one.administration.remove_node(NodeRemoveParams(node="three"))
            former = f"member/{three.identity.node}"
            for node in (one, two):
                await node.sees(lambda node=node: node.store.map.get(former).removed)  # type: ignore[union-attr]  # a member
                to_it = three.peers.connection(node.identity.node, node.address)
                # The kept connection is gone; a new one says why.
                with suppress(PeerUnreachable, NotAMember):
                    await to_it.call("node.ping")
                with pytest.raises(NotAMember, match="removed from the mesh"):
                    await to_it.call("node.ping")
                assert node.state_of(three) is None
        used = invitation(one)
        one.administration._own_tokens().spend(Invitation.parse(used).token.secret, "x", one.identity.node)
        with pytest.raises(JoinRefused, match="removed from the mesh"):
            await whole(tmp_path / "3", "three", used).__aenter__()
        async with whole(tmp_path / "3", "three", invitation(one)) as again:
            assert f"member/{again.identity.node}" != former
            await two.sees(lambda: two.state_of(again) is MemberState.ALIVE)
            members = [value for _, value in two.store.map.items("member/") if isinstance(value, Member)]
            assert [value.removed for value in members if value.name == "three"].count(False) == 1


async def test_a_restart_needs_no_token_and_finds_the_others(tmp_path: Path) -> None:
    async with whole(tmp_path / "1", "one") as one:
        token = invitation(one)
        async with whole(tmp_path / "2", "two", token) as two:
            port, node = two.port, two.identity.node
            await one.sees(lambda: one.state_of(two) is MemberState.ALIVE)
        # With the same command line, though its token is used, and without it.
        for line in (token, None):
            async with whole(tmp_path / "2", "two", line, port) as again:
                assert again.identity.node == node
                await again.sees(lambda again=again: again.state_of(one) is MemberState.ALIVE)
                await one.sees(lambda again=again: one.state_of(again) is MemberState.ALIVE)


async def test_a_node_that_lost_its_records_gets_them_back_from_its_peers(tmp_path: Path) -> None:
    async with whole(tmp_path / "1", "one") as one:
        async with whole(tmp_path / "2", "two", invitation(one)) as two:
            port = two.port
            await one.sees(lambda: one.state_of(two) is MemberState.ALIVE)
        key = one.administration.new_key(KeyNewParams(name="laptop")).key
        (tmp_path / "2" / "records.json").write_bytes(b"{damaged")
        async with whole(tmp_path / "2", "two", None, port) as again:
            assert again.store.lost
            # As multicast DNS, a configured seed or the --join line suggests it.
            again.gossip.seed(one.address)
            await again.sees(lambda: again.keys.holder(key) is not None)
            await again.sees(lambda: again.state_of(one) is MemberState.ALIVE)
