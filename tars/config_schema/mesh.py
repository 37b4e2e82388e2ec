"""[mesh] and [files]: how this node and its peers find each other, and how model files travel between them.

Law of this file: declarations; nobody is asked and no name is resolved.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, field_validator

from tars.config_schema.listen_address import ListenAddress
from tars.config_schema.section import Section
from tars.core.addresses import parse as parse_address


class MeshSection(Section):
    """[mesh]: how this node and its peers find each other."""

    listen: str | None = Field(
        None,
        description="host:port for peers (mutual TLS). Default: node.listen's host and the port after it, unless that is loopback.",
    )
    advertise: tuple[str, ...] = Field(
        (),
        strict=False,
        description="host:port under which peers reach this node, best first, where it cannot know them itself (WSL2, a router).",
    )
    seeds: tuple[str, ...] = Field(
        (),
        strict=False,
        description="host:port of peers to try always: other subnets, tailnets and WSL2 carry no multicast.",
    )
    mdns: bool = Field(True, description="Announce this node on the LAN and look for others (multicast DNS).")
    probe_seconds: float = Field(
        0.5,
        gt=0,
        le=60,
        description="How often a peer is asked whether it lives; a dead one is known within ten of them.",
    )

    @field_validator("listen")
    @classmethod
    def _host_and_port(cls, value: str | None) -> str | None:
        if value is not None:
            ListenAddress.parse(value)
        return value

    @field_validator("advertise", "seeds")
    @classmethod
    def _hosts_and_ports(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(str(parse_address(address)) for address in value)


class FilesSection(Section):
    """[files]: where model files are kept, and how they travel."""

    folder: Path | None = Field(
        None,
        strict=False,
        description="Where model files that are fetched are kept. Default: models in the state folder.",
    )
    most_mib_per_second: float | None = Field(
        None, gt=0, description="Bandwidth cap of copying model files, each way; default: none."
    )
    hub: bool = Field(True, description="Ask Hugging Face for a model's file where no peer has it.")

    @field_validator("folder")
    @classmethod
    def _home(cls, value: Path | None) -> Path | None:
        return None if value is None else value.expanduser()
