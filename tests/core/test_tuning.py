"""tars/core/tuning.py: what each kind of device is set to, and why."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tars.core.tensor_plan import Counts, planned_shape
from tars.core.tuning import (
    BATCH_TOKENS_CPU,
    BATCH_TOKENS_CUDA,
    BATCH_TOKENS_SMALL_CARD,
    SLOTS,
    all_gpu_layers,
    card_flash_attention,
    default_context,
    precision_for,
    settings_for,
)
from tars.core.types import Bytes, DeviceId, DeviceKind, DeviceSnapshot, KvType, ModelKind, NodeId, Precision

MISTRAL = planned_shape(Counts("llama", 32, 4096, 32, 8, 14336, 32000, 32768), "Q4_K_M")
PHI_2 = planned_shape(Counts("phi2", 32, 2560, 32, 32, 10240, 51200, 2048), "Q8_0")


def device(kind=DeviceKind.CUDA, **more) -> DeviceSnapshot:
    values = {
        "id": DeviceId("n/d"),
        "node": NodeId("n"),
        "kind": kind,
        "name": "NVIDIA GeForce RTX 3060",
        "memory_total": Bytes.gib(12),
        "memory_free": Bytes.gib(11),
        "compute_capability": (8, 6),
        "precision": Precision.BF16,
        "cpu_threads": 12,
        **more,
    }
    return DeviceSnapshot(**values)


RTX_3060 = device()
GTX_1660_SUPER = device(
    name="NVIDIA GeForce GTX 1660 SUPER",
    memory_total=Bytes.gib(6),
    compute_capability=(7, 5),
    precision=Precision.FP32,
)
CPU = device(DeviceKind.CPU, name="CPU", compute_capability=None, precision=Precision.BF16)
SIMULATED = device(simulated=True)


def chat(on: DeviceSnapshot, **more):
    return settings_for(on, ModelKind.CHAT, MISTRAL, **more)


def test_a_card_takes_every_layer_and_flash_attention():
    for card in (RTX_3060, GTX_1660_SUPER):
        found = chat(card, context=4096)
        assert (found.gpu_layers, found.flash_attention, found.micro_batch, found.mmap) == (-1, True, 512, True)


@pytest.mark.parametrize("on", [CPU, SIMULATED])
def test_the_cpu_computes_where_there_is_no_card_without_flash_attention(on):
    found = chat(on, context=4096)
    assert (found.gpu_layers, found.flash_attention) == (0, False)
    assert found.threads == 12


def test_a_card_needs_only_a_few_threads():
    assert chat(RTX_3060).threads == 4
    assert chat(device(cpu_threads=2)).threads == 2


def test_threads_have_bounds():
    assert chat(device(DeviceKind.CPU, cpu_threads=512)).threads == 64
    assert chat(device(DeviceKind.CPU, cpu_threads=None)).threads == 1


def test_a_quantised_kv_cache_turns_flash_attention_on_everywhere():
    for on in (RTX_3060, CPU, SIMULATED, device(compute_capability=(6, 1))):
        assert chat(on, kv_type=KvType.Q8_0).flash_attention


@pytest.mark.parametrize(("capability", "on"), [((6, 1), False), ((7, 0), True), ((8, 9), True), (None, True)])
def test_flash_attention_needs_a_current_card(capability, on):
    assert card_flash_attention(device(compute_capability=capability)) is on


def test_a_cpu_has_no_card_to_ask():
    assert not card_flash_attention(CPU)


def test_the_default_context_is_the_trained_one_up_to_4096():
    assert default_context(MISTRAL) == 4096
    assert default_context(PHI_2) == 2048
    assert chat(RTX_3060).context == 4096
    assert chat(RTX_3060, context=8192).context == 8192


def test_slots_and_kv_type_are_carried_over():
    found = chat(RTX_3060, context=4096, slots=10, kv_type=KvType.Q4_0)
    assert (found.slots, found.kv_type) == (10, KvType.Q4_0)


def test_without_slots_four_share_the_cache_of_one_context():
    found = chat(RTX_3060, context=2048)
    assert (found.slots, found.kv_tokens, found.shares_kv) == (SLOTS, 2048, True)
    assert chat(RTX_3060, context=2048, kv_tokens=5000).kv_tokens == 5000


def test_slots_that_are_named_have_a_context_each_unless_fewer_tokens_are():
    found = chat(RTX_3060, context=2048, slots=3)
    assert (found.slots, found.kv_tokens, found.shares_kv) == (3, 6144, False)
    shared = chat(RTX_3060, context=2048, slots=3, kv_tokens=2048)
    assert (shared.slots, shared.kv_tokens, shared.shares_kv) == (3, 2048, True)


@pytest.mark.parametrize(("slots", "kv_tokens"), [(None, 2047), (None, 4 * 2048 + 1), (3, 2047), (3, 6145), (3, 0)])
def test_a_cache_that_is_too_small_or_useless_is_refused_with_its_bounds(slots, kv_tokens):
    most = (slots or SLOTS) * 2048
    with pytest.raises(ValueError, match=f"kv_tokens = {kv_tokens} .* from 2048 .* to {most} "):
        chat(RTX_3060, context=2048, slots=slots, kv_tokens=kv_tokens)


def test_an_embedding_model_has_no_kv_cache():
    found = settings_for(RTX_3060, ModelKind.EMBEDDING, MISTRAL)
    assert (found.slots, found.kv_tokens, found.shares_kv) == (1, 0, False)
    with pytest.raises(ValueError, match="has no KV cache"):
        settings_for(RTX_3060, ModelKind.EMBEDDING, MISTRAL, kv_tokens=2048)


def test_some_layers_on_a_card_leave_work_for_every_core():
    some = chat(RTX_3060, gpu_layers=20)
    assert (some.gpu_layers, some.threads) == (20, 12)
    assert chat(RTX_3060, gpu_layers=all_gpu_layers(MISTRAL)) == chat(RTX_3060)
    assert chat(CPU, gpu_layers=20).gpu_layers == 0
    with pytest.raises(ValueError, match="gpu_layers"):
        chat(RTX_3060, gpu_layers=-2)


def test_every_slot_has_room_in_a_batch():
    assert chat(RTX_3060, slots=1000).batch >= 1000


def test_a_micro_batch_is_no_longer_than_all_contexts():
    assert chat(RTX_3060, context=128).micro_batch == 128
    assert chat(RTX_3060, context=128, slots=2).micro_batch == 256


@pytest.mark.parametrize("wrong", [{"context": 0}, {"slots": 0}])
def test_nothing_below_one_is_accepted(wrong):
    with pytest.raises(ValueError, match="at least 1"):
        chat(RTX_3060, **wrong)


@pytest.mark.parametrize(
    ("name", "capability", "expected"),
    [
        ("NVIDIA GeForce RTX 4090", (8, 9), Precision.BF16),
        ("NVIDIA GeForce RTX 3060", (8, 6), Precision.BF16),
        ("NVIDIA GeForce RTX 2080", (7, 5), Precision.FP16),
        ("Tesla V100-SXM2-16GB", (7, 0), Precision.FP16),
        ("NVIDIA GeForce GTX 1660 SUPER", (7, 5), Precision.FP32),
        ("NVIDIA GeForce GTX 1080", (6, 1), Precision.FP32),
        ("some card", None, Precision.FP32),
    ],
)
def test_precision_follows_the_compute_capability(name, capability, expected):
    assert precision_for(DeviceKind.CUDA, name, capability) is expected


def test_a_cpu_is_fp32_unless_its_probe_says_otherwise():
    assert precision_for(DeviceKind.CPU, "CPU", None) is Precision.FP32
    assert settings_for(CPU, ModelKind.EMBEDDING, MISTRAL).precision is Precision.BF16


def test_embeddings_run_in_full_precision_where_half_gives_nan():
    assert settings_for(GTX_1660_SUPER, ModelKind.EMBEDDING, MISTRAL).precision is Precision.FP32
    assert settings_for(RTX_3060, ModelKind.EMBEDDING, MISTRAL).precision is Precision.BF16
    unknown = device(compute_capability=None)
    assert settings_for(unknown, ModelKind.EMBEDDING, MISTRAL).precision is Precision.FP32


def test_a_probe_that_doubts_half_precision_is_believed():
    assert settings_for(device(precision=Precision.FP32), ModelKind.EMBEDDING, MISTRAL).precision is Precision.FP32


def test_a_simulated_card_says_nothing_about_the_cpu_below_it():
    found = settings_for(SIMULATED, ModelKind.EMBEDDING, MISTRAL)
    assert (found.precision, found.gpu_layers) == (Precision.FP32, 0)


@pytest.mark.parametrize(
    ("on", "tokens"),
    [
        (RTX_3060, BATCH_TOKENS_CUDA),
        (GTX_1660_SUPER, BATCH_TOKENS_SMALL_CARD),
        (CPU, BATCH_TOKENS_CPU),
        (SIMULATED, BATCH_TOKENS_CPU),
    ],
)
def test_embedding_batches_follow_the_device(on, tokens):
    assert settings_for(on, ModelKind.EMBEDDING, MISTRAL).batch_tokens == tokens


def test_an_embedding_model_reads_no_further_than_it_was_trained():
    assert settings_for(CPU, ModelKind.EMBEDDING, PHI_2, context=4096).context == 2048


def test_a_tiny_model_on_a_cpu_gets_no_more_threads_than_its_weights_can_feed():
    cpu = device(DeviceKind.CPU, cpu_threads=8)
    for weights, threads in ((3, 1), (40, 3), (400, 8)):
        shape = replace(PHI_2, tensor_bytes=Bytes.mib(weights))
        assert settings_for(cpu, ModelKind.CHAT, shape).threads == threads
