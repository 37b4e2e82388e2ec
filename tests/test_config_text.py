"""TOML text with the line of every key, files that cannot be used, and the text of environment variables."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tars.config_text import MOST_FILE_BYTES, KeyPath, key_lines, parse_variable, read_toml
from tars.errors import ConfigError

AWKWARD = (
    r'''# a comment with [brackets] and key = value
top = "a # no comment" # a comment
[node]
name = """
[not.a.table]
fake = 1
quote \""" and "" still inside """"
'single quoted' = 'C:\'
"double \"quoted\"" = 2
dotted . inner = 3
list = [
  "]", # ] in a comment
  'also = ]',
  { inline = [1, 2] },
]
after = '''
    r"""'''
literal = 5
'''"""
    r"""

[[deploy]]
model = "one"
[deploy.extra]
deep = 1
[[deploy]]
model = "two"
[[deploy.rows]]
x = 1
[[deploy.rows]]
x = 2
[ spaced . name ]
y = 1979-05-27T07:32:00Z
"""
)


def paths(value: Any, above: KeyPath = ()) -> Iterator[KeyPath]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in items:
        yield (*above, key)
        yield from paths(below, (*above, key))


def test_every_key_of_an_awkward_file_has_its_line() -> None:
    lines = key_lines(AWKWARD)
    expected = {
        ("top",): 'top = "a',
        ("node",): "[node]",
        ("node", "name"): 'name = """',
        ("node", "single quoted"): "'single quoted'",
        ("node", 'double "quoted"'): '"double',
        ("node", "dotted"): "dotted . inner",
        ("node", "dotted", "inner"): "dotted . inner",
        ("node", "list"): "list = [",
        ("node", "after"): "after = '''",
        ("deploy",): "[[deploy]]",
        ("deploy", 0): "[[deploy]]",
        ("deploy", 0, "model"): 'model = "one"',
        ("deploy", 0, "extra", "deep"): "deep = 1",
        ("deploy", 1, "model"): 'model = "two"',
        ("deploy", 1, "rows", 1, "x"): "x = 2",
        ("spaced", "name", "y"): "y = 1979",
    }
    text = AWKWARD.splitlines()
    for path, start in expected.items():
        assert text[lines[path] - 1].startswith(start), path
    assert not any("fake" in path or "literal" in path for path in lines)


def test_no_key_is_invented_and_none_outside_inline_values_is_missed() -> None:
    found = set(key_lines(AWKWARD))
    real = set(paths(tomllib.loads(AWKWARD)))
    assert found <= real
    assert {path for path in real - found if path[:2] != ("node", "list")} <= {("spaced",)}


@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"], exclude_characters="\\\"'"), min_size=1),
        st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"], exclude_characters='\\"')),
        max_size=5,
    )
)
def test_keys_of_any_text_are_found_on_their_line(values: dict[str, str]) -> None:
    text = "".join(f'\n# {number}\n"{key}" = "{value}"\n' for number, (key, value) in enumerate(values.items()))
    assert tomllib.loads(text) == values
    assert key_lines(text) == {(key,): 3 * number + 3 for number, key in enumerate(values)}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[node]\nname = pc1\n", ("line 2", "not valid TOML")),
        ("[node\n", ("line 1", "not valid TOML")),
        ("a = 1\na = 2\n", ("line 2",)),
        ("\ufeff[node]\n".encode(), ("byte order mark", "UTF-8")),
        ('[node]\nname = "pc"\n'.encode("utf-16"), ("UTF-16", "Notepad")),
        (b'[node]\nname = "caf\xe9"\n', ("line 2", "not UTF-8")),
        (b"a = 1\n" * MOST_FILE_BYTES, ("larger than 1 MiB",)),
        ("a = " + "[" * 5000 + "]" * 5000, ("nested too deeply",)),
    ],
    ids=["unquoted", "unclosed", "twice", "bom", "utf-16", "latin-1", "huge", "deep"],
)
def test_a_file_that_cannot_be_used_says_what_is_wrong(
    tmp_path: Path, content: str | bytes, says: tuple[str, ...]
) -> None:
    file = tmp_path / "node.toml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError) as caught:
        read_toml(file)
    for words in (*says, "node.toml"):
        assert words in caught.value.message


def test_a_missing_file_and_a_folder_say_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        read_toml(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="is a folder"):
        read_toml(tmp_path)


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("8", int, 8),
        (" 8 ", int, 8),
        ("8.5", int, "8.5"),
        ("8.5", float, 8.5),
        ("yes", bool, True),
        ("OFF", bool, False),
        ("2", bool, "2"),
        ("plain", str, "plain"),
        ("a, b,", tuple, ["a", "b"]),
        ('["a,b"]', tuple, ["a,b"]),
        ('[{"model": "m"}]', tuple, [{"model": "m"}]),
        ("[broken", tuple, "[broken"),
    ],
)
def test_a_variable_is_parsed_or_left_as_text_for_the_schema_to_refuse(text: str, kind: type, value: object) -> None:
    assert parse_variable(text, kind) == value
