"""Params and results of what only nodes ask of each other, over their own listener: `mesh.gossip`.

The envelopes are checked further inside, by `mesh.record_codec`: what stands in a record depends on its key, and a newer version's record
must not make an older node deaf.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from tars.messages.base import Message

MOST_ANSWERS = 64
"""Envelopes that answer one: an `Ack`, and at most 8 packets each of records and of questions."""


class GossipParams(Message):
    """`mesh.gossip`: one packet of the mesh's own conversation."""

    envelope: dict[str, Any] = Field(description="See core.mesh_messages.Envelope.")


class GossipResult(Message):
    """What the receiver has to say at once; often one envelope, an `Ack`."""

    envelopes: list[dict[str, Any]] = Field(max_length=MOST_ANSWERS)
