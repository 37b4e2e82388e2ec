"""README says nothing that the tree does not: generated blocks, files, links and commands."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path
from types import ModuleType

import click
import pytest

from tars.cli.commands import cli
from tars.errors import TarsError, from_json
from tars.rpc.method_table import METHODS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("readme_tables", ROOT / "scripts" / "readme_tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("block", ["methods", "errors", "limits", "plan"])
def test_a_generated_block_is_what_the_tree_says_now(tables: ModuleType, block: str) -> None:
    found = re.search(rf"<!-- {block} -->\n(.*?)\n<!-- /{block} -->", README, re.S)
    assert found, f"README has no <!-- {block} --> block"
    assert found[1] == tables.BLOCKS[block](), "run: python scripts/readme_tables.py"


def test_every_error_that_can_travel_has_a_row(tables: ModuleType) -> None:
    rows = {row.split("|")[2].strip(" `"): row for row in tables.errors().splitlines()[2:]}
    for kind, row in rows.items():
        code = int(row.split("|")[1])
        made = from_json({"code": code, "message": "m", "data": {"kind": kind}})
        assert type(made) is not TarsError, f"{kind} does not come back as its own class"
        assert made.code == code
    assert {"unknown_model", "does_not_fit", "still_loading", "overloaded", "limit_exceeded"} <= set(rows)


def test_every_method_is_in_the_list() -> None:
    block = README.split("<!-- methods -->")[1].split("<!-- /methods -->")[0]
    for name in METHODS:
        assert f"`{name}`" in block


def named_files() -> list[str]:
    words = re.findall(r"`((?:scripts|node_configs|tars)/[\w./-]*)", README)
    links = re.findall(r"\]\((?!https?://)([^)#]+)\)", README)
    return sorted({*words, *links})


@pytest.mark.parametrize("path", named_files())
def test_a_file_that_readme_names_exists(path: str) -> None:
    assert (ROOT / path).exists()


def test_every_node_config_is_in_readme() -> None:
    for file in (ROOT / "node_configs").glob("*.toml"):
        assert f"node_configs/{file.name}" in README


def console_commands(program: str) -> list[str]:
    blocks = re.findall(r"```console\n(.*?)```", README, re.S)
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    return [line[2:] for line in lines if line.startswith(f"$ {program} ")]


def options_of(command: click.Command) -> set[str]:
    return {option for parameter in command.params for option in parameter.opts}


@pytest.mark.parametrize("line", console_commands("tars"))
def test_a_tars_command_in_readme_parses(line: str) -> None:
    words = shlex.split(line, comments=True)[1:]
    command = cli.commands[words[0]]
    for word in words[1:]:
        if word.startswith("--"):
            assert word in options_of(command), f"{word} in {line!r}"


def test_the_list_of_commands_is_the_whole_list() -> None:
    found = re.search(r"`tars ([a-z]+(?:\|[a-z]+)+)`", README)
    assert found
    assert set(found[1].split("|")) == set(cli.commands)
