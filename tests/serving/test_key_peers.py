"""Questions about idempotency keys on the wire."""

import asyncio

import orjson
import pytest
from hand_clock import Clock

from tars.core import idempotency_claims
from tars.core.idempotency_claims import AnswerQuestion, ClaimQuestion, Settlement
from tars.core.idempotency_keys import Claim, KeyReply, KeyState
from tars.core.types import NodeId
from tars.errors import InvalidParams, MethodNotFound, PeerUnreachable
from tars.messages.key_claims import AwaitAnswerParams, ClaimKeyParams, SettleKeyParams
from tars.serving.key_peers import SILENT_SECONDS, KeysAtPeers, question_of, reply_of, result_of

ME, PEER = NodeId("me"), NodeId("peer")
KEY, BODY = "0a" * 32, "0b" * 32
CLAIM = Claim(ME, "token", 3)
QUESTIONS = {
    "mesh.claim": [ClaimQuestion(KEY, BODY, CLAIM), ClaimQuestion(KEY, BODY, CLAIM, "gone")],
    "mesh.settle": [
        Settlement(KEY, BODY, CLAIM, '{"text": "Grüße \\u0000"}'.encode()),
        Settlement(KEY, BODY, CLAIM),
        Settlement(KEY, BODY, CLAIM, failed=True),
    ],
    "mesh.await_answer": [AnswerQuestion(KEY, BODY, 1.25, ME)],
}
PARAMS = {"mesh.claim": ClaimKeyParams, "mesh.settle": SettleKeyParams, "mesh.await_answer": AwaitAnswerParams}
CLAIM_QUESTION = QUESTIONS["mesh.claim"][0]


class Connection:
    """Says `answer`, or raises it."""

    def __init__(self, answer=None):
        self.answer = answer
        self.asked = []

    async def call(self, method, params=None, *, timeout=None, **meta):
        self.asked.append((method, params, timeout))
        if self.answer is None:
            await asyncio.Event().wait()
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def at(connection, clock=None):
    return KeysAtPeers(ME, lambda: [PEER], lambda node: connection, clock or Clock())


@pytest.mark.parametrize(("method", "question"), [(method, each) for method, all in QUESTIONS.items() for each in all])
async def test_a_question_arrives_as_it_was_asked(method, question):
    connection = Connection({"state": "unknown"})
    assert await at(connection).ask(PEER, question) == KeyReply(KeyState.UNKNOWN)
    ((asked, params, _),) = connection.asked
    assert asked == method
    assert question_of(PARAMS[method].model_validate_json(orjson.dumps(params)), ME) == question


@pytest.mark.parametrize(
    "reply", [KeyReply(KeyState.CONFLICT), KeyReply(KeyState.RUNNING, CLAIM), KeyReply(KeyState.ANSWERED, CLAIM, b"{}")]
)
async def test_a_reply_arrives_as_it_was_given(reply):
    said = orjson.loads(result_of(reply).model_dump_json())
    assert await at(Connection(said)).ask(PEER, CLAIM_QUESTION) == reply
    assert reply_of(result_of(reply)) == reply


def test_nobody_claims_in_another_nodes_name():
    params = ClaimKeyParams.model_validate({"key": KEY, "body": BODY, "claim": {"owner": ME, "token": "t"}})
    with pytest.raises(InvalidParams):
        question_of(params, PEER)


@pytest.mark.parametrize(
    "answer",
    [PeerUnreachable("gone"), MethodNotFound("an older version"), {"state": "nonsense"}, {"more": 1}, "text"],
    ids=lambda answer: str(answer)[:20],
)
async def test_what_cannot_be_used_is_no_reply(answer):
    assert await at(Connection(answer)).ask(PEER, CLAIM_QUESTION) is None


async def test_a_peer_without_an_address_is_no_reply():
    def connection(node):
        raise PeerUnreachable("no address of it is known")

    assert await KeysAtPeers(ME, lambda: [PEER], connection, Clock()).ask(PEER, CLAIM_QUESTION) is None


async def test_a_silent_home_is_given_up_soon_and_not_asked_again_for_a_while(monkeypatch):
    monkeypatch.setattr(idempotency_claims, "ASK_SECONDS", 0.01)
    connection, clock = Connection(), Clock()
    keys = at(connection, clock)
    for _ in range(3):
        assert await keys.ask(PEER, CLAIM_QUESTION) is None
    assert len(connection.asked) == 1
    clock.now = SILENT_SECONDS
    connection.answer = {"state": "conflict"}
    assert await keys.ask(PEER, CLAIM_QUESTION) == KeyReply(KeyState.CONFLICT)
    # It speaks again: at once.
    assert await keys.ask(PEER, CLAIM_QUESTION) == KeyReply(KeyState.CONFLICT)


async def test_a_silent_home_of_which_something_is_heard_is_asked_at_once(monkeypatch):
    monkeypatch.setattr(idempotency_claims, "ASK_SECONDS", 0.01)
    connection = Connection()
    keys = at(connection)
    assert await keys.ask(PEER, CLAIM_QUESTION) is None
    connection.answer = {"state": "conflict"}
    assert await keys.ask(PEER, CLAIM_QUESTION) is None
    keys.heard(PEER)
    assert await keys.ask(PEER, CLAIM_QUESTION) == KeyReply(KeyState.CONFLICT)


async def test_an_owner_has_the_time_that_it_was_told_and_some_more(monkeypatch):
    monkeypatch.setattr(idempotency_claims, "OWNER_SECONDS", 0.01)
    connection = Connection()
    assert await at(connection).ask(PEER, AnswerQuestion(KEY, BODY, 0.02)) is None
    assert connection.asked[0][2] == pytest.approx(0.03)
    assert connection.asked[0][1]["wait_ms"] == 20
