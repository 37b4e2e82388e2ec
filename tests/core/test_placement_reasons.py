"""Words that must be true: a remedy that is named fits, a verdict's numbers explain it, a reason tells the rule that decided."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from fleets import CARDS, MODELS, cpu, gpu, holding, node, random_fleet

from tars.core.placement import plan
from tars.core.types import Deployment, KvType, NodeSnapshot, Plan, Refusal

SETTING = re.compile(r'(replicas|slots|context) = (\d+)|(kv_type|variant|device) = "([^"]+)"')


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


def test_every_setting_that_a_remedy_names_places_more() -> None:
    tried = set()
    for seed in range(60):
        nodes, wanted = random_fleet(seed, fill=1.6)
        nodes = [replace(each, devices=(*each.devices, cpu(each.name, 6))) if seed % 2 else each for each in nodes]
        if seed % 3 == 0:
            wanted = [replace(each, variant=MODELS[each.model].variants[0].name) for each in wanted]
        if seed % 4 == 0:
            wanted = [replace(each, slots=4) for each in wanted]
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
    assert {"replicas", "context", "kv_type", "variant"} <= tried


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


def test_fewer_slots_are_offered() -> None:
    nodes = [node("a", gpu("a", "RTX 3060"))]
    deployment = Deployment("phi-3-mini", context=4096, slots=10, variant="Q4_K_M")
    refusal = plan(nodes, MODELS, [deployment]).refusals[0]
    assert "set slots = 5 instead of 10: fits on RTX 3060 of a" in refusal.remedy


def test_every_device_on_a_draining_node_is_said_to_be_so() -> None:
    made = plan([node("a", gpu("a"), draining=True)], MODELS, [Deployment("phi-2")])
    assert "drains" in made.refusals[0].remedy
    assert made.refusals[0].verdicts[0].reason == "a is draining"


def verdict_of(made: Plan, model: str, device: str) -> str:
    return next(each.reason for each in made.verdicts[model] if each.device == device)


def test_a_device_that_lost_says_to_what() -> None:
    two: list[NodeSnapshot] = [node("a", gpu("a", "RTX 4090")), node("b", gpu("b", "RTX 3060"))]
    made = plan(two, MODELS, [Deployment("mistral-7b"), Deployment("minilm")])
    assert verdict_of(made, "mistral-7b", "b/gpu-0") == "would fit; a larger card is faster: RTX 4090 of a"
    assert verdict_of(made, "minilm", "a/gpu-0").startswith(
        "would fit; a smaller card does, and leaves this one to chat"
    )


def test_other_programs_are_named_only_where_they_are_what_is_in_the_way() -> None:
    busy = plan([node("a", gpu("a", "RTX 3060", free_mib=3000))], MODELS, [Deployment("mistral-7b")])
    assert "(other programs hold 8.7 GiB)" in busy.refusals[0].verdicts[0].reason
    small = plan([node("a", gpu("a", "GTX 1660 SUPER", free_mib=3000))], MODELS, [Deployment("deepseek-33b")])
    assert "other programs" not in small.refusals[0].verdicts[0].reason


def test_reasons_tell_the_rule_that_decided() -> None:
    def reason(nodes: list[NodeSnapshot], deployment: Deployment, *others: Deployment) -> str:
        made = plan(nodes, MODELS, [deployment, *others])
        return next(each.reason for each in made.assignments if each.model == deployment.model)

    one = node("a", gpu("a", "RTX 4090"))
    assert "the only device" in reason([one], Deployment("phi-2"))
    assert "a GPU answers faster than a CPU" in reason([node("a", gpu("a"), cpu("a"))], Deployment("phi-2"))
    two = [one, node("b", gpu("b", "RTX 3060"))]
    assert "the largest device with room" in reason(two, Deployment("mistral-7b"))
    assert "the smallest card that has room" in reason(two, Deployment("minilm"))
    assert "pinned to RTX 3060" in reason(two, Deployment("mistral-7b", device="RTX 3060"))
    assert "beyond the 2048 it was trained for" in reason(two, Deployment("phi-2", context=4096))
    assert "Q4_K_M as asked" in reason(two, Deployment("phi-3-mini", variant="Q4_K_M"))
    assert "Q8_0 is the best quality" in reason(two, Deployment("phi-3-mini"))


def test_a_loaded_variant_is_not_changed_when_a_better_one_would_fit() -> None:
    crowded = [node("a", gpu("a", "RTX 3060", free_mib=6000))]
    first = plan(crowded, MODELS, [Deployment("llama-3.1-8b", context=1024)])
    assert first.assignments[0].variant == "Q4_K_M"
    free = holding([node("a", gpu("a", "RTX 3060"))], first.assignments)
    after = plan(free, MODELS, [Deployment("llama-3.1-8b", context=1024)], first.assignments)
    assert after.assignments[0].variant == "Q4_K_M"
    assert "Q8_0 would fit now; a loaded replica is not changed" in after.assignments[0].reason
