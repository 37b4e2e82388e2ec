"""What schemas become: refused by name, or a grammar whose every text the schema accepts (sampled with llama.cpp's own grammar engine)."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tars.errors import BadGrammar
from tars.workers.gbnf import parse
from tars.workers.json_schema_grammar import _integers, _numbers, schema_grammar

TREE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {"value": {"type": "integer"}, "next": {"$ref": "#/$defs/node"}},
            "required": ["value"],
        }
    },
    "$ref": "#/$defs/node",
}

ACCEPTED: dict[str, dict[str, Any]] = {
    "anything": {},
    "object": {"type": "object"},
    "closed": {"type": "object", "additionalProperties": False},
    "required and optional": {
        "type": "object",
        "properties": {
            "a": {"type": "integer"},
            "b": {"type": "null"},
            "c": {"type": "boolean"},
            'q"\\é': {"const": 1},
        },
        "required": ["b", 'q"\\é'],
    },
    "all optional": {
        "type": "object",
        "properties": {"a": {"type": "null"}, "b": {"type": "null"}, "c": {"type": "null"}},
    },
    "required but not declared": {"type": "object", "required": ["x"]},
    "a map": {"type": "object", "additionalProperties": {"type": "integer"}},
    "properties named like keywords": {
        "type": "object",
        "properties": {"pattern": {"type": "null"}, "$ref": {"type": "null"}, "minLength": {"type": "null"}},
        "required": ["pattern", "$ref", "minLength"],
    },
    "array": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
    "array up to": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    "array from": {"type": "array", "items": {"enum": ["x"]}, "minItems": 3},
    "empty array": {"type": "array", "maxItems": 0},
    "tuple": {"type": "array", "prefixItems": [{"type": "boolean"}, {"type": "null"}], "items": False, "minItems": 2},
    "string": {"type": "string"},
    "lengths": {"type": "string", "minLength": 2, "maxLength": 5},
    "email is an annotation": {"type": "string", "format": "email", "maxLength": 5},
    "pattern": {"type": "string", "pattern": r"^[A-Z]{2}-\d{3}(x|yz)?$"},
    "date-time": {"type": "string", "format": "date-time"},
    "uuid": {"type": "string", "format": "uuid"},
    "age": {"type": "integer", "minimum": 0, "maximum": 99},
    "negative": {"type": "integer", "minimum": -120, "exclusiveMaximum": -7},
    "probability": {"type": "number", "minimum": 0, "maximum": 1},
    "open": {"type": "number", "exclusiveMinimum": -3.5, "exclusiveMaximum": 12},
    "enum": {"enum": ["a", 1, None, {"b": [True]}, 'quote"\\']},
    "enum of a type": {"type": "string", "enum": ["a", 1]},
    "types": {"type": ["string", "null", "integer"], "maxLength": 3, "maximum": 5},
    "any of": {"anyOf": [{"type": "integer"}, {"type": "string", "maxLength": 1}]},
    "any of with a base": {
        "type": "object",
        "properties": {"a": {"type": "null"}},
        "anyOf": [{"required": ["a"]}, {"properties": {"b": {"type": "boolean"}}, "required": ["b"]}],
    },
    "all of": {
        "$defs": {"named": {"properties": {"name": {"type": "string", "maxLength": 3}}, "required": ["name"]}},
        "allOf": [
            {"$ref": "#/$defs/named"},
            {"type": "object", "properties": {"n": {"type": "null"}}, "required": ["n"]},
        ],
    },
    "recursion": TREE,
    "pydantic's optional": {
        "properties": {"x": {"anyOf": [{"type": "integer"}, {"type": "null"}], "default": None, "title": "X"}},
        "required": ["x"],
    },
}


@pytest.mark.model
@pytest.mark.parametrize("name", ACCEPTED)
def test_every_text_is_json_that_the_schema_accepts(tiny_gguf: Path, name: str) -> None:
    import numpy as np

    from tars.messages.inference import CompleteParams
    from tars.workers import llama_library
    from tars.workers.engine import LoadSpec
    from tars.workers.llama_model import Model
    from tars.workers.llama_sampling import Sampler, compile_grammar

    schema = ACCEPTED[name]
    log = llama_library.NativeLog()
    log.install()
    model = Model(LoadSpec(replica="r", model="m", engine="llama", path=str(tiny_gguf)), log, lambda percent: None)
    random = np.random.default_rng(1)
    ended = 0
    for seed in range(25):
        params = CompleteParams(
            prompt="x", json_schema=schema, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=seed
        )
        sampler = Sampler(model, params, [], [], seed, compile_grammar(model, params))
        data = b""
        for step in range(400):
            logits = random.standard_normal(model.tokens).astype(np.float32)
            if step > 100:  # then towards an end: quotes and brackets
                for end in '"}]':
                    logits[[index for index, piece in enumerate(model.pieces) if piece == end.encode()]] += 6
            token = sampler.sample(logits)
            if token in model.end_tokens:
                ended += 1
                jsonschema.validate(
                    json.loads(data), schema, format_checker=jsonschema.FormatChecker(["date", "time", "uuid"])
                )
                break
            data += model.pieces[token]
        sampler.close()
    model.close()
    assert ended >= 5, "too few texts ended to say anything"


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "not": ({"not": {"type": "string"}}, "not"),
    "uniqueItems": ({"type": "array", "uniqueItems": True}, "uniqueItems"),
    "multipleOf": ({"type": "integer", "multipleOf": 3}, "multipleOf"),
    "patternProperties": ({"type": "object", "patternProperties": {}}, "patternProperties"),
    "minProperties": ({"type": "object", "minProperties": 1}, "minProperties"),
    "a keyword nobody knows": ({"type": "string", "maxLenght": 3}, "maxLenght"),
    "unknown type": ({"type": "nope"}, "type"),
    "mixed types": ({"type": ["string", 5]}, "type"),
    "remote reference": ({"$ref": "https://example.com/x"}, "fetches nothing"),
    "file reference": ({"$ref": "other.json#/a"}, "fetches nothing"),
    "dangling reference": ({"$ref": "#/$defs/missing"}, "leads to nothing"),
    "itself": ({"$ref": "#"}, "itself"),
    "a loop": ({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}, "itself"),
    "false": ({"type": "object", "properties": {"x": False}}, "object or true"),
    "billion items": ({"type": "array", "minItems": 10**9}, "1000 times"),
    "billion characters": ({"type": "string", "maxLength": 10**9}, "1000 times"),
    "billion in a pattern": ({"type": "string", "pattern": "^a{1000000000}$"}, "1000 times"),
    "broken pattern": ({"type": "string", "pattern": "(((("}, "unfinished"),
    "look-ahead": ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
    "pattern and length": ({"type": "string", "pattern": "a", "maxLength": 3}, "together"),
    "empty range": ({"type": "integer", "minimum": 3, "maximum": 2}, "bounds"),
    "counts crossed": ({"type": "array", "minItems": 3, "maxItems": 2}, "minItems"),
    "huge enum": ({"enum": [str(number) for number in range(50_000)]}, "characters"),
    "a null count": ({"type": "array", "minItems": None}, "counts"),
    "required is no list of names": ({"type": "object", "required": [{}]}, "required"),
    "required holds a number": ({"type": "object", "required": [1]}, "required"),
    "empty enum": ({"enum": []}, "no value"),
    "disagreement": ({"allOf": [{"type": "string"}, {"type": "integer"}]}, "disagree"),
    "properties twice": (
        {"properties": {"a": {"type": "null"}}, "allOf": [{"properties": {"a": {"type": "string"}}}]},
        "twice",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_kept_is_refused_by_name(name: str) -> None:
    schema, reason = REFUSED[name]
    with pytest.raises(BadGrammar, match=re.escape(reason)):
        schema_grammar(schema)


def test_a_cycle_without_a_way_out_is_refused_and_one_with_is_not() -> None:
    node: dict[str, Any] = {"type": "object", "properties": {"next": {"$ref": "#"}}}
    assert parse(schema_grammar(node)).symbols
    with pytest.raises(BadGrammar, match="do not require the property that refers back"):
        parse(schema_grammar({**node, "required": ["next"]}))


def test_nesting_and_multiplication_are_bounded() -> None:
    deep: dict[str, Any] = {"type": "integer"}
    for _ in range(100):
        deep = {"type": "array", "items": deep}
    with pytest.raises(BadGrammar, match="deep"):
        schema_grammar(deep)
    definitions = {f"d{n}": {"anyOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2, "type": "object"} for n in range(50)}
    with pytest.raises(BadGrammar):
        schema_grammar({"$defs": {**definitions, "d50": {"type": "object"}}, "$ref": "#/$defs/d0"})


def as_regex(gbnf: str) -> str:
    """The digits part of GBNF as a regular expression."""
    return re.sub(r'"([^"]*)"', lambda found: re.escape(found.group(1)), gbnf).replace(" ", "")


@given(st.integers(-3000, 3000), st.integers(0, 3000))
def test_integer_ranges_hold_exactly(least: int, width: int) -> None:
    most = least + width
    pattern = re.compile(as_regex(_integers(least, most)))
    for number in {least, most, least - 1, most + 1, 0, -1, 1, 9, 10, 99, 100, least + width // 2, 10 * most, -least}:
        assert bool(pattern.fullmatch(str(number))) == (least <= number <= most), number
    assert not pattern.fullmatch("007")


@given(st.integers(-300, 300), st.integers(0, 300), st.decimals(-400, 400, places=2))
def test_number_ranges_hold(least: int, width: int, value: Any) -> None:
    pattern = re.compile(as_regex(_numbers({"minimum": least, "maximum": least + width})))
    if pattern.fullmatch(str(value)):
        assert least <= value <= least + width
    assert pattern.fullmatch(str(least))
