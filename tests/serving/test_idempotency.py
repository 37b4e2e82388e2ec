"""Idempotency keys."""

import asyncio
from collections import Counter

import orjson
import pytest
from hand_clock import Clock

from tars.core import idempotency_claims
from tars.core.idempotency_keys import LARGEST_ANSWER, KeyReply, KeyState
from tars.core.types import Deadline
from tars.errors import IdempotencyConflict, PeerUnreachable
from tars.messages.base import CallContext
from tars.messages.inference import (
    Attempt,
    ChatMessage,
    ChatResult,
    Choice,
    CompleteResult,
    EmbedResult,
    RerankResult,
    Scored,
    ServedBy,
    Timings,
    TokenizeParams,
    TokenizeResult,
    TokenLogprob,
    ToolCall,
    Usage,
)
from tars.messages.key_claims import AwaitAnswerParams, ClaimKeyParams, SettleKeyParams
from tars.rpc.envelope import encode_result
from tars.serving.idempotency import KEEP_BYTES, KEEP_SECONDS, Claim, IdempotentAnswers, key_of, seed_of
from tars.serving.kept_answers import RESULTS
from tars.serving.key_peers import KeysAtPeers

PARAMS = TokenizeParams(text="a")
ANSWER = TokenizeResult(model="m", tokens=[1], count=1)
SERVED = ServedBy(
    node="n", replica="r", device="d", call="t", attempts=[Attempt(replica="r", node="n", outcome="answered", tokens=3)]
)
USAGE = Usage(prompt_tokens=1, completion_tokens=1, total_tokens=2, cached_tokens=1)
LOGPROB = TokenLogprob(token="a", token_id=7, logprob=-0.5, top=[("a", -0.5)])
ANSWERS = [
    ChatResult(
        model="m",
        message=ChatMessage(
            role="assistant", content="Grüße", reasoning="hm", tool_calls=[ToolCall(id="c", name="f", arguments="{}")]
        ),
        finish_reason="tool_calls",
        usage=USAGE,
        timings=Timings(),
        served_by=SERVED,
        logprobs=[LOGPROB],
        seed=7,
        further=[Choice(index=1, text="other", finish_reason="length")],
    ),
    CompleteResult(model="m", text="x", finish_reason="stop", usage=USAGE, timings=Timings(), served_by=SERVED),
    EmbedResult.model_construct(
        model="m",
        # As `vectors.written` gives them.
        embeddings=[orjson.Fragment(b"[0.6,-0.8]"), orjson.Fragment(b"[1.0,0.1]")],
        dimensions=2,
        truncated=[0],
        split=[],
        usage=USAGE,
        timings=Timings(),
        served_by=SERVED,
    ),
    RerankResult(
        model="m",
        results=[Scored(index=0, score=1.0, document="a")],
        truncated=[],
        usage=USAGE,
        timings=Timings(),
        served_by=SERVED,
    ),
    ANSWER,
]


def call(key="k", caller="local"):
    return CallContext(Deadline(1e9), "trace", method="inference.tokenize", idempotency_key=key, caller=caller)


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def answers(clock):
    return IdempotentAnswers(clock)


async def test_a_repeated_key_gets_the_first_calls_answer(answers):
    claim = await answers.claim_or_answer(call(), PARAMS)
    await claim.succeed(ANSWER, 100)
    claim.fail()
    assert await answers.claim_or_answer(call(), PARAMS) == ANSWER


async def test_a_call_without_a_key_always_runs(answers):
    for _ in range(2):
        claim = await answers.claim_or_answer(call(key=None), PARAMS)
        assert isinstance(claim, Claim)
        await claim.succeed(ANSWER, 100)


async def test_a_second_call_joins_the_first_while_it_runs(answers):
    claim = await answers.claim_or_answer(call(), PARAMS)
    joined = asyncio.create_task(answers.claim_or_answer(call(), PARAMS))
    await asyncio.sleep(0)
    assert not joined.done()
    await claim.succeed(ANSWER, 100)
    assert await joined == ANSWER


async def test_after_a_failure_one_of_those_who_joined_takes_over(answers):
    claim = await answers.claim_or_answer(call(), PARAMS)
    joined = [asyncio.create_task(answers.claim_or_answer(call(), PARAMS)) for _ in range(2)]
    await asyncio.sleep(0)
    claim.fail()
    done, waiting = await asyncio.wait(joined, return_when=asyncio.FIRST_COMPLETED, timeout=1)
    assert len(done) == len(waiting) == 1
    (second,) = done
    await second.result().succeed(ANSWER, 100)
    assert await waiting.pop() == ANSWER


async def test_another_body_under_the_same_key_is_refused(answers):
    await answers.claim_or_answer(call(), PARAMS)
    with pytest.raises(IdempotencyConflict):
        await answers.claim_or_answer(call(), TokenizeParams(text="b"))


async def test_two_callers_do_not_share_keys(answers):
    await (await answers.claim_or_answer(call(caller="a"), PARAMS)).succeed(ANSWER, 100)
    assert isinstance(await answers.claim_or_answer(call(caller="b"), PARAMS), Claim)


async def test_an_answer_is_forgotten_after_its_time(answers, clock):
    await (await answers.claim_or_answer(call(), PARAMS)).succeed(ANSWER, 100)
    clock.now = KEEP_SECONDS + 1
    assert isinstance(await answers.claim_or_answer(call(), PARAMS), Claim)


async def test_large_answers_push_the_oldest_out_not_the_newest(answers):
    for number in range(3):
        await (await answers.claim_or_answer(call(f"k{number}"), PARAMS)).succeed(ANSWER, KEEP_BYTES // 2)
    await (await answers.claim_or_answer(call("small"), PARAMS)).succeed(ANSWER, 1)
    assert isinstance(await answers.claim_or_answer(call("k0"), PARAMS), Claim)
    assert await answers.claim_or_answer(call("k2"), PARAMS) == ANSWER
    assert await answers.claim_or_answer(call("small"), PARAMS) == ANSWER


async def test_the_sum_of_the_kept_bytes_is_right_whatever_was_dropped(answers, clock):
    for number in range(4):
        await (await answers.claim_or_answer(call(f"k{number}"), PARAMS)).succeed(ANSWER, 10)
    (await answers.claim_or_answer(call("fails"), PARAMS)).fail()
    assert answers._bytes == 40
    clock.now = KEEP_SECONDS + 1
    await answers.claim_or_answer(call("another"), PARAMS)
    assert (answers._bytes, len(answers._entries)) == (0, 1)


def test_a_key_is_the_callers_and_the_methods_and_tells_nothing():
    keys = {key_of(call(key, caller)) for key in ("k", "k2") for caller in ("alice", "bob")}
    assert len(keys) == 4
    assert all(len(key) == 64 and "alice" not in key for key in keys)
    assert key_of(call("k", "alice")) in keys


def test_the_seed_of_a_call_follows_from_its_key():
    assert seed_of(call(key=None)) is None
    seeds = {seed_of(call(f"k{number}")) for number in range(20)}
    assert len(seeds) == 20
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert seed_of(call("k1")) in seeds


# --- several nodes ---------------------------------------------------------------------------------------------------


class Network:
    """Nodes with real tables and real messages; only the wire is a function call. `down` ones are dead, `frozen` ones say nothing."""

    def __init__(self, clock, *names):
        self.clock = clock
        self.down, self.frozen, self.slow, self.parts = set(), set(), set(), None
        self.gate = asyncio.Event()
        self.asked = Counter()
        self.heard = asyncio.Event()
        self.nodes = {}
        for name in names:
            self.add(name)

    def add(self, name):
        self.nodes[name] = IdempotentAnswers(
            self.clock, KeysAtPeers(name, lambda: self.live(name), self.way(name), self.clock)
        )

    def live(self, of):
        return [each for each in self.nodes if each != of and each not in self.down and self.joined(of, each)]

    def joined(self, one, other):
        return self.parts is None or any(one in part and other in part for part in self.parts)

    def way(self, sender):
        def connection(node):
            if node in self.down or not self.joined(sender, node):
                raise PeerUnreachable("refused")
            return Wire(self, sender, node)

        return connection

    def changed(self):
        for name, node in self.nodes.items():
            if name not in self.down:
                node.members_changed()

    async def until_asked(self, times, nodes, method):
        """Wait until so many questions came to these nodes."""
        async with asyncio.timeout(5):
            while sum(self.asked[node, method] for node in nodes) < times:
                self.heard.clear()
                await self.heard.wait()

    async def idle(self):
        for node in self.nodes.values():
            await node.idle()

    async def computes(self, name, answer="42", key="k", body=PARAMS):
        """One whole call at a node: how often it was computed, and what its caller got."""
        claim = await self.nodes[name].claim_or_answer(call(key), body)
        if not isinstance(claim, Claim):
            return 0, claim.model
        return 1, (await claim.succeed(said(answer), 10)).model


class Wire:
    def __init__(self, network, sender, node):
        self.network, self.sender, self.node = network, sender, node

    async def call(self, method, params=None, *, timeout=None, **meta):
        self.network.asked[self.node, method] += 1
        self.network.heard.set()
        if self.node in self.network.frozen:
            raise TimeoutError  # as the bound of the question does; it is tested with the questions
        if self.node in self.network.slow:
            await self.network.gate.wait()
        kind = {"mesh.claim": ClaimKeyParams, "mesh.settle": SettleKeyParams, "mesh.await_answer": AwaitAnswerParams}[
            method
        ]
        asked = kind.model_validate_json(orjson.dumps(params))
        result = await self.network.nodes[self.node].asked(asked, self.sender)
        return orjson.loads(result.model_dump_json())


def said(text):
    return TokenizeResult(model=text, tokens=[1], count=1)


@pytest.fixture
def quick(monkeypatch):
    """Who waits at an owner asks again often."""
    monkeypatch.setattr(idempotency_claims, "WAIT_SECONDS", 0.02)


@pytest.fixture
async def three(clock, quick):
    network = Network(clock, "a", "b", "c")
    yield network
    await network.idle()


async def test_a_key_is_computed_once_wherever_it_is_repeated(three):
    assert await three.computes("a") == (1, "42")
    for name in "abc":
        assert await three.computes(name, "another") == (0, "42")
    with pytest.raises(IdempotencyConflict):
        await three.computes("b", body=TokenizeParams(text="b"))


async def test_calls_with_a_key_are_counted_by_what_came_of_them(three):
    await three.computes("a")
    for name in "aab":
        await three.computes(name)
    with pytest.raises(IdempotencyConflict):
        await three.computes("b", body=TokenizeParams(text="b"))
    assert dict(three.nodes["a"].outcomes) == {"run": 1, "repeated": 2}
    assert dict(three.nodes["b"].outcomes) == {"repeated": 1, "refused": 1}


async def test_a_call_that_runs_elsewhere_is_joined(three):
    claim = await three.nodes["a"].claim_or_answer(call(), PARAMS)
    joined = [asyncio.create_task(three.computes(name)) for name in "bc"]
    await three.until_asked(6, "a", "mesh.await_answer")
    assert not any(each.done() for each in joined), "they ask again while it runs"
    await claim.succeed(said("42"), 10)
    assert await asyncio.gather(*joined) == [(0, "42")] * 2


async def test_of_calls_at_all_nodes_at_once_one_is_computed(three):
    for number in range(20):
        answers = await asyncio.gather(*(three.computes(name, name, key=f"k{number}") for name in "abc"))
        assert sum(computed for computed, _ in answers) == 1
        assert len({answer for _, answer in answers}) == 1


async def test_after_a_failure_elsewhere_one_of_those_who_joined_runs_it(three):
    claim = await three.nodes["a"].claim_or_answer(call(), PARAMS)
    joined = [asyncio.create_task(three.computes(name)) for name in "bc"]
    await three.until_asked(2, "a", "mesh.await_answer")
    claim.fail()
    answers = await asyncio.gather(*joined)
    assert sorted(computed for computed, _ in answers) == [0, 1]


async def test_an_answer_outlives_any_one_node(three):
    for number in range(12):
        key = f"k{number}"
        await three.computes("a", key=key)
        for dead in "abc":
            three.down = {dead}
            for name in sorted(set("abc") - three.down):
                assert await three.computes(name, "another", key=key) == (0, "42"), (key, dead, name)
        three.down = set()


async def test_a_call_whose_node_died_is_run_by_who_repeats_it(three):
    await three.nodes["a"].claim_or_answer(call(), PARAMS)
    waiting = asyncio.create_task(three.computes("b"))
    await three.until_asked(1, "a", "mesh.await_answer")
    three.down = {"a"}
    assert await waiting == (1, "42")
    assert await three.computes("c") == (0, "42")


@pytest.mark.parametrize("key", [f"k{number}" for number in range(6)])
async def test_a_frozen_owner_is_passed_over_and_gives_its_successors_answer_when_it_thaws(three, key):
    """Whether it is the first, the second or no home of the key itself."""
    claim = await three.nodes["a"].claim_or_answer(call(key), PARAMS)
    three.frozen = {"a"}
    assert await three.computes("b", "of the successor", key=key) == (1, "of the successor")
    three.frozen = set()
    assert (await claim.succeed(said("late"), 10)).model == "of the successor"
    for name in "abc":
        assert await three.computes(name, "another", key=key) == (0, "of the successor")


async def test_a_stream_that_was_frozen_ends_as_it_began(three):
    claim = await three.nodes["a"].claim_or_answer(call(), PARAMS)
    three.frozen = {"a"}
    await three.computes("b", "of the successor")
    three.frozen = set()
    assert (await claim.succeed(said("late"), 10, shown=True)).model == "late"
    assert await three.computes("c") == (0, "of the successor")


async def test_a_mesh_in_two_parts_computes_twice_and_agrees_again(three):
    three.parts = [{"a"}, {"b", "c"}]
    assert await three.computes("a", "left") == (1, "left")
    assert await three.computes("b", "right") == (1, "right")
    assert await three.computes("c") == (0, "right")
    three.parts = None
    later = {(await three.computes(name))[1] for name in "bc"}
    assert len(later) == 1, "one answer for everybody who asks after it"


async def test_two_that_computed_it_and_wait_for_each_other_give_the_same_answer(three, monkeypatch):
    three.parts = [{"a"}, {"b"}, {"c"}]
    claims = {name: await three.nodes[name].claim_or_answer(call(), PARAMS) for name in "ab"}
    three.parts = None
    other = {"a": claims["b"]._entry.claim, "b": claims["a"]._entry.claim}

    def counts(told, said, claim, *, higher_only=False):
        return None if higher_only else KeyReply(KeyState.RUNNING, other[claim.owner])

    monkeypatch.setattr(idempotency_claims, "_counts", counts)
    async with asyncio.timeout(5):
        given = await asyncio.gather(*(claims[name].succeed(said(f"of {name}"), 10) for name in "ab"))
    smaller = min("ab", key=lambda name: claims[name]._entry.claim.token)
    assert [each.model for each in given] == [f"of {smaller}"] * 2
    for name in "ab":
        assert await three.computes(name, "another") == (0, f"of {smaller}")


async def test_large_answers_stay_with_their_owner_and_are_computed_again_without_it(three):
    large = "x" * (LARGEST_ANSWER + 1)
    assert (await three.computes("a", large))[0] == 1
    assert await three.computes("b", "another") == (0, large)
    assert all(node._table.size == 0 for node in three.nodes.values())
    three.down = {"a"}
    assert await three.computes("b", "another") == (1, "another")
    three.down = set()
    assert await three.computes("c") == (0, "another")


async def test_a_home_that_is_frozen_costs_one_moment_and_no_call(three):
    keys = [f"k{number}" for number in range(8)]
    three.frozen = {"c"}
    for key in keys:
        assert (await three.computes("a", key=key))[0] == 1
    # The first question shows that it is silent; it is not asked again for some seconds.
    assert three.asked["c", "mesh.claim"] + three.asked["c", "mesh.settle"] == 1
    for key in keys:
        assert await three.computes("b", "another", key=key) == (0, "42")


async def test_a_node_that_comes_learns_the_keys_that_it_is_a_home_of(clock, quick):
    network = Network(clock, "a", "b")
    network.changed()
    keys = [f"k{number}" for number in range(12)]
    for key in keys:
        await network.computes("a", key=key)
    for name in ("c", "d"):
        network.add(name)
        network.changed()
        await network.idle()
    for dead in ("a", "b"):
        network.down.add(dead)
        network.changed()
        await network.idle()
    for key in keys:
        assert await network.computes("c", "another", key=key) == (0, "42"), key


async def test_an_owner_tells_the_new_homes_of_its_running_call(clock, quick):
    network = Network(clock, "a", "b")
    network.changed()
    claims = [await network.nodes["a"].claim_or_answer(call(f"k{number}"), PARAMS) for number in range(8)]
    for name in ("c", "d"):
        network.add(name)
        network.changed()
        await network.idle()
    network.down = {"b"}
    joined = [asyncio.create_task(network.computes("c", key=f"k{number}")) for number in range(8)]
    await network.until_asked(16, "a", "mesh.await_answer")
    assert not any(each.done() for each in joined)
    for claim in claims:
        await claim.succeed(said("42"), 10)
    assert await asyncio.gather(*joined) == [(0, "42")] * 8


async def test_a_rolling_restart_of_all_homes_loses_no_answer(three):
    three.changed()
    keys = [f"k{number}" for number in range(12)]
    for key in keys:
        await three.computes("a", key=key)
    for name in "abc":
        three.down = {name}
        three.changed()
        await three.idle()
        three.add(name)
        three.down = set()
        three.changed()
        await three.idle()
    for key in keys:
        assert (await three.computes("b", "another", key=key)) == (0, "42"), key


async def test_who_gives_up_while_it_waits_leaves_the_key_to_the_others(three):
    claim = await three.nodes["a"].claim_or_answer(call(), PARAMS)
    waiting = asyncio.create_task(three.computes("b"))
    await three.until_asked(1, "a", "mesh.await_answer")
    waiting.cancel()
    await asyncio.wait({waiting})
    await claim.succeed(said("42"), 10)
    assert await three.computes("b") == (0, "42")


async def test_who_gives_up_while_it_claims_leaves_nothing_behind(three):
    three.slow = set("abc")
    waiting = asyncio.create_task(three.computes("a"))
    await three.until_asked(1, "abc", "mesh.claim")
    waiting.cancel()
    await asyncio.wait({waiting})
    three.gate.set()
    await three.idle()
    assert all(len(node._table) == 0 for node in three.nodes.values())
    assert len(three.nodes["a"]._entries) == 0


async def test_a_caller_who_leaves_when_the_answer_is_there_does_not_undo_it(three):
    claim = await three.nodes["a"].claim_or_answer(call(), PARAMS)
    three.slow = {"b", "c"}
    ending = asyncio.create_task(claim.succeed(said("42"), 10))
    await three.until_asked(1, "bc", "mesh.settle")
    ending.cancel()
    await asyncio.wait({ending})
    claim.fail()
    three.gate.set()
    await three.idle()
    assert await three.computes("a", "another") == (0, "42")


@pytest.mark.parametrize("result", ANSWERS, ids=lambda each: type(each).__name__)
async def test_every_kind_of_answer_is_the_same_at_another_node(three, result):
    method = next(name for name, kind in RESULTS.items() if kind is type(result))
    context = CallContext(Deadline(1e9), "trace", method=method, idempotency_key="k")
    claim = await three.nodes["a"].claim_or_answer(context, PARAMS)
    await claim.succeed(result, 10)
    there = await three.nodes["b"].claim_or_answer(context, PARAMS)
    assert orjson.loads(encode_result(1, there)) == orjson.loads(encode_result(1, result))


async def test_an_answer_of_another_version_is_computed_again(three, monkeypatch):
    await three.computes("a")
    monkeypatch.setitem(RESULTS, "inference.tokenize", EmbedResult)
    assert await three.computes("b", "another") == (1, "another")
