"""[node] and [limits]: this process, and the bounds of what it takes.

Law of this file: declarations; what a bound guards enforces it.
"""

from __future__ import annotations

import re
import socket
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from tars.config_schema.listen_address import DEFAULT_PORT, ListenAddress
from tars.config_schema.section import Section
from tars.messages.base import MAX_TIMEOUT_MS


def _host_label() -> str:
    """The host's name up to the first dot, without what `node.name` does not allow: an odd name must not stop a node from starting."""
    label = re.sub(r"[^A-Za-z0-9_-]", "-", socket.gethostname().partition(".")[0]).lstrip("_-")
    return label[:63] or "node"


class NodeSection(Section):
    """[node]: this process."""

    name: str = Field(
        default_factory=_host_label,
        min_length=1,
        max_length=63,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="For people: shown in plans and on the status page. Default: the host's name. At most a DNS label's 63 characters.",
    )
    listen: str = Field(
        f"127.0.0.1:{DEFAULT_PORT}",
        description="host:port. Loopback by default: a GPU on the network without a key is everybody's GPU.",
    )
    state_dir: Path = Field(
        Path("~/.local/state/tars"),
        strict=False,
        description="Node id, deployments, measured memory. Default: $XDG_STATE_HOME/tars, else ~/.local/state/tars.",
    )
    grace_seconds: float = Field(
        10.0,
        ge=0,
        le=3600,
        description="How long running calls may go on after SIGTERM. 10 s is what `docker stop` waits before it kills.",
    )
    log_format: Literal["text", "json"] = Field("text", description="json: one object a line, for a log collector.")
    priority: int = Field(
        0,
        ge=-1000,
        le=1000,
        description="Highest priority coordinates; ties go to the smallest node id. Give it to the PC that stays on.",
    )

    load_on_demand: bool = Field(
        True,
        description="A call that names a model which nobody deployed, and whose file is in the mesh, deploys it where there is room and "
        "waits for it. It moves nothing that others run, and fetches nothing from outside; `tars remove` gives the memory back.",
    )

    @field_validator("listen")
    @classmethod
    def _host_and_port(cls, value: str) -> str:
        ListenAddress.parse(value)
        return value

    @field_validator("state_dir")
    @classmethod
    def _home(cls, value: Path) -> Path:
        return value.expanduser()

    @property
    def address(self) -> ListenAddress:
        """`listen`, parsed."""
        return ListenAddress.parse(self.listen)


class LimitsSection(Section):
    """[limits]: the bounds of one call and of all calls; each has a clear error when it is met."""

    max_body_bytes: int = Field(
        8 * 2**20,
        ge=1024,
        le=2**30,
        description="8 MiB holds 2,048 texts of 4,000 characters; more in one call only delays everybody's first byte.",
    )
    max_batch: int = Field(
        64,
        ge=1,
        le=10_000,
        description="JSON-RPC batch length. 100,000 junk elements blocked the loop for 4.9 s (measured).",
    )
    max_depth: int = Field(
        64,
        ge=8,
        le=250,
        description="JSON nesting. orjson writes about 253 levels, no method needs more than a JSON schema's dozen or two.",
    )
    max_string_bytes: int = Field(
        4 * 2**20,
        ge=1024,
        le=2**30,
        description="One string. A million tokens of English are about 4 MiB; no context here is longer.",
    )
    max_concurrent_calls: int = Field(
        256,
        ge=1,
        le=100_000,
        description="Calls in progress on this node, queued ones included; the next is told to come back later.",
    )
    queue_per_replica: int = Field(
        64,
        ge=0,
        le=100_000,
        description="Calls waiting for one replica. More than 64 behind one GPU is minutes: better to answer 'overloaded' at once.",
    )
    default_timeout_ms: int = Field(
        300_000,
        ge=1,
        le=MAX_TIMEOUT_MS,
        description="For calls that name no budget: 5 minutes, a long answer on a CPU.",
    )
