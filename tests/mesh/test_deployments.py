"""What is wanted, over restarts and edits of the configuration."""

import errno

import pytest

from tars import state_folder
from tars.core.types import Deployment, KvType
from tars.errors import DiskFull
from tars.mesh.deployments import Deployments
from tars.state_folder import StateFolder


@pytest.fixture
def folder(tmp_path):
    return StateFolder(tmp_path)


def names(deployments):
    return [each.model for each in deployments.wanted()]


def test_the_configurations_deployments_are_wanted_in_order(folder):
    assert names(Deployments(folder, [Deployment("b"), Deployment("a")])) == ["b", "a"]


def test_decisions_outlive_a_restart(folder):
    declared = [Deployment("a"), Deployment("b")]
    first = Deployments(folder, declared)
    first.deploy(Deployment("c", replicas=2, kv_type=KvType.Q8_0, context=512))
    assert first.remove("a")
    again = Deployments(folder, declared)
    assert names(again) == ["b", "c"]
    assert again.get("c") == Deployment("c", replicas=2, kv_type=KvType.Q8_0, context=512)


def test_an_edited_configuration_entry_wins_over_an_older_decision(folder):
    Deployments(folder, [Deployment("a")]).remove("a")
    assert names(Deployments(folder, [Deployment("a")])) == []
    assert names(Deployments(folder, [Deployment("a", context=512)])) == ["a"]


def test_removing_what_is_not_wanted_changes_nothing(folder):
    assert not Deployments(folder, []).remove("a")
    assert folder.read_json("deployments.json") == {}


def test_a_full_disk_changes_nothing(folder, monkeypatch):
    deployments = Deployments(folder, [Deployment("a")])

    def full(descriptor):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(state_folder.os, "fsync", full)
    with pytest.raises(DiskFull):
        deployments.deploy(Deployment("b"))
    with pytest.raises(DiskFull):
        deployments.remove("a")
    assert names(deployments) == ["a"]


@pytest.mark.parametrize(
    "content", [b"[]", b'{"decided": {"x": 5}}', b'{"decided": {"x": {"wanted": {"model": 1, "no": 2}}}}']
)
def test_a_file_of_another_version_is_ignored(folder, content):
    (folder.path / "deployments.json").write_bytes(content)
    assert names(Deployments(folder, [Deployment("a")])) == ["a"]
