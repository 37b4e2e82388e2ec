"""What the JSON-RPC layer is told once, by the composition root: bounds and who may call.

Law of this file: frozen values, no reading of files or of the environment (`tars.config` does that); every default carries its reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class EnvelopeLimits:
    """Bounds of one request body. Sizes in bytes."""

    max_body_bytes: int = 8 * 2**20
    """2,048 texts of 4 KB, the largest `inference.embed`, fit."""
    max_batch: int = 64
    """More calls at once gain nothing over two batches, and each waits for the slowest."""
    max_depth: int = 64
    """A JSON schema for constrained output nests about 20 deep; orjson itself writes at most 254."""
    max_values: int = 65_536
    """Members and elements in all. 10,000 messages, the longest chat, have 30,000; checking a body of 2,000,000 wrong ones held the event
    loop for 32 s (measured), so many as these for under one."""
    max_string_bytes: int = 4 * 2**20
    """The longest context in the catalogue (128 Ki tokens) is about 0.5 MB of text; a base64 payload may be larger."""


@dataclass(frozen=True, slots=True)
class AccessOptions:
    """Who may call. Hosts and origins are compared exactly (after lowering their case), never by pattern."""

    api_keys: Mapping[str, str] = field(default_factory=dict)
    """Key's name -> key. Empty: no key is asked for (only allowed on loopback; `tars.config` refuses the rest)."""
    allowed_hosts: tuple[str, ...] = ()
    """What a `Host` header may say besides the addresses that the server is bound to: `box.tailnet.ts.net`, with or without a port."""
    allowed_origins: tuple[str, ...] = ()
    """What an `Origin` header may say besides the node's own pages: `https://chat.example`."""


@dataclass(frozen=True, slots=True)
class RpcOptions:
    """Everything that `rpc/` needs from the configuration."""

    envelope: EnvelopeLimits = field(default_factory=EnvelopeLimits)
    access: AccessOptions = field(default_factory=AccessOptions)
    max_concurrent_calls: int = 256
    """Inference calls under way at once; a further one is told to come back. Far above what one GPU serves, far below what memory bears."""
    batch_concurrency: int = 8
    """Calls of one batch under way at once, so that one batch cannot take every place."""
    default_timeout_ms: int = 300_000
    """A call's budget where it names none: five minutes, a long answer on a CPU."""
    heartbeat_seconds: float = 10.0
    """A comment on a silent event stream, so that a dead client is noticed and no proxy closes it (their usual limit is 30-60 s)."""
