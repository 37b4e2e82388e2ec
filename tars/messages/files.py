"""Results of `models.pull` and `models.transfers`: model files that travel to this node."""

from __future__ import annotations

from pydantic import Field

from tars.messages.base import MAX_NAME_LENGTH, Message


class PullParams(Message):
    """`models.pull`: have the node fetch a model's file, from its peers first, then from Hugging Face."""

    model: str = Field(
        min_length=1,
        max_length=MAX_NAME_LENGTH,
        description="A model of the catalogue; or `hf.co/owner/repo/file.gguf`, or `owner/repo:file.gguf`.",
    )
    variant: str | None = Field(
        None, max_length=MAX_NAME_LENGTH, description="Quantisation; default: what is here, what peers hold, the best."
    )
    from_file: str | None = Field(
        None,
        min_length=1,
        max_length=4096,
        description="A file or folder on the node's own PC to take instead; only asked from that same PC.",
    )


class PullResult(Message):
    """`models.pull`: the file is on the node, verified, and in its catalogue."""

    model: str
    variant: str
    size_bytes: int
    sha256: str = Field(description="Of the file; a folder's is that of its manifest.")
    sources: list[str] = Field(
        description="Who gave it: names of nodes, `Hugging Face`, `this PC`; empty: it was here."
    )
    seconds: float


class TransferDescription(Message):
    """One file that is on its way to this node now."""

    model: str
    variant: str
    stage: str = Field(description="`look`, `fetch`, `verify`, `copy`.")
    bytes_done: int
    bytes_total: int
    bytes_per_second: float
    sources: list[str] = Field(description="Who gives it now.")
    note: str = Field("", description="What a person should know, such as a peer that gave wrong bytes.")


class TransfersResult(Message):
    """`models.transfers`."""

    transfers: list[TransferDescription]
