"""`tars token`, `tars key`, `tars node`: what is asked, what is printed, and that a secret stands alone on its line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
from rich.console import Console, RenderableType

from tars.cli.mesh_commands import join_lines, keys_view, nodes_view, tokens_view
from tars.errors import Forbidden, InvalidParams, Unauthorized
from tars.mesh.operator_key import make_operator_key
from tars.messages.admission import (
    KeyDescription,
    KeyNewResult,
    KeyRevokeResult,
    KeysResult,
    NodeRemoveResult,
    TokenDescription,
    TokenNewResult,
    TokenRevokeResult,
    TokensResult,
)
from tars.messages.node import PeerDescription, PeersResult

TOKEN = "abcDEF-_" * 5 + "123"
NODE = "0a1b2c3d-0000-4000-8000-000000000000"
HOUR_MS = 3_600_000


@pytest.fixture
def mesh(node: Any) -> Any:
    """The fake node with a mesh."""
    node.answers |= {
        "mesh.token_new": TokenNewResult(
            id="0a1b2c3d", token=TOKEN, expires_ms=HOUR_MS, addresses=["192.0.2.7:8001", "box.tailnet:8001"]
        ),
        "mesh.token_list": TokensResult(
            tokens=[TokenDescription(id="0a1b2c3d", state="open", created_ms=0, expires_ms=HOUR_MS)]
        ),
        "mesh.token_revoke": TokenRevokeResult(id="0a1b2c3d", revoked=True),
        "mesh.key_new": KeyNewResult(name="laptop", key="tars-the-key", admin=False),
        "mesh.key_list": KeysResult(keys=[KeyDescription(name="laptop", admin=False, source="mesh", created_ms=0)]),
        "mesh.key_revoke": KeyRevokeResult(name="laptop", revoked=True),
        "mesh.peers": PeersResult(
            peers=[
                PeerDescription(node=NODE, name="pc1", state="ALIVE", addresses=["192.0.2.7:8001"], coordinator=True)
            ]
        ),
        "mesh.remove": NodeRemoveResult(node=NODE, name="pc1", removed=True),
    }
    return node


COMMANDS = [
    (("token", "new"), "mesh.token_new", f"tars-node --join {TOKEN}@192.0.2.7:8001"),
    (("token", "list"), "mesh.token_list", "0a1b2c3d"),
    (("token", "revoke", "0a1b2c3d"), "mesh.token_revoke", "opens nothing any more"),
    (("key", "new", "laptop"), "mesh.key_new", "tars-the-key"),
    (("key", "list"), "mesh.key_list", "every node"),
    (("key", "revoke", "laptop"), "mesh.key_revoke", "works nowhere any more"),
    (("node", "list"), "mesh.peers", "coordinates"),
    (("node", "remove", "pc1"), "mesh.remove", "no longer in the mesh"),
]


@pytest.mark.parametrize(("command", "method", "words"), COMMANDS)
def test_a_command_calls_its_method_and_shows_the_answer(
    mesh: Any, tars: Callable[..., Any], command: tuple[str, ...], method: str, words: str
) -> None:
    ran = tars(*command)
    assert ran.code == 0, ran.err
    assert [name for name, _, _ in mesh.calls] == [method]
    assert words in ran.out


@pytest.mark.parametrize(("command", "method", "words"), COMMANDS)
def test_json_gives_the_message_itself(
    mesh: Any, tars: Callable[..., Any], command: tuple[str, ...], method: str, words: str
) -> None:
    ran = tars(*command, "--json")
    assert (ran.code, ran.err) == (0, "")
    assert orjson.loads(ran.out) == mesh.answers[method].model_dump(mode="json")


@pytest.mark.parametrize(("command", "method", "words"), COMMANDS)
def test_without_the_right_to_it_the_node_says_what_to_do(
    mesh: Any, tars: Callable[..., Any], command: tuple[str, ...], method: str, words: str
) -> None:
    mesh.answers[method] = Forbidden("this is for administrators")
    ran = tars(*command)
    assert (ran.code, ran.out) == (1, "")
    assert "for administrators" in ran.err
    mesh.answers[method] = Unauthorized("a key is needed")
    assert "TARS_STATE_DIR" in tars(*command).err


def test_the_line_for_the_next_pc_is_the_first_and_the_rest_are_comments(mesh: Any, tars: Callable[..., Any]) -> None:
    ran = tars("token", "new", "--ttl", "90m")
    assert mesh.params("mesh.token_new") == {"ttl_seconds": 5400}
    first, second = ran.out.splitlines()
    assert first == f"tars-node --join {TOKEN}@192.0.2.7:8001"
    assert second.startswith("# ")
    assert "box.tailnet" in second
    assert "within 1 h 30 min" in ran.err
    assert TOKEN not in ran.err


def test_a_node_that_knows_no_address_of_its_own_leaves_it_to_the_reader() -> None:
    assert join_lines(TokenNewResult(id="x", token=TOKEN, expires_ms=1, addresses=[])) == [
        f"tars-node --join {TOKEN}@HOST:PORT"
    ]


@pytest.mark.parametrize(
    ("given", "seconds"), [("90s", 90), ("90", 90), ("30m", 1800), ("1h", 3600), ("30d", 2_592_000), ("1H", 3600)]
)
def test_a_tokens_life_is_written_as_people_do(mesh: Any, tars: Callable[..., Any], given: str, seconds: int) -> None:
    assert tars("token", "new", "--ttl", given).code == 0
    assert mesh.params("mesh.token_new") == {"ttl_seconds": seconds}


@pytest.mark.parametrize("given", ["", "0", "0h", "-1", "31d", "1 week", "1.5h", "h", "1e3", "٣h", "9999999d", "nan"])
def test_a_wrong_life_is_wrong_usage_and_asks_nothing(mesh: Any, tars: Callable[..., Any], given: str) -> None:
    ran = tars("token", "new", f"--ttl={given}")
    assert ran.code == 2
    assert "30d" in ran.err
    assert mesh.calls == []


def test_a_key_stands_alone_on_its_line_and_is_not_said_twice(mesh: Any, tars: Callable[..., Any]) -> None:
    ran = tars("key", "new", "laptop", "--admin")
    assert mesh.params("mesh.key_new") == {"name": "laptop", "admin": True}
    assert ran.out == "tars-the-key\n"
    assert "tars-the-key" not in ran.err
    assert "not shown again" in ran.err
    assert "without a key" not in ran.err


def test_who_makes_the_first_key_hears_what_that_changes(mesh: Any, tars: Callable[..., Any]) -> None:
    mesh.answers["mesh.key_new"] = KeyNewResult(name="laptop", key="tars-the-key", admin=False, first=True)
    ran = tars("key", "new", "laptop")
    assert ran.out == "tars-the-key\n"
    assert "from now on every node refuses calls without a key" in ran.err


@pytest.mark.parametrize("name", ["a b", "", "-x", "a/b", "é", "x" * 64])
def test_an_odd_key_name_is_refused_before_anything_is_sent(mesh: Any, tars: Callable[..., Any], name: str) -> None:
    ran = tars("key", "new", "--", name)
    assert ran.code != 0
    assert ran.out == ""
    assert mesh.calls == []


def test_what_could_no_longer_be_done_says_so(mesh: Any, tars: Callable[..., Any]) -> None:
    mesh.answers["mesh.token_revoke"] = TokenRevokeResult(id="0a1b2c3d", revoked=False)
    mesh.answers["mesh.remove"] = NodeRemoveResult(node=NODE, name="pc1", removed=False)
    assert "could no longer be used" in tars("token", "revoke", "0a1b2c3d").out
    assert "was removed before" in tars("node", "remove", "pc1").out
    mesh.answers["mesh.remove"] = InvalidParams("The mesh has no node with that id or name.")
    ran = tars("node", "remove", "pc9")
    assert (ran.code, ran.out) == (1, "")
    assert "no node with that id" in ran.err


def drawn(view: RenderableType) -> str:
    console = Console(width=120, markup=False, highlight=False)
    with console.capture() as captured:
        console.print(view)
    return captured.get()


def test_tokens_are_shown_with_their_age_and_what_became_of_them() -> None:
    now = 2 * 3600.0
    made = [
        TokenDescription(id="aaaaaaaa", state="open", created_ms=HOUR_MS, expires_ms=3 * HOUR_MS),
        TokenDescription(
            id="bbbbbbbb", state="used", created_ms=0, expires_ms=HOUR_MS, used_by=NODE, used_by_name="pc2\x1b[31m"
        ),
        TokenDescription(id="cccccccc", state="expired", created_ms=0, expires_ms=HOUR_MS),
    ]
    shown = drawn(tokens_view(TokensResult(tokens=made), now))
    assert "in 1 h 0 min" in shown
    assert "pc2[31m (0a1b2c3d)" in shown
    assert "\x1b" not in shown
    assert "2 h 0 min ago" in shown
    assert "tars token new" in drawn(tokens_view(TokensResult(tokens=[]), now))


def test_keys_are_shown_with_what_they_may() -> None:
    keys = [
        KeyDescription(name="me", admin=True, source="configuration"),
        KeyDescription(name="laptop", admin=False, source="mesh", created_ms=0),
    ]
    shown = drawn(keys_view(KeysResult(keys=keys), 86_400.0))
    assert "everything" in shown
    assert "its configuration" in shown
    assert "1 d 0 h ago" in shown
    assert "tars key new" in drawn(keys_view(KeysResult(keys=[]), 0.0))


def test_nodes_are_shown_with_their_state_and_role() -> None:
    peers = [
        PeerDescription(node=NODE, name="pc1", state="ALIVE", addresses=["192.0.2.7:8001"], coordinator=True),
        PeerDescription(node="ffffffff-0", name="pc\x1b2", state="DEAD", addresses=[], coordinator=False),
    ]
    shown = drawn(nodes_view(PeersResult(peers=peers)))
    assert "coordinates" in shown
    assert "DEAD" in shown
    assert "\x1b" not in shown
    assert "its own network" not in shown
    assert "its own network" in drawn(nodes_view(PeersResult(peers=peers, isolated=True)))


def test_on_the_nodes_own_pc_the_operator_key_is_sent_and_a_given_key_wins(
    mesh: Any, tars: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sent(*arguments: str) -> str | None:
        tars("key", "list", *arguments)
        headers: dict[str, str] = mesh.calls[-1][2]
        return headers.get("Authorization")

    port = int(mesh.url.rpartition(":")[2])
    monkeypatch.setenv("TARS_STATE_DIR", str(tmp_path))
    assert sent() is None
    key = make_operator_key(tmp_path, port)
    assert sent() == f"Bearer {key}"
    assert sent("--api-key", "given") == "Bearer given"
    make_operator_key(tmp_path, port + 1)
    assert sent() is None
