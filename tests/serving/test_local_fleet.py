"""This node's replicas as the router sees them, on a coordinator whose workers only pretend to load."""

import asyncio

import pytest
from coordinator_bench import NODE, FakeWorker, make_bench

from tars.core.coordination_view import FETCH
from tars.core.mesh_messages import MemberState
from tars.core.types import Deadline, Deployment, ReplicaState
from tars.errors import BadModelFile, DiskFull, ReplicaFailed, StillLoading
from tars.mesh.replica_files import FileFetch
from tars.messages.base import CallContext
from tars.messages.inference import CompleteParams
from tars.messages.node import LoadProgress, MeasuredSpeeds
from tars.serving.local_fleet import LocalFleet


@pytest.fixture
def bench(tmp_path, tiny_gguf):
    return make_bench(tmp_path, tiny_gguf)


@pytest.fixture
async def fleet(bench):
    """One wanted model, whose worker has been started and loads."""
    bench.deployments.deploy(Deployment("tiny", slots=4))
    await bench.coordinator.reconcile()
    return LocalFleet(bench.coordinator)


async def test_a_replica_is_offered_with_its_node_its_queue_and_its_cache(bench, fleet):
    bench.workers[0].active_calls, bench.workers[0].queued_calls = 2, 3
    (candidate,) = fleet.candidates("tiny")
    assert (candidate.node, candidate.local, candidate.state) == (NODE.id, True, ReplicaState.LOADING)
    assert (candidate.active, candidate.queued) == (2, 3)
    assert candidate.cache_tokens > 0
    assert fleet.candidates("second") == []
    assert fleet.target(candidate.replica).served_by.replica == candidate.replica
    with pytest.raises(KeyError):
        fleet.target("nobody")


async def test_the_router_counts_with_the_calls_that_a_worker_serves_at_once_and_not_with_planned_slots(bench, fleet):
    assert [candidate.slots for candidate in fleet.candidates("tiny")] == [4]
    bench.workers[0].loaded()
    assert [candidate.slots for candidate in fleet.candidates("tiny")] == [1]


async def test_a_cold_replica_is_ranked_by_the_speeds_that_it_measured(bench, fleet):
    assert [(each.speed, each.prefill_speed) for each in fleet.candidates("tiny")] == [(None, None)]
    bench.workers[0].loaded()
    speeds = MeasuredSpeeds(decode_tokens_per_second=58.5, prefill_tokens_per_second=900.0, texts_per_second=3.0)
    bench.workers[0].info = bench.workers[0].info.model_copy(update={"speeds": speeds})
    assert [(each.speed, each.prefill_speed) for each in fleet.candidates("tiny")] == [(58.5, 900.0)]


async def test_a_replica_that_is_to_move_is_asked_where_nobody_else_can(bench, fleet):
    bench.workers[0].loaded()
    bench.coordinator.draining.set(True)
    assert [each.standing for each in fleet.candidates("tiny")] == [MemberState.DRAINING]
    bench.coordinator.draining.set(False)
    assert [each.standing for each in fleet.candidates("tiny")] == [MemberState.ALIVE]


async def test_who_may_go_on_with_an_answer_is_told_by_file_and_exactness(bench, fleet):
    (live,) = bench.coordinator.replicas.values()
    assert [(each.file_sha256, each.exact) for each in fleet.candidates("tiny")] == [(None, False)]
    live.file.sha256 = "ab" * 32
    live.spec = live.spec.model_copy(update={"exact": True})
    assert [(each.file_sha256, each.exact) for each in fleet.candidates("tiny")] == [("ab" * 32, True)]


async def test_peers_hear_of_the_queues_of_ready_replicas_only(bench, fleet):
    assert fleet.load() == []
    bench.workers[0].loaded()
    bench.workers[0].active_calls, bench.workers[0].queued_calls = 2, 3
    ((replica, active, queued),) = fleet.load()
    assert (replica, active, queued) == (fleet.candidates("tiny")[0].replica, 2, 3)


async def test_what_waits_at_a_replica_s_gate_counts_and_a_new_worker_has_a_new_gate(bench, fleet):
    (replica, live), worker = *bench.coordinator.replicas.items(), bench.workers[0]
    worker.loaded()
    gate = fleet.gate(replica, worker)
    assert fleet.gate(replica, worker) is gate
    inside = [gate.turn(CallContext(Deadline(1e9), "t"), CompleteParams(prompt="x")) for _ in range(4)]
    entering = [asyncio.create_task(gate.enter(turn)) for turn in inside]
    await asyncio.wait(entering, return_when=asyncio.FIRST_COMPLETED)
    # One slot, and one call ahead: two wait.
    assert [each.queued for each in fleet.candidates("tiny")] == [2]
    assert fleet.load() == [(replica, 0, 2)]
    worker.state = ReplicaState.RESTARTING
    for watcher in worker.watchers:
        watcher()
    async with asyncio.timeout(5):
        await asyncio.gather(*entering)
    assert gate.waiting == 0
    live.worker = FakeWorker(worker.spec, worker.on_change)
    assert fleet.gate(replica, live.worker) is not gate


async def test_a_replica_whose_file_is_coming_counts_as_loading_and_says_how_far(bench, fleet):
    (live,) = bench.coordinator.replicas.values()
    bench.coordinator.executor.replicas.clear()
    fetch = FileFetch(live.assignment, live.device, live.kind, LoadProgress(stage=FETCH, percent=40.0))
    bench.coordinator.fetches[live.assignment.replica] = fetch
    assert [each.state for each in fleet.candidates("tiny")] == [ReplicaState.STARTING]
    loading = fleet.not_ready("tiny")
    assert isinstance(loading, StillLoading)
    assert "its file is being copied, 40 %" in loading.message
    assert loading.details == {"stage": "fetch", "percent": 40.0, "node_name": "pc"}
    fetch.error = DiskFull("no room for the file")
    assert fleet.not_ready("tiny") is fetch.error
    assert [each.state for each in fleet.candidates("tiny")] == [ReplicaState.FAILED]


async def test_without_a_ready_replica_the_error_says_why(bench, fleet):
    bench.workers[0].progress = LoadProgress(stage="read", percent=40.0)
    loading = fleet.not_ready("tiny")
    assert isinstance(loading, StillLoading)
    assert loading.details == {"stage": "read", "percent": 40.0, "node_name": "pc"}
    bench.workers[0].failed(BadModelFile("the file is corrupt"))
    assert fleet.not_ready("tiny") is bench.workers[0].last_error
    bench.workers[0].last_error = None
    assert isinstance(fleet.not_ready("tiny"), ReplicaFailed)
    assert fleet.entries() == {}
    assert [model.name for model in fleet.models()] == ["tiny"]
