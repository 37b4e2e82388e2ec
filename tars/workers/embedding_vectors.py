"""From a model's vectors to the bytes that leave: cut, averaged, quantised.

Law of this file: numpy on float32 vectors of unit length, nothing of models, calls or batches. No vector ever becomes a list.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float32]


def unit(vector: Vector) -> Vector:
    """The vector at length 1; a zero vector stays zero."""
    return np.asarray(vector / max(float(np.linalg.norm(vector)), 1e-12), dtype=np.float32)


def mean_of_pieces(vectors: Sequence[Vector], tokens: Sequence[int]) -> Vector:
    """Average of a split text's vectors by the tokens of each piece, unit length (OpenAI's cookbook on long inputs does the same)."""
    weights = np.asarray(tokens, dtype=np.float32)
    return unit((np.stack(vectors) * weights[:, None]).sum(axis=0) / max(1.0, float(weights.sum())))


def encoded(vector: Vector, dimensions: int, output_type: Literal["float", "int8", "binary"]) -> str:
    """Base64 of the vector's first `dimensions` values, unit length again.

    Little-endian float32; int8 (times 127, rounded); or binary: one sign bit a value, first value in the highest bit.
    """
    if dimensions < vector.shape[0]:
        vector = unit(vector[:dimensions])
    if output_type == "int8":
        data = np.rint(vector * 127).astype(np.int8).tobytes()
    elif output_type == "binary":
        data = np.packbits(vector > 0).tobytes()
    else:
        data = vector.astype("<f4", copy=False).tobytes()
    return base64.b64encode(data).decode("ascii")
