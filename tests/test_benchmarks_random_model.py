"""The random models of the benchmarks: what TARS's own reader finds in them, and that text in them is about one token a word."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from random_model import (
    MISTRAL_7B,
    NEVER_CHOSEN,
    SMALL,
    Shape,
    english_words,
    random_model,
    vocabulary,
    write_random_model,
)

TINY = Shape(layers=1, embedding=256, heads=4, kv_heads=2, feed_forward=512, vocabulary=3000, context=512)


def weights_of(path: Path, name: str) -> np.ndarray:
    tensor = next(each for each in gguf.GGUFReader(str(path)).tensors if each.name == name)
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type)


def test_the_shapes_are_what_the_issue_measures() -> None:
    assert 100e6 < SMALL.parameters < 160e6
    assert 7.2e9 < MISTRAL_7B.parameters < 7.3e9
    assert SMALL.context == 8192


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One model a quantisation, seed 1; to be read only."""
    folder = tmp_path_factory.mktemp("written")
    return {name: write_random_model(folder / f"{name}.gguf", TINY, quantisation=name) for name in ("Q8_0", "Q4_0")}


@pytest.mark.slow
@pytest.mark.parametrize("quantisation", ["Q8_0", "Q4_0"])
def test_weights_are_finite_of_mean_zero_and_of_the_wanted_spread(written: dict[str, Path], quantisation: str) -> None:
    path = written[quantisation]
    for name, scale in (("token_embd.weight", 8.0), ("blk.0.attn_q.weight", 1.0), ("blk.0.ffn_down.weight", 1.0)):
        weights = weights_of(path, name)
        wanted = scale / np.sqrt(weights.shape[1])
        assert np.isfinite(weights).all()
        assert weights.std() == pytest.approx(wanted, rel=0.02)
        assert abs(weights.mean()) < wanted * 0.02


def test_control_and_byte_tokens_are_never_chosen(written: dict[str, Path]) -> None:
    output = weights_of(written["Q4_0"], "output.weight")
    assert not output[:NEVER_CHOSEN].any()
    assert output[NEVER_CHOSEN:].any(axis=1).all()


def test_the_same_arguments_give_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    first, again, other = (
        write_random_model(tmp_path / f"{name}.gguf", TINY, seed=seed).read_bytes()
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert first == again
    assert first != other


def test_every_word_is_reached_from_its_one_letter_shorter_beginning() -> None:
    pieces = {piece for piece, _, _ in vocabulary(32_000)}
    assert len(pieces) == 32_000
    words = [piece for piece in pieces if piece.startswith("▁") and piece[1:].isalpha()]
    assert len(words) > 20_000
    assert all(piece[:-1] in pieces for piece in words)
    # Nearly every word that prompts are made of is one token.
    common = english_words()[:5000]
    assert sum(f"▁{word}" in pieces for word in common) == len(common)


def test_a_vocabulary_too_small_and_another_quantisation_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not hold"):
        vocabulary(300)
    with pytest.raises(ValueError, match="only Q8_0 and Q4_0"):
        write_random_model(tmp_path / "m.gguf", TINY, quantisation="Q5_K")
    assert list(tmp_path.iterdir()) == []


def test_a_written_model_is_taken_again_and_a_broken_off_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("random_model").SHAPES, "small", TINY)
    path = random_model(tmp_path)
    written = path.stat().st_mtime_ns
    assert random_model(tmp_path).stat().st_mtime_ns == written

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(OSError, match="No space"):
        random_model(tmp_path, seed=2)
    assert list(tmp_path.iterdir()) == [path]
