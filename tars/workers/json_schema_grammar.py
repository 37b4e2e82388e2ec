"""A JSON schema as a GBNF grammar whose every text is JSON that the schema accepts.

Law of this file: pure; a dict in, a grammar's text out. The grammar may say less than the schema (properties come in the declared order,
undeclared ones never), but never more: a keyword that cannot be kept is refused by name instead of being ignored, because the caller will
parse the answer without looking. One exception, as everywhere: `oneOf` is taken as `anyOf`.

Why not llama-cpp-python's converter: it lets raw control characters into strings (not JSON), ignores minimum and maximum, and writes
repetitions out in full. GBNF: llama.cpp, `grammars/README.md`; keywords: JSON Schema 2020-12.
"""

from __future__ import annotations

import json
import math
from typing import Any

from tars.errors import BadGrammar
from tars.workers.pattern_grammar import NOT_IN_STRINGS, REPETITION_MOST, literal, pattern_rule

Schema = dict[str, Any]

GRAMMAR_MOST = 262_144
"""Characters of the grammar; `GenerationParams.grammar` has the same bound."""

DEPTH_MOST = 64
"""Schemas within schemas, and references that refer on: this converter recurses."""

SCHEMAS_MOST = 20_000
"""Schemas visited in all: combined references can multiply to 2**64 without ever nesting deep."""

LARGEST_INTEGER = 10**15 - 1
"""Where a schema sets no bound: below 2**53, so that every JSON parser keeps it exactly."""

ANNOTATIONS = frozenset(
    {"$schema", "$id", "$comment", "$defs", "definitions", "$anchor", "title", "description", "default", "examples"}
    | {"deprecated", "readOnly", "writeOnly"}
)
"""Keywords that bind nothing."""

OBJECT = frozenset({"properties", "required", "additionalProperties"})
ARRAY = frozenset({"items", "prefixItems", "minItems", "maxItems"})
STRING = frozenset({"pattern", "minLength", "maxLength", "format"})
NUMBER = frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"})
KEPT = ANNOTATIONS | OBJECT | ARRAY | STRING | NUMBER | {"type", "const", "enum"}

FIXED = {
    "ws": r'| " " | "\n" [ \t]{0,20}',
    "char": rf'[^{NOT_IN_STRINGS}] | "\\" ["\\/bfnrt]',
    "string": r'"\"" char* "\""',
    "boolean": '"true" | "false"',
    "null": '"null"',
    "number": '"-"? ("0" | [1-9] [0-9]{0,14}) ("." [0-9]{1,15})? ([eE] [-+]? [0-9]{1,2})?',
    "value": "object | array | string | number | boolean | null",
    "object": r'"{" ws (string ":" ws value ("," ws string ":" ws value)*)? ws "}"',
    "array": '"[" ws (value ("," ws value)*)? ws "]"',
    "date": '[0-9]{4} "-" ("0" [1-9] | "1" [0-2]) "-" ("0" [1-9] | "1" [0-9] | "2" [0-8])',
    "time": '([01] [0-9] | "2" [0-3]) ":" [0-5] [0-9] ":" [0-5] [0-9] ("." [0-9]{1,6})? "Z"',
    "uuid": '[0-9a-f]{8} "-" [0-9a-f]{4} "-" [0-9a-f]{4} "-" [0-9a-f]{4} "-" [0-9a-f]{12}',
}
"""Rules of every grammar. No `\\u` escapes (half a surrogate pair is not text) and no 29th of a month (not every one has it)."""

FORMATS = {"date": "date", "time": "time", "date-time": 'date "T" time', "uuid": "uuid"}


def schema_grammar(schema: Schema) -> str:
    """The grammar, beginning at rule `root`. Raises `BadGrammar` with the keyword that cannot be kept."""
    converter = _Converter(schema)
    root = converter.expression(schema, 0)
    rules = [f"root ::= {root}", *(f"{name} ::= {rule}" for name, rule in {**FIXED, **converter.rules}.items())]
    text = "\n".join(rules) + "\n"
    if len(text) > GRAMMAR_MOST:
        raise _too_large()
    return text


def schemas_grammar(schemas: dict[str, Schema]) -> str:
    """Rules for a grammar that has its root elsewhere: one under each key's name, and all that they need.

    A key is a GBNF name without a hyphen that is none of `FIXED`'s. Raises as `schema_grammar`.
    """
    rules = dict(FIXED)
    for name, schema in schemas.items():
        converter = _Converter(schema, f"{name}-")
        rules[name] = converter.expression(schema, 0)
        rules.update(converter.rules)
        if sum(map(len, rules.values())) > GRAMMAR_MOST:
            raise _too_large()
    return "".join(f"{name} ::= {rule}\n" for name, rule in rules.items())


def _too_large() -> BadGrammar:
    return BadGrammar(f"The JSON schema makes a grammar of more than {GRAMMAR_MOST} characters. Make it smaller.")


def _refused(what: str) -> BadGrammar:
    return BadGrammar(f"The JSON schema cannot be turned into a grammar: {what}.")


class _Converter:
    def __init__(self, root: Schema, prefix: str = "") -> None:
        self.root = root
        self._prefix = prefix
        """Of the names of its rules."""
        self.rules: dict[str, str] = {}
        self._references: dict[str, str] = {}
        self._size = 0
        self._visited = 0

    def _rule(self, expression: str) -> str:
        """A new rule's name."""
        # Counted while it grows: a few nested references can multiply to gigabytes.
        self._size += len(expression)
        if self._size > GRAMMAR_MOST:
            raise _too_large()
        name = f"{self._prefix}r{len(self.rules)}"
        self.rules[name] = expression
        return name

    def expression(self, schema: Any, depth: int) -> str:
        """A GBNF expression, in brackets where it is more than one thing."""
        self._visited += 1
        if depth > DEPTH_MOST or self._visited > SCHEMAS_MOST:
            raise _refused(f"it nests more than {DEPTH_MOST} deep, or holds more than {SCHEMAS_MOST} schemas")
        if schema is True:
            return "value"
        if not isinstance(schema, dict):
            raise _refused("a schema has to be an object or true")
        binding = {key: value for key, value in schema.items() if key not in ANNOTATIONS}
        if "$ref" in binding:
            return self._reference(binding, depth)
        for keyword in ("allOf", "anyOf", "oneOf"):
            if keyword in binding:
                return self._combined(keyword, binding, depth)
        if unknown := sorted(binding.keys() - KEPT):
            raise _refused(f"the keyword {unknown[0][:40]} cannot be kept; leave it out and check the answer yourself")
        if "const" in binding or "enum" in binding:
            return self._values(binding)
        return self._typed(binding, depth)

    def _reference(self, schema: Schema, depth: int) -> str:
        others = {key: value for key, value in schema.items() if key != "$ref"}
        reference = schema["$ref"]
        target = self._followed({"$ref": reference}, depth)
        if others:
            return self.expression(_merged(others, target), depth + 1)
        if reference not in self._references:
            # Named before it is made: a schema may refer to itself.
            name = self._references[reference] = f"{self._prefix}ref{len(self._references)}"
            self.rules[name] = ""
            expression = self.expression(target, depth + 1)
            self._size += len(expression)
            self.rules[name] = expression
        return self._references[reference]

    def _resolve(self, reference: Any) -> Any:
        if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
            raise _refused("$ref leads to another document, and TARS fetches nothing; put the parts under $defs")
        target: Any = self.root
        for part in reference.split("/")[1:]:
            key = part.replace("~1", "/").replace("~0", "~")
            if isinstance(target, list) and key.isdigit() and len(key) < 7 and int(key) < len(target):
                target = target[int(key)]
            elif isinstance(target, dict) and key in target:
                target = target[key]
            else:
                raise _refused("$ref leads to nothing")
        return target

    def _combined(self, keyword: str, schema: Schema, depth: int) -> str:
        branches = schema[keyword]
        base = {key: value for key, value in schema.items() if key != keyword}
        if not isinstance(branches, list) or not branches:
            raise _refused(f"{keyword} has to be a list with something in it")
        if keyword == "allOf":
            for branch in branches:
                base = _merged(base, self._followed(branch, depth))
            return self.expression(base, depth + 1)
        if not base:
            return _any_of([self.expression(branch, depth + 1) for branch in branches])
        return _any_of([self.expression(_merged(base, self._followed(one, depth)), depth + 1) for one in branches])

    def _followed(self, schema: Any, depth: int) -> Any:
        """A branch that is nothing but a reference, as what it refers to."""
        for _ in range(DEPTH_MOST - depth):
            if not isinstance(schema, dict) or set(schema) - ANNOTATIONS != {"$ref"}:
                return schema
            schema = self._resolve(schema["$ref"])
        raise _refused("a reference leads back to itself")

    def _values(self, schema: Schema) -> str:
        values = [schema["const"]] if "const" in schema else schema["enum"]
        if schema.keys() - {"const", "enum", "type"} or {"const", "enum"} <= schema.keys():
            raise _refused("const or enum stands beside other bounds; leave out the values that do not keep them")
        if not isinstance(values, list):
            raise _refused("enum has to be a list")
        kinds = schema.get("type")
        if kinds is not None:
            values = [value for value in values if any(_is_a(value, kind) for kind in _listed(kinds))]
        if not values:
            raise _refused("enum or const leaves no value")
        return self._rule(" | ".join(literal(_json(value)) for value in values))

    def _typed(self, schema: Schema, depth: int) -> str:
        kind = schema.get("type", _implied_type(schema))
        if isinstance(kind, list):
            return _any_of([self._typed({**schema, "type": one}, depth) for one in kind])
        match kind:
            case "object":
                return self._object(schema, depth)
            case "array":
                return self._array(schema, depth)
            case "string":
                return self._string(schema)
            case "integer":
                return self._rule(_integers(*_bounds(schema, exclusive_step=1)))
            case "number":
                return self._rule(_numbers(schema)) if NUMBER & schema.keys() else "number"
            case "boolean" | "null":
                return str(kind)
            case None:
                return "value"
            case _:
                raise _refused("type is none of object, array, string, integer, number, boolean, null")

    def _object(self, schema: Schema, depth: int) -> str:
        declared, required, additional = (
            schema.get("properties", {}),
            schema.get("required", []),
            schema.get("additionalProperties"),
        )
        if not isinstance(declared, dict) or not isinstance(required, list):
            raise _refused("properties has to be an object and required a list")
        if not all(isinstance(name, str) for name in required):
            raise _refused("required has to be a list of names")
        properties = {**declared, **{name: True for name in required if name not in declared}}
        if not properties:
            if additional is False:
                return '"{" ws "}"'
            if additional is None or additional is True:
                return "object"
            value = self._rule(self.expression(additional, depth + 1))
            return self._rule(f'"{{" ws (string ":" ws {value} ("," ws string ":" ws {value})*)? ws "}}"')
        pairs = [
            (self._rule(f'{literal(_json(name))} ":" ws {self.expression(value, depth + 1)}'), name in required)
            for name, value in properties.items()
        ]
        # From the back: `more` is what may follow a property, `first` what may stand first.
        more, first = "", '""'
        for pair, needed in reversed(pairs):
            following = f"{pair} {more}".rstrip()
            first = self._rule(following if needed else f"{following} | {first}")
            more = self._rule(f'"," ws {pair} {more}' if needed else f'("," ws {pair})? {more}')
        return self._rule(f'"{{" ws {first} ws "}}"')

    def _array(self, schema: Schema, depth: int) -> str:
        least, most = _counts(schema, "minItems", "maxItems")
        fixed = schema.get("prefixItems", [])
        if not isinstance(fixed, list):
            raise _refused("prefixItems has to be a list")
        if fixed:
            if not least <= len(fixed) or (most is not None and most < len(fixed)):
                raise _refused("prefixItems and the counts of items do not agree")
            inside = ' "," ws '.join(self.expression(item, depth + 1) for item in fixed)
            return self._rule(f'"[" ws {inside} ws "]"')
        if most == 0:
            return '"[" ws "]"'
        item = self._rule(self.expression(schema.get("items", True), depth + 1))
        rest = f"{{{max(0, least - 1)},{'' if most is None else most - 1}}}"
        inside = f'{item} ("," ws {item}){rest}'
        return self._rule(f'"[" ws {inside if least else f"({inside})?"} ws "]"')

    def _string(self, schema: Schema) -> str:
        least, most = _counts(schema, "minLength", "maxLength")
        counted = bool(schema.keys() & {"minLength", "maxLength"})
        # Other formats are annotations (2020-12, 7.2.1), as every validator takes them by default.
        form = FORMATS.get(str(schema.get("format")))
        if sum(("pattern" in schema, form is not None, counted)) > 1:
            raise _refused(
                "pattern, format and lengths of one string cannot be kept together; say the length in the pattern"
            )
        if "pattern" in schema:
            if not isinstance(schema["pattern"], str):
                raise _refused("pattern has to be a string")
            return self._rule(rf'"\"" ({pattern_rule(schema["pattern"])}) "\""')
        if form is not None:
            return self._rule(rf'"\"" {form} "\""')
        if counted:
            return self._rule(rf'"\"" char{{{least},{"" if most is None else most}}} "\""')
        return "string"


def _any_of(expressions: list[str]) -> str:
    return f"({' | '.join(expressions)})"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _is_a(value: Any, kind: Any) -> bool:
    """JSON Schema's idea of a type: 1.0 is an integer, True is no number."""
    match kind:
        case "null":
            return value is None
        case "boolean":
            return isinstance(value, bool)
        case "integer":
            return not isinstance(value, bool) and isinstance(value, int | float) and value == int(value)
        case "number":
            return not isinstance(value, bool) and isinstance(value, int | float)
        case "string":
            return isinstance(value, str)
        case "array":
            return isinstance(value, list)
        case _:
            return isinstance(value, dict)


def _implied_type(schema: Schema) -> str | None:
    """What a schema without `type` speaks about: leaving the other types out says less, never more."""
    for kind, keywords in (("object", OBJECT), ("array", ARRAY), ("string", STRING), ("number", NUMBER)):
        if keywords & schema.keys():
            return kind
    return None


def _merged(one: Any, other: Any) -> Schema:
    """Both schemas at once, where they speak of different things or say the same. Raises `BadGrammar` where they do not."""
    if other is True:
        return dict(one)
    if not isinstance(one, dict) or not isinstance(other, dict):
        raise _refused("a schema has to be an object or true")
    both = dict(one)
    for key, value in other.items():
        if key in ANNOTATIONS or key not in both or both[key] == value:
            both[key] = value
        elif key == "required" and isinstance(value, list) and isinstance(both[key], list):
            both[key] = [*both[key], *(name for name in value if name not in both[key])]
        elif key == "properties" and isinstance(value, dict) and isinstance(both[key], dict):
            if any(name in both[key] and both[key][name] != schema for name, schema in value.items()):
                raise _refused("combined schemas describe one property twice")
            both[key] = {**both[key], **value}
        else:
            raise _refused(f"combined schemas disagree about {key[:40]}")
    return both


def _counts(schema: Schema, least_key: str, most_key: str) -> tuple[int, int | None]:
    for value in (schema[key] for key in (least_key, most_key) if key in schema):
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise _refused(f"{least_key} and {most_key} have to be counts")
        if value > REPETITION_MOST:
            raise _refused(f"it repeats something more than {REPETITION_MOST} times")
    least, most = schema.get(least_key, 0), schema.get(most_key)
    if most is not None and most < least:
        raise _refused(f"{least_key} is more than {most_key}")
    return least, most


def _bounds(schema: Schema, exclusive_step: int) -> tuple[int, int]:
    """Least and greatest integer that the schema accepts."""
    least, most = -LARGEST_INTEGER, LARGEST_INTEGER
    for key in NUMBER & schema.keys():
        value = schema[key]
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise _refused(f"{key} has to be a number")
        step = exclusive_step if key.startswith("exclusive") and value == int(value) else 0
        if key.lower().endswith("minimum"):
            least = max(least, math.ceil(value) + step)
        else:
            most = min(most, math.floor(value) - step)
    if least > most:
        raise _refused("no whole number lies between the bounds")
    return least, most


def _integers(least: int, most: int) -> str:
    """Integers from `least` to `most`, both included."""
    branches = []
    if least < 0:
        branches.append(f'"-" ({_naturals(max(1, -most), -least)})')
    if most >= 0:
        branches.append(_naturals(max(0, least), most))
    return " | ".join(branches)


def _naturals(least: int, most: int) -> str:
    """Decimal numerals without leading zeros from `least` >= 0 to `most`."""
    branches = []
    for digits in range(len(str(least)), len(str(most)) + 1):
        low = max(least, 10 ** (digits - 1) if digits > 1 else 0)
        high = min(most, 10**digits - 1)
        branches.append(_same_length(str(low), str(high)))
    return " | ".join(branches)


def _same_length(low: str, high: str) -> str:
    """Numerals of one length between two of them: split at the first digit that differs."""
    if not low:
        return '""'
    if low == high:
        return f'"{low}"'
    if set(low) == {"0"} and set(high) == {"9"}:
        return f"[0-9]{{{len(low)}}}"
    rest = len(low) - 1
    if low[0] == high[0]:
        return f'"{low[0]}" ({_same_length(low[1:], high[1:])})'
    branches, first, last = [], int(low[0]), int(high[0])
    if rest and set(low[1:]) != {"0"}:
        branches.append(f'"{first}" ({_same_length(low[1:], "9" * rest)})')
        first += 1
    if rest and set(high[1:]) != {"9"}:
        branches.append(f'"{last}" ({_same_length("0" * rest, high[1:])})')
        last -= 1
    if first <= last:
        branches.append(f"[{first}-{last}]" + (f" [0-9]{{{rest}}}" if rest else ""))
    return f"({' | '.join(branches)})"


def _numbers(schema: Schema) -> str:
    """Decimal numbers between whole bounds (fractional and open bounds are moved inwards to the next whole number)."""
    least, most = _bounds(schema, exclusive_step=1)
    fraction = '("." [0-9]{1,15})?'
    branches = []
    if least < 0:
        # -x.y with x from `closest` on lies at or below -closest.
        closest = max(0, -most)
        if -least - 1 >= closest:
            branches.append(f'"-" ({_naturals(closest, -least - 1)}) {fraction}')
        branches.append(f'"-" "{-least}"')
    if most >= 0:
        lowest = max(0, least)
        if most - 1 >= lowest:
            branches.append(f"({_naturals(lowest, most - 1)}) {fraction}")
        branches.append(f'"{most}"')
    return " | ".join(branches)
