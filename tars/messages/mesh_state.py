"""`mesh.describe`: the whole mesh as one node sees it, for the status page and `tars status`.

Law of this file: what peers said of themselves, and what this node makes of it; bounded, so that a mesh of a thousand nodes fits into one
answer.
"""

from __future__ import annotations

from pydantic import Field

from tars.messages.base import MAX_NAME_LENGTH, Message
from tars.messages.files import TransferDescription
from tars.messages.node import DeviceDescription, LoadProgress, MoveDescription, VerdictDescription

SHOWN_NODES = 50
"""Nodes in one answer, unless more are asked for: a page with more is no overview any longer."""
MOST_NODES = 1_000
MOST_REFUSED = 100
"""Of models that are served nowhere: the first ones by name."""


class MeshParams(Message):
    """`mesh.describe`."""

    node: str | None = Field(
        None, min_length=1, max_length=MAX_NAME_LENGTH, description="Only this one: a name, an id, or its beginning."
    )
    most_nodes: int = Field(SHOWN_NODES, ge=1, le=MOST_NODES, description="The others are only counted.")


class MeshReplica(Message):
    """A replica as its node told of it last."""

    id: str
    model: str
    model_kind: str
    variant: str
    device: str
    device_name: str
    simulated: bool
    state: str
    progress: LoadProgress | None = Field(description="Stage `fetch` while its file is copied; in steps of 10 %.")
    memory_bytes: int
    measured: bool = Field(description="False: `memory_bytes` is the estimate before the load.")
    speed: float | None = Field(description="Tokens, or texts, a second of one call alone, measured after the load.")
    last_error: str | None


class MeshNode(Message):
    """One node: how this node sees it, and what it told of itself last (of this node: what it told the others)."""

    node: str
    name: str
    this_node: bool
    state: str = Field(description="`ALIVE`, `SUSPECT`, `DEAD`, `DRAINING`, `LEFT`.")
    since: float | None = Field(description="Unix time, seconds: when this node began to see it so.")
    coordinator: bool
    version: str
    client_url: str | None = Field(description="Where its clients reach it; None where only its own PC does.")
    addresses: list[str]
    devices: list[DeviceDescription]
    replicas: list[MeshReplica]
    transfers: list[TransferDescription]


class UnservedModel(Message):
    """A model that is wanted, and answers nowhere or on fewer replicas than wanted."""

    model: str
    why: str
    verdicts: list[VerdictDescription] = Field(description="Bytes needed against bytes free, device by device.")


class MeshDescription(Message):
    """`mesh.describe`'s answer."""

    nodes: list[MeshNode] = Field(description="This node first, then by name.")
    nodes_left_out: int = Field(description="Not in `nodes`. Those that left are left out first, then idle ones.")
    nodes_by_state: dict[str, int] = Field(description="Of all nodes.")
    coordinator: str | None = Field(description="The name of the node that decides now; None: nobody is known to.")
    isolated: bool = Field(False, description="No peer answers this node: look first at its own network.")
    moves: list[MoveDescription]
    unserved: list[UnservedModel]
