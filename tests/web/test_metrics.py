"""Prometheus' text format."""

from __future__ import annotations

import re

import pytest

from tars.messages.files import TransferDescription
from tars.messages.node import CallCounters, EngineCounters, PeerDescription, PeersResult, WaitingDescription
from tars.web.metrics import ENGINE_FAMILIES, render

ALONE = PeersResult(
    peers=[PeerDescription(node="node-1", name="living-room", state="ALIVE", addresses=[], coordinator=True)]
)
LINE = re.compile(r'[a-z_]+(\{([a-z_]+="(\\[\\"n]|[^\\"\n])*",?)+\})? -?\d+(\.\d+)?(e[+-]\d+)?')


@pytest.fixture
def node(service):
    return service.description


def test_every_line_is_a_comment_or_a_sample_and_every_family_is_declared_once(node):
    lines = render(node, ALONE).splitlines()
    samples = [line for line in lines if not line.startswith("#")]
    assert [line for line in samples if not LINE.fullmatch(line)] == []
    declared = [line.split()[2] for line in lines if line.startswith("# TYPE")]
    assert len(declared) == len(set(declared))
    assert {re.split(r"[{ ]", line)[0] for line in samples} == set(declared)


def test_calls_replicas_and_device_memory_are_there(node):
    text = render(node, ALONE)
    assert "tars_calls_total 312\n" in text
    assert "tars_calls_failed_total 3\n" in text
    assert "tars_calls_active 1\n" in text
    assert 'tars_method_calls_total{method="inference.chat"} 300\n' in text
    assert 'tars_idempotency_key_calls_total{outcome="repeated"} 2\n' in text
    assert 'tars_replicas{state="ready"} 1\n' in text
    assert 'tars_replicas{state="loading"} 1\n' in text
    assert 'tars_replicas{state="failed"} 0\n' in text
    labels = '{device="node-1/gpu-1",name="NVIDIA GeForce RTX 3060",simulated="false"}'
    assert f"tars_device_memory_held_bytes{labels} {5 * 2**30}\n" in text
    assert f"tars_device_utilisation_ratio{labels} 0.87\n" in text


def test_what_waits_in_front_of_a_replica_and_what_was_refused_there(node):
    gate = WaitingDescription(
        interactive=3,
        batch=2,
        callers=2,
        longest_ms=80.0,
        expected_ms=1500.0,
        passed=70,
        refused={"full": 1, "late": 4},
    )
    first, *others = node.replicas
    shown = node.model_copy(update={"replicas": [first.model_copy(update={"waiting": gate}), *others]})
    text = render(shown, ALONE)
    labels = f'replica="{first.id}",model="{first.model}"'
    assert f'tars_replica_waiting_calls{{{labels},priority="batch"}} 2\n' in text
    assert f"tars_replica_expected_wait_seconds{{{labels}}} 1.5\n" in text
    assert f"tars_replica_let_in_calls_total{{{labels}}} 70\n" in text
    assert f'tars_replica_refused_calls_total{{{labels},reason="late"}} 4\n' in text
    test_every_line_is_a_comment_or_a_sample_and_every_family_is_declared_once(shown)


def test_what_a_device_does_not_say_is_left_out(node):
    lines = [line for line in render(node, ALONE).splitlines() if "sim-0" in line]
    assert any(line.startswith("tars_device_memory_total_bytes") and 'simulated="true"' in line for line in lines)
    assert not any("temperature" in line or "utilisation" in line or "power" in line for line in lines)


COUNTERS = EngineCounters(
    running=3,
    waiting=1,
    kv_cells=8192,
    kv_used=1000,
    kv_cached=500,
    steps=77,
    prompt_tokens=4000,
    prompt_tokens_cached=3000,
    generated_tokens=900,
    preemptions=2,
    python_seconds=0.25,
    native_seconds=12.5,
    draft_tokens=10,
    draft_accepted=6,
    texts=0,
    padding_tokens=0,
)


def test_every_count_of_an_engine_is_there_under_its_own_name_and_type(node):
    assert {field for field, *_ in ENGINE_FAMILIES} == set(EngineCounters.model_fields)
    assert all(name.endswith("_total") is (kind == "counter") for _, name, kind, _ in ENGINE_FAMILIES)
    text = render(counted(node), ALONE)
    labels = '{replica="help-desk@gpu-1#0",model="help-desk"}'
    assert f"tars_replica_slots{labels} 4\n" in text
    assert f"tars_replica_sequences_running{labels} 3\n" in text
    assert f"tars_replica_kv_cells_used{labels} 1000\n" in text
    assert f"tars_replica_prompt_tokens_cached_total{labels} 3000\n" in text
    assert f"tars_replica_python_seconds_total{labels} 0.25\n" in text
    assert "# TYPE tars_replica_python_seconds_total counter\n" in text
    assert "# TYPE tars_replica_kv_cells_cached gauge\n" in text
    test_every_line_is_a_comment_or_a_sample_and_every_family_is_declared_once(counted(node))


def test_a_replica_shows_what_its_kind_counts_and_nothing_before_its_first_answer(node):
    text = render(counted(node), ALONE)
    assert "tars_replica_texts_total" not in text
    embedder = counted(node, model_kind="embedding")
    text = render(embedder, ALONE)
    assert "tars_replica_texts_total" in text
    assert "tars_replica_kv_cells" not in text
    assert "tars_replica_slots" not in text
    assert "tars_replica_sequences_running" not in render(node, ALONE)


def counted(node, **changes):
    replica = node.replicas[0].model_copy(update={"counters": COUNTERS, **changes})
    return node.model_copy(update={"replicas": [replica, *node.replicas[1:]]})


def test_a_family_without_samples_is_not_declared(node):
    text = render(node.model_copy(update={"replicas": [], "devices": [], "calls": CallCounters()}), ALONE)
    assert "tars_method_calls_total" not in text
    assert "tars_device" not in text
    assert "tars_calls_total 0\n" in text


def test_a_label_cannot_break_its_line(node):
    evil = 'a"b\\c\nd\ud800'
    text = render(node.model_copy(update={"name": evil}), ALONE)
    assert r'name="a\"b\\c\nd?"' in text
    text.encode("utf-8")


def test_peers_are_counted_by_state_and_the_coordinator_is_named(node):
    def peer(name, state, coordinator=False):
        return PeerDescription(node=f"id of {name}", name=name, state=state, addresses=[], coordinator=coordinator)

    me = ALONE.peers[0].model_copy(update={"coordinator": False})
    peers = PeersResult(peers=[me, peer("attic", "ALIVE", True), peer("cellar", "DEAD"), peer("shed", "DEAD")])
    text = render(node, peers)
    assert 'tars_peers{state="ALIVE"} 1\n' in text
    assert 'tars_peers{state="DEAD"} 2\n' in text
    assert 'tars_peers{state="SUSPECT"} 0\n' in text
    assert "tars_coordinates 0\n" in text
    assert 'tars_coordinator_info{node="id of attic",name="attic"} 1\n' in text
    alone = render(node, ALONE)
    assert 'tars_peers{state="ALIVE"} 0\n' in alone
    assert "tars_coordinates 1\n" in alone
    assert "tars_coordinator_info" not in render(node, PeersResult(peers=[me])), "nobody is known to decide"


def test_bytes_of_model_files_are_counted_and_what_is_on_its_way_is_shown(node):
    transfer = TransferDescription(
        model="mistral-7b", variant="Q4_K_M", stage="fetch", bytes_done=2**30, bytes_total=2**32,
        bytes_per_second=1.5e8, sources=["attic"],
    )  # fmt: skip
    going = {"file_bytes_received": 7 * 2**30, "file_bytes_sent": 12, "transfers": [transfer]}
    text = render(node.model_copy(update=going), ALONE)
    assert f"tars_file_bytes_received_total {7 * 2**30}\n" in text
    assert "tars_file_bytes_sent_total 12\n" in text
    labels = '{model="mistral-7b",variant="Q4_K_M",stage="fetch"}'
    assert f"tars_transfer_done_bytes{labels} {2**30}\n" in text
    assert f"tars_transfer_size_bytes{labels} {2**32}\n" in text
    assert f"tars_transfer_bytes_per_second{labels} 150000000\n" in text
    assert "tars_transfer_done_bytes" not in render(node, ALONE)
