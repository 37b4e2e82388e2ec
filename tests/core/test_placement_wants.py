"""What each device would cost for a wish, before anything is placed."""

from __future__ import annotations

from dataclasses import replace

from fleets import MODELS, cpu, gpu, node

from tars.core.placement_cost import cost_on
from tars.core.placement_wants import Want, places_of, resolve
from tars.core.types import Deployment, DeviceId

NODES = [
    node("a", gpu("a", "RTX 3060"), cpu("a")),
    node("b", gpu("b", "RTX 3060", free_mib=3000)),
    node("c", gpu("c", "GTX 1660 SUPER"), draining=True),
]
PLACES = places_of(NODES)


def want(deployment: Deployment, bars: dict | None = None) -> Want:
    return Want(deployment, MODELS[deployment.model], PLACES, {}, bars or {})


def names(made: Want) -> dict[str, list[str]]:
    return {place.device.id: [cost.variant.name for cost in made.costs(n)] for n, place in enumerate(PLACES)}


def test_devices_come_in_the_order_of_ids_and_those_that_cost_the_same_have_one_number() -> None:
    assert [place.device.id for place in PLACES] == ["a/cpu", "a/gpu-0", "b/gpu-0", "c/gpu-0"]
    kinds = {place.device.id: place.kind for place in PLACES}
    assert kinds["a/gpu-0"] == kinds["b/gpu-0"]
    assert len(set(kinds.values())) == 3
    assert places_of(NODES[::-1]) == PLACES


def test_only_what_fits_the_empty_device_and_may_go_there_is_a_cost() -> None:
    found = names(want(Deployment("llama-3.1-8b", context=4096)))
    assert found == {"a/cpu": ["Q4_K_M"], "a/gpu-0": ["Q4_K_M", "Q8_0"], "b/gpu-0": [], "c/gpu-0": []}
    assert names(want(Deployment("llama-3.1-8b", device="b/gpu-0")))["a/gpu-0"] == []


def test_costs_are_those_of_the_device_itself() -> None:
    deployment = Deployment("llama-3.1-8b", context=2048)
    made = want(deployment)
    for number, place in enumerate(PLACES):
        every = [cost_on(place.device, made.entry, each, deployment, {}) for each in made.entry.variants]
        assert made.smallest(number) == min(every, key=lambda cost: cost.need)
        assert set(made.costs(number)) <= set(every)
        options = made.options()[number]
        assert [option.need for option in options] == [cost.need for cost in made.costs(number)]
        assert [option.variant for option in options] == list(range(len(options)))


def test_a_bar_takes_one_variant_from_one_device() -> None:
    bars = {("llama-3.1-8b", "Q8_0", DeviceId("a/gpu-0")): "it failed", ("phi-2", "Q4_K_M", DeviceId("a/cpu")): ""}
    assert names(want(Deployment("llama-3.1-8b"), bars))["a/gpu-0"] == ["Q4_K_M"]


def test_of_two_wishes_for_a_model_the_larger_counts_and_unknown_ones_are_refused() -> None:
    two = [Deployment("minilm"), Deployment("MINILM-alias", replicas=3), Deployment("gpt-9")]
    found, unknown = resolve(two, MODELS)
    assert [(deployment.replicas, entry.name) for deployment, entry in found] == [(3, "minilm")]
    assert [refusal.model for refusal in unknown] == ["gpt-9"]
    none, _ = resolve([replace(two[0], replicas=0)], MODELS)
    assert none == []
