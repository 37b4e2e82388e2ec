"""Prometheus' text format."""

from __future__ import annotations

import re

import pytest

from tars.messages.node import CallCounters
from tars.web.metrics import render

LINE = re.compile(r'[a-z_]+(\{([a-z_]+="(\\[\\"n]|[^\\"\n])*",?)+\})? -?\d+(\.\d+)?(e[+-]\d+)?')


@pytest.fixture
def node(service):
    return service.description


def test_every_line_is_a_comment_or_a_sample_and_every_family_is_declared_once(node):
    lines = render(node).splitlines()
    samples = [line for line in lines if not line.startswith("#")]
    assert [line for line in samples if not LINE.fullmatch(line)] == []
    declared = [line.split()[2] for line in lines if line.startswith("# TYPE")]
    assert len(declared) == len(set(declared))
    assert {re.split(r"[{ ]", line)[0] for line in samples} == set(declared)


def test_calls_replicas_and_device_memory_are_there(node):
    text = render(node)
    assert "tars_calls_total 312\n" in text
    assert "tars_calls_failed_total 3\n" in text
    assert "tars_calls_active 1\n" in text
    assert 'tars_method_calls_total{method="inference.chat"} 300\n' in text
    assert 'tars_replicas{state="ready"} 1\n' in text
    assert 'tars_replicas{state="loading"} 1\n' in text
    assert 'tars_replicas{state="failed"} 0\n' in text
    labels = '{device="node-1/gpu-1",name="NVIDIA GeForce RTX 3060",simulated="false"}'
    assert f"tars_device_memory_held_bytes{labels} {5 * 2**30}\n" in text
    assert f"tars_device_utilisation_ratio{labels} 0.87\n" in text


def test_what_a_device_does_not_say_is_left_out(node):
    lines = [line for line in render(node).splitlines() if "sim-0" in line]
    assert any(line.startswith("tars_device_memory_total_bytes") and 'simulated="true"' in line for line in lines)
    assert not any("temperature" in line or "utilisation" in line or "power" in line for line in lines)


def test_a_family_without_samples_is_not_declared(node):
    text = render(node.model_copy(update={"replicas": [], "devices": [], "calls": CallCounters()}))
    assert "tars_method_calls_total" not in text
    assert "tars_device" not in text
    assert "tars_calls_total 0\n" in text


def test_a_label_cannot_break_its_line(node):
    evil = 'a"b\\c\nd\ud800'
    text = render(node.model_copy(update={"name": evil}))
    assert r'name="a\"b\\c\nd?"' in text
    text.encode("utf-8")
