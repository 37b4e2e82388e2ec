from __future__ import annotations

import base64

import pytest

np = pytest.importorskip("numpy")
from tars.workers.embedding_vectors import encoded, mean_of_pieces, unit  # noqa: E402  # it needs numpy


def test_a_vector_leaves_as_little_endian_float32() -> None:
    vector = unit(np.array([3.0, 4.0], dtype=np.float32))
    assert base64.b64decode(encoded(vector, 2, "float")) == np.array([0.6, 0.8], dtype="<f4").tobytes()


def test_fewer_dimensions_are_unit_length_again() -> None:
    vector = unit(np.array([3.0, 4.0, 12.0], dtype=np.float32))
    cut = np.frombuffer(base64.b64decode(encoded(vector, 2, "float")), dtype="<f4")
    assert cut == pytest.approx([0.6, 0.8])


def test_int8_is_the_value_times_127_rounded() -> None:
    vector = np.array([1.0, -1.0, 0.5, -0.004, 0.0039], dtype=np.float32)
    assert np.frombuffer(base64.b64decode(encoded(vector, 5, "int8")), dtype=np.int8).tolist() == [127, -127, 64, -1, 0]


def test_binary_is_one_sign_bit_a_value_first_value_highest() -> None:
    vector = np.array([1, -1, -1, -1, -1, -1, -1, 1, -1, 1, 0, 0, 0, 0, 0, 0], dtype=np.float32)
    assert base64.b64decode(encoded(vector, 16, "binary")) == bytes([0b10000001, 0b01000000])


def test_pieces_weigh_by_their_tokens() -> None:
    one, other = np.array([1, 0], dtype=np.float32), np.array([0, 1], dtype=np.float32)
    assert mean_of_pieces([one, other], [3, 4]) == pytest.approx([0.6, 0.8])


def test_a_zero_vector_stays_zero() -> None:
    assert unit(np.zeros(3, dtype=np.float32)).tolist() == [0, 0, 0]
