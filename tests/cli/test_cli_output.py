from __future__ import annotations

from types import SimpleNamespace

import pytest
from drawing import drawn, row

from tars.cli import output
from tars.messages.inference import EmbedResult, RerankResult, Scored, Timings, Usage
from tars.messages.node import ModelPlace, ModelsResult

GIB = 2**30


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("one\ntwo\tthree", "one\ntwo\tthree"),
        ("\x1b]0;owned\x07title", "]0;ownedtitle"),
        ("\x9b31mred", "31mred"),
        ("\r\x7f\x00", ""),
        ("é 漢 🎉", "é 漢 🎉"),
    ],
)
def test_text_from_the_wire_loses_its_control_characters(text: str, shown: str) -> None:
    assert output.plain(text) == shown


@pytest.mark.parametrize(
    ("held", "free", "bar"),
    [
        (0, 12, "░" * 24),
        (6, 6, "█" * 12 + "░" * 12),
        (3, 6, "█" * 6 + "▒" * 6 + "░" * 12),
        (12, 0, "█" * 24),
        (12, 12, "█" * 24),  # a probe that says all is free while TARS holds all: never a longer bar
    ],
)
def test_a_memory_bar_shows_held_others_and_free(make: SimpleNamespace, held: int, free: int, bar: str) -> None:
    device = make.device(memory_held_bytes=held * GIB, memory_free_bytes=free * GIB)
    assert output.memory_bar(device).plain == bar


def test_a_device_without_memory_does_not_break_the_bar(make: SimpleNamespace) -> None:
    device = make.device(memory_total_bytes=0, memory_free_bytes=0, memory_held_bytes=0)
    assert len(output.memory_bar(device).plain) == output.BAR_CELLS


def test_models_show_replicas_ready_of_wanted_and_where_they_are(make: SimpleNamespace) -> None:
    places = [
        ModelPlace(replica=f"a@{number}", node="n", node_name=name, device_name="card", state=state)
        for number, (name, state) in enumerate([("pc2", "loading"), ("pc1", "ready"), ("pc1", "ready")])
    ]
    served = make.model(
        "a", deployed=True, replicas_wanted=3, replicas_ready=2, state="ready", local=True, places=places
    )
    text = drawn(output.models_view(ModelsResult(models=[served, make.model("c")])))
    assert row(text, "2/3").split()[:4] == ["a", "chat", "ready", "2/3"]
    assert "pc1 x2, pc2 (loading)" in row(text, "2/3")
    assert "Q8_0, Q4_K_M" in row(text, "2/3")
    assert "available" in row(text, "c ")
    assert "knows no model" in drawn(output.models_view(ModelsResult(models=[])))


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ([1, 0], [1, 0], 1.0),
        ([1, 0], [0, 1], 0.0),
        ([1, 0], [-2, 0], -1.0),
        ([3, 4], [4, 3], 0.96),
        ([0, 0], [1, 0], 0.0),
    ],
)
def test_cosine(one: list[float], other: list[float], expected: float) -> None:
    assert output.cosine(one, other) == pytest.approx(expected)


def embeddings(make: SimpleNamespace, vectors: list[list[float]], truncated: list[int]) -> EmbedResult:
    return EmbedResult(
        model="minilm", embeddings=vectors, dimensions=len(vectors[0]), truncated=truncated,
        usage=Usage(prompt_tokens=4, total_tokens=4), timings=Timings(), served_by=make.served_by,
    )  # fmt: skip


def test_embeddings_show_dimensions_first_values_and_each_pair(make: SimpleNamespace) -> None:
    text = drawn(
        output.embeddings_view(embeddings(make, [[1.0, 0.0], [0.6, 0.8]], [1]), ["first text", "second\ntext"])
    )
    assert "minilm: 2 x 2 dimensions, 4 tokens" in text
    assert "+1.000 +0.000" in row(text, "first text")
    assert "second text (cut at the model's limit)" in text
    assert "0.60" in text


def test_one_embedding_has_no_pairs_and_many_have_too_many(make: SimpleNamespace) -> None:
    assert "cosine" not in drawn(output.embeddings_view(embeddings(make, [[1.0, 0.0]], []), ["only"]))
    many = output.SHOWN_PAIRS + 1
    text = drawn(output.embeddings_view(embeddings(make, [[1.0, 0.0]] * many, []), ["text"] * many))
    assert "--json" in text
    assert "cosine" not in text


def test_reranked_documents_show_their_place_their_score_and_what_was_cut(make: SimpleNamespace) -> None:
    result = RerankResult(
        model="rerank\x1b[31mer", results=[Scored(index=1, score=0.75), Scored(index=0, score=0.25)], truncated=[0],
        usage=Usage(prompt_tokens=4, total_tokens=4), timings=Timings(), served_by=make.served_by,
    )  # fmt: skip
    text = drawn(output.rerank_view(result, ["first [bold]text", "second"]))
    assert "2 documents, 4 tokens" in text
    assert row(text, "second").split()[:2] == ["2", "0.7500"]
    assert "first [bold]text (cut at the model's limit)" in row(text, "0.2500")
    assert "\x1b" not in text


def test_the_line_under_an_answer_names_the_simulated_device_and_the_cut(make: SimpleNamespace) -> None:
    result = make.chat_result("text", "length")
    simulated = result.model_copy(update={"served_by": make.served_by.model_copy(update={"simulated": True})})
    footer = output.chat_footer(simulated).plain
    assert "CPU (simulated)" in footer
    assert "140 tokens/s" in footer
    assert "cut at max tokens" in footer


@pytest.mark.parametrize(
    ("seconds", "shown"), [(8.9, "8 s"), (60, "1 min"), (3600, "1 h 0 min"), (7500, "2 h 5 min"), (90_000, "1 d 1 h")]
)
def test_durations_are_short(seconds: float, shown: str) -> None:
    assert output.duration(seconds) == shown
