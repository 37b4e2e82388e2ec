"""From TOML text and environment variables to plain values, each with the place that it came from.

Law of this file: it knows text, not what TARS means by it; the schema is `config.py`'s. `tomllib` gives no positions, so a scanner
over the already parsed (hence valid) text finds the line of every key: a message without its line costs the reader a search.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tars.errors import ConfigError

KeyPath = tuple[str | int, ...]
"""Where a value stands: `("security", "api_key", 0, "name")`."""

MOST_FILE_BYTES = 2**20
"""A configuration is a few KiB; a MiB means that another kind of file was named."""

_BYTE_ORDER_MARKS = (
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
    (b"\xef\xbb\xbf", "UTF-8 with a byte order mark"),
)


def read_toml(path: Path) -> tuple[dict[str, Any], dict[KeyPath, int]]:
    """The file's values and the line of every key and table.

    Raises `ConfigError` for a file that is missing, a folder, unreadable, over `MOST_FILE_BYTES`, not plain UTF-8 or not TOML.
    """
    text = _read_text(path)
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(
            f"{path} is not valid TOML: {error}. Nothing of it was used; correct that place and start again. "
            'Text needs quotes (name = "pc1"), tables need brackets ([node]).'
        ) from None
    except RecursionError:
        raise ConfigError(f"{path} is nested too deeply to be a TARS configuration.") from None
    return values, key_lines(text)


def _read_text(path: Path) -> str:
    try:
        if path.is_dir():
            raise ConfigError(
                f"{path} is a folder, not a configuration file. Name a file in it, such as {path / 'node.toml'}."
            )
        with path.open("rb") as file:
            raw = file.read(MOST_FILE_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(
            f"The configuration file {path} does not exist. Check the path, or copy one of node_configs/*.toml and change it."
        ) from None
    except OSError as error:
        raise ConfigError(f"The configuration file {path} cannot be read: {error.strerror}.") from None
    if len(raw) > MOST_FILE_BYTES:
        raise ConfigError(f"{path} is larger than {MOST_FILE_BYTES // 2**20} MiB: this is not a TARS configuration.")
    for mark, encoding in _BYTE_ORDER_MARKS:
        if raw.startswith(mark):
            raise ConfigError(f"{path} is saved as {encoding}. Save it as UTF-8 (in Notepad: Save As, Encoding UTF-8).")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}, line {line}: not UTF-8 text. Save the file as UTF-8.") from None


# --- positions ------------------------------------------------------------------------------------------------------

_KEY_PART = re.compile(r"""\s*(?:"((?:[^"\\]|\\.)*)"|'([^']*)'|([A-Za-z0-9_-]+))\s*""")


def key_lines(text: str) -> dict[KeyPath, int]:
    """The first line (from 1) of every table and key of valid TOML; keys of an inline table have their parent's line."""
    lines: dict[KeyPath, int] = {}
    counts: dict[KeyPath, int] = {}
    table: KeyPath = ()
    for number, statement in _statements(text):
        if statement.startswith("["):
            repeated = statement.startswith("[[")
            parts = _key_parts(statement[2 if repeated else 1 :])
            table = _resolved(parts[:-1], counts)
            table = (*table, parts[-1])
            if repeated:
                counts[table] = counts.get(table, 0) + 1
                lines.setdefault(table, number)
                table = (*table, counts[table] - 1)
            lines.setdefault(table, number)
        else:
            path = (*table, *_key_parts(statement))
            for end in range(len(table) + 1, len(path) + 1):
                lines.setdefault(path[:end], number)
    return lines


def _resolved(parts: list[str], counts: dict[KeyPath, int]) -> KeyPath:
    """A table's path with the index of the newest element after every array of tables."""
    path: KeyPath = ()
    for part in parts:
        path = (*path, part)
        if path in counts:
            path = (*path, counts[path] - 1)
    return path


def _key_parts(text: str) -> list[str]:
    parts: list[str] = []
    position = 0
    while (match := _KEY_PART.match(text, position)) is not None:
        double, single, bare = match.groups()
        parts.append(json.loads(f'"{double}"') if double is not None else single if single is not None else bare)
        position = match.end()
        if position >= len(text) or text[position] != ".":
            break
        position += 1
    return parts


def _statements(text: str) -> Iterator[tuple[int, str]]:
    """(line, text) of every table header and every `key = ...` of valid TOML, skipping comments, strings and arrays."""
    position, line = 0, 1
    while position < len(text):
        if text[position] in " \t\r\n":
            line += text[position] == "\n"
            position += 1
        elif text[position] == "#":
            position = _line_end(text, position)
        elif text[position] == "[":
            end = _line_end(text, position)
            yield line, text[position:end]
            position = end
        else:
            end = _value_end(text, position)
            yield line, text[position:end]
            line += text.count("\n", position, end)
            position = end


def _line_end(text: str, position: int) -> int:
    end = text.find("\n", position)
    return len(text) if end < 0 else end


def _value_end(text: str, position: int) -> int:
    """The end of a `key = value` statement: the first newline outside strings, comments and brackets."""
    depth = 0
    while position < len(text):
        character = text[position]
        if character in "\"'":
            position = _string_end(text, position)
            continue
        if character == "#":
            position = _line_end(text, position)
            continue
        if character == "\n" and depth == 0:
            return position
        depth += (character in "[{") - (character in "]}")
        position += 1
    return position


def _string_end(text: str, position: int) -> int:
    quote = text[position]
    long = text.startswith(quote * 3, position)
    closing = quote * 3 if long else quote
    position += len(closing)
    while position < len(text) and not text.startswith(closing, position):
        position += 2 if quote == '"' and text[position] == "\\" else 1
    position += len(closing)
    # TOML allows one or two quotes directly before the closing three.
    while long and position < len(text) and text[position] == quote:
        position += 1
    return position


# --- environment ----------------------------------------------------------------------------------------------------

_TRUE = {"1", "true", "yes", "on"}
_FALSE = {"0", "false", "no", "off"}


def parse_variable(text: str, kind: type) -> object:
    """An environment variable's text as `kind` (bool, int, float, str or tuple); text that does not parse is given back as it is.

    A tuple is comma-separated text, or a JSON array, which is how an array of tables is written. The schema then refuses
    what stayed text, with the variable's name: one place makes the messages.
    """
    stripped = text.strip()
    try:
        if kind is bool:
            lowered = stripped.lower()
            return True if lowered in _TRUE else False if lowered in _FALSE else text
        if kind is int:
            return int(stripped)
        if kind is float:
            return float(stripped)
        if kind is tuple:
            if stripped.startswith("["):
                return json.loads(stripped)
            return [part.strip() for part in stripped.split(",") if part.strip()]
    except (ValueError, RecursionError):
        return text
    return text
