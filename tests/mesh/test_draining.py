"""One flag that outlives the process."""

import pytest

from tars.errors import DiskFull
from tars.mesh.draining import FILE, Draining
from tars.state_folder import StateFolder


def test_it_is_off_at_first_and_survives_a_restart(tmp_path):
    folder = StateFolder(tmp_path)
    first = Draining(folder)
    assert not first.on
    first.set(True)
    assert Draining(folder).on
    Draining(folder).set(False)
    assert not Draining(folder).on


@pytest.mark.parametrize("content", ["[]", "{", '{"draining": "yes"}'])
def test_a_damaged_file_is_as_none(tmp_path, content):
    (tmp_path / FILE).write_text(content)
    assert not Draining(StateFolder(tmp_path)).on


def test_a_full_disk_changes_nothing(tmp_path, monkeypatch):
    folder = StateFolder(tmp_path)
    draining = Draining(folder)

    def full(*args, **more):
        raise DiskFull("full")

    monkeypatch.setattr(folder, "write_json", full)
    with pytest.raises(DiskFull):
        draining.set(True)
    assert not draining.on


def test_without_a_folder_it_lasts_as_long_as_the_process():
    draining = Draining()
    draining.set(True)
    assert draining.on
