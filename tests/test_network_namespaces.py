"""The PCs that tests are run on behave like PCs: what is sent arrives, what is cut does not, and nothing is left behind."""

import os
import socket
import subprocess
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from network_namespaces import network, why_not

PORT = 9753
GROUP = "239.91.91.91"


def receiver(host):
    """A UDP socket in a host that also hears a multicast group."""
    with host.entered():
        made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        made.bind(("", PORT))
        group = socket.inet_aton(GROUP) + socket.inet_aton(host.address)
        made.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, group)
    made.settimeout(0.1)
    return made


@contextmanager
def sockets(*hosts):
    with ExitStack() as stack:
        yield [stack.enter_context(receiver(host)) for host in hosts]


def arrives(sender, receiver, address):
    """Whether a datagram to `address` comes out at the receiver."""
    text = os.urandom(8)
    try:
        sender.sendto(text, (address, PORT))
        while receiver.recv(100) != text:
            pass
    except OSError:
        return False
    return True


def test_pcs_on_a_subnet_hear_each_other_and_multicast_and_a_router_passes_only_the_first():
    with network(2, 1) as net, sockets(*net.hosts) as (a, b, far):
        home, neighbour, distant = net.hosts
        assert arrives(a, b, neighbour.address)
        assert arrives(a, b, GROUP)
        assert arrives(a, far, distant.address)
        assert not arrives(a, far, GROUP)
        assert home.run("hostname") == subprocess.run(["hostname"], capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
@pytest.mark.parametrize(("cut", "heal"), [("unplug", "plug"), ("silence", "speak")])
def test_a_cut_link_passes_nothing_until_it_is_healed(cut, heal):
    with network(2) as lan, sockets(*lan.hosts) as (a, b):
        one, two = lan.hosts
        getattr(two, cut)()
        assert not arrives(a, b, two.address)
        assert not arrives(b, a, one.address)
        getattr(two, heal)()
        # The first packets may wait for the other's address (ARP).
        assert any(arrives(a, b, two.address) for _ in range(10))
        assert any(arrives(b, a, one.address) for _ in range(10))


def test_a_link_can_be_cut_in_one_direction_and_for_one_pair():
    with network(3) as lan, sockets(*lan.hosts) as (a, b, c):
        one, two, three = lan.hosts
        one.deafen(two)
        assert not arrives(a, b, two.address)
        assert arrives(b, a, one.address)
        assert arrives(a, c, three.address)
        one.hear(two)
        assert any(arrives(a, b, two.address) for _ in range(10))


def test_nothing_is_left_behind_even_after_a_failure():
    process, name = None, None

    def fails():
        nonlocal process, name
        with network(1) as lan:
            process = subprocess.Popen(lan.hosts[0].command("sleep", "1000"))
            name = lan.hosts[0].name
            assert Path("/run/netns", name).exists()
            # What has not entered yet cannot be found there.
            ends = time.monotonic() + 10
            while (
                str(process.pid)
                not in subprocess.run(
                    ["ip", "netns", "pids", name], capture_output=True, text=True, check=True
                ).stdout.split()
            ):
                assert time.monotonic() < ends
                time.sleep(0.01)
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fails()
    assert process.wait(5) < 0
    assert not Path("/run/netns", name).exists()
    assert not list(Path("/run/netns").glob(f"tars{os.getpid()}-*"))


def test_a_killed_runs_namespaces_are_removed_by_the_next():
    if reason := why_not():
        pytest.skip(reason)
    ended = subprocess.Popen(["true"])
    ended.wait()
    left = f"tars{ended.pid}-dead-h1x1"
    subprocess.run(["ip", "netns", "add", left], check=True)
    with network(1):
        assert not Path("/run/netns", left).exists()


def test_a_failing_command_says_what_it_said():
    with network(1) as lan, pytest.raises(RuntimeError, match="No such file"):
        lan.hosts[0].run("cat", "/nowhere")
