"""A plan's reasons as text for people."""

from __future__ import annotations

from fleets import MODELS, cpu, gpu, node

from tars.core.explanation import explain
from tars.core.placement import measured_key, plan
from tars.core.types import Bytes, Deployment

NODES = [
    node("pc1", gpu("pc1", "RTX 3060"), cpu("pc1")),
    node("pc2", gpu("pc2", "GTX 1660 SUPER", free_mib=5600)),
]
WANTED = [Deployment("mistral-7b"), Deployment("minilm"), Deployment("phi-2"), Deployment("llama-3.1-70b")]


def test_a_placed_model_is_explained_in_a_few_lines() -> None:
    lines = explain("mistral-7b", plan(NODES, MODELS, WANTED), NODES).splitlines()
    on_the_cpu = lines.pop(3)
    assert lines == [
        "mistral-7b (Q4_K_M) is on RTX 3060 of pc1: needs 5.0 GiB (estimated) of 11.1 GiB free; the only GPU with room.",
        "  weights 4.0 GiB, KV cache 512 MiB, buffers 74 MiB, process 450 MiB; 4 slots of up to 4096 tokens share 4096",
        "Not elsewhere, because:",
        "  GTX 1660 SUPER of pc2: no room: needs 5.0 GiB, 758 MiB free beside minilm, phi-2",
    ]
    assert on_the_cpu.startswith("  CPU of pc1: would fit; a GPU answers faster: RTX 3060 of pc1 (Q4_K_M needs 4.")


def test_a_refused_model_is_explained_device_by_device_with_what_would_help() -> None:
    text = explain("llama-3.1-70b", plan(NODES, MODELS, WANTED), NODES)
    assert text.startswith("llama-3.1-70b: 1 replica fits nowhere.\nDevice by device:\n")
    assert "RTX 3060 of pc1: too large: needs 41.0 GiB, 11.1 GiB can be had here" in text
    assert text.splitlines()[-1].startswith("What would help: No device here is large enough")


def test_replicas_on_one_device_are_told_together_and_missing_ones_counted() -> None:
    nodes = [node("wsl2", gpu("wsl2", "RTX 4090"))]
    lines = explain("mistral-7b", plan(nodes, MODELS, [Deployment("mistral-7b", replicas=6)]), nodes).splitlines()
    assert lines[0].startswith("mistral-7b (Q4_K_M) has 4 replicas on RTX 4090 of wsl2: ")
    assert "mistral-7b: 2 replicas fit nowhere else." in lines


def test_measured_memory_is_told_as_measured() -> None:
    first = plan(NODES, MODELS, [Deployment("mistral-7b")])
    home = next(d for each in NODES for d in each.devices if d.id == first.assignments[0].device)
    key = measured_key(first.assignments[0], home)
    text = explain("mistral-7b", plan(NODES, MODELS, [Deployment("mistral-7b")], measured={key: Bytes.gib(4)}), NODES)
    assert "needs 4.0 GiB (measured)" in text
    assert "4.0 GiB measured at its last load; 4 slots of up to 4096 tokens share 4096" in text


def test_slots_with_a_cache_of_their_own_are_told_so() -> None:
    for slots, told in ((1, "; 2048 tokens"), (3, "; 2048 tokens in each of 3 slots")):
        made = plan(NODES, MODELS, [Deployment("mistral-7b", context=2048, slots=slots)])
        assert explain("mistral-7b", made, NODES).splitlines()[1].endswith(told)


def test_a_model_that_nobody_wants_is_said_to_be_so() -> None:
    assert explain("phi-2", plan(NODES, MODELS, []), NODES) == "phi-2 is not deployed: no plan has been asked about it."


def test_a_device_that_has_gone_is_named_by_its_id() -> None:
    made = plan(NODES, MODELS, [Deployment("mistral-7b")])
    assert "is on pc1/gpu-0 of pc1" in explain("mistral-7b", made, NODES[1:])
