from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from drawing import drawn, row

from tars.cli import plan_output as output
from tars.messages.node import (
    AssignmentDescription,
    DeployResult,
    ExplainResult,
    PlanResult,
    RefusalDescription,
    VerdictDescription,
)

GIB = 2**30


def assignment(model: str = "mistral-7b", needed: int = 5 * GIB, **changes: Any) -> AssignmentDescription:
    fields: dict[str, Any] = {
        "replica": f"{model}@gpu-0#1",
        "model": model,
        "variant": "Q4_K_M",
        "node": "0123456789abcdef",
        "node_name": "pc1",
        "device": "n1/gpu-0",
        "device_name": "NVIDIA GeForce RTX 3060",
        "needed_bytes": needed,
        "weights_bytes": 4 * GIB,
        "kv_cache_bytes": GIB // 2,
        "compute_bytes": GIB // 4,
        "overhead_bytes": GIB // 4,
        "measured": False,
        "context": 4096,
        "slots": 1,
        "gpu_layers": -1,
        "reason": "best fit",
    }
    return AssignmentDescription(**{**fields, **changes})


def verdict(**changes: Any) -> VerdictDescription:
    fields: dict[str, Any] = {
        "device": "n1/gpu-0",
        "device_name": "RTX 4090",
        "variant": "Q4_K_M",
        "accepted": False,
        "needed_bytes": 41 * GIB,
        "free_bytes": 23 * GIB,
        "reason": "needs 18.0 GiB more",
    }
    return VerdictDescription(**{**fields, **changes})


def test_free_before_is_what_the_other_replicas_of_the_device_leave(make: SimpleNamespace) -> None:
    other = make.device("GTX 1660 SUPER", id="n2/gpu-0", memory_capacity_bytes=5 * GIB)
    plan = PlanResult(
        assignments=[
            assignment("phi-2", 3 * GIB, device="n2/gpu-0"),
            assignment("mistral-7b", 5 * GIB),
            assignment("embeddings", GIB, device="n2/gpu-0"),
        ],
        refusals=[],
        devices=[make.device(), other],
    )
    assert [(part.model, before) for part, before in output.free_before(plan)] == [
        ("mistral-7b", 10 * GIB),
        ("phi-2", 4 * GIB),
        ("embeddings", 2 * GIB),
    ]


def test_a_plan_shows_each_replica_with_its_bytes_and_reason(make: SimpleNamespace) -> None:
    idle = make.device(
        "NVIDIA GeForce RTX 4090", id="0123456789abcdef/gpu-1", memory_capacity_bytes=20 * GIB, node_name="pc1"
    )
    simulated = make.device(simulated=True)
    text = drawn(output.plan_view(PlanResult(assignments=[assignment()], refusals=[], devices=[simulated, idle])))
    line = row(text, "mistral-7b")
    for word in ("Q4_K_M", "pc1", " GeForce RTX 3060 (simulated)", "5.0 GiB", "10.0 GiB"):
        assert word in line
    assert "mistral-7b: best fit" in text
    assert "GeForce RTX 4090 of pc1: 20.0 GiB usable" in text


def test_a_refusal_shows_bytes_needed_and_free_per_device_and_the_remedy() -> None:
    refusal = RefusalDescription(
        model="llama-70b",
        replicas_missing=2,
        remedy="a card with 48 GB",
        verdicts=[verdict(), verdict(device_name="CPU")],
    )
    text = drawn(output.plan_view(PlanResult(assignments=[], refusals=[refusal], devices=[])))
    assert "nothing is placed" in text
    assert "(2 replicas missing)" in row(text, "refused llama-70b")
    line = row(text, "RTX 4090")
    assert "41.0 GiB" in line
    assert "23.0 GiB" in line
    assert "needs 18.0 GiB more" in line
    assert row(text, "CPU")
    assert "a card with 48 GB" in row(text, "what would help")


def test_an_explanation_shows_the_words_and_the_bytes_of_every_device() -> None:
    explanation = ExplainResult(
        model="mistral-7b",
        deployed=True,
        assignments=[assignment()],
        verdicts=[verdict(accepted=True, device_name="RTX 3060"), verdict()],
        remedy="nothing",
        replicas=[],
        text="It stands on the 3060.\n",
    )
    text = drawn(output.explain_view(explanation))
    assert text.startswith("It stands on the 3060.\n")
    assert row(text, "RTX 3060 ").split()[-1] == "yes"
    assert row(text, "RTX 4090").split()[-5:] == ["41.0", "GiB", "23.0", "GiB", "no"]


def test_a_deployment_says_where_it_goes_or_that_it_does_not() -> None:
    text = drawn(output.deploy_view(DeployResult(model="m", accepted=True, assignments=[assignment("m")])))
    assert "m Q4_K_M -> GeForce RTX 3060 on pc1, 5.0 GiB: best fit" in text
    assert "tars explain m" in drawn(output.deploy_view(DeployResult(model="m", accepted=False, assignments=[])))
