"""`models.pull`, `models.add_file` and `models.transfers`: model files that come to this node."""

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


class AddFileParams(Message):
    """`models.add_file`: have the node take a file (or folder) that lies on its own PC."""

    model: str = Field(
        min_length=1, max_length=MAX_NAME_LENGTH, description="The catalogue's name of it, or a new name for it."
    )
    path: str = Field(min_length=1, max_length=4096, description="From the root of the node's PC.")
    variant: str | None = Field(
        None, max_length=MAX_NAME_LENGTH, description="Refused if the file holds another quantisation."
    )


class PullResult(Message):
    """`models.pull` and `models.add_file`: the file is on the node, verified, and in its catalogue."""

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
