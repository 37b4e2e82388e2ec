"""One file from several sources: whole, verified, resumable; whatever the sources, the disk or an impatient operator do to it."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import hashlib
import json
import os
import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tars.core.transfer import TokenBucket
from tars.errors import BadModelFile, DiskFull
from tars.mesh.file_transfer import FileTransfer, SourceFailed, SourcesExhausted
from tars.mesh.partial_file import Digest, WantedFile, held_on_disk

PIECE = 1000
CONTENT = bytes(range(256)) * 40  # 10,240 bytes: ten whole pieces and a short one


def sha256(content):
    return Digest("sha256", hashlib.sha256(content).hexdigest())


@dataclass
class Pretended:
    """A source of `content`; what it does wrong is written beside it."""

    name: str
    content: bytes = CONTENT
    breaks_after: int | None = None
    """Requests that it answers before it is gone."""
    stalls: bool = False
    endless: bool = False
    short: bool = False
    busy: int = 0
    wait: float = 0.0
    gate: asyncio.Event | None = None
    asked: list[tuple[int, int]] = field(default_factory=list)

    @property
    def title(self):
        return self.name.upper()

    async def read(self, start, stop):
        self.asked.append((start, stop))
        if self.breaks_after is not None and len(self.asked) > self.breaks_after:
            raise SourceFailed("it does not answer", final=True)
        if self.busy:
            self.busy -= 1
            raise SourceFailed("it is busy", pause=0.01)
        if self.stalls:
            await asyncio.sleep(3600)
        if self.gate is not None:
            await self.gate.wait()
        await asyncio.sleep(self.wait)
        yield self.content[start : (start + stop) // 2]
        yield self.content[(start + stop) // 2 : stop - 1 if self.short else stop]
        while self.endless:
            yield b"more"


@pytest.fixture
def target(tmp_path):
    return tmp_path / "folder" / "model.gguf"


def transfer(target, *sources, content=CONTENT, digest=None, **options):
    wanted = WantedFile(target, len(content), digest or sha256(content))
    return FileTransfer(wanted, sources, piece=PIECE, **options)


async def until(happened, seconds=20.0):
    """Wait for something that only the disk shows."""
    ends = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < ends
        await asyncio.sleep(0.001)


def damage(path, at, content):
    with open(path, "rb+") as file:
        file.seek(at)
        file.write(content)


def left_beside(target):
    return sorted(each.name for each in target.parent.iterdir() if each != target)


async def test_several_sources_bring_one_file(target):
    sources = [Pretended(name, wait=0.001) for name in "abc"]
    outcome = await transfer(target, *sources).run()
    assert target.read_bytes() == CONTENT
    assert left_beside(target) == []
    assert all(source.asked for source in sources)
    assert outcome.sources == ("A", "B", "C")
    assert outcome.liars == ()


async def test_an_empty_file_needs_no_source(target):
    await transfer(target, content=b"").run()
    assert target.read_bytes() == b""


async def test_a_file_named_by_git_is_verified_too(target):
    digest = Digest("git-sha1", hashlib.sha1(b"blob %d\0" % len(CONTENT) + CONTENT).hexdigest())
    await transfer(target, Pretended("a"), digest=digest).run()
    assert target.read_bytes() == CONTENT
    wrong = Digest("git-sha1", hashlib.sha1(CONTENT).hexdigest())
    with pytest.raises(SourcesExhausted):
        await transfer(target.with_name("other"), Pretended("a"), digest=wrong).run()


async def test_a_source_that_dies_midway_is_replaced_by_the_others(target):
    dying, good = Pretended("dying", breaks_after=2), Pretended("good", wait=0.002)
    outcome = await transfer(target, dying, good).run()
    assert target.read_bytes() == CONTENT
    assert outcome.sources == ("DYING", "GOOD")


@pytest.mark.slow
async def test_a_source_that_keeps_silent_is_given_up(target, monkeypatch):
    monkeypatch.setattr("tars.core.transfer.FIRST_PAUSE", 0.01)
    silent = Pretended("silent", stalls=True)
    with pytest.raises(SourcesExhausted) as raised:
        await asyncio.wait_for(transfer(target, silent, idle_seconds=0.02).run(), 10)
    assert raised.value.reasons == {"SILENT": "it sent nothing for 0.02 s"}
    assert not target.exists()


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (Pretended("a", endless=True), "it sent more than it was asked for"),
        (Pretended("a", breaks_after=0), "it does not answer"),
        (Pretended("a", short=True), "it ended in the middle of a piece"),
    ],
    ids=["endless", "gone", "short"],
)
async def test_what_a_source_did_wrong_stands_in_the_error(target, source, reason, monkeypatch):
    monkeypatch.setattr("tars.core.transfer.FIRST_PAUSE", 0.01)
    source.asked.clear()
    with pytest.raises(SourcesExhausted) as raised:
        await asyncio.wait_for(transfer(target, source).run(), 10)
    assert raised.value.reasons == {"A": reason}
    assert raised.value.liars == ()
    assert not target.exists()


async def test_a_busy_source_is_asked_again(target):
    await asyncio.wait_for(transfer(target, Pretended("a", busy=2)).run(), 10)
    assert target.read_bytes() == CONTENT


async def test_a_cancelled_transfer_goes_on_where_it_was(target):
    first = Pretended("a", gate=asyncio.Event())
    first.gate.set()
    reports = []
    going = asyncio.create_task(transfer(target, first, report=reports.append).run())
    await until(lambda: len(first.asked) >= 5)
    first.gate.clear()
    await until(lambda: len(json_lines(target)) >= 4)
    going.cancel()
    with suppress(asyncio.CancelledError):
        await going
    saved = len(json_lines(target)) - 1
    assert saved >= 3
    assert held_on_disk(target) > 0
    assert not target.exists()
    second = Pretended("b")
    outcome = await transfer(target, second).run()
    assert target.read_bytes() == CONTENT
    assert len(second.asked) == 11 - saved
    assert outcome.sources == ("B", "a")  # the first one is not there any more: only its name is known


def json_lines(target):
    journal = target.with_name(target.name + ".journal")
    return journal.read_bytes().splitlines() if journal.exists() else []


KILLED = """
import asyncio, sys
sys.path[:0] = sys.argv[2:]
from pathlib import Path
import test_file_transfer as tests

async def main():
    source = tests.Pretended("a", wait=0.02)
    await tests.transfer(Path(sys.argv[1]), source).run()

asyncio.run(main())
"""


@pytest.mark.slow
async def test_a_transfer_survives_kill_9(target):
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", KILLED, str(target), str(Path(__file__).parent), os.getcwd()
    )
    await until(lambda: len(json_lines(target)) >= 3)
    process.send_signal(signal.SIGKILL)
    await asyncio.wait_for(process.wait(), 10)
    saved = len([line for line in json_lines(target) if line.endswith(b"}")]) - 1
    assert 2 <= saved < 11
    assert not target.exists()
    source = Pretended("a")
    await transfer(target, source).run()
    assert target.read_bytes() == CONTENT
    assert len(source.asked) == 11 - saved


async def half_done(target, content=CONTENT):
    """A partial file with its journal, six pieces of eleven."""
    with pytest.raises(SourcesExhausted):
        await transfer(target, Pretended("a", content, breaks_after=6), content=content).run()
    assert 5 <= len(json_lines(target)) - 1 <= 6


async def test_a_torn_last_line_costs_its_piece_alone(target):
    await half_done(target)
    journal = target.with_name(target.name + ".journal")
    saved = len(json_lines(target)) - 1
    journal.write_bytes(journal.read_bytes()[:-5])
    source = Pretended("b")
    await transfer(target, source).run()
    assert target.read_bytes() == CONTENT
    assert len(source.asked) == 11 - saved + 1


@pytest.mark.parametrize(
    "content", [b"", b"rubbish\n", b'{"digest": "sha256:0", "size": 3, "piece": 1}\n', b"[]\n[]\n", b"\xff\n"]
)
async def test_a_journal_that_is_not_one_of_this_file_starts_afresh(target, content):
    await half_done(target)
    target.with_name(target.name + ".journal").write_bytes(content)
    source = Pretended("b")
    await transfer(target, source).run()
    assert target.read_bytes() == CONTENT
    assert len(source.asked) == 11


@pytest.mark.parametrize(
    "line",
    [
        '{"piece": -1}',
        '{"piece": "1", "source": "a", "digest": "x"}',
        "5",
        '{"piece": 10000, "source": "a", "digest": "x"}',
    ],
)
async def test_lines_that_say_nothing_usable_are_no_pieces(target, line):
    await half_done(target)
    saved = len(json_lines(target)) - 1
    journal = target.with_name(target.name + ".journal")
    journal.write_bytes(journal.read_bytes() + line.encode() + b"\n")
    source = Pretended("b")
    await transfer(target, source).run()
    assert target.read_bytes() == CONTENT
    assert len(source.asked) == 11 - saved


async def test_a_partial_file_that_was_cut_is_fetched_again_from_there(target):
    await half_done(target)
    os.truncate(target.with_name(target.name + ".partial"), 2500)
    source = Pretended("b")
    await transfer(target, source).run()
    assert target.read_bytes() == CONTENT
    assert (2000, 3000) in source.asked
    assert (0, 1000) not in source.asked


async def test_another_file_of_the_same_name_starts_afresh(target):
    await half_done(target)
    other = CONTENT[::-1]
    source = Pretended("b", other)
    await transfer(target, source, content=other).run()
    assert target.read_bytes() == other
    assert len(source.asked) == 11


async def test_bytes_that_rot_on_this_disk_are_fetched_again_and_nobody_is_accused(target):
    await half_done(target)
    damage(target.with_name(target.name + ".partial"), 1500, b"rotten")
    source = Pretended("a")
    outcome = await transfer(target, source).run()
    assert target.read_bytes() == CONTENT
    assert outcome.liars == ()
    assert source.asked.count((1000, 2000)) == 1


# --- wrong bytes ------------------------------------------------------------------------------------------------------

TAMPERED = CONTENT[:5000] + b"EVIL" + CONTENT[5004:]


async def test_a_lying_source_is_named_and_the_file_comes_from_the_others(target):
    reports = []
    liar, good = Pretended("liar", bytes(len(CONTENT)), wait=0.002), Pretended("good", wait=0.002)
    outcome = await transfer(target, liar, good, report=reports.append).run()
    assert target.read_bytes() == CONTENT
    assert outcome.liars == ("liar",)
    assert outcome.sources == ("GOOD",)
    assert max(good.asked.count(each) for each in good.asked) <= 2
    assert left_beside(target) == []


async def test_a_tampered_file_of_a_single_source_is_never_used(target):
    with pytest.raises(SourcesExhausted) as raised:
        await transfer(target, Pretended("liar", TAMPERED)).run()
    assert raised.value.liars == ("liar",)
    assert "do not hash" in raised.value.reasons["LIAR"]
    assert list(target.parent.iterdir()) == []


async def test_where_all_lie_all_are_named(target):
    with pytest.raises(SourcesExhausted) as raised:
        await transfer(target, Pretended("x", TAMPERED), Pretended("y", bytes(len(CONTENT)))).run()
    assert raised.value.liars == ("x", "y")
    assert not target.exists()


async def test_a_source_that_dies_while_it_is_checked_is_no_liar(target):
    liar = Pretended("liar", bytes(len(CONTENT)), wait=0.002)
    mortal = Pretended("mortal", wait=0.002, breaks_after=4)
    with pytest.raises(SourcesExhausted) as raised:
        await transfer(target, liar, mortal).run()
    assert raised.value.liars == ("liar",)
    assert raised.value.reasons["MORTAL"] == "it does not answer"


async def test_what_came_wrong_before_a_restart_is_put_right_after_it(target):
    """Pieces of a liar that is not there any more."""
    await half_done(target)
    journal = target.with_name(target.name + ".journal")
    lines = [json.loads(line) for line in journal.read_bytes().splitlines()]
    wrong = b"x" * PIECE
    damage(target.with_name(target.name + ".partial"), lines[1]["piece"] * PIECE, wrong)
    lines[1].update(source="gone", digest=hashlib.sha256(wrong).hexdigest())
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines))
    outcome = await transfer(target, Pretended("good")).run()
    assert target.read_bytes() == CONTENT
    assert outcome.liars == ("gone",)


# --- the disk ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 64 KiB."""
    libc = ctypes.CDLL(None, use_errno=True)
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() != 0 or libc.mount(b"none", os.fsencode(place), b"tmpfs", 0, b"size=65536") != 0:
        pytest.skip("mounting a small disk needs root")
    yield place
    assert libc.umount2(os.fsencode(place), 2) == 0


async def test_a_disk_that_fills_up_midway_keeps_what_came(small_disk):
    content = os.urandom(40 * PIECE)
    filler = small_disk / "filler"
    filler.write_bytes(b"x" * 40_000)
    target = small_disk / "model.gguf"
    with pytest.raises(DiskFull) as raised:
        await transfer(target, Pretended("a", content), content=content).run()
    assert "is kept" in raised.value.message
    assert str(small_disk) not in raised.value.message
    assert not target.exists()
    saved = len(json_lines(target)) - 1
    assert saved > 5
    filler.unlink()
    source = Pretended("a", content)
    await transfer(target, source, content=content).run()
    assert target.read_bytes() == content
    assert len(source.asked) <= 40 - saved


async def test_a_folder_that_cannot_be_written_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(BadModelFile, match="cannot be written"):
        await transfer(tmp_path / "file" / "model.gguf", Pretended("a")).run()


async def test_a_symbolic_link_at_the_partial_files_place_is_not_followed(target, tmp_path):
    target.parent.mkdir()
    victim = tmp_path / "victim"
    victim.write_text("precious")
    target.with_name(target.name + ".partial").symlink_to(victim)
    with pytest.raises(BadModelFile):
        await transfer(target, Pretended("a")).run()
    assert victim.read_text() == "precious"


# --- pace and progress ------------------------------------------------------------------------------------------------


async def test_progress_grows_to_the_whole_and_names_who_gives(target, monkeypatch):
    monkeypatch.setattr("tars.mesh.file_transfer.TICK_SECONDS", 0.002)
    reports = []
    await transfer(target, Pretended("a", wait=0.003), report=reports.append).run()
    fetching = [each for each in reports if each.stage == "fetch"]
    done = [each.bytes_done for each in fetching]
    assert len(done) > 3
    assert done[-1] == len(CONTENT)
    assert all(0 <= each <= len(CONTENT) for each in done)
    assert ("A",) in {each.sources for each in fetching}
    assert any(each.bytes_per_second > 0 for each in fetching)
    assert reports[-1].stage == "verify"


async def test_the_bandwidth_cap_holds(target):
    began = time.monotonic()
    await transfer(target, Pretended("a"), bandwidth=TokenBucket(40_000.0, burst=1000.0)).run()
    assert time.monotonic() - began > 0.8 * (len(CONTENT) - 1000) / 40_000


async def test_more_sources_than_lanes_wait_as_spares(target):
    dying = [Pretended(f"dying{number}", breaks_after=0) for number in range(9)]
    outcome = await transfer(target, *dying, Pretended("spare")).run()
    assert outcome.sources == ("SPARE",)


def test_nothing_is_held_of_what_never_began(target):
    assert held_on_disk(target) == 0
    with contextlib.suppress(FileNotFoundError):
        target.unlink()
