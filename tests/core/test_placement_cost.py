"""What one replica costs on one device, and whether it may go there."""

from __future__ import annotations

from dataclasses import replace

from fleets import MODELS, cpu, gpu, node

from tars.core.memory import estimate_replica, kv_cache_bytes
from tars.core.placement_cost import MeasuredKey, barred, card_of, cost_on, too_slow, wanted_variants
from tars.core.tuning import settings_for
from tars.core.types import Adapter, Bytes, Deployment, KvType, ModelKind

PHI3 = MODELS["phi-3-mini"]


def test_a_deployments_context_slots_and_kv_type_decide_the_cost() -> None:
    variant = wanted_variants(PHI3, Deployment("phi-3-mini", variant="Q4_K_M"))[0]
    base = Deployment("phi-3-mini", context=2048)

    def kv(deployment: Deployment) -> int:
        return cost_on(gpu("a"), PHI3, variant, deployment, {}).memory.kv_cache

    shared = replace(base, slots=10, kv_tokens=4096)
    assert kv(shared) == 2 * kv(base)
    assert kv(replace(base, slots=None)) == kv(base)

    # Field notes: 384 KiB a token.
    assert kv(base) == 2048 * 384 * 1024
    assert kv(replace(base, slots=10)) == 10 * kv(base)
    assert kv(replace(base, kv_type=KvType.Q8_0)) * 64 == kv(base) * 34


def test_a_measurement_counts_only_for_the_same_load() -> None:
    deployment = Deployment("phi-3-mini", context=2048, variant="Q4_K_M")
    variant = wanted_variants(PHI3, deployment)[0]
    cost = cost_on(gpu("a"), PHI3, variant, deployment, {})
    key = MeasuredKey(card_of(gpu("a")), f"phi-3-mini:Q4_K_M:{int(cost.memory.weights)}", 2048, 4, 2048, KvType.F16, -1)
    measured = {key: Bytes.gib(2)}
    assert cost_on(gpu("a"), PHI3, variant, deployment, measured).need == Bytes.gib(2)
    for other in (
        replace(deployment, slots=2),
        replace(deployment, context=1024),
        replace(deployment, kv_tokens=4096),
        replace(deployment, gpu_layers=32),
    ):
        assert cost_on(gpu("a"), PHI3, variant, other, measured).memory.measured is None
    assert cost_on(gpu("b", "GTX 1660 SUPER"), PHI3, variant, deployment, measured).memory.measured is None


def test_a_measurement_counts_for_the_same_card_in_every_pc() -> None:
    deployment = Deployment("phi-3-mini", context=2048, variant="Q4_K_M")
    variant = wanted_variants(PHI3, deployment)[0]
    memory = cost_on(gpu("a"), PHI3, variant, deployment, {}).memory
    key = MeasuredKey(card_of(gpu("a")), f"phi-3-mini:Q4_K_M:{int(memory.weights)}", 2048, 4, 2048, KvType.F16, -1)
    assert cost_on(gpu("b"), PHI3, variant, deployment, {key: Bytes.gib(2)}).need == Bytes.gib(2)


def test_adapters_and_a_draft_model_cost_memory_too() -> None:
    deployment = Deployment("phi-3-mini", context=2048)
    variant, draft = wanted_variants(PHI3, deployment)[0], MODELS["phi-2"].variants[-1].shape
    alone = cost_on(gpu("a"), PHI3, variant, deployment, {})
    adapted = replace(PHI3, adapters=(Adapter("a", 1.0, Bytes.mib(10)), Adapter("b", 0.5, Bytes.mib(20))))
    assert cost_on(gpu("a"), adapted, variant, deployment, {}).need == alone.need + Bytes.mib(30)
    drafted = cost_on(gpu("a"), replace(PHI3, draft=draft), variant, deployment, {}).memory
    assert drafted.weights == alone.memory.weights + draft.tensor_bytes - draft.host_bytes
    assert drafted.kv_cache > alone.memory.kv_cache
    assert drafted.overhead == alone.memory.overhead


def test_a_draft_model_takes_cells_for_two_answers_however_many_slots_there_are() -> None:
    shape, draft = MODELS["phi-3-mini"].variants[-1].shape, MODELS["phi-2"].variants[-1].shape
    for slots, sequences in ((1, 1), (2, 2), (8, 2)):
        settings = settings_for(gpu("a"), ModelKind.CHAT, shape, context=1024, slots=slots)
        alone = estimate_replica(gpu("a"), ModelKind.CHAT, shape, settings)
        drafted = estimate_replica(gpu("a"), ModelKind.CHAT, shape, settings, draft=draft)
        assert drafted.kv_cache - alone.kv_cache == kv_cache_bytes(draft, context=1024, slots=sequences)
        assert drafted.compute - alone.compute < alone.compute, "it computes 128 tokens at once, not 512"


def test_variants_come_best_first_and_only_the_pinned_one_if_one_is() -> None:
    assert [each.name for each in wanted_variants(PHI3, Deployment("phi-3-mini"))] == ["Q8_0", "Q4_K_M"]
    assert [each.name for each in wanted_variants(PHI3, Deployment("phi-3-mini", variant="q4_k_m"))] == ["Q4_K_M"]
    assert wanted_variants(PHI3, Deployment("phi-3-mini", variant="Q2_K")) == ()


def test_draining_nodes_and_pins_bar_a_device() -> None:
    home = node("a", gpu("a"))
    assert barred(home, gpu("a"), PHI3, Deployment("phi-2")) is None
    assert barred(replace(home, draining=True), gpu("a"), PHI3, Deployment("phi-2")) == "a is draining"
    assert barred(home, gpu("a"), PHI3, Deployment("phi-2", device="cpu")) == "pinned to cpu"
    without_cuda = replace(gpu("a"), cannot_run=((ModelKind.CHAT, "built without CUDA"),))
    assert barred(home, without_cuda, PHI3, Deployment("phi-2")) == "built without CUDA"
    assert barred(home, without_cuda, replace(PHI3, kind=ModelKind.EMBEDDING), Deployment("phi-2")) is None


def test_only_large_chat_models_that_nobody_pinned_are_too_slow_for_a_cpu() -> None:
    large, small = MODELS["deepseek-33b"], MODELS["qwen-0.5b"]
    assert too_slow(cpu("a"), large, large.variants[0], Deployment("x"))
    assert not too_slow(cpu("a"), large, large.variants[0], Deployment("x", device="cpu"))
    assert not too_slow(gpu("a"), large, large.variants[0], Deployment("x"))
    assert not too_slow(cpu("a"), small, small.variants[0], Deployment("x"))
    encoder = replace(large, kind=MODELS["minilm"].kind)
    assert not too_slow(cpu("a"), encoder, large.variants[0], Deployment("x"))
