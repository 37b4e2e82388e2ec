"""What a replica was loaded from has one hash, of content alone, and none while that is not known."""

from __future__ import annotations

import hashlib
from pathlib import Path

from tars.core.records import HeldFile
from tars.core.types import Bytes
from tars.mesh.loaded_files import LoadedFile
from tars.workers.engine import AdapterSpec


def held(path: Path, model: str = "m", variant: str = "Q8_0", folder: bool = False) -> HeldFile:
    return HeldFile(model, variant, Bytes(1), hashlib.sha256(path.read_bytes()).hexdigest(), folder)


def file(folder: Path, content: str = "weights", name: str = "m.gguf") -> Path:
    path = folder / name
    path.write_text(content)
    return path


def test_a_file_is_known_once_it_was_hashed_and_stays_known(tmp_path: Path) -> None:
    path = file(tmp_path)
    loaded = LoadedFile.taken("m", "Q8_0", path)
    assert loaded.identify([]) is None
    assert loaded.identify([HeldFile("m", "Q8_0", Bytes(1))]) is None
    assert loaded.identify([held(path, "other"), held(path, variant="Q4_0"), held(path, folder=True)]) is None
    assert loaded.identify([held(path)]) == held(path).sha256
    path.write_text("others came into its place")
    assert loaded.identify([held(path)]) == loaded.sha256 != held(path).sha256


def test_a_file_that_was_replaced_after_its_load_is_not_taken_for_the_loaded_one(tmp_path: Path) -> None:
    path = file(tmp_path)
    loaded = LoadedFile.taken("m", "Q8_0", path)
    path.write_text("other weights")
    assert loaded.identify([held(path)]) is None
    gone = LoadedFile.taken("m", "Q8_0", tmp_path / "gone")
    assert gone.identify([held(path)]) is None
    path.unlink()
    assert LoadedFile.taken("m", "Q8_0", path).identify([HeldFile("m", "Q8_0", Bytes(1), "0" * 64)]) is None


def test_adapters_are_a_part_of_it_by_content_name_and_scale(tmp_path: Path) -> None:
    path, small, other = file(tmp_path), file(tmp_path, "one", "a.gguf"), file(tmp_path, "two", "b.gguf")

    def identity(*adapters: AdapterSpec) -> str | None:
        return LoadedFile.taken("m", "Q8_0", path, adapters).identify([held(path)])

    one = AdapterSpec(name="a", path=str(small))
    different = [
        identity(),
        identity(one),
        identity(AdapterSpec(name="b", path=str(small))),
        identity(AdapterSpec(name="a", path=str(other))),
        identity(AdapterSpec(name="a", path=str(small), scale=0.5)),
        identity(one, AdapterSpec(name="b", path=str(other))),
        identity(AdapterSpec(name="a", path=str(tmp_path / "gone"))),
    ]
    assert len(set(different)) == len(different)
    assert None not in different
    again = file(tmp_path, "one", "copied under another name.gguf")
    assert identity(AdapterSpec(name="a", path=str(again))) == identity(one)
    assert identity(AdapterSpec(name="b", path=str(other)), one) == identity(
        one, AdapterSpec(name="b", path=str(other))
    )
