"""The llama engine on a real (random) GGUF, in this process: what a worker's engine thread does, without the worker."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_thread import EngineThread
from tiny_gguf import write_tiny_gguf

from tars.errors import (
    BadGrammar,
    BadModelFile,
    Cancelled,
    DeadlineExceeded,
    InternalError,
    InvalidParams,
    PromptTooLong,
    ReplicaFailed,
    WrongModelKind,
)
from tars.messages.inference import (
    ChatMessage,
    ChatParams,
    CompleteParams,
    Delta,
    EmbedParams,
    Generated,
    Tokenized,
    TokenizeParams,
)
from tars.workers.engine import Event, LoadSpec, Work
from tars.workers.llama_engine import LlamaEngine

pytestmark = pytest.mark.model

CONTEXT = 512
PROMPT = "hello world, this is a prompt that is longer than one chunk of the prefill. " * 4


class Running(EngineThread):
    """An engine with its thread; `call` submits and collects."""

    def __init__(self, path: Path, **changes: object) -> None:
        super().__init__(
            LlamaEngine(),
            LoadSpec.model_validate(
                {"replica": "r", "model": "m", "engine": "llama", "path": str(path), "context": CONTEXT, **changes}
            ),
        )

    def end_of(self, number: int) -> tuple[list[Delta], Event]:
        deltas = []
        while True:
            who, event = self.events.get(timeout=60)
            if who != number:
                continue
            if isinstance(event, Exception):
                raise event
            if not isinstance(event, Delta):
                return deltas, event
            deltas.append(event)

    def call(self, work: Work, seconds: float | None = 60) -> tuple[list[Delta], Event]:
        return self.end_of(self.submit(work, seconds))

    def generate(self, **params: object) -> Generated:
        deltas, result = self.call(CompleteParams.model_validate({"prompt": PROMPT, "max_tokens": 24, **params}))
        assert isinstance(result, Generated)
        assert "".join(delta.text for delta in deltas) == result.text
        return result


@pytest.fixture(scope="module")
def running(tiny_gguf: Path) -> Iterator[Running]:
    engine = Running(tiny_gguf, exact=True)
    yield engine
    engine.close()


def chat(text: str, **params: object) -> ChatParams:
    return ChatParams.model_validate({"messages": [ChatMessage(role="user", content=text)], **params})


def test_loading_reports_growing_progress_and_what_was_loaded(running: Running) -> None:
    percents = [percent for _, percent in running.stages]
    assert percents == sorted(percents)
    assert {stage for stage, _ in running.stages} == {"import", "read", "load", "warm"}
    info = running.info
    assert (info.model_kind, info.architecture, info.context, info.has_chat_template) == (
        "chat",
        "llama",
        CONTEXT,
        True,
    )
    assert info.memory_bytes > 0
    assert info.speeds.decode_tokens_per_second
    assert info.speeds.prefill_tokens_per_second


def test_greedy_and_seeded_texts_repeat_whether_the_prompt_is_cached_or_not(running: Running) -> None:
    cold = running.generate(temperature=0.0)
    assert cold.finish_reason in ("stop", "length")
    assert running.generate(temperature=0.0).text == cold.text
    seeded = running.generate(seed=5)
    running.generate(prompt="something else", seed=5)
    assert running.generate(seed=5).text == seeded.text
    assert running.generate(seed=6).text != seeded.text


def test_a_call_that_cannot_be_prepared_for_a_fault_of_ours_ends_alone(
    running: Running, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The engine thread's end is the worker's, and every other caller's."""

    def broken(schema: object) -> str:
        raise TypeError("unhashable")

    monkeypatch.setattr("tars.workers.llama_sampling.schema_grammar", broken)
    with pytest.raises(InternalError) as error:
        running.generate(json_schema={"type": "object"})
    assert "unhashable" not in error.value.message
    assert "unhashable" in capsys.readouterr().err
    assert running.generate(max_tokens=2).usage.completion_tokens


def test_usage_and_timings_are_counted(running: Running) -> None:
    result = running.generate(temperature=0.0, max_tokens=10)
    _, tokens = running.call(TokenizeParams(text=PROMPT))
    assert isinstance(tokens, Tokenized)
    assert result.finish_reason == "length"
    assert result.usage.prompt_tokens == len(tokens.tokens)
    assert result.usage.completion_tokens == 10
    assert result.usage.total_tokens == len(tokens.tokens) + 10
    assert result.timings.first_token_ms is not None
    assert result.timings.first_token_ms <= result.timings.total_ms
    assert result.timings.tokens_per_second


def test_a_deltas_text_is_the_text_of_its_tokens(running: Running) -> None:
    deltas, result = running.call(CompleteParams(prompt=PROMPT, temperature=0.0, max_tokens=60))
    assert isinstance(result, Generated)
    assert sum(len(delta.token_ids) for delta in deltas) == result.usage.completion_tokens
    pieces = running.engine._model.pieces
    for delta in deltas:
        assert b"".join(pieces[token] for token in delta.token_ids).decode("utf-8", "replace") == delta.text


def test_a_stop_string_ends_the_text_before_it(running: Running) -> None:
    whole = running.generate(temperature=0.0, max_tokens=40).text
    stop = whole[11:14]
    result = running.generate(temperature=0.0, max_tokens=40, stop=["never in there", stop])
    assert result.finish_reason == "stop"
    assert result.text == whole[: whole.index(stop)]


def test_the_context_ends_a_generation_without_a_bound(running: Running) -> None:
    result = running.generate(max_tokens=None, temperature=0.0, logit_bias={"4": -100.0, "2": -100.0})
    assert (result.finish_reason, result.usage.total_tokens) == ("length", CONTEXT)


def test_log_probabilities_are_a_softmax_of_the_raw_logits(running: Running) -> None:
    result = running.generate(temperature=0.0, max_tokens=4, logprobs=20)
    assert result.logprobs is not None
    assert len(result.logprobs) == 4
    for one in result.logprobs:
        values = [logprob for _, logprob in one.top]
        assert values == sorted(values, reverse=True)
        assert one.logprob == pytest.approx(values[0])  # greedy takes the best
        assert 0 < sum(map(math.exp, values)) <= 1
    # Temperature and bias come after them.
    warm = running.generate(temperature=3.0, seed=1, max_tokens=1, logprobs=20, logit_bias={"300": 50.0}).logprobs
    assert warm is not None
    assert warm[0].token_id == 300
    assert [pytest.approx(value, abs=1e-4) for _, value in warm[0].top] == [
        value for _, value in result.logprobs[0].top
    ]


def test_all_alternatives_together_have_probability_one(running: Running) -> None:
    import numpy as np

    from tars.workers.llama_sampling import token_logprob

    logits = np.random.default_rng(3).standard_normal(running.engine._model.tokens).astype(np.float32)
    one = token_logprob(running.engine._model, logits, 7, len(logits))
    assert sum(math.exp(value) for _, value in one.top) == pytest.approx(1.0, abs=1e-6)
    expected = float(logits[7]) - math.log(float(np.exp(logits.astype(np.float64)).sum()))
    assert one.logprob == pytest.approx(expected, abs=1e-6)


def test_a_bias_forbids_and_forces_tokens(running: Running) -> None:
    first = running.generate(temperature=0.0, max_tokens=1, logprobs=0).logprobs
    assert first is not None
    banned = running.generate(
        temperature=0.0, max_tokens=1, logprobs=0, logit_bias={str(first[0].token_id): -100.0}
    ).logprobs
    assert banned is not None
    assert banned[0].token_id != first[0].token_id


def test_a_frequency_penalty_makes_the_text_more_varied(running: Running) -> None:
    def tokens(**params: object) -> set[int]:
        favoured = {"300": 8.0, "301": 7.9}
        logprobs = running.generate(temperature=0.0, max_tokens=12, logprobs=0, logit_bias=favoured, **params).logprobs
        assert logprobs is not None
        return {one.token_id for one in logprobs}

    assert len(tokens(frequency_penalty=2.0)) > len(tokens())
    assert len(tokens(presence_penalty=2.0)) > len(tokens())
    assert len(tokens(repeat_penalty=3.0)) > len(tokens())


def test_json_schema_and_grammar_bind_the_text(running: Running) -> None:
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 8},
            "age": {"type": "integer", "minimum": 0, "maximum": 99},
        },
        "required": ["name", "age"],
    }
    for seed in range(3):
        result = running.generate(json_schema=schema, max_tokens=120, seed=seed)
        assert result.finish_reason == "stop"
        assert set(json.loads(result.text)) == {"name", "age"}
    result = running.generate(grammar='root ::= "日本" [0-9]{3} "."', seed=1)
    assert result.text[:2] == "日本"
    assert len(result.text) == 6
    assert running.generate(grammar='root ::= "yes" | "no"', temperature=0.0).text in ("yes", "no")


@pytest.mark.parametrize(
    "params",
    [
        {"grammar": "root ::= ("},
        {"grammar": "no rules at all"},
        {"grammar": 'start ::= "a"'},
        {"grammar": "root ::= missing"},
        {"grammar": 'root ::= root "a"'},
        {"grammar": "   "},
        {"grammar": 'root ::= "a"\0'},
        {"grammar": "root ::= " + "(" * 100_000},
        {"grammar": 'root ::= "a"{999999999}'},
        {"grammar": "root ::= [z-a]"},
        {"json_schema": {"type": "nope"}},
        {"json_schema": {"$ref": "https://example.com/schema.json"}},
        {"json_schema": {"$ref": "#/$defs/missing"}},
        {"json_schema": {"$ref": "#"}},
        {"json_schema": {"type": "array", "items": {"type": "integer"}, "minItems": 10**9}},
        {"json_schema": {"type": "string", "maxLength": 10**9}},
        {"json_schema": {"type": "string", "pattern": "^a{1000000000}$"}},
        {"json_schema": {"type": "string", "pattern": "^((((("}},
        {"json_schema": {"enum": [str(number) for number in range(50_000)]}},
    ],
)
def test_a_bad_grammar_or_schema_is_one_clear_error_and_the_engine_goes_on(
    running: Running, params: dict[str, object]
) -> None:
    with pytest.raises(BadGrammar):
        running.generate(**params)
    assert running.generate(max_tokens=1).usage.completion_tokens <= 1


@pytest.mark.parametrize("bias", [{"x": 1.0}, {"-1": 1.0}, {"99999999": 1.0}, {"1": 101.0}, {"9" * 5000: 1.0}])
def test_a_bias_on_no_token_is_the_callers_error(running: Running, bias: dict[str, float]) -> None:
    with pytest.raises(InvalidParams, match="logit_bias"):
        running.generate(logit_bias=bias)


@pytest.mark.parametrize("prompt", ["", "\0", "a\0b", "\ud800", "\udfff and more", "\u202e", "<|im_end|>" * 20])
def test_odd_prompts_are_answered(running: Running, prompt: str) -> None:
    assert isinstance(running.call(CompleteParams(prompt=prompt, max_tokens=2))[1], Generated)
    assert isinstance(running.call(chat(prompt, max_tokens=2))[1], Generated)


def test_an_empty_prompt_without_a_first_token_is_the_callers_error(tmp_path: Path) -> None:
    engine = Running(write_tiny_gguf(tmp_path / "no-bos.gguf", add_bos=False))
    assert isinstance(engine.call(CompleteParams(prompt="", max_tokens=2))[1], Generated)  # begun with BOS all the same
    engine.close()


def test_a_prompt_beyond_the_context_is_refused_with_its_count(running: Running) -> None:
    for text in ("hello " * CONTEXT, "x" * 4 * 2**20, "🙂" * 2**18):
        started = time.monotonic()
        with pytest.raises(PromptTooLong) as caught:
            running.call(CompleteParams(prompt=text))
        assert caught.value.details["context"] == CONTEXT
        assert caught.value.details["prompt_tokens"] >= CONTEXT
        assert time.monotonic() - started < 10


def test_four_mebibytes_are_tokenized(running: Running) -> None:
    _, result = running.call(TokenizeParams(text="ab" * 2**21, add_special=False))
    assert isinstance(result, Tokenized)
    assert len(result.tokens) == 2**22


def test_special_tokens_are_added_once(running: Running) -> None:
    _, with_special = running.call(TokenizeParams(text="hi"))
    _, without = running.call(TokenizeParams(text="hi", add_special=False))
    assert isinstance(with_special, Tokenized)
    assert isinstance(without, Tokenized)
    assert with_special.tokens == [1, *without.tokens]


def test_a_template_that_writes_the_first_token_does_not_get_a_second(tmp_path: Path) -> None:
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    engine = Running(write_tiny_gguf(tmp_path / "bos.gguf", template=template))
    _, plain = engine.call(CompleteParams(prompt="hello", max_tokens=1))
    _, chatted = engine.call(chat("hello", max_tokens=1))
    assert isinstance(plain, Generated)
    assert isinstance(chatted, Generated)
    assert plain.usage.prompt_tokens == chatted.usage.prompt_tokens
    engine.close()


def test_without_a_template_chatml_is_taken_and_said(tmp_path: Path) -> None:
    engine = Running(write_tiny_gguf(tmp_path / "bare.gguf", template=None))
    assert not engine.info.has_chat_template
    assert isinstance(engine.call(chat("hello", max_tokens=2))[1], Generated)
    engine.close()


def endless(**params: object) -> CompleteParams:
    return CompleteParams.model_validate({"prompt": "go", "logit_bias": {"2": -100.0, "4": -100.0}, **params})


def test_a_cancelled_call_ends_and_the_next_one_runs(running: Running) -> None:
    first, waiting, last = running.submit(endless()), running.submit(endless()), running.submit(endless(max_tokens=1))
    while running.events.get(timeout=60)[0] != first:
        pass
    running.engine.cancel(waiting)
    running.engine.cancel(first)
    ended: dict[int, Event | Exception] = {}
    while last not in ended:
        number, event = running.events.get(timeout=60)
        if not isinstance(event, Delta):
            ended[number] = event
    assert isinstance(ended[first], Cancelled | Generated)  # it may have reached the context's end first
    assert isinstance(ended[waiting], Cancelled)
    assert isinstance(ended[last], Generated)


def test_a_deadline_stops_the_active_and_the_waiting_call(running: Running) -> None:
    with pytest.raises(DeadlineExceeded):
        running.call(endless(), 0.0)
    mark = running.engine.progress_mark()
    assert isinstance(running.call(endless(max_tokens=3))[1], Generated)
    assert running.engine.progress_mark() > mark


def test_an_embedding_call_is_the_wrong_kind(running: Running) -> None:
    with pytest.raises(WrongModelKind):
        running.call(EmbedParams(input="x"))


def test_an_abort_in_the_middle_of_a_prefill_changes_nothing(running: Running) -> None:
    expected = running.generate(temperature=0.0).text
    context = running.engine._context
    assert context is not None
    for _ in range(3):
        number = running.submit(CompleteParams(prompt=PROMPT, max_tokens=24, temperature=0.0))
        context.abort.set()  # as a cancellation meant for a call that just ended
        _, result = running.end_of(number)
        assert isinstance(result, Generated)
        assert result.text == expected


def damaged(data: bytes, how: str) -> bytes:
    middle = len(data) // 2
    return {
        "empty": b"",
        "magic only": data[:4],
        "no gguf": b"PK\x03\x04" + data[4:],
        "cut in the header": data[:2000],
        "cut in the tensors": data[:middle],
        "noise": data[:20_000] + bytes(byte ^ 0x5A for byte in data[20_000:]),
    }[how]


@pytest.mark.parametrize("how", ["empty", "magic only", "no gguf", "cut in the header", "cut in the tensors", "noise"])
def test_a_damaged_file_is_a_clear_error_without_its_path(tiny_gguf: Path, tmp_path: Path, how: str) -> None:
    path = tmp_path / "damaged.gguf"
    path.write_bytes(damaged(tiny_gguf.read_bytes(), how))
    with pytest.raises(BadModelFile) as caught:
        Running(path)
    assert str(tmp_path) not in caught.value.message
    if how == "cut in the tensors":
        assert "truncated" in caught.value.message


def test_an_unknown_architecture_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadModelFile, match="frobnicator"):
        Running(write_tiny_gguf(tmp_path / "odd.gguf", architecture="frobnicator"))


def test_several_slots_and_a_quantised_cache_load(tmp_path: Path) -> None:
    # Blocks of 32: the head has to be as wide.
    path = write_tiny_gguf(tmp_path / "wide.gguf", embedding=128)
    engine = Running(path, slots=3, kv_type="q8_0", flash_attention=True, context=256)
    assert engine.generate(max_tokens=4, prompt="hi").usage.completion_tokens <= 4
    with pytest.raises(PromptTooLong):
        engine.generate(prompt="hello " * 256)
    engine.close()


def test_a_cache_type_that_the_model_cannot_have_is_refused(tiny_gguf: Path) -> None:
    with pytest.raises(ReplicaFailed, match="kv_type f16"):
        Running(tiny_gguf, kv_type="q8_0", flash_attention=True)
