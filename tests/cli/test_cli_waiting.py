from __future__ import annotations

import io
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from rich.progress import Progress, TextColumn

from tars.cli import waiting
from tars.cli.waiting import Bars, Lines, watch_until_ready
from tars.errors import DeadlineExceeded, MethodNotFound
from tars.messages.mesh_state import MeshDescription
from tars.messages.node import LoadProgress, ModelsResult, NodeDescription
from tars.rpc.http_client import NodeNotReachable


class Describes:
    """A client whose node is in one state after the other; the last one stays. `meshes` and `models` likewise, where there are some."""

    def __init__(
        self,
        states: Iterable[NodeDescription | Exception],
        meshes: Iterable[MeshDescription] = (),
        models: Iterable[ModelsResult] = (),
    ) -> None:
        self.states = list(states)
        self.meshes = list(meshes)
        self.listed = list(models)

    async def describe_mesh(self) -> MeshDescription:
        if not self.meshes:
            raise MethodNotFound("no method mesh.describe")
        return self.meshes.pop(0) if len(self.meshes) > 1 else self.meshes[0]

    async def models(self) -> ModelsResult:
        return self.listed.pop(0) if len(self.listed) > 1 else self.listed[0]

    async def describe(self) -> NodeDescription:
        state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        if isinstance(state, Exception):
            raise state
        return state


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "POLL_SECONDS", 0.001)


@pytest.fixture
def lines() -> Lines:
    return Lines(Console(file=io.StringIO(), width=120))


def said(shows: Lines) -> list[str]:
    assert isinstance(shows.console.file, io.StringIO)
    return shows.console.file.getvalue().splitlines()


def loading(make: SimpleNamespace, stage: str, percent: float) -> Any:
    return make.description(make.replica("loading", LoadProgress(stage=stage, percent=percent)), state="loading")


async def test_waiting_outlasts_the_nodes_start_and_says_each_stage_once(make: SimpleNamespace, lines: Lines) -> None:
    client = Describes(
        [
            NodeNotReachable("away"),
            NodeNotReachable("away"),
            make.description(state="loading"),
            loading(make, "read", 10),
            loading(make, "read", 60),
            loading(make, "warm", 95),
            make.description(make.replica()),
        ]
    )
    description, _ = await watch_until_ready(client, lines, 10)  # type: ignore[arg-type]  # only `describe` is used
    assert description.replicas[0].state == "ready"
    assert said(lines) == [
        "waiting for the node to answer",
        "mistral-7b-instruct: loading: read 10 %",
        "mistral-7b-instruct: loading: warm 95 %",
        "mistral-7b-instruct: ready",
    ]


async def test_a_failed_replica_ends_the_waiting_though_the_node_still_says_loading(
    make: SimpleNamespace, lines: Lines
) -> None:
    client = Describes([make.description(make.replica("failed", None), state="loading")])
    description, _ = await watch_until_ready(client, lines, 10)  # type: ignore[arg-type]
    assert description.replicas[0].state == "failed"


async def test_waiting_for_one_model_does_not_end_before_its_replica_exists(
    make: SimpleNamespace, lines: Lines
) -> None:
    other = make.replica(id="other", model="other")
    client = Describes([make.description(other), make.description(other, make.replica(model="new"))])
    description, _ = await watch_until_ready(client, lines, 10, model="new")  # type: ignore[arg-type]
    assert [replica.model for replica in description.replicas] == ["other", "new"]
    assert said(lines) == ["new: ready"]


async def test_a_model_that_goes_to_a_peer_is_waited_for_there(make: SimpleNamespace, lines: Lines) -> None:
    def mesh(*replicas: Any) -> MeshDescription:
        return make.mesh(make.mesh_node(this_node=True, name="pc1"), make.mesh_node(replicas=list(replicas)))

    loading_there = make.mesh_replica(state="loading", progress=LoadProgress(stage="fetch", percent=30))
    client = Describes([make.description()], [mesh(), mesh(loading_there), mesh(make.mesh_replica())])
    _, replicas = await watch_until_ready(client, lines, 10, model="phi-2")  # type: ignore[arg-type]
    assert [(replica.model, replica.state) for replica in replicas] == [("phi-2", "ready")]
    assert said(lines) == ["phi-2: loading: fetch 30 %", "phi-2: ready"]
    gone = make.mesh(make.mesh_node(this_node=True), make.mesh_node(state="DEAD", replicas=[make.mesh_replica()]))
    with pytest.raises(DeadlineExceeded, match="phi-2 is still loading"):
        await watch_until_ready(Describes([make.description()], [gone]), lines, 0.05, model="phi-2")  # type: ignore[arg-type]


async def test_what_a_peer_has_yet_to_begin_with_is_waited_for(make: SimpleNamespace, lines: Lines) -> None:
    def models(state: str) -> ModelsResult:
        return ModelsResult(models=[make.model(state=state, deployed=True)])

    mesh = make.mesh(make.mesh_node(this_node=True), make.mesh_node())
    client = Describes([make.description()], [mesh], [models("loading"), models("loading"), models("ready")])
    await watch_until_ready(client, lines, 10)  # type: ignore[arg-type]
    assert client.listed == [models("ready")]


async def test_what_never_gets_ready_is_named_at_the_end(make: SimpleNamespace, lines: Lines) -> None:
    client = Describes([loading(make, "read", 10)])
    with pytest.raises(DeadlineExceeded, match=r"mistral-7b-instruct is still loading .* --wait-timeout"):
        await watch_until_ready(client, lines, 0.05)  # type: ignore[arg-type]


async def test_a_node_that_never_answers_is_not_reachable(lines: Lines) -> None:
    with pytest.raises(NodeNotReachable):
        await watch_until_ready(Describes([NodeNotReachable("away")]), lines, 0.05)  # type: ignore[arg-type]


def test_bars_follow_the_percentage_and_end_full(make: SimpleNamespace) -> None:
    progress = Progress(TextColumn("{task.description}"), console=Console(file=io.StringIO()))
    bars = Bars(progress)
    bars.waiting("waiting for the node to answer")
    bars.replicas([make.replica("loading", LoadProgress(stage="read", percent=40))])
    waited, loading_task = progress.tasks
    assert not waited.visible
    assert (loading_task.completed, loading_task.fields["state"]) == (40, "loading: read 40 %")
    bars.replicas([make.replica()])
    assert loading_task.finished
    assert len(progress.tasks) == 2
