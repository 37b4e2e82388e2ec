from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tars.messages.node import ExplainResult, PlanResult

RTX_3060 = """
[node]
name = "pc1"
[[devices.expected]]
name = "NVIDIA GeForce RTX 3060"
memory_mib = 11909
[[deploy]]
model = "mistral-7b-instruct-v0.2"
variant = "Q4_K_M"
context = 4096
"""
GTX_1660_SUPER = """
[node]
name = "pc2"
[[devices.expected]]
name = "NVIDIA GeForce GTX 1660 SUPER"
memory_mib = 5944
compute_capability = "7.5"
[[deploy]]
model = "llama-3.1-70b-instruct"
"""


@pytest.fixture
def fleet(tmp_path: Path) -> tuple[str, ...]:
    """The options that name two PCs: one model fits the first, another fits neither."""
    arguments: list[str] = []
    for name, text in (("pc1.toml", RTX_3060), ("pc2.toml", GTX_1660_SUPER)):
        (tmp_path / name).write_text(text)
        arguments += ["--node", str(tmp_path / name)]
    return tuple(arguments)


def test_a_fleet_is_planned_without_any_node(node: Any, tars: Callable[..., Any], fleet: tuple[str, ...]) -> None:
    ran = tars("plan", *fleet)
    assert ran.code == 0, ran.err
    line = next(line for line in ran.out.splitlines() if line.startswith("mistral-7b-instruct-v0.2"))
    assert "Q4_K_M" in line
    assert "pc1" in line
    assert "GeForce RTX 3060" in line
    assert "refused llama-3.1-70b-instruct" in ran.out
    assert "what would help" in ran.out
    assert not node.calls


def test_the_json_of_a_fleet_is_the_message_of_mesh_plan(tars: Callable[..., Any], fleet: tuple[str, ...]) -> None:
    ran = tars("plan", *fleet, "--json")
    plan = PlanResult.model_validate_json(ran.out)
    assert [(each.model, each.node_name, each.context) for each in plan.assignments] == [
        ("mistral-7b-instruct-v0.2", "pc1", 4096)
    ]
    assert [each.model for each in plan.refusals] == ["llama-3.1-70b-instruct"]
    assert plan.assignments[0].needed_bytes <= 11_909 * 2**20
    # The verdict on a small card: 39,979 MiB of weights (field notes) against less than 6 GiB.
    assert all(verdict.needed_bytes > 39_979 * 2**20 for verdict in plan.refusals[0].verdicts)


def test_another_context_changes_the_kv_cache_by_its_formula(tars: Callable[..., Any], fleet: tuple[str, ...]) -> None:
    def kv_cache(*options: str) -> int:
        plan = PlanResult.model_validate_json(tars("plan", *fleet, "--json", *options).out)
        return plan.assignments[0].kv_cache_bytes

    # Mistral-7B: 128 KiB a token (field notes).
    assert kv_cache("--context", "8192") - kv_cache() == 4096 * 128 * 1024


def test_another_context_takes_shared_tokens_within_what_it_allows(tars: Callable[..., Any], tmp_path: Path) -> None:
    file = tmp_path / "pc.toml"
    file.write_text(
        '[node]\nname = "pc"\n[[devices.expected]]\nname = "RTX 3060"\nmemory_mib = 11909\n'
        '[[deploy]]\nmodel = "mistral-7b"\ncontext = 2048\nkv_tokens = 4096\n'
    )

    def kv_tokens(context: int) -> int:
        ran = tars("plan", "--node", str(file), "--json", "--context", str(context))
        return PlanResult.model_validate_json(ran.out).assignments[0].kv_tokens

    assert [kv_tokens(context) for context in (512, 2048, 8192)] == [2048, 4096, 8192]


def test_a_model_is_explained_device_by_device(tars: Callable[..., Any], fleet: tuple[str, ...]) -> None:
    ran = tars("plan", *fleet, "--explain", "llama-3.1-70b-instruct")
    assert ran.code == 0
    assert "fits nowhere" in ran.out
    assert ran.out.count("GeForce GTX 1660 SUPER") >= 2


def test_a_model_that_no_file_deploys_is_explained_as_if_one_did(
    tars: Callable[..., Any], fleet: tuple[str, ...]
) -> None:
    explanation = ExplainResult.model_validate_json(tars("plan", *fleet, "--explain", "phi-2", "--json").out)
    assert not explanation.deployed
    assert [each.model for each in explanation.assignments] == ["phi-2"]


def test_an_unknown_model_is_an_error_with_the_nearest_name(tars: Callable[..., Any], fleet: tuple[str, ...]) -> None:
    ran = tars("plan", *fleet, "--explain", "phi-22")
    assert ran.code == 1
    assert "phi-2" in ran.err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[node]\nnmae = "pc1"\n', "line 2"),
        ("[node\n", "line 1"),
        ('[node]\nname = "pc1"\n', "devices.expected"),
        ('[[devices.expected]]\nname = "RTX 3060"\nmemory_mib = 11909\n', "--explain MODEL"),
    ],
)
def test_a_file_that_cannot_be_planned_is_wrong_usage_with_what_to_do(
    tars: Callable[..., Any], tmp_path: Path, text: str, words: str
) -> None:
    file = tmp_path / "pc.toml"
    file.write_text(text)
    ran = tars("plan", "--node", str(file))
    assert ran.code == 2
    assert words in ran.err
    assert "Traceback" not in ran.err
    assert ran.out == ""
