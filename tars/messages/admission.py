"""`mesh.join`, and what administrators do: tokens, keys, removing a node."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from tars.messages.base import Message

_UUID = r"^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$"
_KEY_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"
_NODE_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"

MOST_PEM = 4096
"""Characters of a certificate, or of a request for one, with a key of P-256: under 1,000."""


class JoinParams(Message):
    """`mesh.join`: a node that wants in, before it has a certificate; only on the mesh listener."""

    secret: str = Field(min_length=16, max_length=64, description="The token's first 16 bytes, base64url.")
    node: str = Field(pattern=_UUID, description="Its NodeId, kept over restarts.")
    name: str = Field(min_length=1, max_length=63, pattern=_NODE_NAME)
    certificate_request: str = Field(
        min_length=1, max_length=MOST_PEM, description="PKCS #10, PEM: its public key (P-256), signed with it."
    )
    addresses: list[str] = Field(max_length=16, description="host:port of its own mesh listener, best first.")
    clock_ms: int = Field(
        ge=0, le=2**53, description="Its clock, Unix time in ms: certificates need clocks that agree."
    )


class JoinResult(Message):
    """All that a member has: with it the new node can do whatever every other node can."""

    node: str = Field(description="Who admitted it.")
    certificate: str = Field(max_length=MOST_PEM)
    ca_certificate: str = Field(max_length=MOST_PEM)
    ca_key: str = Field(max_length=MOST_PEM)
    records: list[dict[str, Any]] = Field(description="The whole replicated map, as `mesh.record_codec` writes it.")


class TokenNewParams(Message):
    """`mesh.token_new`."""

    ttl_seconds: int = Field(3600, ge=1, le=30 * 86_400, description="How long it can be used, once.")


class TokenNewResult(Message):
    """The token, shown this once."""

    id: str
    token: str
    expires_ms: int = Field(description="Unix time, ms.")
    addresses: list[str] = Field(description="host:port where this node admits others, best first.")


class TokenDescription(Message):
    """A token that this node made; the token itself is kept nowhere."""

    id: str
    state: str = Field(description="`open`, `used`, `expired`, `revoked`.")
    created_ms: int
    expires_ms: int
    used_by: str | None = None
    used_by_name: str | None = None


class TokensResult(Message):
    """`mesh.token_list`: newest first; only this node's own."""

    tokens: list[TokenDescription]


class TokenParams(Message):
    """`mesh.token_revoke`."""

    id: str = Field(min_length=1, max_length=64)


class TokenRevokeResult(Message):
    """`revoked` is false where it could no longer be used anyway."""

    id: str
    revoked: bool


class KeyNewParams(Message):
    """`mesh.key_new`."""

    name: str = Field(pattern=_KEY_NAME, description="Who will hold it: appears in logs.")
    admin: bool = Field(False, description="May also make tokens and keys and remove nodes.")


class KeyNewResult(Message):
    """The key, shown this once; it works on every node."""

    name: str
    key: str
    admin: bool
    first: bool = Field(
        default=False,
        description="No other key works at this node: until now it may have answered calls without one, and does so no longer.",
    )


class KeyDescription(Message):
    """A key; of the key itself only its hash is kept."""

    name: str
    admin: bool
    source: str = Field(description="`mesh` (works on every node) or `configuration` (of this node only).")
    created_ms: int | None = None


class KeysResult(Message):
    """`mesh.key_list`, by name."""

    keys: list[KeyDescription]


class KeyParams(Message):
    """`mesh.key_revoke`."""

    name: str = Field(min_length=1, max_length=63)


class KeyRevokeResult(Message):
    """It works nowhere any more."""

    name: str
    revoked: bool


class NodeRemoveParams(Message):
    """`mesh.remove`."""

    node: str = Field(min_length=1, max_length=64, description="A NodeId, its beginning, or a node's name.")


class NodeRemoveResult(Message):
    """`removed` is false where it was removed before."""

    node: str
    name: str
    removed: bool
