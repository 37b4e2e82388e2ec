"""The coordinator's rounds, with the real planner, simulated cards and workers that only pretend to load."""

import asyncio
import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from coordinator_bench import NODE, card, make_bench
from tiny_gguf import write_tiny_adapter, write_tiny_gguf

from tars import builtin_models
from tars.catalogue import Catalogue
from tars.config import AdapterSource, EnginesSection, ModelSource
from tars.core.types import Bytes, Deployment, DeviceKind, ReplicaState
from tars.errors import BadModelFile, DoesNotFit, ModelFileMissing, UnknownModel
from tars.mesh.advertising import PACE_SECONDS
from tars.mesh.coordinator import PROGRESS_SECONDS
from tars.messages.node import LoadedInfo, MeasuredSpeeds, TunedSettings


@pytest.fixture
def bench(tmp_path, tiny_gguf):
    return make_bench(tmp_path, tiny_gguf)


async def test_a_wish_becomes_a_load_and_the_load_a_measurement(bench):
    bench.deployments.deploy(Deployment(bench.model))
    await bench.coordinator.reconcile()
    (worker,) = bench.workers
    assert (worker.spec.model, worker.spec.engine, worker.spec.cuda_device) == ("tiny", "llama", "0")
    assert not bench.coordinator.settled()
    worker.loaded(123 * 2**20)
    assert bench.coordinator.settled()
    await bench.coordinator.reconcile()
    assert len(bench.measured.by_key()) == 1


async def test_the_drivers_word_on_a_process_is_what_a_load_took(bench):
    bench.deployments.deploy(Deployment(bench.model))
    await bench.coordinator.reconcile()
    bench.told = {bench.devices[0].id: {bench.workers[0].pid: Bytes.mib(600)}}
    bench.workers[0].loaded(123 * 2**20)
    await bench.coordinator.reconcile()
    assert list(bench.measured.by_key().values()) == [Bytes.mib(600)]


async def test_where_the_driver_is_silent_the_context_that_the_engine_cannot_see_is_added(bench):
    bench.deployments.deploy(Deployment(bench.model))
    await bench.coordinator.reconcile()
    bench.told = {bench.devices[0].id: {bench.workers[0].pid: None}}
    bench.workers[0].loaded(123 * 2**20)
    await bench.coordinator.reconcile()
    (live,) = bench.coordinator.replicas.values()
    assert live.assignment.memory.overhead > 100 * 2**20
    assert live.taken == 123 * 2**20 + live.assignment.memory.overhead


async def test_on_a_cpu_the_engines_own_measurement_counts(bench):
    bench.devices = [replace(card("cpu"), kind=DeviceKind.CPU, compute_capability=None, index=None)]
    bench.deployments.deploy(Deployment(bench.model))
    await bench.coordinator.reconcile()
    bench.workers[0].loaded(123 * 2**20)
    await bench.coordinator.reconcile()
    assert list(bench.measured.by_key().values()) == [Bytes.mib(123)]


async def test_before_peers_hear_of_a_restarted_node_its_last_word_is_taken_back(bench, tmp_path, tiny_gguf):
    bench.deployments.deploy(Deployment(bench.model))
    await bench.coordinator.reconcile()
    bench.workers[0].loaded()
    await bench.coordinator.reconcile()
    key = f"node/{NODE.id}"
    assert [each.state for each in bench.store.map.get(key).replicas] == [ReplicaState.READY]
    folder = tmp_path / "again"
    await asyncio.to_thread(folder.mkdir)
    again = make_bench(folder, tiny_gguf)
    again.store.map.merge(bench.store.map.records(), 2**60)
    await again.coordinator.announce()
    assert again.store.map.get(key).replicas == ()
    assert again.workers == [], "that is the next round's"


async def test_a_restarted_worker_is_measured_again(bench):
    bench.deployments.deploy(Deployment(bench.model))
    await bench.coordinator.reconcile()
    worker = bench.workers[0]
    for pid, taken in ((1, 600), (2, 610)):
        worker.pid = pid
        bench.told = {bench.devices[0].id: {pid: Bytes.mib(taken)}}
        worker.loaded(1)
        await bench.coordinator.reconcile()
    assert list(bench.measured.by_key().values()) == [Bytes.mib(610)]


async def test_loads_on_one_device_happen_one_at_a_time(bench):
    for model in (bench.model, bench.second):
        bench.deployments.deploy(Deployment(model))
    await bench.coordinator.reconcile()
    await bench.coordinator.reconcile()
    assert len(bench.workers) == 1
    bench.workers[0].loaded()
    await bench.coordinator.reconcile()
    assert len(bench.workers) == 2


async def test_a_failed_replica_is_tried_again_after_its_cool_down_when_nothing_else_loads_on_its_device(bench):
    for model in (bench.model, bench.second):
        bench.deployments.deploy(Deployment(model))
    await bench.coordinator.reconcile()
    failed = bench.workers[0]
    failed.failed(BadModelFile("broken"))
    await bench.coordinator.reconcile()
    other = bench.workers[1]
    failed.cooled_down()
    await bench.coordinator.reconcile()
    assert (failed.starts, failed.state) == (1, ReplicaState.FAILED)
    other.loaded()
    await bench.coordinator.reconcile()
    assert (failed.starts, failed.state) == (2, ReplicaState.LOADING)
    await bench.coordinator.reconcile()
    assert failed.starts == 2


async def test_while_something_loads_peers_are_told_how_far_it_is_and_not_afterwards(bench):
    now = 1000.0
    bench.coordinator._now = bench.coordinator.advertising._now = lambda: now

    async def patience():
        """Of a round that has nothing to tell any more."""
        nonlocal now
        for _ in range(2):
            now += PACE_SECONDS
            bench.coordinator._wake_at = None
            await bench.coordinator.reconcile()
        return bench.coordinator._patience()

    bench.deployments.deploy(Deployment(bench.model))
    assert await patience() == PROGRESS_SECONDS
    bench.workers[0].loaded()
    assert await patience() > PROGRESS_SECONDS


async def test_two_devices_load_side_by_side(bench):
    bench.devices = [card("gpu-a", 700), card("gpu-b", 700)]
    bench.deployments.deploy(Deployment(bench.model, replicas=2))
    await bench.coordinator.reconcile()
    assert len({worker.spec.replica for worker in bench.workers}) == 2


async def test_a_ready_replica_is_not_touched_by_further_rounds(bench):
    bench.deployments.deploy(Deployment(bench.model))
    await bench.coordinator.reconcile()
    bench.workers[0].loaded()
    for _ in range(3):
        await bench.coordinator.reconcile()
    assert len(bench.workers) == 1
    assert bench.workers[0].stopped_with is None


async def test_a_removed_model_is_unloaded_and_its_device_waits_until_it_is_gone(bench):
    bench.deployments.deploy(Deployment(bench.model))
    await bench.coordinator.reconcile()
    bench.workers[0].loaded()
    bench.workers[0].may_stop.clear()
    bench.deployments.remove(bench.model)
    bench.deployments.deploy(Deployment(bench.second))
    await bench.coordinator.reconcile()
    await asyncio.sleep(0)
    assert bench.workers[0].stopped_with is not None
    assert len(bench.workers) == 1
    bench.workers[0].may_stop.set()
    await asyncio.sleep(0)
    await bench.coordinator.reconcile()
    assert bench.workers[1].spec.model == "second"


async def test_a_changed_wish_replaces_the_replica(bench):
    bench.deployments.deploy(Deployment(bench.model, context=128))
    await bench.coordinator.reconcile()
    bench.workers[0].loaded()
    bench.deployments.deploy(Deployment(bench.model, context=256))
    await bench.coordinator.reconcile()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    await bench.coordinator.reconcile()
    assert bench.workers[0].stopped_with is not None
    assert bench.workers[1].spec.context == 256


async def test_what_fits_nowhere_is_a_problem_with_bytes_and_starts_nothing(bench):
    bench.devices = [card(mib=100)]
    bench.deployments.deploy(Deployment(bench.model))
    await bench.coordinator.reconcile()
    assert bench.workers == []
    problem = bench.coordinator.problems[bench.model]
    assert isinstance(problem, DoesNotFit)
    assert problem.details["devices"][0]["needed_bytes"] > 100 * 2**20
    assert bench.coordinator.settled()


async def test_memory_that_a_foreign_program_frees_is_used_in_a_later_round(bench):
    bench.devices = [card(mib=100)]
    bench.deployments.deploy(Deployment(bench.model))
    await bench.coordinator.reconcile()
    bench.devices = [card(mib=2000)]
    await bench.coordinator.reconcile()
    assert len(bench.workers) == 1
    assert bench.coordinator.problems == {}


async def test_a_model_of_the_catalogue_without_a_file_says_where_to_get_it(bench):
    bench.deployments.deploy(Deployment("mistral-7b-instruct-v0.2"))
    await bench.coordinator.reconcile()
    problem = bench.coordinator.problems["mistral-7b-instruct-v0.2"]
    assert isinstance(problem, ModelFileMissing)
    assert "TheBloke" in problem.message
    with pytest.raises(ModelFileMissing):
        await bench.coordinator.preview(Deployment("mistral-7b"))


async def test_a_failed_load_stays_failed_until_somebody_asks_again(bench):
    bench.deployments.deploy(Deployment(bench.model))
    await bench.coordinator.reconcile()
    bench.workers[0].failed(BadModelFile("corrupt"))
    await bench.coordinator.reconcile()
    assert bench.states == ["failed"]
    bench.coordinator.retry_failed(bench.model)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    await bench.coordinator.reconcile()
    assert len(bench.workers) == 2


async def test_a_preview_changes_nothing(bench):
    plan = await bench.coordinator.preview(Deployment(bench.model))
    assert [assignment.model for assignment in plan.assignments] == ["tiny"]
    assert bench.deployments.wanted() == ()
    assert bench.workers == []
    with pytest.raises(UnknownModel):
        await bench.coordinator.preview(Deployment("no-such-model"))


async def test_stop_stops_every_worker_within_its_grace(bench):
    bench.deployments.deploy(Deployment(bench.model))
    await bench.coordinator.reconcile()
    await bench.coordinator.stop(1.5)
    assert bench.workers[0].stopped_with == 1.5
    await bench.coordinator.reconcile()
    assert len(bench.workers) == 1


async def test_a_stop_in_a_hurry_hurries_what_is_ending_already_and_waits_for_it(bench):
    bench.deployments.deploy(Deployment(bench.model))
    await bench.coordinator.reconcile()
    (worker,) = bench.workers
    worker.may_stop.clear()
    patient = asyncio.create_task(bench.coordinator.stop(60.0))
    await asyncio.wait_for(worker.stop_asked.wait(), 5)
    patient.cancel()
    await asyncio.wait({patient})
    worker.stop_asked.clear()
    hurried = asyncio.create_task(bench.coordinator.stop(0.0))
    await asyncio.wait_for(worker.stop_asked.wait(), 5)
    assert worker.stopped_with == 0.0
    assert not hurried.done()
    worker.may_stop.set()
    await hurried
    assert worker.state is ReplicaState.STOPPED


async def test_a_file_deleted_during_a_round_does_not_keep_the_others_from_loading(bench):
    bench.devices = [card("gpu-a", 700), card("gpu-b", 700)]
    for model in (bench.model, bench.second):
        bench.deployments.deploy(Deployment(model))
    good = bench.probe

    def deleting(held):
        gone = bench.catalogue.resolve(bench.model)
        Path(bench.catalogue.path_of(gone, gone.variants[0])).unlink(missing_ok=True)
        return good(held)

    bench.coordinator.executor.probe = deleting
    await bench.coordinator.reconcile()
    assert [worker.spec.model for worker in bench.workers] == [bench.second]
    bench.coordinator.executor.probe = good
    await bench.coordinator.reconcile()
    assert isinstance(bench.coordinator.problems[bench.model], ModelFileMissing)


async def test_a_round_that_fails_is_logged_and_the_next_one_works(bench, caplog):
    bench.deployments.deploy(Deployment(bench.model))
    good, failures, failed = bench.probe, [RuntimeError("driver hiccup")], threading.Event()

    def flaky(held):
        if failures:
            failed.set()
            raise failures.pop()
        return good(held)

    bench.coordinator.executor.probe = flaky
    running = asyncio.create_task(bench.coordinator.run())
    async with asyncio.timeout(5):
        await asyncio.to_thread(failed.wait)
        while not bench.workers:
            bench.coordinator.wake()
            await asyncio.sleep(0)
    assert "placement round failed" in caplog.text
    running.cancel()


async def test_a_simulated_card_computes_on_the_cpu_and_holds_what_it_declares(bench):
    bench.devices = [replace(card(), simulated=True, index=None)]
    bench.deployments.deploy(Deployment(bench.model))
    await bench.coordinator.reconcile()
    assert bench.workers[0].spec.cuda_device is None
    assert bench.workers[0].spec.gpu_layers == 0
    bench.workers[0].loaded(1)
    snapshot = await bench.coordinator.snapshot()
    (live,) = bench.coordinator.replicas.values()
    assert snapshot.devices[0].memory_held == live.assignment.memory.total
    assert bench.measured.by_key() == {}


async def test_a_demo_model_whose_package_is_missing_says_which_to_install(bench, monkeypatch):
    monkeypatch.setitem(builtin_models._BUNDLED, "minilm", lambda: None)
    catalogue = type(bench.catalogue).load()
    bench.coordinator.catalogue = catalogue
    with pytest.raises(ModelFileMissing, match="comes with TARS"):
        await bench.coordinator.preview(Deployment("all-minilm-l6-v2"))


async def test_a_loaded_model_outlives_the_loss_of_its_file(bench):
    bench.deployments.deploy(Deployment(bench.model))
    await bench.coordinator.reconcile()
    bench.workers[0].loaded()
    await asyncio.to_thread(Path(bench.workers[0].spec.path).unlink)
    await bench.coordinator.reconcile()
    assert bench.states == ["ready"]
    assert bench.workers[0].stopped_with is None


async def test_a_second_replica_whose_file_is_gone_waits_without_a_storm_of_rounds(bench):
    bench.devices = [card("gpu-a", 700), card("gpu-b", 700)]
    bench.deployments.deploy(Deployment(bench.model))
    await bench.coordinator.reconcile()
    bench.workers[0].loaded()
    await asyncio.to_thread(Path(bench.workers[0].spec.path).unlink)
    bench.deployments.deploy(Deployment(bench.model, replicas=2))
    running = asyncio.create_task(bench.coordinator.run())
    await asyncio.sleep(0.3)
    running.cancel()
    assert len(bench.workers) == 1
    assert bench.coordinator.rounds < 5
    assert bench.coordinator.problems[bench.model].kind == "model_file_missing"


# --- what a worker is told ---------------------------------------------------------------------------------------------


async def test_a_worker_is_told_how_many_tokens_its_slots_share(bench):
    bench.deployments.deploy(Deployment(bench.model, context=512, gpu_layers=2))
    await bench.coordinator.reconcile()
    spec = bench.workers[0].spec
    assert (spec.context, spec.slots, spec.kv_tokens, spec.gpu_layers) == (512, 4, 512, 2)
    bench.workers[0].loaded()
    bench.deployments.deploy(Deployment(bench.model, context=512, slots=3, kv_tokens=1024))
    await bench.coordinator.reconcile()
    await bench.workers[0].stop_asked.wait()
    while len(bench.workers) < 2:
        await bench.coordinator.changed() if bench.coordinator.replicas else await asyncio.sleep(0)
        await bench.coordinator.reconcile()
    spec = bench.workers[1].spec
    assert (spec.slots, spec.kv_tokens, spec.gpu_layers) == (3, 1024, -1)


async def test_a_worker_is_told_of_the_engines_settings_adapters_and_the_draft_model(tmp_path, tiny_gguf):
    bench = make_bench(tmp_path, tiny_gguf)
    adapter, draft = write_tiny_adapter(tmp_path / "a.gguf"), write_tiny_gguf(tmp_path / "d.gguf", layers=1)
    given = (AdapterSource(name="legal", path=adapter, scale=0.5),)
    model = ModelSource(name="mine", path=tiny_gguf, adapters=given, draft=draft)
    bench.coordinator.catalogue = Catalogue.load(builtin=False, extra=[model])
    bench.coordinator.executor.engines = EnginesSection(
        inter_token_ms=50.0, continuation="exact", embedding_backend="onnx"
    )
    bench.deployments.deploy(Deployment("mine"))
    await bench.coordinator.reconcile()
    spec = bench.workers[0].spec
    assert (spec.inter_token_ms, spec.exact, spec.backend, spec.draft_path) == (50.0, True, None, str(draft))
    assert [each.model_dump() for each in spec.adapters] == [{"name": "legal", "path": str(adapter), "scale": 0.5}]
    (live,) = bench.coordinator.replicas.values()
    alone = bench.coordinator.catalogue.resolve("mine").variants[0].shape
    assert live.assignment.memory.weights > alone.tensor_bytes - alone.host_bytes + adapter.stat().st_size


async def test_what_a_load_measured_is_told_to_the_next_of_the_same(tmp_path, tiny_gguf):
    found = TunedSettings(chunk=96, speeds=MeasuredSpeeds(decode_tokens_per_second=58.5))
    bench = make_bench(tmp_path, tiny_gguf)
    bench.deployments.deploy(Deployment(bench.model))
    await bench.coordinator.reconcile()
    worker = bench.workers[0]
    assert worker.spec.tuned is None
    worker.info = LoadedInfo(model_kind="chat", memory_bytes=1, load_seconds=0.1, tuned=found)
    worker.state = ReplicaState.READY
    await bench.coordinator.reconcile()
    copied = os.stat(worker.spec.path).st_mtime_ns
    again = make_bench(tmp_path, tiny_gguf)
    os.utime(worker.spec.path, ns=(copied, copied))  # the bench copied the same file there again
    await again.coordinator.reconcile()
    assert again.workers[0].spec.tuned == found


async def test_exact_answers_do_not_share_a_cache_by_default(bench):
    bench.coordinator.executor.engines = EnginesSection(continuation="exact")
    for model, slots in ((bench.model, None), (bench.second, 3)):
        bench.deployments.deploy(Deployment(model, context=512, slots=slots))
    await bench.coordinator.reconcile()
    settings = {each.model: each.settings for each in bench.coordinator.plan.assignments}
    assert [(each.slots, each.kv_tokens) for _, each in sorted(settings.items())] == [(3, 1536), (1, 512)]


async def test_a_node_that_was_removed_from_its_mesh_keeps_what_runs_and_loads_no_more(bench):
    bench.deployments.deploy(Deployment(bench.model))
    await bench.coordinator.reconcile()
    bench.workers[0].loaded()
    bench.coordinator.takes_part = lambda: False
    bench.deployments.deploy(Deployment(bench.model, replicas=2))
    await bench.coordinator.reconcile()
    assert len(bench.coordinator.replicas) == 1
    assert len(bench.workers) == 1
