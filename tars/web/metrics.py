"""The node's counters in Prometheus' text format, version 0.0.4.

Law of this file: `NodeDescription` in, text out. Names and units follow https://prometheus.io/docs/practices/naming/ (base units,
`_total` for counters); the words are the design's. No client library: a page of text needs none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from tars.core.types import ReplicaState
from tars.messages.node import DeviceDescription, NodeDescription

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Sample = tuple[Mapping[str, str], float]
"""Labels and value."""


def render(node: NodeDescription) -> str:
    """The whole page. What a device does not say is left out, never sent as 0."""
    families = (
        *_node(node),
        *_calls(node),
        *_replicas(node),
        *_devices(node.devices),
    )
    return "".join(_family(name, kind, text, samples) for name, kind, text, samples in families)


Family = tuple[str, str, str, list[Sample]]
"""Name, type, help text, samples."""


def _node(node: NodeDescription) -> Iterable[Family]:
    about = {"node": node.node, "name": node.name, "version": node.version, "state": node.state}
    yield "tars_node_info", "gauge", "Who this node is; always 1.", [(about, 1)]
    yield "tars_node_uptime_seconds", "gauge", "Seconds since the node started.", [({}, node.uptime_seconds)]


def _calls(node: NodeDescription) -> Iterable[Family]:
    calls = node.calls
    yield "tars_calls_total", "counter", "Calls since the node started.", [({}, calls.total)]
    yield "tars_calls_failed_total", "counter", "Calls that ended with an error.", [({}, calls.failed)]
    yield "tars_calls_active", "gauge", "Calls being answered now.", [({}, calls.active)]
    by_method: list[Sample] = [({"method": method}, count) for method, count in sorted(calls.by_method.items())]
    yield "tars_method_calls_total", "counter", "Calls by method.", by_method


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
