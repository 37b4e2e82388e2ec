"""What goes with a call between nodes crosses HTTP as JSON, compactly, and comes back as what it was."""

from __future__ import annotations

import base64
import struct

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tars.messages.base import CallMeta, ResumeMeta, SavedState
from tars.rpc.envelope import Call, decode
from tars.rpc.options import EnvelopeLimits

TOKEN = st.integers(0, 2**32 - 1)


@given(answers=st.lists(st.lists(TOKEN, max_size=20), min_size=1, max_size=4), seed=TOKEN)
def test_begun_answers_come_back_as_they_were(answers: list[list[int]], seed: int) -> None:
    handed_out = [len(tokens) // 2 for tokens in answers]
    state = SavedState(node="n", id="i", bytes=3, sha256="a" * 64)
    sent = ResumeMeta(answers=answers, handed_out=handed_out, ended=[0], seed=seed, state=state)
    said = orjson.dumps({"resume": sent.model_dump(mode="json", exclude_none=True)})
    assert CallMeta.model_validate(orjson.loads(said)).resume == sent


def test_token_ids_are_little_endian_on_the_wire_whatever_the_machine() -> None:
    sent = ResumeMeta(answers=[[1, 0x01020304]], seed=1).model_dump(mode="json")
    assert base64.b64decode(sent["answers"][0]) == struct.pack("<2I", 1, 0x01020304)


def test_the_longest_answer_fits_the_bounds_of_a_body() -> None:
    sent = ResumeMeta(answers=[list(range(131_072))] * 2, seed=1).model_dump(mode="json")
    call = {"jsonrpc": "2.0", "id": 1, "method": "inference.chat", "params": {"_meta": {"resume": sent}}}
    came = decode(orjson.dumps(call), EnvelopeLimits())
    assert isinstance(came, Call)
    assert came.meta.resume is not None
    assert came.meta.resume.answers[1][-1] == 131_071


@pytest.mark.parametrize(
    "wrong",
    [
        {"answers": [], "seed": 1},
        {"answers": [[1]] * 17, "seed": 1},
        {"answers": ["AQ=="], "seed": 1},
        {"answers": ["AQAAAA"], "seed": 1},
        {"answers": ["AQAA AA="], "seed": 1},
        {"answers": ["é"], "seed": 1},
        {"answers": [[-1]], "seed": 1},
        {"answers": [[2**32]], "seed": 1},
        {"answers": [[1.0]], "seed": 1},
        {"answers": [None], "seed": 1},
        {"answers": [[1]]},
        {"answers": [[1]], "seed": 2**32},
        {"answers": [[1]], "seed": 1, "surprise": 1},
        {"answers": [[1]], "seed": 1, "state": {"node": "n", "id": "i", "bytes": 1, "sha256": "../../etc"}},
    ],
)
def test_what_is_no_continuation_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        CallMeta.model_validate({"resume": wrong})


def test_priorities_are_two() -> None:
    assert CallMeta.model_validate({"priority": "batch"}).priority == "batch"
    with pytest.raises(ValidationError):
        CallMeta.model_validate({"priority": "urgent"})
