"""The node's counters in Prometheus' text format, version 0.0.4.

Law of this file: messages in, text out. Names and units follow https://prometheus.io/docs/practices/naming/ (base units,
`_total` for counters); the words are the design's. No client library: a page of text needs none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from tars.core.mesh_messages import MemberState
from tars.core.types import ReplicaState
from tars.messages.node import DeviceDescription, NodeDescription, PeersResult, ReplicaDescription

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Sample = tuple[Mapping[str, str], float]
"""Labels and value."""


def render(node: NodeDescription, peers: PeersResult) -> str:
    """The whole page. What a device does not say is left out, never sent as 0."""
    families = (
        *_node(node),
        *_mesh(node, peers),
        *_transfers(node),
        *_calls(node),
        *_replicas(node),
        *_gates(node.replicas),
        *_engines(node.replicas),
        *_devices(node.devices),
    )
    return "".join(_family(name, kind, text, samples) for name, kind, text, samples in families)


Family = tuple[str, str, str, list[Sample]]
"""Name, type, help text, samples."""


def _node(node: NodeDescription) -> Iterable[Family]:
    about = {"node": node.node, "name": node.name, "version": node.version, "state": node.state}
    yield "tars_node_info", "gauge", "Who this node is; always 1.", [(about, 1)]
    yield "tars_node_uptime_seconds", "gauge", "Seconds since the node started.", [({}, node.uptime_seconds)]


MEMBER_STATES = tuple(state.value for state in MemberState)


def _mesh(node: NodeDescription, peers: PeersResult) -> Iterable[Family]:
    """Peers are the other nodes: of a node alone all are 0, so that an alert on them needs no exception for it."""
    others = [peer for peer in peers.peers if peer.node != node.node]
    states: list[Sample] = [({"state": state}, sum(peer.state == state for peer in others)) for state in MEMBER_STATES]
    yield "tars_peers", "gauge", "Other nodes of the mesh, by the state in which this node sees them.", states
    own = any(peer.coordinator and peer.node == node.node for peer in peers.peers)
    yield "tars_coordinates", "gauge", "1 where this node decides what is loaded where.", [({}, own)]
    told: list[Sample] = [({"node": peer.node, "name": peer.name}, 1) for peer in peers.peers if peer.coordinator]
    yield "tars_coordinator_info", "gauge", "Who decides, as this node sees it; always 1.", told


def _transfers(node: NodeDescription) -> Iterable[Family]:
    received = "Bytes of model files that came from peers and from the hub."
    yield "tars_file_bytes_received_total", "counter", received, [({}, node.file_bytes_received)]
    sent = "Bytes of model files that peers got from here."
    yield "tars_file_bytes_sent_total", "counter", sent, [({}, node.file_bytes_sent)]
    each = [({"model": one.model, "variant": one.variant, "stage": one.stage}, one) for one in node.transfers]
    for name, field, text in (
        ("tars_transfer_done_bytes", "bytes_done", "Bytes that are there of a file on its way to this node."),
        ("tars_transfer_size_bytes", "bytes_total", "Bytes of a file on its way to this node."),
        ("tars_transfer_bytes_per_second", "bytes_per_second", "How fast a file comes to this node now."),
    ):
        samples: list[Sample] = [(labels, getattr(one, field)) for labels, one in each]
        yield name, "gauge", text, samples


def _calls(node: NodeDescription) -> Iterable[Family]:
    calls = node.calls
    yield "tars_calls_total", "counter", "Calls since the node started.", [({}, calls.total)]
    yield "tars_calls_failed_total", "counter", "Calls that ended with an error.", [({}, calls.failed)]
    yield "tars_calls_active", "gauge", "Calls being answered now.", [({}, calls.active)]
    by_method: list[Sample] = [({"method": method}, count) for method, count in sorted(calls.by_method.items())]
    yield "tars_method_calls_total", "counter", "Calls by method.", by_method
    with_key: list[Sample] = [({"outcome": outcome}, count) for outcome, count in sorted(calls.with_key.items())]
    yield "tars_idempotency_key_calls_total", "counter", "Calls with an idempotency key, by outcome.", with_key
    at_peers: list[Sample] = [({"peer": each.peer, "outcome": each.outcome}, each.calls) for each in node.sent_to_peers]
    yield "tars_peer_calls_total", "counter", "Calls sent to a peer, by outcome.", at_peers
    yield "tars_calls_from_peers_total", "counter", "Calls that peers sent here.", [({}, node.calls_from_peers)]
    yield from _attempts(node)


def _attempts(node: NodeDescription) -> Iterable[Family]:
    each: list[Sample] = [({"why": one.why, "outcome": one.outcome}, one.attempts) for one in node.attempts]
    yield "tars_attempts_total", "counter", "Replicas that were asked: first, retry, hedge or continuation.", each
    refused = "Further attempts that the retry budget did not allow."
    yield "tars_retries_refused_total", "counter", refused, [({}, node.retries_refused)]
    yield "tars_hedged_units_total", "counter", "Texts given to a second replica.", [({}, node.hedged_units)]
    silent = "Times that a peer with calls of this node fell silent: frozen, asleep, cut off, or far too busy."
    yield "tars_peers_silent_total", "counter", silent, [({}, node.peers_silent)]


def _replicas(node: NodeDescription) -> Iterable[Family]:
    states: list[Sample] = [
        ({"state": state.value}, sum(replica.state == state for replica in node.replicas)) for state in ReplicaState
    ]
    yield "tars_replicas", "gauge", "Replicas of this node by state.", states
    each = [({"replica": replica.id, "model": replica.model}, replica) for replica in node.replicas]
    yield (
        "tars_replica_calls_total",
        "counter",
        "Calls that a replica answered.",
        [(labels, replica.calls_total) for labels, replica in each],
    )
    yield (
        "tars_replica_active_calls",
        "gauge",
        "Calls that a replica is answering now.",
        [(labels, replica.active_calls) for labels, replica in each],
    )
    yield (
        "tars_replica_queued_calls",
        "gauge",
        "Calls that wait for a replica.",
        [(labels, replica.queued_calls) for labels, replica in each],
    )
    yield (
        "tars_replica_restarts_total",
        "counter",
        "Restarts of a replica's worker.",
        [(labels, replica.restarts) for labels, replica in each],
    )
    yield (
        "tars_replica_memory_bytes",
        "gauge",
        "Memory that a loaded replica really takes.",
        [(labels, replica.info.memory_bytes) for labels, replica in each if replica.info is not None],
    )


def _gates(replicas: Iterable[ReplicaDescription]) -> Iterable[Family]:
    each = [
        ({"replica": replica.id, "model": replica.model}, replica.waiting)
        for replica in replicas
        if replica.waiting is not None
    ]
    waiting: list[Sample] = [
        ({**labels, "priority": priority}, count)
        for labels, gate in each
        for priority, count in (("interactive", gate.interactive), ("batch", gate.batch))
    ]
    yield "tars_replica_waiting_calls", "gauge", "Calls that wait in front of a replica, by priority.", waiting
    expected: list[Sample] = [(labels, gate.expected_ms / 1000) for labels, gate in each]
    yield "tars_replica_expected_wait_seconds", "gauge", "What a new interactive call would wait now.", expected
    passed: list[Sample] = [(labels, gate.passed) for labels, gate in each]
    yield "tars_replica_let_in_calls_total", "counter", "Calls that were let in to a replica.", passed
    refused: list[Sample] = [
        ({**labels, "reason": reason}, count) for labels, gate in each for reason, count in sorted(gate.refused.items())
    ]
    yield "tars_replica_refused_calls_total", "counter", "Calls that were refused in front of a replica.", refused


ENGINE_FAMILIES: tuple[tuple[str, str, str, str], ...] = (
    ("running", "tars_replica_sequences_running", "gauge", "Sequences, or texts, being computed now."),
    ("waiting", "tars_replica_sequences_waiting", "gauge", "Sequences, or texts, that wait for a slot or their batch."),
    ("kv_cells", "tars_replica_kv_cells", "gauge", "Tokens that the KV cache holds at most."),
    ("kv_used", "tars_replica_kv_cells_used", "gauge", "Tokens of running sequences in the KV cache."),
    (
        "kv_cached",
        "tars_replica_kv_cells_cached",
        "gauge",
        "Tokens of ended sequences kept for prompts that begin alike.",
    ),
    ("steps", "tars_replica_steps_total", "counter", "Decodes, or forward passes, of the engine."),
    ("prompt_tokens", "tars_replica_prompt_tokens_total", "counter", "Prompt tokens, computed or reused."),
    (
        "prompt_tokens_cached",
        "tars_replica_prompt_tokens_cached_total",
        "counter",
        "Prompt tokens reused from a prefix.",
    ),
    ("generated_tokens", "tars_replica_generated_tokens_total", "counter", "Tokens generated."),
    ("preemptions", "tars_replica_preemptions_total", "counter", "Sequences that gave up their KV cells and waited."),
    (
        "python_seconds",
        "tars_replica_python_seconds_total",
        "counter",
        "Engine thread outside the native compute, with work.",
    ),
    ("native_seconds", "tars_replica_native_seconds_total", "counter", "Engine thread inside the native compute."),
    ("draft_tokens", "tars_replica_draft_tokens_total", "counter", "Tokens that a draft model proposed."),
    ("draft_accepted", "tars_replica_draft_tokens_accepted_total", "counter", "Proposed tokens that were taken."),
    ("texts", "tars_replica_texts_total", "counter", "Texts embedded or scored."),
    (
        "padding_tokens",
        "tars_replica_padding_tokens_total",
        "counter",
        "Tokens computed only to fill a batch's rectangle.",
    ),
)
"""Field of `EngineCounters`, name, type, help. Counters begin at 0 with each start of a worker, as Prometheus' `rate` expects of them
(`tars_replica_restarts_total` says when). They are at most a ping interval old."""

_TEXT_ONLY = frozenset({"texts", "padding_tokens"})


def _engines(replicas: Iterable[ReplicaDescription]) -> Iterable[Family]:
    each = [
        ({"replica": replica.id, "model": replica.model}, replica, replica.counters)
        for replica in replicas
        if replica.counters is not None
    ]
    slots: list[Sample] = [(labels, r.info.slots) for labels, r, _ in each if r.info is not None and _generates(r)]
    yield "tars_replica_slots", "gauge", "Sequences that a replica computes at once at most.", slots
    for field, name, kind, text in ENGINE_FAMILIES:
        shared = field in ("running", "waiting", "steps", "prompt_tokens", "python_seconds", "native_seconds")
        samples: list[Sample] = [
            (labels, getattr(counters, field))
            for labels, replica, counters in each
            if shared or (field in _TEXT_ONLY) is not _generates(replica)
        ]
        yield name, kind, f"{text} Since the worker's last start." if kind == "counter" else text, samples


def _generates(replica: ReplicaDescription) -> bool:
    return replica.model_kind == "chat"


def _devices(devices: Iterable[DeviceDescription]) -> Iterable[Family]:
    each = [
        ({"device": device.id, "name": device.name, "simulated": str(device.simulated).lower()}, device)
        for device in devices
    ]
    for field, text in (
        ("total", "Memory of a device."),
        ("free", "Free memory of a device."),
        ("held", "Memory of a device that TARS holds."),
        ("capacity", "Memory of a device that TARS may hold in all."),
    ):
        samples: list[Sample] = [(labels, getattr(device, f"memory_{field}_bytes")) for labels, device in each]
        yield f"tars_device_memory_{field}_bytes", "gauge", text, samples
    yield (
        "tars_device_temperature_celsius",
        "gauge",
        "Temperature of a device.",
        [(labels, device.temperature_celsius) for labels, device in each if device.temperature_celsius is not None],
    )
    yield (
        "tars_device_utilisation_ratio",
        "gauge",
        "Utilisation of a device, 0 to 1.",
        [
            (labels, device.utilisation_percent / 100)
            for labels, device in each
            if device.utilisation_percent is not None
        ],
    )
    yield (
        "tars_device_power_watts",
        "gauge",
        "Power draw of a device.",
        [(labels, device.power_watts) for labels, device in each if device.power_watts is not None],
    )


def _family(name: str, kind: str, text: str, samples: list[Sample]) -> str:
    if not samples:
        return ""
    lines = "".join(f"{name}{_labels(labels)} {_number(value)}\n" for labels, value in samples)
    return f"# HELP {name} {text}\n# TYPE {name} {kind}\n{lines}"


def _labels(labels: Mapping[str, str]) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{_escape(value)}"' for name, value in labels.items()) + "}"


def _escape(value: str) -> str:
    """Backslash, quote and line break, as the format asks; a lone surrogate cannot be sent as UTF-8 at all."""
    escaped = value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
    return escaped.encode("utf-8", "replace").decode()


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else repr(float(value))
