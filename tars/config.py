"""How a configuration is read: command line over environment over file over default.

Law of this file: a key that is unknown, or of the wrong type, is refused with the file, the line and what would be right: a typo that is
silently ignored costs an evening. Every key can also be given as `TARS_<SECTION>_<KEY>`. The keys themselves stand in `config_schema`.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from tars.config_schema.devices import DeclaredDevice, DeviceCap, DevicesSection, ExpectedDevice, SimulatedDevice
from tars.config_schema.listen_address import DEFAULT_PORT, ListenAddress
from tars.config_schema.mesh import FilesSection, MeshSection
from tars.config_schema.models import AdapterSource, DemoSection, DeploySection, ModelSource
from tars.config_schema.node import LimitsSection, NodeSection
from tars.config_schema.section import Section
from tars.config_schema.security import ApiKey, SecuritySection
from tars.config_schema.whole import Config
from tars.config_schema.workers import EnginesSection, WorkerSection
from tars.config_text import KeyPath, parse_variable, read_toml
from tars.errors import ConfigError

__all__ = [
    "DEFAULT_PORT",
    "AdapterSource",
    "ApiKey",
    "Config",
    "DeclaredDevice",
    "DemoSection",
    "DeploySection",
    "DeviceCap",
    "DevicesSection",
    "EnginesSection",
    "ExpectedDevice",
    "FilesSection",
    "LimitsSection",
    "ListenAddress",
    "MeshSection",
    "ModelSource",
    "NodeSection",
    "Section",
    "SecuritySection",
    "SimulatedDevice",
    "WorkerSection",
    "load_config",
    "variables",
]

_SHORT_VARIABLES: dict[str, KeyPath] = {"TARS_STATE_DIR": ("node", "state_dir")}
"""Variables with a short name; the long one wins where both are set."""


def load_config(
    path: Path | None = None,
    *,
    environment: Mapping[str, str] | None = None,
    overrides: Mapping[str, object] | None = None,
) -> Config:
    """The configuration in force.

    `environment` is the process's environment (no variable is read but through it); `overrides` are the command line's values by
    dotted key (`{"node.listen": "127.0.0.1:0"}`); a value of None counts as not given. Raises `ConfigError`.
    """
    environment = environment or {}
    values: dict[str, Any] = {}
    origins: dict[KeyPath, str] = {}
    if path is not None:
        values, lines = read_toml(path)
        origins = {key: f"{path}, line {line}" for key, line in lines.items()}
        _paths_beside(values, path.resolve().parent)
    for variable, key, value in _from_environment(environment):
        _put(values, key, value)
        origins = {place: origin for place, origin in origins.items() if place[: len(key)] != key}
        origins[key] = f"environment variable {variable}"
    for dotted, value in (overrides or {}).items():
        if value is not None:
            key = tuple(dotted.split("."))
            _put(values, key, value)
            origins = {place: origin for place, origin in origins.items() if place[: len(key)] != key}
            origins[key] = f"command line ({dotted})"
    if isinstance(node := values.setdefault("node", {}), dict):
        node.setdefault("state_dir", str(_default_state_dir(environment)))
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False)
        messages = [
            _message(detail, origins) for detail in sorted(found, key=lambda detail: _line(detail, origins))[:10]
        ]
        if len(found) > len(messages):
            messages.append(f"... and {len(found) - len(messages)} more.")
    raise ConfigError("\n".join(messages), details={"errors": messages})


def state_folder_of(environment: Mapping[str, str]) -> Path:
    """The state folder of a node that was started in this environment without a file and without --state-dir."""
    given = environment.get("TARS_STATE_DIR") or environment.get("TARS_NODE_STATE_DIR")
    return (Path(given) if given else _default_state_dir(environment)).expanduser()


def _default_state_dir(environment: Mapping[str, str]) -> Path:
    base = environment.get("XDG_STATE_HOME", "")
    # The XDG specification: a relative path there is invalid and to be ignored.
    return Path(base) / "tars" if Path(base).is_absolute() else Path("~/.local/state/tars")


def _paths_beside(values: dict[str, Any], folder: Path) -> None:
    """Make the file's relative paths relative to the file: a configuration must not depend on where it is started."""
    holders = [(values.get("node"), "state_dir"), (values.get("files"), "folder")]
    if isinstance(models := values.get("model"), list):
        holders += [(model, key) for model in models for key in ("path", "draft")]
        holders += [
            (adapter, "path")
            for model in models
            if isinstance(model, dict) and isinstance(model.get("adapters"), list)
            for adapter in model["adapters"]
        ]
    for holder, key in holders:
        if isinstance(holder, dict) and isinstance(text := holder.get(key), str) and text and not text.startswith("~"):
            holder[key] = str(folder / text)


def _put(values: dict[str, Any], key: KeyPath, value: object) -> None:
    for part in key[:-1]:
        below = values.setdefault(str(part), {})
        if not isinstance(below, dict):
            return
        values = below
    values[str(key[-1])] = value


def _fields(model: type[BaseModel] = Config, above: KeyPath = ()) -> Iterator[tuple[KeyPath, type]]:
    """Every key that a variable can set, with the plain type that its text is parsed as."""
    for name, field in model.model_fields.items():
        kind = _plain(field.annotation)
        if issubclass(kind, BaseModel):
            yield from _fields(kind, (*above, name))
        else:
            yield (*above, name), kind


def _plain(annotation: object) -> type:
    """`int | None` -> int, `Literal["a"]` -> str, `tuple[X, ...]` -> tuple, a class -> itself."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return _plain(next(kind for kind in typing.get_args(annotation) if kind is not type(None)))
    if origin is Literal:
        return str
    if origin is not None:
        return typing.cast(type, origin)
    return typing.cast(type, annotation)


NEAR_MISS = 0.9
"""difflib's ratio: one or two wrong letters in a variable's name."""


def variables() -> dict[str, KeyPath]:
    """Every environment variable that is read, with the key it sets."""
    named = {"TARS_" + "_".join(map(str, key)).upper(): key for key, _ in _fields()}
    return {**_SHORT_VARIABLES, **named}


def _from_environment(environment: Mapping[str, str]) -> Iterator[tuple[str, KeyPath, object]]:
    kinds = dict(_fields())
    known = variables()
    sections = tuple(f"TARS_{name.upper()}_" for name in Config.model_fields)
    for variable in sorted(environment):
        # Only names under a section, and near misses of ours, are typos: TARS_ENDPOINT and the like belong to others.
        ours = variable.startswith(sections) or (
            variable.startswith("TARS_") and difflib.get_close_matches(variable, known, n=1, cutoff=NEAR_MISS)
        )
        if ours and variable not in known:
            raise ConfigError(f"environment variable {variable}: no such key.{_nearest(variable, known)}")
    for variable, key in known.items():
        # Compose files hand over unset variables as empty ones; an empty array is written as [].
        if environment.get(variable, "").strip():
            yield variable, key, parse_variable(environment[variable], kinds[key])


# --- messages -------------------------------------------------------------------------------------------------------

_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": 'text in quotes ("...")',
    "path_type": 'a path in quotes ("...")',
    "tuple_type": "an array ([...])",
    "model_type": "a table ([...])",
    "model_attributes_type": "a table ([...])",
}


def _place(location: KeyPath, origins: Mapping[KeyPath, str]) -> str:
    """Where the value, or the nearest table above it, was written; empty for a default."""
    return next((origins[location[:end]] for end in range(len(location), 0, -1) if location[:end] in origins), "")


def _line(detail: ErrorDetails, origins: Mapping[KeyPath, str]) -> int:
    """Messages come in the file's order, those without a line last."""
    _, separator, number = _place(detail["loc"], origins).rpartition(", line ")
    return int(number) if separator else 2**31


def _message(detail: ErrorDetails, origins: Mapping[KeyPath, str]) -> str:
    """One line: where, which key, what is wrong, what is right. Never a value from [security]."""
    location = detail["loc"]
    place = _place(location, origins)
    prefix = f"{place}: " if place else ""
    name = _dotted(location)
    if detail["type"] == "extra_forbidden":
        return f"{prefix}unknown key {name}.{_right_key(location)}"
    if detail["type"] == "missing":
        return f"{prefix}{name} is missing; it has no default."
    if detail["type"] in _EXPECTED:
        expected = f"{name} must be {_EXPECTED[detail['type']]}"
    elif detail["type"] == "value_error":
        expected = f"{name}: {detail['msg'].removeprefix('Value error, ')}"
    else:
        expected = f"{name}: {detail['msg'][:1].lower()}{detail['msg'][1:]}"
    shown = detail["input"]
    if location[0] == "security" or detail["type"] == "value_error" or not isinstance(shown, str | int | float):
        return f"{prefix}{expected}."
    given = {True: "true", False: "false"}[shown] if isinstance(shown, bool) else repr(shown)
    return f"{prefix}{expected}, not {given[:80]}."


def _dotted(location: tuple[int | str, ...]) -> str:
    name = ""
    for part in location:
        name += f"[{part}]" if isinstance(part, int) else f".{part}" if name else part
    return name


def _section_at(location: tuple[int | str, ...]) -> type[BaseModel] | None:
    """The schema of the table at `location`."""
    model: type[BaseModel] = Config
    for part in location:
        if isinstance(part, int):
            continue
        field = model.model_fields.get(part)
        if field is None:
            return None
        annotation = field.annotation
        kind = typing.get_args(annotation)[0] if typing.get_origin(annotation) is tuple else annotation
        if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
            return None
        model = kind
    return model


def _right_key(location: tuple[int | str, ...]) -> str:
    section = _section_at(location[:-1])
    if section is None:
        return ""
    wrong = str(location[-1])
    elsewhere = [_dotted(key[:-1]) for key, _ in _fields() if key[-1] == wrong and len(key) > 1]
    if elsewhere and wrong not in section.model_fields:
        return f" It belongs under [{elsewhere[0]}]."
    return _nearest(wrong, section.model_fields)


def _nearest(wrong: str, known: typing.Iterable[str]) -> str:
    names = list(known)
    near = difflib.get_close_matches(wrong, names, n=1, cutoff=0.6)
    return f" Did you mean {near[0]}?" if near else f" Known here: {', '.join(sorted(names)[:20])}."
