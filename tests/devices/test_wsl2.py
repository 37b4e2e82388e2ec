"""tars.devices.wsl2 on trees that stand for /proc of several systems."""

import pytest

from tars.devices import wsl2
from tars.devices.wsl2 import default_gateway, detect, networking_mode, probe, windows_host

WSL2_KERNEL = "5.15.167.4-microsoft-standard-WSL2\n"

ROUTES = (
    "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n"
    "eth0\t00000000\t01F01CAC\t0003\t0\t0\t0\t00000000\t0\t0\t0\n"
    "eth0\t00F01CAC\t00000000\t0001\t0\t0\t0\t00F0FFFF\t0\t0\t0\n"
)


def tree(root, kernel, *, interop=None, routes=""):
    (root / "proc/sys/kernel").mkdir(parents=True)
    (root / "proc/sys/kernel/osrelease").write_text(kernel)
    if interop:
        (root / "proc/sys/fs/binfmt_misc").mkdir(parents=True)
        (root / "proc/sys/fs/binfmt_misc" / interop).write_text("enabled\n")
    (root / "proc/net").mkdir()
    (root / "proc/net/route").write_text(routes)
    return root


@pytest.mark.parametrize(
    ("kernel", "interop", "environment", "signals"),
    [
        (WSL2_KERNEL, "WSLInterop", {"WSL_DISTRO_NAME": "Ubuntu"}, ("kernel", "interop", "environment")),
        (WSL2_KERNEL, None, {}, ("kernel",)),  # a service, interop switched off
        ("6.6.0-my-own\n", "WSLInterop-late", {}, ("interop",)),  # a kernel that somebody built, with systemd
        ("6.6.0-my-own\n", None, {"WSL_DISTRO_NAME": "Debian"}, ("environment",)),
        ("6.1.0-25-amd64\n", None, {}, ()),
        ("6.1.0-25-amd64\n", None, {"WSL_DISTRO_NAME": ""}, ()),
        ("4.4.0-19041-Microsoft\n", "WSLInterop", {"WSL_DISTRO_NAME": "Ubuntu"}, ()),  # WSL1 has no GPU
        ("5.15.0-1061-azure\n", None, {}, ()),
    ],
)
def test_several_signals_tell_wsl2(tmp_path, kernel, interop, environment, signals):
    assert detect(tree(tmp_path, kernel, interop=interop), environment) == signals


def test_elsewhere_wslinfo_is_not_asked(tmp_path):
    def ask():
        raise AssertionError("asked")

    assert probe(tree(tmp_path, "6.1.0-25-amd64\n"), {}, ask) is None


@pytest.mark.parametrize(
    ("mode", "host"),
    [
        ("nat", "172.28.240.1"),
        (None, "172.28.240.1"),  # before wslinfo there was only NAT
        ("virtioproxy", "172.28.240.1"),
        ("mirrored", "127.0.0.1"),
        ("bridged", None),  # the gateway is the LAN's router
        ("none", None),
    ],
)
def test_windows_is_where_the_networking_mode_puts_it(tmp_path, mode, host):
    found = probe(tree(tmp_path, WSL2_KERNEL, routes=ROUTES), {}, lambda: mode)
    assert (found.networking, found.windows_host) == (mode, host)


def test_the_default_route_with_the_smallest_metric_wins(tmp_path):
    header = ROUTES.splitlines()[0]
    routes = f"{header}\nwlan0 00000000 0100A8C0 0003 0 0 600 00000000 0 0 0\neth0 00000000 FE01A8C0 0003 0 0 100 00000000 0 0 0\n"
    assert default_gateway(tree(tmp_path, WSL2_KERNEL, routes=routes)) == "192.168.1.254"


@pytest.mark.parametrize(
    "line",
    [
        "eth0 00000000 00000000 0001 0 0 0 00000000 0 0 0",  # no gateway: a tunnel
        "eth0 00000000 0100A8C0 0002 0 0 0 00000000 0 0 0",  # down
        "eth0 0000A8C0 0100A8C0 0003 0 0 0 00FFFFFF 0 0 0",  # not the default
        "eth0 00000000 nonsense 0003 0 0 0 00000000 0 0 0",
        "cut short",
        "",
    ],
)
def test_what_is_no_default_route_is_no_gateway(tmp_path, line):
    header = ROUTES.splitlines()[0]
    assert windows_host("nat", tree(tmp_path, WSL2_KERNEL, routes=f"{header}\n{line}\n")) is None


def test_no_routing_table_is_no_gateway(tmp_path):
    assert default_gateway(tmp_path) is None


def script(folder, text):
    program = folder / "wslinfo"
    program.write_text(f"#!/bin/sh\n{text}\n")
    program.chmod(0o755)


@pytest.mark.parametrize(
    ("text", "mode"),
    [
        ('[ "$1" = --networking-mode ] && echo mirrored', "mirrored"),
        ("echo NAT", "nat"),
        ("echo", None),
        ("echo usage >&2; exit 1", None),
    ],
)
def test_wslinfo_is_asked_for_the_mode(tmp_path, monkeypatch, text, mode):
    script(tmp_path, text)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert networking_mode() == mode


def test_a_wslinfo_that_hangs_is_given_up(tmp_path, monkeypatch):
    script(tmp_path, "exec sleep 60")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(wsl2, "WSLINFO_TIMEOUT_SECONDS", 0.1)
    assert networking_mode() is None


def test_without_wslinfo_the_mode_is_unknown(tmp_path, monkeypatch):
    monkeypatch.setattr(wsl2.shutil, "which", lambda *_, **__: None)
    assert networking_mode() is None
