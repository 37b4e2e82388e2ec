"""The table's rows are whole, and what is printed from them is in README."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tars.messages.base import Message, NoParams
from tars.rpc.method_table import CALLERS, METHODS, MethodSpec, Role, method_list_markdown

ROOT = Path(__file__).resolve().parents[2]


def test_a_rows_key_is_its_name_and_its_name_has_a_namespace() -> None:
    for name, spec in METHODS.items():
        assert name == spec.name
        assert re.fullmatch(r"(rpc|node|mesh|models|calls|inference)\.[a-z_]+", name)
        assert spec.summary.endswith((".", "?", "!"))


def test_only_generation_streams_and_only_it_and_what_makes_or_ends_a_secret_is_not_idempotent() -> None:
    generating = {"inference.chat", "inference.complete"}
    secrets = {"mesh.join", "mesh.token_new", "mesh.key_new", "mesh.key_revoke"}
    assert {name for name, spec in METHODS.items() if spec.streams} == generating
    assert {name for name, spec in METHODS.items() if not spec.idempotent} == generating | secrets
    assert all(spec.delta_notification == "inference.delta" for spec in METHODS.values() if spec.streams)


def test_each_method_is_for_those_who_may_call_it() -> None:
    only = {name: spec.roles for name, spec in METHODS.items() if spec.roles != CALLERS}
    assert only.pop("mesh.join") == {Role.STRANGER}
    for name in ("mesh.gossip", "mesh.claim", "mesh.settle", "mesh.await_answer"):
        assert only.pop(name) == {Role.PEER}
    assert set(only) == {
        name for name in METHODS if name.startswith(("mesh.token_", "mesh.key_", "mesh.remove", "models.add_file"))
    }
    assert set(only.values()) == {frozenset({Role.ADMINISTRATOR})}
    assert Role.STRANGER not in CALLERS


def test_tars_own_methods_take_named_params_only() -> None:
    assert not any(spec.positional for spec in METHODS.values())


def test_the_list_names_each_method_with_what_it_needs() -> None:
    class Params(Message):
        needed: str
        optional: int = 1

    spec = MethodSpec("a.b", "Does it.", Params)
    assert method_list_markdown({"a.b": spec}).splitlines()[2] == "| `a.b` | `needed`, [`optional`] |  | Does it. |"
    assert "| none |" in method_list_markdown({"a.c": MethodSpec("a.c", "Does it.", NoParams)})


def test_the_list_stands_in_readme_and_the_command_prints_it() -> None:
    printed = subprocess.run(
        [sys.executable, "-m", "tars.rpc.method_table"], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    assert printed == method_list_markdown()
    readme = ROOT.joinpath("README.md").read_text(encoding="utf-8")
    found = re.search(r"<!-- methods -->\n(.*?)\n*<!-- /methods -->", readme, re.S)
    assert found, "README has no <!-- methods --> block"
    assert found[1].strip() == printed.strip(), "put in README what `python -m tars.rpc.method_table` prints"


@pytest.mark.parametrize("name", METHODS)
def test_a_rows_messages_refuse_unknown_fields(name: str) -> None:
    spec = METHODS[name]
    for message in (spec.params, spec.result, spec.delta):
        assert message is None or message.model_config["extra"] == "forbid"
