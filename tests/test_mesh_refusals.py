"""Who and what a mesh refuses, tried on real `tars-node` processes in network namespaces: each with a clear error, and nothing is lost."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import resource
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from mesh_processes import HELP_DESK, Connection, Pc, assemble, fleet, said, stopping, told, until
from network_namespaces import Host, network, why_not
from tiny_gguf import write_tiny_gguf

from tars.core.mesh_messages import Record, Stamp
from tars.core.records import NodeAdvert
from tars.core.replicated_map import range_of
from tars.core.types import Bytes, DeviceId, DeviceKind, DeviceSnapshot, NodeId, NodeSnapshot
from tars.errors import DiskFull, JoinRefused, NotAMember, PeerUnreachable
from tars.mesh.identity import IDENTITY_FILE, trusting
from tars.mesh.join_tokens import Token
from tars.mesh.joining import JoinRequest
from tars.mesh.record_codec import encode_record
from tars.state_folder import fresh_node_id

pytestmark = [
    pytest.mark.slow,
    pytest.mark.model,
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]


async def names(pc: Pc) -> list[str]:
    """Whom this PC knows."""
    return sorted(each.name for each in (await pc.client.peers()).peers)


async def test_a_token_that_is_wrong_too_old_revoked_or_used_lets_nobody_in(tmp_path: Path) -> None:
    with network(2) as lan:
        a, b = fleet(tmp_path, lan)
        async with stopping([a, b]):
            await a.start()
            good = await a.invitation()
            token, address = good.split("@")
            expired = (await a.client.new_token(1)).token
            revoked = await a.client.new_token()
            await a.client.revoke_token(revoked.id)
            guessed = ("A" if token[0] != "A" else "B") + token[1:]
            # The other half of a token is the hash of the mesh's CA: with another one the joiner says nothing to anybody.
            elsewhere = token[:30] + ("A" if token[30] != "A" else "B") + token[31:]
            await until(
                a.client.tokens, lambda seen: [t.state for t in seen.tokens].count("expired") == 1, 10, "expires"
            )
            said_of = await asyncio.gather(
                b.refused("--join", f"{guessed}@{address}"),
                b.refused("--join", f"{expired}@{address}"),
                b.refused("--join", f"{revoked.token}@{address}"),
                b.refused("--join", f"{elsewhere}@{address}"),
            )
            for output, reason in zip(
                said_of,
                ["has made no such join token", "has expired", "was revoked", "is not the one that this token is for"],
                strict=True,
            ):
                assert reason in output
                assert output.count("\n") == 1, output
            assert await names(a) == ["a"]
            # None of that has cost the good one anything; but it lets in one PC.
            await b.start(good)
            await a.sees(b, "ALIVE")
            used = await b.refused("--join", good)
            assert "was used already" in used
            assert "tars token new" in used
            assert await names(a) == ["a", "b"]


class Recorder:
    """Somebody between two PCs: passes bytes on, and keeps what the one who connects sent."""

    def __init__(self, host: Host, target: str) -> None:
        self._host = host
        self._target = target
        self.sent: list[bytes] = []
        self._server: asyncio.Server | None = None

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """To the target, from this PC."""
        name, port = self._target.split(":")
        made = self._host.socket_factory((socket.AF_INET, socket.SOCK_STREAM, 0))
        await asyncio.get_running_loop().sock_connect(made, (name, int(port)))
        return await asyncio.open_connection(sock=made)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, kept: list[bytes] | None) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(65536):
                if kept is not None:
                    kept.append(data)
                writer.write(data)
                await writer.drain()
        writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await self.connect()
        kept: list[bytes] = []
        await asyncio.gather(self._pass(reader, back, kept), self._pass(there, writer, None))
        self.sent.append(b"".join(kept))

    async def __aenter__(self) -> str:
        with self._host.entered():
            listening = socket.create_server((self._host.address, 0))
        listening.setblocking(False)
        self._server = await asyncio.start_server(self._serve, sock=listening)
        return f"{self._host.address}:{listening.getsockname()[1]}"

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()


async def test_a_recorded_join_opens_nothing_a_second_time(tmp_path: Path) -> None:
    with network(2) as lan:
        a, b = fleet(tmp_path, lan)
        async with stopping([a, b]):
            await a.start()
            token, address = (await a.invitation()).split("@")
            recorder = Recorder(b.host, address)
            async with recorder as between:
                await b.start(f"{token}@{between}")
            await a.sees(b, "ALIVE")
            # What went over the wire, byte by byte: TLS gives every connection new keys, so it is noise to the next one.
            recorded = [each for each in recorder.sent if len(each) > 500]
            assert recorded
            for each in recorded:
                reader, writer = await recorder.connect()
                writer.write(each)
                with suppress(ConnectionError):
                    async with asyncio.timeout(20):
                        answer = await reader.read()
                        assert b"HTTP/1.1 200" not in answer
                writer.close()
            # The request itself, as somebody has it who is in the joiner's place: its token is spent.
            line = await a.client.new_token()
            ca = a.identity()
            request = JoinRequest(Token.parse(line.token), fresh_node_id(), "recorded", ())
            params = request.params().model_dump()
            context = trusting(ca._ca_certificate, lambda peer: None)
            first = Connection(b.host, f"https://{address}", tls=context)
            again = Connection(b.host, f"https://{address}", tls=context)
            async with first, again:
                assert (await first.call("mesh.join", params))["node"] == a.node_id()
                with pytest.raises(JoinRefused, match="was used already"):
                    await again.call("mesh.join", params)
                with pytest.raises(JoinRefused, match="was used already"):
                    await again.call("mesh.join", {**params, "node": fresh_node_id(), "name": "another"})
            assert "another" not in await names(a)
            await b.sees(a, "ALIVE")


async def test_a_mesh_next_door_stays_another_mesh(tmp_path: Path) -> None:
    """On the same LAN, heard by multicast DNS, and named as a seed: nobody talks to whom another CA has signed."""
    with network(2) as lan:
        a = Pc(tmp_path, "a", host=lan.hosts[0])
        z = Pc(tmp_path, "z", host=lan.hosts[1], mesh=f'seeds = ["{a.mesh_address}"]')
        async with stopping([a, z]):
            await asyncio.gather(a.start(), z.start())
            for certificate, says in ((z.state / IDENTITY_FILE, False), (None, True)):
                blind = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
                blind.check_hostname = False
                blind.verify_mode = ssl.CERT_NONE
                if certificate is not None:
                    blind.load_cert_chain(certificate)
                async with Connection(z.host, f"https://{a.mesh_address}", tls=blind) as stranger:
                    # A foreign certificate ends in the handshake; who shows none is told what this port is.
                    with pytest.raises(NotAMember if says else PeerUnreachable):
                        await stranger.call("node.ping", timeout=10)
                    with pytest.raises(NotAMember if says else PeerUnreachable):
                        await stranger.call("models.list", timeout=10)
            # Nor does one that checks whom it reached say anything.
            async with z.peer_call(a) as proper:
                with pytest.raises((NotAMember, PeerUnreachable)):
                    await proper.call("node.ping", timeout=10)
            # With z's identity in its state folder, a's token does not move it.
            moved = await a.invitation()
            await z.stop()
            with pytest.raises(AssertionError, match="belongs to another mesh"):
                await z.start(moved)
            await z.stop()
            await z.start()
            assert await names(a) == ["a"]
            assert await names(z) == ["z"]
            await a.client.ping()


async def test_a_removed_node_is_refused_everywhere_and_its_open_connections_end(tmp_path: Path) -> None:
    with network(3) as lan:
        pcs = a, b, c = fleet(tmp_path, lan)
        async with stopping(pcs):
            await assemble(pcs)
            await a.client.deploy(HELP_DESK)
            await c.holds(HELP_DESK)
            await b.answered_by(c)
            # Open since before, with the certificate that was right then.
            async with c.peer_call(a) as to_a, c.peer_call(b) as to_b:
                for connection in (to_a, to_b):
                    assert (await connection.call("node.ping"))["node"]
                removed_at = time.time()
                removed = await a.client.remove_node("c")
                assert removed.node == c.node_id()
                for pc in (a, b):
                    await until(lambda pc=pc: names(pc), lambda seen: seen == ["a", "b"], 10, f"{pc.name} knows")
                for connection in (to_a, to_b):
                    with pytest.raises((NotAMember, PeerUnreachable)):  # what was open is broken off
                        await connection.call("node.ping")
                    with pytest.raises(NotAMember, match="removed from the mesh"):
                        await connection.call("node.ping")
            # It is told, and goes on serving who asks it itself; the others put its model elsewhere.
            await told(c, "this node was removed from the mesh", 0, 20)
            assert (await c.asks()).served_by.node == c.node_id()
            await until(lambda: held(a, b), lambda seen: seen == [HELP_DESK], 90, "a or b holds it")
            for pc in (a, b):
                await pc.answered_by(a, b)
            # A restart changes nothing of that: it is told again, and nobody has it back; with a token it is another node.
            await c.stop()
            again = time.time()
            await c.start()
            await told(c, "this node was removed from the mesh", again, 30)
            assert said(c, "this node is isolated", removed_at) is None
            for pc in (a, b):
                assert await names(pc) == ["a", "b"]
            await c.stop()
            former = c.node_id()
            await c.start(await b.invitation())
            assert c.node_id() != former
            await a.sees(c, "ALIVE")
            assert await names(a) == ["a", "b", "c"]


async def held(*pcs: Pc) -> list[str]:
    """Models of ready replicas, in all."""
    return sorted([model for pc in pcs for model in await pc.ready_replicas()])


def advert_of(node: NodeId, *, total: int = 8 * 2**30) -> dict[str, Any]:
    """What a node says of itself, as it goes over the wire; a test spoils it."""
    device = DeviceSnapshot(
        DeviceId(f"{node}/gpu"), node, DeviceKind.CUDA, "Card of a liar", Bytes(total), Bytes(total), driver="1.0"
    )
    value = NodeAdvert(NodeSnapshot(node, "liar", (device,)))
    record = Record(f"node/{node}", Stamp(int(time.time() * 1000), 0, node), value)
    return encode_record(record)


LIES: dict[str, object] = {
    "negative": -1,
    "beyond every PC": 2**62,
    "beyond 64 bits": 10**30,
    "infinite": float("inf"),
    "no number": float("nan"),
    "a text": "24 GB",
    "a fraction": 0.5,
    "a truth": True,
    "nothing": None,
    "a list": [1],
}


async def test_a_member_that_sends_numbers_that_cannot_be_is_not_believed(tmp_path: Path) -> None:
    with network(2) as lan:
        pcs = a, b = fleet(tmp_path, lan)
        async with stopping(pcs):
            await assemble(pcs)
            liar = NodeId(b.node_id())
            await b.stop()
            await a.sees(b, "LEFT")
            began = time.time()
            async with b.peer_call(a) as connection:

                async def send(body: dict[str, Any], *records: dict[str, Any], **fields: Any) -> dict[str, Any]:
                    envelope = {"sender": liar, "incarnation": 0, "body": body, "records": records, **fields}
                    call = {"jsonrpc": "2.0", "id": 1, "method": "mesh.gossip", "params": {"envelope": envelope}}
                    # By hand: the standard library writes NaN, which no JSON has.
                    async with connection._session.post(
                        connection._url, data=json.dumps(call), headers={"Content-Type": "application/json"}
                    ) as answer:
                        found: dict[str, Any] = await answer.json()
                        return found

                async def card() -> str:
                    """Of the sender, as `a` has it."""
                    key = f"node/{liar}"
                    answer = await send({"is": "want", "ranges": [range_of(key)]})
                    told = [record for each in answer["result"]["envelopes"] for record in each["records"]]
                    (value,) = [record["value"] for record in told if record["key"] == key]
                    name: str = value["node"]["devices"][0]["name"]
                    return name

                assert await card() == "Card of b"
                for name in ("memory_total", "memory_free", "memory_held"):
                    for what, lie in LIES.items():
                        record = advert_of(liar)
                        record["value"]["node"]["devices"][0][name] = lie
                        await send({"is": "news"}, record)
                        assert await card() == "Card of b", (name, what)
                for problem in (r"devices\[0\].memory_total: should not be below 0", "memory_held: .*out of bounds"):
                    await told(
                        a, f"node {liar} sent 1 records that were not taken: Invalid params: .*{problem}", began, 10
                    )
                # A packet that is wrong where it says who lives is refused as a whole, with the place.
                for spoilt in ({"incarnation": -1}, {"incarnation": 1.5}, {"root": -1}, {"updates": [{"node": liar}]}):
                    answer = await send({"is": "news"}, advert_of(liar), **spoilt)
                    assert answer["error"]["data"]["kind"] == "invalid_params", answer
                    assert next(iter(spoilt)) in answer["error"]["message"]
                # In another's name: not taken, neither the packet nor the record.
                answer = await send({"is": "news"}, advert_of(liar), sender=a.node_id())
                assert answer["error"]["data"]["kind"] == "not_a_member"
                assert await card() == "Card of b"
                foreign = advert_of(NodeId(a.node_id()))
                foreign["stamp"][2] = liar
                await send({"is": "news"}, foreign)
                assert {each.name for each in (await a.client.plan()).devices} == {"Card of a"}
                # The same in order is taken: it was the numbers.
                await send({"is": "news"}, advert_of(liar))
                assert await card() == "Card of a liar"
            # Its own node, back again, has the last word on what it has.
            await b.start()
            await a.sees(b, "ALIVE")
            await a.plans_with("a", "b")
            assert {each.name for each in (await a.client.plan()).devices} == {"Card of a", "Card of b"}


# --- files --------------------------------------------------------------------------------------------------------------

SHAPE = {"layers": 3, "embedding": 1024, "feed_forward": 4096}
"""Of a model file of about 50 MB: several pieces of `core.transfer.PIECE`, so that each source gives some."""


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights; treat it as read-only."""
    return write_tiny_gguf(tmp_path_factory.mktemp("model") / "tiny.Q8_0.gguf", **SHAPE)


def with_model(folder: Path, source: Path) -> str:
    """Lines of a configuration for a PC that has its own copy of the file."""
    folder.mkdir()
    copied = shutil.copy(source, folder / source.name)
    return f'[[model]]\nname = "tiny"\npath = "{copied}"\n'


async def offered(to: Pc, *holders: Pc) -> None:
    """Wait until a PC knows that these hold the file, and its hash."""
    for holder in holders:

        async def look(holder: Pc = holder) -> bool:
            record = await holder.record_at(to, f"node/{holder.node_id()}")
            return record is not None and any(
                file["model"] == "tiny" and "sha256" in file for file in record["value"].get("files", [])
            )

        await until(look, lambda seen: seen, 60, f"{to.name} knows that {holder.name} has it", gap=0.3)


def hash_of(path: Path) -> str:
    """sha256, hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def size_of(path: Path) -> int:
    """Bytes."""
    return path.stat().st_size


def spoil(path: Path) -> None:
    """Another byte in every MiB, and nothing that a look at the folder would show."""
    before = path.stat()
    with path.open("r+b") as file:
        for at in range(1000, before.st_size, 2**20):
            file.seek(at)
            byte = file.read(1)
            file.seek(at)
            file.write(bytes([byte[0] ^ 0xFF]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


async def test_a_peer_that_gives_wrong_bytes_is_named_and_the_good_copy_of_another_is_used(
    tmp_path: Path, model_file: Path
) -> None:
    sha256 = hash_of(model_file)
    with network(3) as lan:
        hosts = lan.hosts
        a = Pc(tmp_path, "a", host=hosts[0], priority=10)
        b = Pc(tmp_path, "b", host=hosts[1], more=with_model(tmp_path / "of-b", model_file))
        c = Pc(tmp_path, "c", host=hosts[2], more=with_model(tmp_path / "of-c", model_file))
        async with stopping([a, b, c]):
            await assemble([a, b, c])
            await offered(a, b, c)
            spoil(tmp_path / "of-c" / model_file.name)
            began = time.time()
            pulled = await a.client.pull("tiny", timeout=120)
            assert pulled.sha256 == sha256
            assert pulled.sources == ["b"]
            await told(a, rf"\bc\b.* gave wrong bytes of the file {sha256}", began, 5)
            assert said(a, r"\bb\b.* gave wrong bytes", began) is None
            (fetched,) = [path for path in (a.state / "models").rglob("*") if path.is_file() and path.suffix == ".gguf"]
            assert hash_of(fetched) == sha256
            assert not [*a.state.rglob("*.partial"), *a.state.rglob("*.journal")]


def fill(path: Path) -> None:
    """Write until the disk is full."""
    with suppress(OSError), path.open("wb", buffering=0) as file:
        while file.write(bytes(2**20)):
            pass


@contextmanager
def small_disk(folder: Path, mib: int) -> Iterator[Path]:
    """A disk of its own of so many MiB, in memory."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mib}m", "none", folder], check=True, capture_output=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True, capture_output=True)


async def test_a_disk_that_is_full_before_or_during_a_transfer_is_said_and_what_came_counts_afterwards(
    tmp_path: Path, model_file: Path
) -> None:
    size = size_of(model_file)
    mib = size // 2**20
    with network(2) as lan, small_disk(tmp_path / "disk", mib + 256 + 24) as disk:
        a = Pc(
            tmp_path, "a", host=lan.hosts[0], priority=10, more=f'[files]\nfolder = "{disk}"\nmost_mib_per_second = 8\n'
        )
        b = Pc(tmp_path, "b", host=lan.hosts[1], more=with_model(tmp_path / "of-b", model_file))
        async with stopping([a, b]):
            await assemble([a, b])
            await offered(a, b)
            ballast = disk / "ballast"
            # Full before: nothing is fetched.
            ballast.write_bytes(bytes(40 * 2**20))
            with pytest.raises(DiskFull) as refused:
                await a.client.pull("tiny", timeout=60)
            assert "the disk of the fetched model files" in refused.value.message
            assert [path.name for path in disk.rglob("*") if path.is_file()] == ["ballast"]
            ballast.unlink()
            # Filled up by somebody else meanwhile.
            pulling = asyncio.create_task(a.client.pull("tiny", timeout=120))
            await until(
                a.client.transfers, lambda seen: any(t.bytes_done > 2**20 for t in seen.transfers), 30, "it comes"
            )
            await asyncio.to_thread(fill, ballast)
            with pytest.raises(DiskFull) as refused:
                await pulling
            print(refused.value.message)
            assert "disk" in refused.value.message
            # The node goes on; with room the same command goes on where it was.
            assert (await a.client.ping()).state == "ready"
            await b.sees(a, "ALIVE")
            ballast.unlink()
            pulled = await a.client.pull("tiny", timeout=120)
            assert pulled.size_bytes == size
            assert not [*disk.rglob("*.partial"), *disk.rglob("*.journal")]


async def test_a_pc_that_has_less_memory_than_it_says_fails_there_and_the_model_goes_elsewhere(tmp_path: Path) -> None:
    with network(2) as lan:
        a = Pc(tmp_path, "a", host=lan.hosts[0], priority=10, memory_mib=3000)
        b = Pc(tmp_path, "b", host=lan.hosts[1], memory_mib=90_000)
        async with stopping([a, b]):
            await assemble([a, b])
            assert b.node is not None
            # What a process of b may really have: a worker starts in it, and the 400 MiB of the KV cache do not fit any more.
            limit = 700 * 2**20
            resource.prlimit(b.node.process.pid, resource.RLIMIT_AS, (limit, limit))
            began = time.time()
            await a.client.deploy(HELP_DESK, slots=256, kv_tokens=256 * 1024)
            await told(b, f"loading {HELP_DESK}@", began, 30)
            await a.holds(HELP_DESK)
            for pc in (a, b):
                await pc.answered_by(a)
            # Whoever asks is told what happened there, and that it was no word of the plan.
            verdicts = {each.node_name: each for each in (await a.client.explain(HELP_DESK)).verdicts}
            print(verdicts["b"].reason, "|", (await b.client.describe()).recent_errors)
            assert not verdicts["b"].accepted
            assert "memory" in verdicts["b"].reason
