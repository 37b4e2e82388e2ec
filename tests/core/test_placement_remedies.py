"""Words that must be true: a remedy that is named fits."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from fleets import CARDS, MODELS, cpu, gpu, holding, node, random_fleet

from tars.core.placement import plan
from tars.core.types import Deployment, KvType, ModelKind, Plan, Refusal

SETTING = re.compile(r'(replicas|slots|context|kv_tokens|gpu_layers) = (\d+)|(kv_type|variant|device) = "([^"]+)"')


def changed(deployment: Deployment, advice: str) -> Deployment:
    """The deployment as the advice says to write it."""
    for number_key, number, text_key, text in SETTING.findall(advice):
        if number_key:
            deployment = replace(deployment, **{number_key: int(number)})
        else:
            deployment = replace(deployment, **{text_key: KvType(text) if text_key == "kv_type" else text})
    return deployment


def advices(refusal: Refusal) -> list[str]:
    """Each "set ..." of a remedy, without where it fits."""
    return [part.partition(": ")[0] for part in refusal.remedy.rstrip(".").split("; or ") if part[:4].lower() == "set "]


def placed(made: Plan, model: str) -> int:
    return sum(each.model == model for each in made.assignments)


@pytest.mark.parametrize("seeds", [range(16), pytest.param(range(60), marks=pytest.mark.slow)], ids=len)
def test_every_setting_that_a_remedy_names_places_more(seeds: range) -> None:
    tried = set()
    for seed in seeds:
        nodes, wanted = random_fleet(seed, fill=1.6)
        nodes = [replace(each, devices=(*each.devices, cpu(each.name, 6))) if seed % 2 else each for each in nodes]
        if seed % 5 == 0:
            nodes = [replace(each, devices=(*each.devices[:1], cpu(each.name, 64))) for each in nodes]
            wanted = [replace(each, replicas=1, priority=-seed % 4) for each in wanted]
        if seed % 3 == 0:
            wanted = [replace(each, variant=MODELS[each.model].variants[0].name) for each in wanted]
        if seed % 4 < 2:
            wanted = [replace(each, slots=8) if MODELS[each.model].kind is ModelKind.CHAT else each for each in wanted]
        made = plan(nodes, MODELS, wanted, orders=20)
        for refusal in made.refusals:
            deployment = next(each for each in wanted if each.model == refusal.model)
            others = [each for each in made.assignments if each.model != refusal.model]
            for advice in advices(refusal):
                follow = changed(deployment, advice)
                # Other models that miss replicas compete for the same room; what is loaded stays.
                rest = [
                    replace(each, replicas=placed(made, each.model)) for each in wanted if each.model != refusal.model
                ]
                again = plan(holding(nodes, others), MODELS, [*rest, follow], others, orders=20)
                if "replicas = 1" in advice:
                    assert placed(again, refusal.model) == 1, (seed, refusal.model, advice)
                else:
                    assert placed(again, refusal.model) > placed(made, refusal.model), (seed, refusal.model, advice)
                tried.add(advice.split()[1])
    assert {"replicas", "context", "kv_type", "variant", "kv_tokens", "gpu_layers"} <= tried


@pytest.mark.parametrize("card", CARDS)
def test_memory_that_a_remedy_says_to_free_is_enough(card: str) -> None:
    total = CARDS[card][0]
    for share in (0.1, 0.3, 0.5, 0.7):
        nodes = [node("a", gpu("a", card, free_mib=int(total * share)))]
        for model in ("mistral-7b", "phi-2", "llama-3.1-8b"):
            for refusal in plan(nodes, MODELS, [Deployment(model)]).refusals:
                found = re.search(r"ree ([\d.]+) (GiB|MiB) more", refusal.remedy)
                if found is None:
                    assert plan([node("a", gpu("a", card))], MODELS, [Deployment(model)]).refusals or advices(refusal)
                    continue
                more = float(found[1]) * (1024 if found[2] == "GiB" else 1)
                freed = [node("a", gpu("a", card, free_mib=min(total, int(total * share + more) + 1)))]
                assert not plan(freed, MODELS, [Deployment(model)]).refusals, (card, share, model, refusal.remedy)


def test_a_combination_is_offered_where_no_single_change_fits() -> None:
    nodes = [node("pc2", gpu("pc2", "GTX 1660 SUPER", free_mib=2900))]
    deployment = Deployment("phi-3-mini", context=4096)
    remedy = plan(nodes, MODELS, [deployment]).refusals[0].remedy
    (advice, *_) = advices(plan(nodes, MODELS, [deployment]).refusals[0])
    assert "context = " in advice, remedy
    assert ", kv_type = " in advice, remedy
    assert not plan(nodes, MODELS, [changed(deployment, advice)]).refusals


def test_slots_are_offered_to_share_their_kv_cache() -> None:
    nodes = [node("a", gpu("a", "RTX 3060"))]
    deployment = Deployment("phi-3-mini", context=4096, slots=10, variant="Q4_K_M")
    refusal = plan(nodes, MODELS, [deployment]).refusals[0]
    assert "Set kv_tokens = 20480 for all 10 slots instead of 40960: fits on RTX 3060 of a" in refusal.remedy
    made = plan(nodes, MODELS, [replace(deployment, kv_tokens=20480)])
    assert [(each.settings.slots, each.settings.kv_tokens) for each in made.assignments] == [(10, 20480)]


def test_slots_that_share_already_are_not_told_to() -> None:
    nodes = [node("a", gpu("a", "GTX 1660 SUPER", free_mib=4000))]
    refusal = plan(nodes, MODELS, [Deployment("phi-3-mini", context=4096)]).refusals[0]
    assert "kv_tokens" not in refusal.remedy
    assert "kv_type" in refusal.remedy


def test_a_shorter_context_takes_the_tokens_that_are_shared_with_it() -> None:
    nodes = [node("a", gpu("a", "GTX 1660 SUPER", free_mib=3700))]
    deployment = Deployment("phi-3-mini", context=4096, slots=2, kv_tokens=5000, kv_type=KvType.Q8_0, variant="Q4_K_M")
    refusal = plan(nodes, MODELS, [deployment]).refusals[0]
    found = next(each for each in advices(refusal) if "context" in each)
    assert "with kv_tokens = " in found, refusal.remedy
    assert not plan(nodes, MODELS, [changed(deployment, found)]).refusals


def test_a_part_of_the_layers_is_offered_where_the_rest_finds_ram() -> None:
    card = gpu("a", "RTX 4090", free_mib=22900)
    alone, with_ram = [node("a", card)], [node("a", card, cpu("a", 64))]
    wanted = [Deployment("llama-3.1-70b")]
    assert "gpu_layers" not in plan(alone, MODELS, wanted).refusals[0].remedy
    remedy = plan(with_ram, MODELS, wanted).refusals[0].remedy
    found = re.match(r"Set gpu_layers = (\d+): (\d+) of 81 layers fit on RTX 4090 of a ", remedy)
    assert found is not None, remedy
    assert found[1] == found[2]
    (made,) = plan(with_ram, MODELS, [replace(wanted[0], gpu_layers=int(found[1]))]).assignments
    assert (made.settings.gpu_layers, made.device) == (int(found[1]), "a/gpu-0")
    assert f"{found[1]} of 81 layers on the card, the rest on the processor: slower" in made.reason
    assert plan(with_ram, MODELS, [replace(wanted[0], gpu_layers=int(found[1]) + 1)]).refusals
    small = [node("a", gpu("a", "GTX 1660 SUPER"), cpu("a", 64))]
    assert "gpu_layers" not in plan(small, MODELS, wanted).refusals[0].remedy


def test_a_replica_that_is_whole_on_a_card_is_not_told_to_leave_it() -> None:
    nodes = [node("a", gpu("a", "RTX 3060"), cpu("a", 3))]
    refusal = plan(nodes, MODELS, [Deployment("llama-2-7b", replicas=2, variant="Q4_K_M")]).refusals[0]
    assert refusal.replicas_missing == 1
    assert "gpu_layers" not in refusal.remedy


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"context": 4096, "kv_tokens": 1000}, "kv_tokens = 1000 does not go with a context of 4096 and 4 slots"),
        ({"context": 512, "slots": 2, "kv_tokens": 1025}, "it must be from 512"),
        ({"slots": 0}, "at least 1"),
    ],
)
def test_wishes_that_contradict_each_other_are_refused_with_the_reason(wrong: dict[str, int], said: str) -> None:
    made = plan([node("a", gpu("a"))], MODELS, [Deployment("mistral-7b", **wrong), Deployment("minilm")])
    assert [each.model for each in made.assignments] == ["minilm"]
    assert said in made.refusals[0].remedy


@pytest.mark.parametrize("wrong", [{"kv_tokens": 512}, {"gpu_layers": 3}])
def test_an_embedding_model_has_no_kv_cache_and_no_part_on_the_host(wrong: dict[str, int]) -> None:
    made = plan([node("a", gpu("a"))], MODELS, [Deployment("minilm", **wrong)])
    assert f"{next(iter(wrong))} is for chat models" in made.refusals[0].remedy


def test_every_device_on_a_draining_node_is_said_to_be_so() -> None:
    made = plan([node("a", gpu("a"), draining=True)], MODELS, [Deployment("phi-2")])
    assert "drains" in made.refusals[0].remedy
    assert made.refusals[0].verdicts[0].reason == "a is draining"
