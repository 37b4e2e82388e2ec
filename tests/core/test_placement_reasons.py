"""Words that must be true: a verdict says what it lost to, a reason tells the rule that decided."""

from __future__ import annotations

from fleets import MODELS, cpu, gpu, holding, node

from tars.core.placement import plan
from tars.core.types import Deployment, NodeSnapshot, Plan


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
