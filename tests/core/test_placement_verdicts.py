"""Verdicts are made when somebody looks, and are the same whenever that is."""

from __future__ import annotations

import pytest
from fleets import MODELS, gpu, holding, node

from tars.core import placement_verdicts
from tars.core.placement import Circumstances, plan
from tars.core.types import Deployment, DeviceId

NODES = [node("a", gpu("a", "RTX 3060")), node("b", gpu("b", "GTX 1660 SUPER"))]
WANTED = [Deployment("mistral-7b"), Deployment("phi-2")]


def test_nobody_pays_for_verdicts_that_nobody_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    real = placement_verdicts.verdicts_on
    monkeypatch.setattr(placement_verdicts, "verdicts_on", lambda *given: made.append(given) or real(*given))
    verdicts = plan(NODES, MODELS, WANTED).verdicts
    assert made == []
    assert verdicts["phi-2"] is verdicts["phi-2"]
    assert len(made) == 1


def test_they_are_a_mapping_by_model() -> None:
    verdicts = plan(NODES, MODELS, WANTED).verdicts
    assert (list(verdicts), len(verdicts), verdicts.get("gpt-9", ())) == (["mistral-7b", "phi-2"], 2, ())
    assert verdicts == dict(verdicts) == plan(NODES, MODELS, WANTED).verdicts
    assert verdicts != plan(NODES, MODELS, WANTED[:1]).verdicts
    assert repr(verdicts) == repr(dict(verdicts))
    with pytest.raises(TypeError):
        hash(verdicts)


def test_what_stays_is_explained_without_a_look_at_the_other_devices() -> None:
    first = plan(NODES, MODELS, WANTED)
    again = plan(holding(NODES, first.assignments), MODELS, WANTED, first.assignments)
    assert all("stays where it is loaded" in each.reason for each in again.assignments)
    assert {each.device for each in again.verdicts["phi-2"]} == {"a/gpu-0", "b/gpu-0"}


def test_a_barred_load_is_told_as_such_in_verdict_and_remedy() -> None:
    bars = {("mistral-7b", "Q4_K_M", DeviceId("a/gpu-0")): "a load of Q4_K_M failed: bad magic"}
    made = plan(NODES[:1], MODELS, WANTED[:1], circumstances=Circumstances(bars=bars))
    assert [each.reason for each in made.verdicts["mistral-7b"]] == ["a load of Q4_K_M failed: bad magic"]
    assert made.refusals[0].remedy == (
        "On RTX 3060 of a a load of Q4_K_M failed: bad magic. `tars deploy mistral-7b` tries again at once."
    )
