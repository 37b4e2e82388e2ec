"""The OpenRPC document (https://spec.open-rpc.org, 1.3.2), made from the method table.

Law of this file: pure; nothing is said here that is not in a row. JSON schemas are draft-07, as OpenRPC asks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic.json_schema import JsonSchemaMode, models_json_schema

import tars
from tars.errors import TarsError
from tars.messages.base import CallMeta, Message
from tars.rpc.method_table import EVERY_CALL, METHODS, MethodSpec

_SCHEMA_REFERENCE = "#/components/schemas/{model}"


def openrpc_document(methods: Mapping[str, MethodSpec] = METHODS) -> dict[str, object]:
    """The document as plain JSON. Streaming and idempotence stand in `x-streams` and `x-idempotent`."""
    messages: dict[type[Message], JsonSchemaMode] = {CallMeta: "validation"}
    for spec in methods.values():
        messages[spec.params] = "validation"
        for message in (spec.result, spec.delta, spec.progress):
            if message is not None:
                messages[message] = "serialization"
    places, shared = models_json_schema(list(messages.items()), ref_template=_SCHEMA_REFERENCE)
    schemas = _draft_07(shared["$defs"])
    references: dict[Any, Any] = {message: place for (message, _), place in places.items()}
    errors = sorted({*EVERY_CALL, *(one for spec in methods.values() for one in spec.errors)}, key=lambda one: one.code)
    return {
        "openrpc": "1.3.2",
        "info": {
            "title": "TARS node",
            "description": "Named params only. Every call may carry `_meta`. `POST /rpc`; a method with `x-streams` also answers "
            "`Accept: text/event-stream` with notifications and then the response.",
            "version": tars.__version__,
            "license": {"name": "Apache-2.0"},
        },
        "methods": [_method(spec, schemas, references) for spec in methods.values()],
        "components": {"schemas": schemas, "errors": {one.kind: _error(one) for one in errors}},
    }


def _method(spec: MethodSpec, schemas: dict[str, Any], references: Mapping[Any, Any]) -> dict[str, object]:
    schema = schemas[references[spec.params]["$ref"].rpartition("/")[2]]
    required = schema.get("required", ())
    params: list[dict[str, object]] = [
        {
            "name": name,
            **({"description": field["description"]} if "description" in field else {}),
            "required": name in required,
            "schema": field,
        }
        for name, field in schema.get("properties", {}).items()
    ]
    # A required param must not follow an optional one (OpenRPC, method object).
    params.sort(key=lambda param: not param["required"])
    params.append({"name": "_meta", "required": False, "schema": references[CallMeta]})
    document: dict[str, object] = {
        "name": spec.name,
        "summary": spec.summary,
        "paramStructure": "either" if spec.positional else "by-name",
        "params": params,
        "result": {
            "name": "result" if spec.result is None else spec.result.__name__,
            "schema": {} if spec.result is None else references[spec.result],
        },
        "errors": [{"$ref": f"#/components/errors/{one.kind}"} for one in (*EVERY_CALL, *spec.errors)],
        "x-idempotent": spec.idempotent,
        "x-roles": sorted(spec.roles),
    }
    if spec.delta is not None:
        streams: dict[str, object] = {"notification": spec.delta_notification, "schema": references[spec.delta]}
        if spec.progress is not None:
            streams["progress"] = {"notification": spec.progress_notification, "schema": references[spec.progress]}
        document["x-streams"] = streams
    return document


def _error(error: type[TarsError]) -> dict[str, object]:
    return {
        "code": error.code,
        "message": (error.__doc__ or error.kind).strip().partition("\n")[0],
        "data": {"kind": error.kind, "retryable": error.retryable},
    }


def _draft_07(schema: Any) -> Any:
    """Pydantic writes draft 2020-12; the one word of it that our messages use and draft-07 has not is `prefixItems`."""
    if isinstance(schema, list):
        return [_draft_07(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    return {("items" if key == "prefixItems" else key): _draft_07(value) for key, value in schema.items()}
