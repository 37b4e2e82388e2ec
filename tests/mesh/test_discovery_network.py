"""Discovery between PCs (network namespaces on a bridge), and with a second, independent implementation of multicast DNS, avahi."""

import asyncio
import json
import shutil
import subprocess
import sys
import time
import uuid
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest
from network_namespaces import network

from tars.mesh.discovery import SERVICE_TYPE

pytestmark = pytest.mark.slow
MESH = "0123456789abcdef"
PROGRAM = Path(__file__).parent / "discovering_process.py"


class Node:
    """A discovering process in a PC; `lines` is what it said so far."""

    def __init__(self, process, node):
        self.id = node
        self.lines = []
        self._process = process
        self._grew = asyncio.Event()
        self._reader = asyncio.create_task(self._read())

    async def _read(self):
        while line := await self._process.stdout.readline():
            self.lines.append(json.loads(line))
            self._grew.set()

    async def says(self, seconds=15, **what):
        """Wait for a line that has all of `what`; it and all before are done with. Seconds that it took."""
        began = time.monotonic()
        try:
            async with asyncio.timeout(seconds):
                while True:
                    self._grew.clear()
                    for number, line in enumerate(self.lines):
                        if what.items() <= line.items():
                            del self.lines[: number + 1]
                            return time.monotonic() - began
                    await self._grew.wait()
        except TimeoutError:
            raise AssertionError(f"never said {what}: {self.lines}") from None

    def heard(self, other):
        return any(line.get("heard") == other.id for line in self.lines)

    async def leave(self):
        self._process.stdin.close()
        async with asyncio.timeout(10):
            assert await self._process.wait() == 0
            await self._reader


@asynccontextmanager
async def discovering(host, *seeds, mesh=MESH, port=8001):
    """A node's discovery in a PC. Ended by its input's end, or by force; nothing on its error output either way."""
    node = str(uuid.uuid4())
    process = await asyncio.create_subprocess_exec(
        *host.command(sys.executable, PROGRAM, node, mesh, port, *seeds),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    made = Node(process, node)
    try:
        await made.says(ready=True)
        yield made
        if process.returncode is None:
            await made.leave()
        assert (await process.stderr.read()).decode() == ""
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        await made._reader


async def test_pcs_on_a_lan_hear_each_other_and_the_goodbye_and_strangers_are_left_alone():
    with network(4) as lan:
        a, b, c, d = lan.hosts
        async with (
            discovering(a) as one,
            discovering(d, mesh="fedcba9876543210") as stranger,
            discovering(b, port=9001) as two,
        ):
            # Started at the same time: within a second or two, not at the next question.
            assert await one.says(heard=two.id, addresses=[f"{b.address}:9001"]) < 5
            await one.says(suggested=f"{b.address}:9001")
            await two.says(suggested=f"{a.address}:8001")
            async with discovering(c) as three:
                await one.says(suggested=f"{c.address}:8001")
                await two.says(suggested=f"{c.address}:8001")
                await three.says(suggested=f"{b.address}:9001")
                await three.leave()
            assert await one.says(gone=three.id) < 3
            await two.says(gone=three.id)
            assert not any("suggested" in line for line in stranger.lines)
            assert not one.heard(stranger)


async def test_an_address_that_changes_is_followed():
    with network(2) as lan:
        a, b = lan.hosts
        async with discovering(a) as one, discovering(b) as two:
            await one.says(heard=two.id, addresses=[f"{b.address}:8001"])
            b.run("ip", "address", "add", "10.91.1.77/32", "dev", "eth0")
            await one.says(heard=two.id, addresses=[f"{b.address}:8001", "10.91.1.77:8001"])
            # New addresses flush those that were announced more than a second before them (RFC 6762, 10.2); the last of the three
            # announcements of the old ones goes out half a second after the first.
            await asyncio.sleep(2)
            b.run("ip", "address", "delete", f"{b.address}/24", "dev", "eth0")
            b.run("ip", "address", "replace", "10.91.1.78/24", "dev", "eth0")
            await one.says(heard=two.id, addresses=["10.91.1.77:8001", "10.91.1.78:8001"])
            await one.says(suggested="10.91.1.78:8001")


async def test_a_cable_that_is_put_back_is_enough_to_be_found():
    with network(2) as lan:
        a, b = lan.hosts
        async with discovering(b) as two:
            b.unplug()
            async with discovering(a) as one:
                assert not one.heard(two)
                b.plug()
                await one.says(suggested=f"{b.address}:8001")
                await two.says(suggested=f"{a.address}:8001")


async def test_an_interface_that_comes_later_is_used():
    with network(2) as lan:
        a, b = lan.hosts
        b.run("ip", "link", "set", "eth0", "down")
        async with discovering(a) as one:
            process = await asyncio.create_subprocess_exec(
                *b.command(sys.executable, PROGRAM, str(uuid.uuid4()), MESH, 8001),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
            )
            two = Node(process, "")
            await two.says(ready=True)
            b.run("ip", "link", "set", "eth0", "up")
            await two.says(heard=one.id)
            await one.says(suggested=f"{b.address}:8001")
            await two.leave()
            said = (await process.stderr.read()).decode().splitlines()
        # The one line that it had no network to do it on.
        assert len(said) == 1
        assert "no network interface here carries it" in said[0]


async def test_no_multicast_passes_a_router_and_a_seed_does():
    with network(1, 1) as both:
        home, far = both.hosts
        async with discovering(far) as distant, discovering(home, f"{far.address}:8001", "nobody.invalid:8001") as one:
            await one.says(suggested=f"{far.address}:8001")
            await one.says(suggested=f"{far.address}:8001")  # again: seeds are tried for ever
            assert not one.heard(distant)
            assert not distant.heard(one)
            # Both are well: the seed's try came from the list, not from what was heard.
            home.run("true")
            one_said = [line for line in one.lines if "heard" in line]
            assert one_said == []


async def test_nodes_on_two_pcs_with_two_networks_announce_both():
    with network(2, 2) as both:
        (a, b), (c, _) = both.segments
        # PC a gets a second card, on the other subnet.
        a.add_card(2, 99)
        told = sorted([f"{a.address}:8001", "10.91.2.99:8001"])
        async with discovering(b) as near, discovering(c) as far, discovering(a) as one:
            await near.says(heard=one.id, addresses=told)
            await far.says(heard=one.id, addresses=told)
            await one.says(heard=near.id)
            # Those two have only one network each.
            assert not near.heard(far)


# --- avahi ------------------------------------------------------------------------------------------------------------

AVAHI = ("avahi-daemon", "avahi-browse", "avahi-resolve", "avahi-publish", "dbus-daemon")
BUS = """<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig><type>system</type><listen>unix:path={socket}</listen><auth>EXTERNAL</auth>
<policy context="default"><allow send_destination="*" eavesdrop="true"/><allow eavesdrop="true"/><allow own="*"/></policy>
</busconfig>
"""


@contextmanager
def avahi(host, folder):
    """An avahi daemon in a PC, with a message bus of its own; a function that runs one of its tools there, or starts it."""
    missing = [tool for tool in AVAHI if not shutil.which(tool)]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed (Debian: apt-get install avahi-daemon avahi-utils dbus)")
    address = folder / "bus"
    (folder / "bus.conf").write_text(BUS.format(socket=address))
    (folder / "avahi.conf").write_text(
        "[server]\nuse-ipv4=yes\nuse-ipv6=no\nallow-interfaces=eth0\nenable-dbus=yes\n[wide-area]\nenable-wide-area=no\n"
        "[publish]\npublish-hinfo=no\npublish-workstation=no\n"
    )
    environment = {
        "DBUS_SYSTEM_BUS_ADDRESS": f"unix:path={address}",
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        "LC_ALL": "C.UTF-8",
    }
    # Its process file has one fixed place; `ip netns exec` gives every command a view of the mounts of its own.
    start = "mkdir -p /run/avahi-daemon && mount -t tmpfs tmpfs /run/avahi-daemon && exec avahi-daemon --no-drop-root --no-chroot -f "
    processes = []

    def begin(*command, **options):
        processes.append(subprocess.Popen(host.command(*command), env=environment, text=True, **options))
        return processes[-1]

    def ask(*command, seconds=20):
        return subprocess.run(
            host.command(*command), env=environment, text=True, capture_output=True, timeout=seconds, check=False
        ).stdout

    log = (folder / "log").open("w")
    try:
        begin("dbus-daemon", f"--config-file={folder / 'bus.conf'}", "--nofork", stdout=log, stderr=log)
        _until(address.exists, 10, log)
        begin("sh", "-c", start + str(folder / "avahi.conf"), stdout=log, stderr=log)
        _until(lambda: "Server startup complete" in Path(log.name).read_text(), 20, log)
        yield begin, ask
    finally:
        for process in reversed(processes):
            process.terminate()
        for process in processes:
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        log.close()


def _until(condition, seconds, log):
    ends = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > ends:
            raise AssertionError(Path(log.name).read_text())
        time.sleep(0.02)


async def test_avahi_sees_a_node_resolves_it_and_sees_it_go(tmp_path):
    with network(2) as lan:
        a, b = lan.hosts
        with avahi(b, tmp_path) as (_, ask):
            async with discovering(a) as one:

                async def browse():
                    """Its lines, ever again, at its own pace (each run takes a while)."""
                    command = ("avahi-browse", "--parsable", "--resolve", "--terminate", "--no-db-lookup", "_tars._tcp")
                    async with asyncio.timeout(20):
                        while True:
                            yield (await asyncio.to_thread(ask, *command)).splitlines()

                async for lines in browse():
                    if resolved := [line for line in lines if line.startswith("=")]:
                        break
                (fields,) = [line.split(";") for line in resolved]
                assert fields[1:9] == [
                    "eth0",
                    "IPv4",
                    one.id,
                    "_tars._tcp",
                    "local",
                    f"{one.id}.local",
                    a.address,
                    "8001",
                ]
                assert sorted(fields[9].split(" ")) == sorted([f'"node={one.id}"', f'"mesh={MESH}"', '"version=0.4.0"'])
                name = await asyncio.to_thread(ask, "avahi-resolve", "--name", "-4", f"{one.id}.local")
                assert name.split() == [f"{one.id}.local", a.address]
                await one.leave()
            async for lines in browse():
                if not lines:
                    break


async def test_a_node_sees_what_avahi_announces_and_sees_it_go(tmp_path):
    node = str(uuid.uuid4())
    with network(2) as lan:
        a, b = lan.hosts
        with avahi(b, tmp_path) as (begin, _):
            async with discovering(a) as one:
                publish = ("avahi-publish", "--service", node, SERVICE_TYPE.removesuffix(".local."), "8123")
                service = begin(*publish, f"node={node}", f"mesh={MESH}", "version=0.4.0", stdout=subprocess.DEVNULL)
                begin(
                    *publish[:2],
                    str(uuid.uuid4()),
                    publish[3],
                    "8124",
                    f"node={uuid.uuid4()}",
                    f"mesh={MESH}",
                    stdout=subprocess.DEVNULL,
                )
                await one.says(suggested=f"{b.address}:8123")
                service.terminate()
                await one.says(gone=node)
                assert not any("heard" in line for line in one.lines)
