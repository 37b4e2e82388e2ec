"""`tars drain` and `tars resume` say what the node says."""

from __future__ import annotations

from typing import Any

import orjson

from tars.messages.node import DrainResult

DRAINED = DrainResult(
    state="draining", active_calls=0, unloaded=["phi-2"], freed_bytes=5, message="pc1 gives 5.3 GiB back."
)


def test_drain_prints_what_happens_to_the_models(node: Any, tars: Any) -> None:
    node.answers["node.drain"] = DRAINED
    ran = tars("drain")
    assert (ran.code, ran.out) == (0, "pc1 gives 5.3 GiB back.\n")


def test_resume_prints_the_state_where_the_node_says_no_more(node: Any, tars: Any) -> None:
    node.answers["node.resume"] = DrainResult(state="ready", active_calls=0)
    assert tars("resume").out == "ready\n"


def test_json_has_everything(node: Any, tars: Any) -> None:
    node.answers["node.drain"] = DRAINED
    assert orjson.loads(tars("drain", "--json").out)["unloaded"] == ["phi-2"]
