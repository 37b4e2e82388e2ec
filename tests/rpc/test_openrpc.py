"""The OpenRPC document: the shape that https://spec.open-rpc.org (1.3.2) asks for, and every row of the table in it.

The closed objects below are written from the specification's own field tables.
"""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import pytest

from tars.messages.inference import ChatParams, Delta, TokenLogprob
from tars.rpc.method_table import EVERY_CALL, METHODS
from tars.rpc.openrpc import openrpc_document


def closed(needed: str, optional: str = "", /, **types: Any) -> dict[str, Any]:
    names = needed.split() + optional.split()
    return {
        "type": "object",
        "required": needed.split(),
        "properties": {name: types.get(name, {"type": "string"}) for name in names},
        "patternProperties": {"^x-": {}},
        "additionalProperties": False,
    }


SCHEMA = {"$ref": "http://json-schema.org/draft-07/schema#"}
REFERENCE = {
    "type": "object",
    "required": ["$ref"],
    "properties": {"$ref": {"type": "string", "pattern": "^#/components/"}},
    "additionalProperties": False,
}
DESCRIPTOR = closed(
    "name schema", "description summary required deprecated", schema=SCHEMA, required={"type": "boolean"}
)
ERROR = closed("code message", "data", code={"type": "integer"}, data={})
METHOD = closed(
    "name params result",
    "summary description paramStructure errors",
    params={"type": "array", "items": DESCRIPTOR},
    result=DESCRIPTOR,
    paramStructure={"enum": ["by-name", "by-position", "either"]},
    errors={"type": "array", "items": {"oneOf": [ERROR, REFERENCE]}},
)
KEYS = {"type": "object", "propertyNames": {"pattern": r"^[a-zA-Z0-9.\-_]+$"}}
DOCUMENT = closed(
    "openrpc info methods",
    "components",
    openrpc={"enum": ["1.3.0", "1.3.1", "1.3.2"]},
    info=closed("title version", "description license", license=closed("name", "url")),
    methods={"type": "array", "items": METHOD},
    components=closed(
        "",
        "schemas errors",
        schemas={**KEYS, "additionalProperties": SCHEMA},
        errors={**KEYS, "additionalProperties": ERROR},
    ),
)


@pytest.fixture(scope="module")
def document() -> Any:
    return json.loads(json.dumps(openrpc_document()))


def test_the_document_has_the_shape_that_the_specification_asks_for(document: Any) -> None:
    jsonschema.Draft7Validator(DOCUMENT).validate(document)


def test_every_reference_leads_to_something(document: Any) -> None:
    references = set(re.findall(r'"\$ref": "([^"]+)"', json.dumps(document)))
    assert references
    for reference in references:
        place = document
        for key in reference.removeprefix("#/").split("/"):
            place = place[key]


def test_every_row_of_the_table_is_a_method_with_its_params_result_and_errors(document: Any) -> None:
    methods = {method["name"]: method for method in document["methods"]}
    assert list(methods) == list(METHODS)
    for name, spec in METHODS.items():
        method = methods[name]
        assert method["paramStructure"] == "by-name"
        *params, meta = method["params"]
        assert meta["name"] == "_meta"
        assert {one["name"]: one["required"] for one in params} == {
            field: info.is_required() for field, info in spec.params.model_fields.items()
        }
        # OpenRPC: a required param must not follow an optional one.
        assert [one["required"] for one in params] == sorted((one["required"] for one in params), reverse=True)
        errors = {one["$ref"].rpartition("/")[2] for one in method["errors"]}
        assert errors == {error.kind for error in (*EVERY_CALL, *spec.errors)}
        assert ("x-streams" in method) is spec.streams
        assert method["x-idempotent"] is spec.idempotent


def test_the_schemas_accept_what_the_messages_write_and_refuse_what_they_refuse(document: Any) -> None:
    def check(name: str, value: object) -> None:
        schema = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
        jsonschema.Draft7Validator(schema).validate(value)

    check("ChatParams", ChatParams.model_validate({"messages": [{"role": "user", "content": "a"}]}).model_dump())
    logprob = TokenLogprob(token="a", token_id=1, logprob=-0.5, top=[("a", -0.5)])
    check("Delta", json.loads(Delta(text="a", token_ids=[1], logprobs=[logprob]).model_dump_json()))
    for wrong in ({}, {"messages": []}, {"messages": [{"role": "nobody", "content": "a"}]}, {"messages": 1, "x": 1}):
        with pytest.raises(jsonschema.ValidationError):
            check("ChatParams", wrong)
    # A tuple: draft-07 says it with `items`, and 2020-12's `prefixItems` would say nothing to a draft-07 reader.
    with pytest.raises(jsonschema.ValidationError):
        check("TokenLogprob", {"token": "a", "token_id": 1, "logprob": 0, "top": [[1, "a"]]})


def test_an_errors_code_and_kind_are_the_classs(document: Any) -> None:
    errors = document["components"]["errors"]
    for spec in METHODS.values():
        for error in (*EVERY_CALL, *spec.errors):
            assert errors[error.kind]["code"] == error.code
            assert errors[error.kind]["data"] == {"kind": error.kind, "retryable": error.retryable}
