"""tars/builtin_models.py and catalogue.toml: the shipped list is whole, plausible, and names what the field notes name."""

from __future__ import annotations

import pytest

from tars.builtin_models import QUALITY, builtin_models, ordered
from tars.core.types import ModelKind

MODELS = {model.entry.name: model for model in builtin_models()}
EXACT_BYTES = {
    ("mistral-7b-instruct-v0.2", "Q4_K_M"): 4_368_439_584,
    ("llama-2-7b-chat", "Q4_K_M"): 4_081_004_224,
    ("llama-3.1-8b-instruct", "Q4_K_M"): 4_920_739_232,
    ("llama-3.1-8b-instruct", "Q8_0"): 8_540_775_840,
    ("llama-3.1-70b-instruct", "Q4_K_M"): 42_520_398_400,
    ("phi-3-mini-4k-instruct", "Q4_K_M"): 2_393_231_072,
    ("qwen2.5-0.5b-instruct", "Q4_K_M"): 491_400_032,
    ("qwen2.5-1.5b-instruct", "Q4_K_M"): 1_117_320_736,
    ("all-minilm-l6-v2", "fp32"): 90_868_376,
    ("bge-small-en-v1.5", "fp32"): 133_466_304,
    ("nomic-embed-text-v1.5", "fp32"): 546_938_168,
}
CARD_MIB = {
    ("mistral-7b-instruct-v0.2", "Q4_K_M"): 4095.05,
    ("llama-2-7b-chat", "Q4_K_M"): 3820.93,
    ("llama-3.1-8b-instruct", "Q4_K_M"): 4403.49,
    ("llama-3.1-8b-instruct", "Q8_0"): 7605.3,
    ("llama-3.1-70b-instruct", "Q4_K_M"): 39_979,
    ("deepseek-coder-33b-instruct", "Q4_K_M"): 18_892,
    ("phi-3-mini-4k-instruct", "Q4_K_M"): 2229,
    ("phi-3-mini-4k-instruct", "Q8_0"): 3773,
    ("phi-2", "Q8_0"): 2687,
    ("stablelm-zephyr-3b", "Q8_0"): 2703,
    ("qwen2.5-0.5b-instruct", "Q4_K_M"): 374,
    ("qwen2.5-1.5b-instruct", "Q4_K_M"): 935,
}


def variant(name, quantisation):
    return next(each for each in MODELS[name].entry.variants if each.name == quantisation)


@pytest.mark.parametrize(("name", "quantisation"), EXACT_BYTES)
def test_files_have_their_exact_sizes(name, quantisation):
    assert variant(name, quantisation).shape.file_bytes == EXACT_BYTES[name, quantisation]


@pytest.mark.parametrize(("name", "quantisation"), CARD_MIB)
def test_weights_on_a_card_are_the_reference_tables(name, quantisation):
    shape = variant(name, quantisation).shape
    assert (shape.tensor_bytes - shape.host_bytes) / 2**20 == pytest.approx(CARD_MIB[name, quantisation], rel=0.001)


def test_a_files_tensors_leave_room_for_its_vocabulary_and_no_more():
    for model in MODELS.values():
        for each in model.entry.variants:
            header = each.shape.file_bytes - each.shape.tensor_bytes
            assert 0 <= header <= 80 * each.shape.vocabulary, f"{model.entry.name} {each.name}"


def test_every_variant_can_be_downloaded_and_none_claims_to_be_here():
    for model in MODELS.values():
        for each in model.entry.variants:
            assert each.repo
            assert each.repo.count("/") == 1
            assert each.file.endswith((".gguf", ".safetensors"))
            assert not each.local


def test_every_model_has_a_description_and_a_licence():
    for model in MODELS.values():
        assert model.entry.description.endswith(".")
        assert model.entry.licence


def test_names_and_aliases_are_unique_in_any_case():
    names = [name.lower() for model in MODELS.values() for name in (model.entry.name, *model.entry.aliases)]
    assert len(names) == len(set(names))


def test_the_two_demo_models_come_with_the_installation():
    assert {name for name, model in MODELS.items() if model.place is not None} == {"tars-help-desk", "all-minilm-l6-v2"}
    assert MODELS["tars-help-desk"].place().name == "tars-help-desk.gguf"
    assert MODELS["all-minilm-l6-v2"].entry.kind is ModelKind.EMBEDDING


def test_variants_stand_best_first():
    mistral = MODELS["mistral-7b-instruct-v0.2"].entry.variants
    assert [each.name for each in mistral] == ["Q8_0", "Q4_K_M"]
    assert ordered(reversed(mistral)) == mistral


def test_quality_follows_the_bits():
    order = ["Q2_K", "Q3_K_M", "Q4_0", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0", "F16", "F32"]
    assert sorted(order, key=QUALITY.__getitem__) == order
