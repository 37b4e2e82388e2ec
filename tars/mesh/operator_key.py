"""The key that lets whoever can read a node's state folder in: `tars` on the same PC needs no other.

Law of this file: the key is new at each start, lies in a file that only this user can read, and names the port it is for, so that it is
never sent to another program; and only to an address of this very PC, so that it never travels.
"""

from __future__ import annotations

import ipaddress
import secrets
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import orjson
import psutil

from tars.mesh.client_keys import KEY_PREFIX
from tars.state_folder import write_atomically

OPERATOR_KEY_FILE = "operator.key"


def make_operator_key(folder: Path, port: int) -> str:
    """A new key for the node that listens on `port`, written to its state folder (0600). Raises `DiskFull` or `OSError`."""
    key = KEY_PREFIX + secrets.token_urlsafe(32)
    path = folder / OPERATOR_KEY_FILE
    # What another mode may have been given to is not written over but replaced.
    path.unlink(missing_ok=True)
    write_atomically(path, orjson.dumps({"port": port, "key": key}), mode=0o600)
    return key


def remove_operator_key(folder: Path) -> None:
    """When the node ends: what opens nothing need not lie there."""
    with suppress(OSError):
        (folder / OPERATOR_KEY_FILE).unlink(missing_ok=True)


def operator_key_for(url: str, folder: Path) -> str | None:
    """The key for the node at `url`, where that is on this PC and its state folder is `folder`; else None. Raises nothing."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
        stored = orjson.loads((folder / OPERATOR_KEY_FILE).read_bytes())
    except (OSError, ValueError):
        return None
    if not isinstance(stored, dict) or stored.get("port") != port or not isinstance(stored.get("key"), str):
        return None
    key: str = stored["key"]
    # It goes into a header.
    return key if key.isascii() and key.isprintable() and is_this_pc(host) else None


def is_this_pc(host: str) -> bool:
    """Whether `host` is loopback or one of this PC's own addresses. Other names than localhost do not count: a resolver can be lied to."""
    if host.lower() == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    if address.is_loopback:
        return True
    own = (entry.address.partition("%")[0] for entries in psutil.net_if_addrs().values() for entry in entries)
    return str(address) in {each.lower() for each in own}
