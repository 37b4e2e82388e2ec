"""The models that TARS knows before it has seen a file of them: `catalogue.toml` as entries.

Law of this file: it turns the list into entries and knows where the two demo models lie; it opens no model.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from pydantic import Field

from tars.core.tensor_plan import Counts, planned_shape
from tars.core.types import Bytes, ModelEntry, ModelKind, ModelShape, Variant
from tars.demo import help_desk_gguf, minilm_directory
from tars.messages.base import Message

QUALITY: dict[str, float] = {
    "FP32": 1.0,
    "F32": 1.0,
    "BF16": 0.999,
    "F16": 0.999,
    "Q8_0": 0.99,
    "Q6_K": 0.98,
    "Q5_K_M": 0.96,
    "Q5_K_S": 0.955,
    "Q5_1": 0.95,
    "Q5_0": 0.945,
    "Q4_K_M": 0.93,
    "IQ4_XS": 0.925,
    "IQ4_NL": 0.925,
    "Q4_K_S": 0.92,
    "MXFP4": 0.915,
    "Q4_1": 0.91,
    "Q4_0": 0.9,
    "Q3_K_L": 0.85,
    "Q3_K_M": 0.83,
    "Q3_K_S": 0.78,
    "Q2_K": 0.65,
}
"""Order of quantisations, best first; only the order counts. It follows the perplexities that llama.cpp's quantize tool prints."""
UNKNOWN_QUALITY = 0.5
"""A quantisation that the table does not know: only taken where nothing known fits."""


@dataclass(frozen=True, slots=True)
class BuiltinModel:
    """One entry; `place` tells where its file lies when it comes with this installation."""

    entry: ModelEntry
    place: Callable[[], Path | None] | None


class _CountsRow(Message):
    architecture: str
    layers: int = Field(ge=1)
    embedding: int = Field(ge=1)
    heads: int = Field(ge=1)
    kv_heads: int = Field(ge=1)
    feed_forward: int = Field(ge=1)
    vocabulary: int = Field(ge=1)
    context: int = Field(ge=1)
    rope_factors: int = Field(0, ge=0)


class _VariantRow(Message):
    quantisation: str
    repo: str
    file: str
    bytes: int | None = Field(None, ge=1)


class _ModelRow(Message):
    name: str
    kind: str
    aliases: list[str] = []
    description: str
    licence: str
    bundled: str | None = None
    counts: _CountsRow | None = None
    variant: list[_VariantRow] = []


def builtin_models() -> list[BuiltinModel]:
    """All of them, in the list's order. The list is part of the package, so that a mistake in it is a bug: any exception."""
    text = files("tars").joinpath("catalogue.toml").read_text(encoding="utf-8")
    rows = [_ModelRow.model_validate(row) for row in tomllib.loads(text)["model"]]
    return [BuiltinModel(_entry(row), None if row.bundled is None else _BUNDLED[row.bundled]) for row in rows]


def ordered(variants: Iterable[Variant]) -> tuple[Variant, ...]:
    """Best quality first."""
    return tuple(sorted(variants, key=lambda variant: (-variant.quality, variant.name)))


_BUNDLED: dict[str, Callable[[], Path | None]] = {"help-desk": help_desk_gguf, "minilm": minilm_directory}


def _entry(row: _ModelRow) -> ModelEntry:
    return ModelEntry(
        name=row.name,
        kind=ModelKind(row.kind),
        variants=ordered(_declared(row, each) for each in row.variant),
        aliases=tuple(row.aliases),
        description=row.description,
        licence=row.licence,
    )


def _declared(row: _ModelRow, variant: _VariantRow) -> Variant:
    """A variant as the built-in list counts it, without its file."""
    counts = row.counts
    if counts is None:
        raise ValueError(f"catalogue.toml: {row.name} has a variant and no counts")
    if row.kind == ModelKind.CHAT:
        shape = planned_shape(
            Counts(
                architecture=counts.architecture,
                layers=counts.layers,
                embedding=counts.embedding,
                heads=counts.heads,
                kv_heads=counts.kv_heads,
                feed_forward=counts.feed_forward,
                vocabulary=counts.vocabulary,
                context_trained=counts.context,
                rope_factors=counts.rope_factors,
            ),
            variant.quantisation,
            file_bytes=variant.bytes,
        )
    else:
        size = Bytes(variant.bytes or 0)
        shape = ModelShape(
            architecture=counts.architecture,
            layers=counts.layers,
            embedding=counts.embedding,
            heads=counts.heads,
            kv_heads=counts.kv_heads,
            feed_forward=counts.feed_forward,
            vocabulary=counts.vocabulary,
            key_length=counts.embedding // counts.heads,
            value_length=counts.embedding // counts.heads,
            context_trained=counts.context,
            # A safetensors header is some ten KiB: the file's size is the weights'.
            tensor_bytes=size,
            host_bytes=Bytes(0),
            file_bytes=size,
        )
    return Variant(
        name=variant.quantisation,
        shape=shape,
        quality=QUALITY[variant.quantisation.upper()],
        repo=variant.repo,
        file=variant.file,
    )
