"""The arithmetic of `scripts/bench engine` and how it reads servers' streams: what would silently make its numbers wrong."""

from __future__ import annotations

import argparse
import json
import math
import tomllib
from pathlib import Path

import pytest
from engine import _parts, parts_of
from engine_chat import beside, describe_python_share, describe_reuse, llama_settings
from engine_embeddings import PATTERNS, EmbeddingReport, embedding_aims
from engine_memory import parse_smaps
from engine_prompts import embedding_texts, prompts, prompts_with_common_beginning
from engine_results import (
    Aim,
    Answer,
    Measurement,
    best_setting,
    chat_aims,
    median_of,
    paired_ratio,
    prefix_aims,
    quantile,
    summarise,
    trend,
    verdict,
)
from engine_servers import Deployed, node_config
from generation_load import LlamaServerManner, OpenAiManner, Recorded, TarsManner, read_answer

from tars.config_schema.whole import Config

WORDS = [f"word{number}" for number in range(500)]


def measured(rate: float, first: float = 100.0, p99: float = 20.0) -> Measurement:
    return Measurement(rate, first, p99 / 2, p99, p99 * 2)


# --- results ---


def test_quantile_is_the_nearest_rank() -> None:
    assert quantile([3, 1, 2], 0.5) == 2
    assert quantile(list(range(1, 101)), 0.99) == 99
    assert quantile([7], 0.99) == 7
    with pytest.raises(ValueError, match="no values"):
        quantile([], 0.5)


def test_a_load_is_all_tokens_over_the_whole_time_and_gaps_are_by_token() -> None:
    first = Answer(sent=0.0, token_times=(1.0, 1.0, 1.4), ended=1.5)
    second = Answer(sent=0.5, token_times=(2.0, 2.1, 2.2), ended=3.0)
    found = summarise([first, second])
    assert found.tokens_per_second == pytest.approx(6 / 3.0)
    assert found.first_token_ms == pytest.approx(1250)
    assert found.inter_token_p50_ms == pytest.approx(100)
    assert found.inter_token_max_ms == pytest.approx(400)


def test_ratios_are_taken_round_by_round() -> None:
    # The third round met a busy machine: the ratio of medians would be 1.0.
    assert paired_ratio([20, 20, 2], [10, 20, 1]) == 2
    with pytest.raises(ValueError, match="zip"):
        paired_ratio([1], [1, 2])


def test_the_best_setting_is_by_median_and_medians_are_by_field() -> None:
    rounds = {"lucky": [measured(1), measured(300), measured(2)], "steady": [measured(100)] * 3}
    assert best_setting(rounds) == "steady"
    assert median_of([measured(1, 30), measured(3, 10), measured(2, 20)]) == measured(2, 20)


def test_aims_say_reached_only_within_the_bound() -> None:
    assert Aim("a", 1.0, at_least=1.0).reached
    assert not Aim("a", 0.999, at_least=1.0).reached
    assert not Aim("a", math.nan, at_least=1.0).reached
    assert not Aim("a", math.nan, at_most=2.0).reached
    assert "NOT reached" in str(Aim("a", 3.0, at_most=2.0))
    assert verdict([Aim("a", 1, at_least=1), Aim("b", 0, at_least=1)]) == "1 of 2 aims reached"


def test_chat_aims_compare_with_the_setting_of_most_tokens_a_second() -> None:
    ours = {1: [measured(120, 100, 20)], 8: [measured(240, 90, 40)]}
    theirs = {
        1: {"fast": [measured(100, 100, 20)], "slow": [measured(50, 10, 1)]},
        8: {"fast": [measured(200, 100, 20)]},
    }
    aims = chat_aims(ours, theirs, "m")
    assert [round(aim.value, 6) for aim in aims] == [1.2, 1.0, 1.0, 1.2, 0.9, 2.0, 1.2]
    assert [aim.reached for aim in aims] == [True, True, True, True, True, False, True]
    assert [aim.reached for aim in prefix_aims({4: [measured(120, 60)]}, {4: {"x": [measured(100, 100)]}})] == [
        True,
        True,
    ]


def test_a_trend_ignores_a_spike_and_finds_a_leak() -> None:
    flat = [(float(at), 100.0 + (50 if at == 30 else 0)) for at in range(60)]
    assert trend(flat).flat(share=0.01, least=0)
    leak = [(float(at), 100.0 + at) for at in range(2000)]
    assert trend(leak).growth == pytest.approx(1999)
    assert trend(leak).first == pytest.approx(100)
    assert not trend(leak).flat(share=0.02, least=8)
    with pytest.raises(ValueError, match="two samples"):
        trend([(1.0, 1.0)])


# --- prompts ---


def test_prompts_are_seeded_and_share_only_what_they_should() -> None:
    assert prompts(WORDS, 3, 20, "a") == prompts(WORDS, 3, 20, "a")
    assert len({text.split()[0] for text in prompts(WORDS, 20, 5, "b")}) > 10
    common = prompts_with_common_beginning(WORDS, 4, 200, 170, "c")
    assert len({" ".join(text.split()[:170]) for text in common}) == 1
    assert len({" ".join(text.split()[170:]) for text in common}) == 4
    lengths = [len(text.split()) for text in embedding_texts(WORDS, 500, "d")]
    assert min(lengths) >= 8
    assert max(lengths) <= 200
    assert 90 < sum(lengths) / 500 < 118


# --- reading streams ---


def stream(*events: object) -> Recorded:
    """Each event in a chunk of its own, a second apart, torn in the middle of the next."""
    text = b"".join(b"data: " + (e if isinstance(e, bytes) else json.dumps(e).encode()) + b"\n\n" for e in events)
    half = len(text) // 2
    return Recorded(0.0, 200, [(1.0, text[:half]), (2.0, text[half:])], 3.0)


def tars_events(*groups: list[int]) -> list[object]:
    deltas: list[object] = [{"method": "inference.delta", "params": {"id": 1, "token_ids": ids}} for ids in groups]
    count = sum(map(len, groups))
    usage = {"prompt_tokens": 200, "completion_tokens": count, "total_tokens": 0, "cached_tokens": 170}
    return [*deltas, {"id": 1, "result": {"usage": usage}}]


def test_tars_tokens_are_those_of_its_deltas() -> None:
    answer = read_answer(stream(*tars_events([1, 2], [3])), TarsManner("m"), 3)
    assert len(answer.token_times) == 3
    assert set(answer.token_times) <= {1.0, 2.0}
    assert (answer.prompt_tokens, answer.cached_tokens) == (200, 170)


def test_llama_servers_withheld_token_comes_with_the_last_event() -> None:
    end = {"content": "", "stop": True, "tokens_evaluated": 200, "tokens_predicted": 3, "timings": {"cache_n": 5}}
    answer = read_answer(
        stream({"content": "a", "tokens": [1]}, {"content": "b", "tokens": [2]}, end), LlamaServerManner(), 3
    )
    assert answer.token_times[-1] == 3.0
    assert answer.cached_tokens == 5


def test_the_openai_stream_counts_pieces_without_the_last() -> None:
    piece = {"choices": [{"text": "x", "finish_reason": None}]}
    end = {"choices": [{"text": "", "finish_reason": "length"}]}
    assert len(read_answer(stream(piece, piece, end, b"[DONE]"), OpenAiManner(), 2).token_times) == 2


@pytest.mark.parametrize(
    "events",
    [
        tars_events([1], [2]),
        tars_events([1, 2, 3], [4]),
        [{"id": 1, "error": {"message": "overloaded"}}],
        tars_events([1, 2, 3])[:-1],
    ],
    ids=["too few tokens", "too many tokens", "an error", "no end"],
)
def test_an_answer_that_is_not_what_was_asked_is_no_measurement(events: list[object]) -> None:
    with pytest.raises(RuntimeError):
        read_answer(stream(*events), TarsManner("m"), 3)


def test_a_refusal_is_no_measurement() -> None:
    with pytest.raises(RuntimeError, match="HTTP 503"):
        read_answer(Recorded(0.0, 503, [(1.0, b"busy")], 2.0), TarsManner("m"), 3)


def test_both_sides_are_asked_for_the_same() -> None:
    ours, theirs = TarsManner("m", (2,)).body("hello", 96)["params"], LlamaServerManner().body("hello", 96)
    assert ours["prompt"] == theirs["prompt"]
    assert (ours["max_tokens"], ours["temperature"]) == (theirs["n_predict"], theirs["temperature"]) == (96, 0)
    assert ours["logit_bias"] == {"2": -100}
    assert theirs["ignore_eos"]
    assert "logit_bias" not in TarsManner("m").body("hello", 96)["params"]


# --- chat, memory, embeddings ---


def test_only_gaps_that_touch_the_long_prompt_count() -> None:
    running = Answer(0.0, (1.0, 2.0, 2.5, 9.0, 9.1), 10.0)
    found = beside([running], Answer(2.2, (8.0,), 8.0))
    assert found["max_ms"] == pytest.approx(6500)
    assert found["p50_ms"] == pytest.approx(500)
    assert found["long_first_ms"] == pytest.approx(5800)
    with pytest.raises(RuntimeError, match="nothing to measure"):
        beside([running], Answer(9.5, (9.9,), 9.9))


def test_settings_vary_what_matters_and_are_named_apart() -> None:
    settings = llama_settings(2, on_card=False, small=True, quick=False)
    assert len({setting.name for setting in settings}) == len(settings)
    words = {" ".join(setting.arguments) for setting in settings}
    for option in ("-fa on", "-fa off", "-kvu", "-t 1", "-t 2", "-ub 64"):
        assert any(option in line for line in words), option
    assert any(not setting.cache_prompt for setting in settings)


def test_python_share_and_reuse_come_from_counters() -> None:
    before = {"steps": 100, "python_seconds": 1.0, "native_seconds": 9.0, "prompt_tokens": 0, "prompt_tokens_cached": 0}
    after = {
        "steps": 200,
        "python_seconds": 1.1,
        "native_seconds": 10.9,
        "prompt_tokens": 200,
        "prompt_tokens_cached": 170,
    }
    assert "1000 microseconds" in describe_python_share(before, after)
    assert "5.0%" in describe_python_share(before, after)
    assert "85.0%" in describe_reuse(before, after)
    assert "counts no steps" in describe_python_share(before, before)
    assert "does not count" in describe_reuse(None, None)


def test_smaps_are_read_in_bytes() -> None:
    text = "00400000-7fff [rollup]\nRss:       2048 kB\nPss:    1024 kB\nPss_Anon:  512 kB\nPss_File:  512 kB\nSwap: 0 kB\n"
    assert parse_smaps(text) == {"Rss": 2097152, "Pss": 1048576, "Pss_Anon": 524288, "Pss_File": 524288}


def test_embedding_aims_name_a_missing_peer_by_its_absence() -> None:
    report = EmbeddingReport(limit={pattern: [100.0] for pattern in PATTERNS}, added_ms=1.0)
    for pattern in PATTERNS:
        report.note("tars", pattern, 95.0)
        report.note("plain encode", pattern, 20.0)
    aims = embedding_aims(report, None)
    assert all(aim.reached for aim in aims)
    assert not any("infinity" in aim.what for aim in aims)
    slow = EmbeddingReport(rates=report.rates, limit={pattern: [200.0] for pattern in PATTERNS}, added_ms=3.0)
    assert [aim.reached for aim in embedding_aims(slow, None)] == [False, True, False, True, False]


def test_the_nodes_configuration_is_one_that_tars_takes(tmp_path: Path) -> None:
    text = node_config([Deployed("small", tmp_path / "m.gguf", slots=16, context=512), Deployed("all-minilm-l6-v2")])
    config = Config.model_validate(tomllib.loads(text))
    assert (config.deploy[0].model, config.deploy[0].slots, config.deploy[0].context) == ("small", 16, 512)
    assert not config.demo_models


def test_parts_run_in_their_order_and_a_wrong_one_is_named() -> None:
    assert parts_of("long, chat") == ["chat", "long"]
    with pytest.raises(ValueError, match="speed is no part"):
        parts_of("speed")
    with pytest.raises(argparse.ArgumentTypeError, match="nothing is no part"):
        _parts("")
