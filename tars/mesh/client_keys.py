"""API keys of clients: those of the configuration, those that every node of the mesh knows, and this PC's operator key.

Law of this file: a key is shown once and kept as its sha256 (keys are 256 random bits, so a slow hash would add nothing); `key/<name>` in
the replicated map makes it work on every node at once, and its tombstone makes it stop. Looking a key up is one hash and one look in a
dict of digests: what the time of that tells is about a digest that the asker cannot choose.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from tars.core.records import ClientKey
from tars.core.replicated_map import KEY
from tars.errors import InvalidParams
from tars.mesh.replicated_store import Records

KEY_PREFIX = "tars-"
"""So that people, and programs that look for leaked secrets, see what it is."""
FIRST_KEY = "admin"
"""The name of the key that an exposed node makes for itself on its first start."""
OPERATOR = "operator"
RESERVED = frozenset({OPERATOR, "local", "mesh"})
"""What calls are named after that come without a client's key."""
KEY_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}"


@dataclass(frozen=True, slots=True)
class KeyHolder:
    """Whose key it is. An admin may also make tokens and keys and remove nodes."""

    name: str
    admin: bool


class ClientKeys:
    """All keys that this node accepts. `refresh` it whenever records under `key/` changed."""

    def __init__(
        self,
        store: Records | None = None,
        configured: Mapping[str, str] | None = None,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._wall_clock = wall_clock
        # Whoever writes the configuration is the PC's operator, so its keys may do everything.
        self._fixed = dict(_entry(digest_of(key), name, admin=True) for name, key in (configured or {}).items())
        self._configured = tuple(configured or {})
        self._operator: dict[bytes, tuple[bytes, KeyHolder]] = {}
        self._holders: dict[bytes, tuple[bytes, KeyHolder]] = {}
        self._mesh: list[ClientKey] = []
        self.refresh()

    # --- who is it ----------------------------------------------------------------------------------------------------

    @property
    def exist(self) -> bool:
        """Whether a client could have a key at all; the operator key, which only this PC's user can read, does not count."""
        return bool(self._fixed or self._mesh)

    def holder(self, key: str) -> KeyHolder | None:
        """Whose key it is; None where it is nobody's."""
        given = digest_of(key)
        digest, holder = self._holders.get(given, _NOBODY)
        # The look-up compared already; once more in constant time, so that nothing depends on how a dict does.
        return holder if hmac.compare_digest(given, digest) else None

    def accept_operator_key(self, key: str) -> None:
        """Let in whoever can read this node's state folder (`mesh.operator_key`)."""
        self._operator = dict([_entry(digest_of(key), OPERATOR, admin=True)])
        self.refresh()

    def refresh(self, changed: Iterable[str] | None = None) -> None:
        """Read the map's keys again; `changed`, where it is given, says which records changed, and others are ignored."""
        if changed is not None and not any(key.startswith(KEY) for key in changed):
            return
        found = [] if self._store is None else self._store.map.items(KEY)
        self._mesh = [value for _, value in found if isinstance(value, ClientKey)]
        holders: dict[bytes, tuple[bytes, KeyHolder]] = {}
        for each in self._mesh:
            try:
                digest = bytes.fromhex(each.digest)
            except ValueError:
                continue
            if len(digest) == hashlib.sha256().digest_size:
                holders.update([_entry(digest, each.name, admin=each.admin)])
        self._holders = {**holders, **self._fixed, **self._operator}

    # --- making and ending them -----------------------------------------------------------------------------------------

    def new(self, name: str, *, admin: bool = False) -> str:
        """A new key, good on every node; it is returned once and kept nowhere. Raises `InvalidParams` where the name is taken or odd."""
        if not re.fullmatch(KEY_NAME, name):
            raise InvalidParams(
                "A key's name has 1 to 63 letters, digits, '.', '_' and '-', and begins with a letter or digit."
            )
        if self._store is None:
            raise InvalidParams(
                "This node keeps no keys of its own; set them in its configuration: [[security.api_key]]."
            )
        if name in self._configured or name in RESERVED or any(each.name == name for each in self._mesh):
            raise InvalidParams(
                f"There is a key called {name} already, and it still works. Choose another name, or revoke that one first: "
                f"tars key revoke {name}."
            )
        key = KEY_PREFIX + secrets.token_urlsafe(32)
        value = ClientKey(name, digest_of(key).hex(), admin, int(self._wall_clock() * 1000))
        self._store.put(KEY + name, value)
        self.refresh()
        return key

    def first_admin_key(self) -> str | None:
        """For a node that other machines can reach: an admin key where no key exists yet, to be shown to its operator once; else None."""
        return None if self.exist else self.new(FIRST_KEY, admin=True)

    def listed(self) -> tuple[tuple[str, ...], list[ClientKey]]:
        """The names of the configuration's keys (this node only), and the mesh's keys, sorted by name."""
        return self._configured, sorted(self._mesh, key=lambda each: each.name)

    def revoke(self, name: str) -> None:
        """End a key on every node. Raises `InvalidParams` where it is not one of the mesh's."""
        if name in self._configured:
            raise InvalidParams(
                f"The key {name} stands in this node's configuration: take it out there ([[security.api_key]]) and restart the node."
            )
        if self._store is None or not any(each.name == name for each in self._mesh):
            raise InvalidParams("There is no key with that name. `tars key list` shows them.")
        self._store.remove(KEY + name)
        self.refresh()


def digest_of(key: str) -> bytes:
    """sha256 of the key, 32 bytes; any text has one, also such as a header may carry by mistake."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


_NOBODY = (b"", KeyHolder("", admin=False))


def _entry(digest: bytes, name: str, *, admin: bool) -> tuple[bytes, tuple[bytes, KeyHolder]]:
    return digest, (digest, KeyHolder(name, admin))
