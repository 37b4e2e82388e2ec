"""Sampling for a real vocabulary: llama.cpp's own samplers and grammar engine are the oracle."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tars.errors import BadGrammar, InvalidParams, ReplicaFailed
from tars.messages.inference import CompleteParams

if TYPE_CHECKING:
    from tars.workers.llama_model import Model

pytestmark = pytest.mark.model  # importing the module loads llama.cpp


@pytest.fixture(scope="module")
def model(tiny_gguf: Path) -> Iterator[Model]:
    from tars.workers import llama_library
    from tars.workers.engine import LoadSpec
    from tars.workers.llama_model import Model

    log = llama_library.NativeLog()
    log.install()
    model = Model(LoadSpec(replica="r", model="m", engine="llama", path=str(tiny_gguf)), log, lambda percent: None)
    yield model
    model.close()


def sampler(model: Model, seed: int = 1, generated: list[int] | None = None, **params: Any) -> Any:
    from tars.workers.llama_sampling import Sampler, compile_grammar

    given = CompleteParams(prompt="x", **params)
    return Sampler(model, given, [5, 6, 7], generated or [], seed, compile_grammar(model, given))


def rows(model: Model, count: int, seed: int = 3) -> Any:
    import numpy as np

    return (np.random.default_rng(seed).standard_normal((count, model.tokens)) * 3).astype(np.float32)


CALLS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "defaults": {},
    "penalties": {"repeat_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2, "temperature": 1.5},
    "greedy with penalties": {"temperature": 0.0, "repeat_penalty": 1.5},
    "bias": {"logit_bias": {"10": 5.0, "11": -5.0}, "temperature": 1.5},
    "nothing cut": {"top_k": 0, "top_p": 1.0, "min_p": 0.0},
    "json": {"json_schema": {"type": "object", "properties": {"a": {"type": "string"}}}, "temperature": 1.5},
    "grammar, nothing cut": {"grammar": 'root ::= ([a-z]+ " ")*', "top_k": 0, "top_p": 1.0, "min_p": 0.0},
    "greedy grammar": {"grammar": 'root ::= ([a-z]{3} " ")*', "temperature": 0.0},
}


@pytest.mark.parametrize("name", CALLS)
def test_a_sequence_that_is_continued_anywhere_goes_on_exactly(model: Model, name: str) -> None:
    logits = rows(model, 40)
    logits[:, list(model.end_tokens)] = -30
    whole = sampler(model, 7, **CALLS[name])
    tokens = [whole.sample(row) for row in logits]
    for place in (1, 17, 39):
        continued = sampler(model, 7, tokens[:place], **CALLS[name])
        assert [continued.sample(row) for row in logits[place:]] == tokens[place:]
    if "greedy" not in name:
        other = sampler(model, 8, **CALLS[name])
        assert [other.sample(row) for row in logits] != tokens
    whole.close()


def test_only_plain_greedy_calls_may_be_taken_together(model: Model) -> None:
    from tars.workers.llama_sampling import greedy_rows

    logits = rows(model, 8)
    plain = sampler(model, temperature=0.0)
    assert plain.plain_greedy
    assert greedy_rows(logits) == [plain.sample(row) for row in logits]
    assert sampler(model, top_k=1).plain_greedy
    for params in ({}, {"repeat_penalty": 1.1}, {"logit_bias": {"5": 1.0}}, {"grammar": "root ::= .*"}):
        assert not sampler(model, **({"temperature": 0.0} | params if params else {})).plain_greedy


def test_what_is_not_a_number_ends_the_call(model: Model) -> None:
    from tars.workers.llama_sampling import greedy_rows

    logits = rows(model, 3)
    logits[1, 9] = float("nan")
    logits[2] = -float("inf")
    assert greedy_rows(logits) == [int(logits[0].argmax()), None, None]
    for row in logits[1:]:
        with pytest.raises(ReplicaFailed):
            sampler(model).sample(row)


def test_a_bias_on_what_is_no_token_is_refused(model: Model) -> None:
    for bias in ({"-1": 1.0}, {str(model.tokens): 1.0}, {"x": 1.0}, {"1": 101.0}, {"1" * 5000: 1.0}):
        with pytest.raises(InvalidParams, match="token ids"):
            sampler(model, logit_bias=bias)


NATIVE_GRAMMARS = [
    'root ::= "hello" | "help" "!"? | [0-9]{2,4}',
    r'root ::= "{" ws "\"" char* "\"" ws "}"' + '\nws ::= [ \\n]*\nchar ::= [^"\\\\\\x00-\\x1f] | "\\\\" ["n]',
    'root ::= ("(" root ")" | "[" root "]" | "a")*',
    "root ::= [é日🙂]+ .",
    'root ::= ("a" | "ab" | "the" | "he")* "."',
]


@pytest.mark.parametrize("text", NATIVE_GRAMMARS)
def test_what_may_come_next_is_what_llama_cpp_says_of_whole_characters(model: Model, text: str) -> None:
    import numpy as np
    from llama_cpp import llama_cpp as api

    from tars.workers.llama_sampling import compile_grammar

    grammar = compile_grammar(model, CompleteParams(prompt="x", grammar=text))
    assert grammar is not None
    dice = np.random.default_rng(2)
    whole = [token for token, piece in enumerate(model.pieces) if piece.isascii() and piece and b"\0" not in piece]
    whole += [token for token, piece in enumerate(model.pieces) if not piece.isascii() and len(piece) > 1]
    whole += model.end_tokens
    kind = np.dtype([("id", "<i4"), ("logit", "<f4"), ("p", "<f4")])
    compared = 0
    for _ in range(20):
        native = api.llama_sampler_init_grammar(model.vocabulary_pointer, text.encode(), b"root")
        place = grammar.start
        for _ in range(25):
            candidates = np.zeros(len(whole), dtype=kind)
            candidates["id"] = whole
            array = api.llama_token_data_array(
                data=candidates.ctypes.data_as(api.llama_token_data_p), size=len(whole), selected=-1, sorted=False
            )
            api.llama_sampler_apply(native, ctypes.byref(array))
            theirs = set(candidates["id"][np.isfinite(candidates["logit"])].tolist())
            mask = grammar.mask(place)
            assert {token for token in whole if mask[token]} == theirs
            compared += 1
            going_on = sorted(theirs - model.end_tokens)
            if not going_on:
                break
            token = int(dice.choice(going_on))
            api.llama_sampler_accept(native, token)
            after = grammar.after(place, token)
            assert after is not None
            place = after
        api.llama_sampler_free(native)
    assert compared >= 60


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"top_k": 0},
        {"top_k": 0, "top_p": 1.0},
        {"top_k": 5, "min_p": 0.3, "top_p": 1.0, "temperature": 2.0},
        {"top_k": 100_000, "top_p": 0.5, "min_p": 0.0},
        {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "temperature": 0.3},
        {"repeat_penalty": 1.4, "presence_penalty": 0.7, "frequency_penalty": -0.3},
        {"logit_bias": {"100": 8.0, "101": -100.0}, "repeat_penalty": 0.8},
    ],
)
@pytest.mark.parametrize("vocabulary", [350, 5000])
def test_kept_tokens_and_their_probabilities_are_llama_cpps(params: dict[str, Any], vocabulary: int) -> None:
    import numpy as np
    from llama_cpp import llama_cpp as api

    from tars.workers.token_draw import PENALTY_WINDOW, TokenDraw

    given = CompleteParams(prompt="x", **params)
    bias = {int(token): value for token, value in given.logit_bias.items()}
    history = np.random.default_rng(5).integers(0, 120, 200).tolist()
    ours = TokenDraw(given, bias, history, 1)
    chain = api.llama_sampler_chain_init(api.llama_sampler_chain_default_params())
    entries = (api.llama_logit_bias * len(bias))(*bias.items())
    stages = [api.llama_sampler_init_logit_bias(vocabulary, len(bias), entries)] if bias else []
    stages.append(
        api.llama_sampler_init_penalties(
            vocabulary, PENALTY_WINDOW, given.repeat_penalty, given.frequency_penalty, given.presence_penalty
        )
    )
    stages.append(api.llama_sampler_init_top_k(given.top_k))
    stages.append(api.llama_sampler_init_top_p(given.top_p, 1))
    stages.append(api.llama_sampler_init_min_p(given.min_p, 1))
    stages.append(api.llama_sampler_init_temp(given.temperature))
    stages.append(api.llama_sampler_init_dist(1))  # fills in the probabilities
    for stage in stages:
        api.llama_sampler_chain_add(chain, stage)
    for token in history:
        api.llama_sampler_accept(chain, token)
    dice = np.random.default_rng(6)
    for _ in range(20):
        logits = (dice.standard_normal(vocabulary) * 4).astype(np.float32)
        candidates = np.zeros(vocabulary, dtype=[("id", "<i4"), ("logit", "<f4"), ("p", "<f4")])
        candidates["id"], candidates["logit"] = np.arange(vocabulary), logits
        array = api.llama_token_data_array(
            data=candidates.ctypes.data_as(api.llama_token_data_p), size=vocabulary, selected=-1, sorted=False
        )
        api.llama_sampler_apply(chain, ctypes.byref(array))
        theirs = {one["id"]: one["p"] for one in candidates[: array.size]}
        ids, weights = ours.kept(ours.adjusted(logits))
        mine = dict(zip(ids.tolist(), (weights / weights.sum()).tolist(), strict=True))
        # A token on the very border of top-p or min-p may fall to either side of it by rounding.
        assert len(mine.keys() ^ theirs.keys()) <= 1
        both = sorted(mine.keys() & theirs.keys())
        assert np.allclose([mine[one] for one in both], [theirs[one] for one in both], rtol=2e-3, atol=1e-6)
    api.llama_sampler_free(chain)


def test_no_constraint_is_no_grammar_and_equal_ones_are_one(model: Model) -> None:
    from tars.workers.llama_sampling import compile_grammar

    assert compile_grammar(model, CompleteParams(prompt="x")) is None
    schema = CompleteParams(prompt="x", json_schema={"type": "string"})
    assert compile_grammar(model, schema) is compile_grammar(model, schema)
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.append(compile_grammar(model, schema)))
    thread.start()
    thread.join(20)
    assert found == [compile_grammar(model, schema)]


def test_text_that_contradicts_the_grammar_cannot_be_continued(model: Model) -> None:
    with pytest.raises(BadGrammar, match="does not follow the grammar") as error:
        sampler(model, generated=[model.pieces.index(b"x")], grammar='root ::= "abc"')
    assert not error.value.retryable


def test_a_point_where_nothing_may_follow_is_said(model: Model) -> None:
    one = sampler(model, grammar='root ::= "a" "\\x00"')
    logits = rows(model, 2)
    assert model.pieces[one.sample(logits[0])] == b"a"
    with pytest.raises(BadGrammar, match="no token of this model may follow"):
        one.sample(logits[1])


@pytest.mark.parametrize(
    "grammar",
    ['root ::= root "a"', "root ::= (", "root ::= e root\ne ::= f\nf ::= ", 'root ::= "x"{0,999999999}', " "],
)
def test_a_grammar_that_cannot_be_compiled_is_refused(model: Model, grammar: str) -> None:
    with pytest.raises(BadGrammar):
        sampler(model, grammar=grammar)


def test_alternatives_that_multiply_harm_nobody(model: Model) -> None:
    """llama.cpp needs 2**n stacks for n letters here: seconds at the 20th, for ever at the 30th."""
    import numpy as np

    one = sampler(model, grammar='root ::= "a" root "b" | "a" root "c" | "d"', temperature=0.0)
    towards_a = np.zeros(model.tokens, dtype=np.float32)
    towards_a[model.pieces.index(b"a")] = 5
    for _ in range(200):
        assert model.pieces[one.sample(towards_a)] == b"a"
    towards_a[model.pieces.index(b"d")] = 9
    assert model.pieces[one.sample(towards_a)] == b"d"
    assert model.pieces[one.sample(towards_a)] in (b"b", b"c")
