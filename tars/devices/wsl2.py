"""Whether this is WSL2, how its network is joined to Windows, and where Windows itself can be reached.

Law of this file: reads /proc, the environment and `wslinfo`, and nothing else; several signals, for each alone can be missing.
"""

from __future__ import annotations

import os
import shutil
import socket
import struct
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

WSLINFO_TIMEOUT_SECONDS = 2.0
"""`wslinfo` asks the Windows side and answers in tens of milliseconds; when Windows hangs, a node must start all the same."""

ROUTE_IS_UP, ROUTE_HAS_GATEWAY = 0x1, 0x2
"""RTF_UP and RTF_GATEWAY of linux/route.h, as /proc/net/route shows them."""


@dataclass(frozen=True, slots=True)
class Wsl2:
    """What is known of this WSL2. `networking` is wslinfo's word: nat, mirrored, none, bridged or virtioproxy."""

    signals: tuple[str, ...]
    networking: str | None
    windows_host: str | None
    """The Windows host's address as seen from here; None where the mode has none, or it could not be found."""


def probe(
    root: Path = Path("/"),
    environment: Mapping[str, str] | None = None,
    ask_mode: Callable[[], str | None] | None = None,
) -> Wsl2 | None:
    """This WSL2, or None on anything else. `root` stands for `/`, `ask_mode` for `wslinfo` (tests give their own)."""
    environment = os.environ if environment is None else environment
    signals = detect(root, environment)
    if not signals:
        return None
    mode = (ask_mode or networking_mode)()
    return Wsl2(signals=signals, networking=mode, windows_host=windows_host(mode, root))


def detect(root: Path, environment: Mapping[str, str]) -> tuple[str, ...]:
    """The signals that say WSL2, none on any other Linux, on WSL1 and on macOS.

    The kernel's name decides when it is Microsoft's own; for a kernel that somebody built, the interop file or the variable do
    (the variable is absent in services, the file where interop is switched off).
    """
    release = _text(root / "proc/sys/kernel/osrelease").strip().lower()
    if release.endswith("-microsoft") and "wsl2" not in release:
        return ()  # WSL1 (`4.4.0-19041-Microsoft`): a translator of system calls, without a GPU
    signals = []
    if "microsoft" in release and "wsl2" in release:
        signals.append("kernel")
    interop = root / "proc/sys/fs/binfmt_misc"
    if (interop / "WSLInterop").exists() or (interop / "WSLInterop-late").exists():
        signals.append("interop")
    if environment.get("WSL_DISTRO_NAME"):
        signals.append("environment")
    return tuple(signals)


def networking_mode() -> str | None:
    """`wslinfo --networking-mode`, None where there is no wslinfo (before WSL 2.0) or it does not answer."""
    program = shutil.which("wslinfo") or shutil.which("wslinfo", path="/usr/bin:/bin")
    if program is None:
        return None
    try:
        answer = subprocess.run(
            [program, "--networking-mode"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=WSLINFO_TIMEOUT_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.decode("ascii", "replace").strip().lower() or None


def windows_host(mode: str | None, root: Path = Path("/")) -> str | None:
    """Where Windows' own services (Ollama, LM Studio) can be reached from inside.

    Mirrored shares the host's interfaces: 127.0.0.1. NAT, which is also what a WSL without wslinfo has, and virtioproxy: the default
    gateway; not resolv.conf, which may name a DNS tunnel (10.255.255.254). Bridged: the gateway is the LAN's router, so unknown.
    """
    if mode == "mirrored":
        return "127.0.0.1"
    if mode in (None, "nat", "virtioproxy"):
        return default_gateway(root)
    return None


def default_gateway(root: Path = Path("/")) -> str | None:
    """The IPv4 gateway of the default route with the smallest metric, from /proc/net/route (addresses in host byte order, hex)."""
    best: tuple[int, str] | None = None
    for line in _text(root / "proc/net/route").splitlines()[1:]:
        fields = line.split()
        try:
            destination, gateway, flags = fields[1], int(fields[2], 16), int(fields[3], 16)
            metric, mask = int(fields[6]), fields[7]
        except (IndexError, ValueError):
            continue
        if int(destination, 16) != 0 or int(mask, 16) != 0:
            continue
        if not flags & ROUTE_IS_UP or not flags & ROUTE_HAS_GATEWAY:
            continue
        if best is None or metric < best[0]:
            best = (metric, socket.inet_ntoa(struct.pack("=I", gateway)))
    return best[1] if best else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
