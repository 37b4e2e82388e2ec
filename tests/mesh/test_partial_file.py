"""The file under way: pieces and their journal, what is left of them after a crash, and the move into place."""

from __future__ import annotations

import hashlib
import json
import os
import threading

import pytest

from tars.errors import BadModelFile, DiskFull
from tars.mesh.partial_file import Digest, PartialFile, WantedFile, held_on_disk

CONTENT = bytes(range(250)) * 10
PIECE = 1000


@pytest.fixture
def wanted(tmp_path):
    digest = Digest("sha256", hashlib.sha256(CONTENT).hexdigest())
    return WantedFile(tmp_path / "folder" / "model.gguf", len(CONTENT), digest)


def opened(wanted):
    file = PartialFile(wanted, PIECE)
    file.open()
    return file


def save(file, *pieces, source="a", content=CONTENT):
    for piece in pieces:
        file.save(piece, piece * PIECE, content[piece * PIECE : (piece + 1) * PIECE], source)


def matches(file):
    return file.matches(threading.Event(), lambda done: None)


def test_pieces_in_any_order_become_the_file(wanted):
    file = opened(wanted)
    assert file.pieces == 3
    save(file, 2, 0, 1)
    assert matches(file)
    file.close()
    file.close()
    file.move()
    assert wanted.target.read_bytes() == CONTENT
    assert os.listdir(wanted.target.parent) == ["model.gguf"]


def test_what_is_saved_is_there_for_the_next_attempt(wanted):
    file = opened(wanted)
    save(file, 1, source="peer")
    file.close()
    assert held_on_disk(wanted.target) > 0
    again = opened(wanted)
    assert again.journal.now == {1: ("peer", hashlib.sha256(CONTENT[1000:2000]).hexdigest())}
    save(again, 0, 2)
    assert matches(again)
    again.close()


def test_the_journal_names_the_file_and_its_pieces(wanted):
    file = opened(wanted)
    save(file, 0)
    file.close()
    head, row = [json.loads(line) for line in (wanted.target.parent / "model.gguf.journal").read_text().splitlines()]
    assert head == {"digest": f"sha256:{wanted.digest.value}", "size": 2500, "piece": 1000}
    assert (row["piece"], row["source"]) == (0, "a")
    other = PartialFile(wanted, 500)
    other.open()
    assert other.journal.now == {}
    other.close()


def test_the_first_bytes_of_a_piece_stand_and_the_seconds_word_is_kept(wanted):
    file = opened(wanted)
    save(file, 0, source="first")
    save(file, 0, source="second", content=bytes(2500))
    assert file.journal.now[0][0] == "first"
    assert file.journal.claims["second", 0] == hashlib.sha256(bytes(1000)).hexdigest()
    assert file.damaged() == []
    file.close()


def test_pieces_that_changed_on_the_disk_are_found(wanted):
    file = opened(wanted)
    save(file, 0, 1, 2)
    with open(wanted.target.parent / "model.gguf.partial", "rb+") as partial:
        partial.seek(1999)
        partial.write(b"xx")
    assert file.damaged() == [1, 2]
    assert not matches(file)
    file.close()


def test_a_hashing_that_is_stopped_says_no(wanted):
    file = opened(wanted)
    save(file, 0, 1, 2)
    stop = threading.Event()
    stop.set()
    assert not file.matches(stop, lambda done: None)
    seen = []
    assert file.matches(threading.Event(), seen.append)
    assert seen == [2500]
    file.close()


def test_nothing_stays_of_what_is_discarded(wanted):
    file = opened(wanted)
    save(file, 0)
    file.close()
    file.discard()
    file.discard()
    assert os.listdir(wanted.target.parent) == []


def test_an_error_of_the_disk_says_what_is_kept(wanted):
    file = opened(wanted)
    save(file, 0, 2)
    full = file.failed(OSError(28, "No space left on device"))
    assert isinstance(full, DiskFull)
    assert "(1 KiB of 2 KiB) is kept" in full.message
    other = file.failed(OSError(13, "Permission denied"))
    assert isinstance(other, BadModelFile)
    assert "Permission denied" in other.message
    assert str(wanted.target.parent) not in full.message + other.message
    file.close()
    wanted.target.parent.joinpath("model.gguf.partial").unlink()
    with pytest.raises(BadModelFile):
        file.move()


def test_gits_name_of_a_file():
    # As `git hash-object` prints it for these five bytes.
    digest = Digest("git-sha1", "b6fc4c620b67d95f953a5c1c1230aaab5db5a1b0")
    found = digest.start(5)
    found.update(b"hello")
    assert found.hexdigest() == digest.value
