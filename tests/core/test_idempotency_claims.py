"""Claiming and settling an idempotency key among several nodes."""

import random
from functools import partial

import pytest

from tars.core.idempotency_claims import (
    MOST_WAITS,
    AnswerQuestion,
    Ask,
    ClaimQuestion,
    Known,
    Pause,
    Refused,
    Run,
    at_home,
    claiming,
    freeing,
    gives_its_own,
    settling,
)
from tars.core.idempotency_keys import Claim, KeyReply, KeyState, KeyTable
from tars.core.types import NodeId

A, B, C, D = (NodeId(name) for name in "abcd")


class Mesh:
    """Tables of several nodes, and what each answers as an owner. `down` nodes answer nothing."""

    def __init__(self, *nodes):
        self.tables = {node: KeyTable() for node in nodes}
        self.own = {}
        self.down = set()
        self.asked = []

    def put(self, ask):
        self.asked.append((ask.node, type(ask.question).__name__))
        if ask.node in self.down:
            return None
        if isinstance(ask.question, AnswerQuestion):
            return self.own.get(ask.node, KeyReply(KeyState.UNKNOWN))
        return at_home(self.tables[ask.node], ask.question, 0)

    def drive(self, steps, before=lambda asks: None):
        """Run a protocol to its end; `before` sees each step's questions first."""
        replies = None
        for _ in range(50):
            try:
                asks = steps.send(replies)
            except StopIteration as ended:
                return ended.value
            before(asks)
            replies = () if isinstance(asks, Pause) else tuple(self.put(ask) for ask in asks)
        raise AssertionError("it never ends")

    def claim(self, node, body="x", homes=(A, B), token=None, **more):
        return self.drive(
            claiming("k", body, Claim(node, token or f"token-{node}"), lambda: homes, random.Random(1), **more)
        )

    def settle(self, run, answer, homes=(A, B), **more):
        return self.drive(settling("k", "x", run, lambda: homes, answer, **more))


@pytest.fixture
def mesh():
    return Mesh(A, B, C, D)


def test_a_granted_claim_is_known_at_both_homes_and_its_answer_too(mesh):
    run = mesh.claim(C)
    assert run == Run(Claim(C, "token-c"), (A, B))
    assert mesh.settle(run, b"42") is None
    for home in (A, B):
        mesh.down = {home}
        assert mesh.claim(D) == Known(b"42")


def test_who_comes_second_waits_at_the_owner_and_gets_its_answer(mesh):
    mesh.claim(C)
    mesh.own[C] = KeyReply(KeyState.ANSWERED, None, b"42")
    assert mesh.claim(D) == Known(b"42")
    assert mesh.asked[-1] == (C, "AnswerQuestion")


def test_who_waits_asks_again_while_the_owner_runs(mesh):
    mesh.claim(C)
    mesh.own[C] = KeyReply(KeyState.RUNNING)
    waited = []

    def before(asks):
        if isinstance(asks[0].question, AnswerQuestion):
            waited.append(asks)
            if len(waited) == 3:
                mesh.own[C] = KeyReply(KeyState.ANSWERED, None, b"42")

    steps = claiming("k", "x", Claim(D, "token-d"), lambda: (A, B), random.Random(1))
    assert mesh.drive(steps, before) == Known(b"42")
    assert len(waited) == 3


@pytest.mark.parametrize("how", ["unreachable", "knows it no more"])
def test_a_call_whose_owner_is_gone_is_run_by_who_waited(mesh, how):
    mesh.claim(C)
    if how == "unreachable":
        mesh.down = {C}
    run = mesh.claim(D)
    assert run == Run(Claim(D, "token-d", 2), (A, B))
    assert [each.kept(0)[0].claim for each in (mesh.tables[A], mesh.tables[B])] == [run.claim] * 2


def test_an_owner_that_thaws_gives_the_answer_of_the_one_who_took_over(mesh):
    frozen = mesh.claim(C)
    mesh.down = {C}
    run = mesh.claim(D)
    mesh.down = set()
    # Still running there: it waits.
    mesh.own[D] = KeyReply(KeyState.ANSWERED, None, b"42")
    assert mesh.settle(frozen, b"late") == Known(b"42")
    assert mesh.settle(run, b"42") is None
    assert mesh.settle(frozen, b"late") == Known(b"42")
    assert mesh.claim(B) == Known(b"42")


def test_an_owner_that_is_a_home_itself_asks_the_others_before_it_believes_itself(mesh):
    frozen = mesh.claim(A)
    mesh.down = {A}
    run = mesh.claim(C)
    mesh.settle(run, b"42")
    mesh.down = set()
    assert mesh.settle(frozen, b"late") == Known(b"42")
    # And knows better now.
    mesh.down = {B, C}
    assert mesh.claim(D) == Known(b"42")


def test_an_owner_that_thaws_keeps_its_own_answer_where_its_successor_is_gone_too(mesh):
    frozen = mesh.claim(C)
    mesh.down = {C}
    mesh.claim(D)
    mesh.down = {D}
    assert mesh.settle(frozen, b"late") is None


def test_an_owner_does_not_wait_for_a_successor_that_it_does_not_see_alive(mesh):
    frozen = mesh.claim(C)
    mesh.down = {C}
    mesh.claim(D)
    mesh.down = set()
    mesh.own[D] = KeyReply(KeyState.RUNNING)  # for ever
    assert mesh.settle(frozen, b"late", lives=lambda node: node != D) is None


def test_of_two_that_ran_it_in_two_parts_the_first_homes_word_counts_though_that_is_the_owner_itself(mesh):
    run = mesh.claim(A, homes=(A,))
    mesh.claim(C, homes=(B,))
    mesh.own[C] = KeyReply(KeyState.ANSWERED, None, b"theirs")
    assert mesh.settle(run, b"42") is None
    assert mesh.claim(D) == Known(b"42")


def test_another_body_is_refused_and_what_was_granted_for_it_is_freed(mesh):
    run = mesh.claim(C, homes=(B,))
    # A became a home since and knows nothing.
    assert mesh.claim(D, body="y") == Refused()
    assert len(mesh.tables[A]) == 0
    assert mesh.settle(run, b"42", homes=(A, B)) is None
    assert mesh.claim(D, body="y") == Refused()
    assert mesh.claim(D) == Known(b"42")


def test_a_new_home_learns_the_answer_from_the_first_who_asks_for_it(mesh):
    run = mesh.claim(C, homes=(B, D))
    mesh.settle(run, b"42", homes=(B, D))
    assert mesh.claim(D, homes=(A, B)) == Known(b"42")
    mesh.down = {B}
    assert mesh.claim(C, homes=(A, B)) == Known(b"42")


def test_nodes_that_see_other_homes_meet_at_the_one_they_share(mesh):
    run = mesh.claim(C, homes=(B, D))
    mesh.own[C] = KeyReply(KeyState.ANSWERED, None, b"42")
    # A granted it, B says that it runs.
    assert mesh.claim(D, homes=(A, B)) == Known(b"42")
    assert len(mesh.tables[A]) == 0
    assert run.claim.epoch == 1


def test_a_home_that_does_not_answer_costs_nothing_but_its_memory(mesh):
    mesh.down = {A}
    run = mesh.claim(C)
    mesh.settle(run, b"42")
    mesh.down = set()
    assert mesh.claim(D) == Known(b"42")


def test_no_home_at_all_lets_the_call_run(mesh):
    mesh.down = {A, B}
    run = mesh.claim(C)
    assert run == Run(Claim(C, "token-c"), (A, B))
    assert mesh.settle(run, b"42") is None
    assert mesh.claim(C, homes=(), token="another") == Run(Claim(C, "another"), ())


def test_a_failed_call_frees_its_key_at_all_homes(mesh):
    run = mesh.claim(C)
    mesh.drive(freeing("k", "x", run.claim, run, lambda: (A, B)))
    assert mesh.claim(D, body="y") == Run(Claim(D, "token-d"), (A, B))


def test_a_call_that_was_given_up_while_it_claimed_frees_what_it_may_have_got(mesh):
    steps = claiming("k", "x", Claim(C, "token-c"), lambda: (A, B), random.Random(1))
    (ask,) = next(steps)
    mesh.put(ask)
    steps.close()
    mesh.drive(freeing("k", "x", Claim(C, "token-c"), None, lambda: (A, B)))
    assert len(mesh.tables[A]) == 0


def test_who_waits_for_another_owner_says_so(mesh):
    mesh.claim(C)
    said = []
    mesh.claim(D, joining=said.append)
    assert said == [False, True, False]


def test_a_large_answer_is_fetched_from_its_owner(mesh):
    run = mesh.claim(C)
    assert mesh.settle(run, None) is None
    mesh.own[C] = KeyReply(KeyState.ANSWERED, None, b"large")
    assert mesh.claim(D) == Known(b"large")
    mesh.down = {C}
    assert isinstance(mesh.claim(D), Run)


def step(steps, node, answer):
    """One step of a node's protocol; `steps` has each node's generator and the replies that it is sent next."""
    generator, replies = steps[node]
    try:
        asks = generator.send(replies)
    except StopIteration:
        del steps[node]
    else:
        steps[node][1] = () if isinstance(asks, Pause) else tuple(map(answer, asks))


class Racing:
    """Several nodes that claim one key at once, their steps interleaved by dice; who runs it answers after some steps."""

    def __init__(self, seed, homes_of):
        self.dice = random.Random(seed)
        self.mesh = Mesh(A, B, C, D)
        self.joins = dict.fromkeys((A, B, C, D), False)
        self.results = {}
        self.computed = []
        self.homes_of = homes_of

    def node(self, node):
        claim = Claim(node, f"token-{node}")

        def joining(joins):
            self.joins[node] = joins

        def homes():
            return self.homes_of(node)

        outcome = yield from claiming("k", "x", claim, homes, self.dice, joining)
        if isinstance(outcome, Run):
            self.computed.append(node)
            for _ in range(self.dice.randrange(6)):
                yield Pause(0)
            answer = f"by {node}".encode()
            other = yield from settling("k", "x", outcome, homes, answer)
            outcome = other or Known(answer)
        self.results[node] = outcome.answer

    def answer(self, ask):
        if isinstance(ask.question, AnswerQuestion):
            if ask.node in self.results:
                return KeyReply(KeyState.ANSWERED, None, self.results[ask.node])
            return KeyReply(KeyState.UNKNOWN if self.joins[ask.node] else KeyState.RUNNING)
        return self.mesh.put(ask)

    def run(self):
        steps = {node: [self.node(node), None] for node in (A, B, C, D)}
        for _ in range(2000):
            if not steps:
                return
            node = self.dice.choice(sorted(steps))
            step(steps, node, self.answer)
        raise AssertionError(f"still waiting for each other: {sorted(steps)}")


@pytest.mark.parametrize("seed", range(100))
def test_of_nodes_that_claim_a_key_at_once_one_computes_and_all_get_its_answer(seed):
    race = Racing(seed, lambda node: (A, B))
    race.run()
    assert len(race.computed) == 1
    assert len(set(race.results.values())) == 1


@pytest.mark.parametrize("seed", range(100))
def test_nodes_with_unlike_views_that_share_a_home_compute_it_once_and_wait_in_no_circle(seed):
    views = {A: (A, B), B: (B, C), C: (A, B), D: (B, D)}
    race = Racing(seed, views.__getitem__)
    race.run()
    assert len(race.computed) == 1
    assert len(set(race.results.values())) == 1


@pytest.mark.parametrize("seed", range(50))
def test_a_mesh_in_two_parts_computes_it_once_in_each(seed):
    views = {A: (A, B), B: (A, B), C: (C, D), D: (C, D)}
    race = Racing(seed, views.__getitem__)
    race.run()
    assert len(race.computed) == 2
    assert race.results[A] == race.results[B]
    assert race.results[C] == race.results[D]


class Finished:
    """Two nodes, A and B, that both computed the call; what homes say is given. Each waits for the other one, as `serving` does it."""

    def __init__(self, tokens, said):
        self.runs = {node: Run(Claim(node, tokens[node]), (C, D)) for node in tokens}
        self.said = said
        self.waits = dict.fromkeys(tokens)
        self.given = {}
        self.questions = 0

    def node(self, node):
        def waiting(winner):
            self.waits[node] = winner

        own = f"by {node}".encode()
        other = yield from settling("k", "x", self.runs[node], lambda: (C, D), own, waiting=waiting)
        self.given[node] = own if other is None else other.answer

    def reply(self, node, ask):
        if not isinstance(ask.question, AnswerQuestion):
            return self.said[node].get(ask.node)
        assert ask.question.asker == node
        self.questions += 1
        owner = ask.node
        if gives_its_own(self.runs[owner].claim, self.waits[owner], node):
            return KeyReply(KeyState.ANSWERED, None, f"by {owner}".encode())
        if owner in self.given:
            return KeyReply(KeyState.ANSWERED, None, self.given[owner])
        return KeyReply(KeyState.RUNNING)

    def run(self, order):
        steps = {node: [self.node(node), None] for node in self.runs}
        while steps:
            for node in order:
                if node in steps:
                    step(steps, node, partial(self.reply, node))


@pytest.mark.parametrize("order", [(A, B), (B, A)])
@pytest.mark.parametrize("tokens", [{A: "1", B: "2"}, {A: "2", B: "1"}])
def test_two_that_computed_it_and_heard_of_each_other_give_the_same_answer_at_once(tokens, order):
    """The first home knows B's claim, and its word to B was lost; the second one knows A's."""
    finished = Finished(
        tokens,
        {
            A: {
                C: KeyReply(KeyState.RUNNING, Claim(B, tokens[B])),
                D: KeyReply(KeyState.ANSWERED, Claim(A, tokens[A])),
            },
            B: {D: KeyReply(KeyState.RUNNING, Claim(A, tokens[A]))},
        },
    )
    finished.run(order)
    smaller = min(tokens, key=tokens.__getitem__)
    assert finished.given == dict.fromkeys((A, B), f"by {smaller}".encode())
    assert finished.questions < 10


def test_a_finished_answer_is_not_kept_from_its_caller_for_ever(mesh):
    run = Run(Claim(A, "a"), (C,))
    mesh.tables[C].claim("k", "x", Claim(B, "b"), 0)
    mesh.own[B] = KeyReply(KeyState.RUNNING)
    steps, asked, replies = settling("k", "x", run, lambda: (C,), b"42"), 0, None
    try:
        while True:
            asks = steps.send(replies)
            asked += isinstance(asks[0].question, AnswerQuestion)
            replies = tuple(map(mesh.put, asks))
    except StopIteration as ended:
        given = ended.value
    assert given is None
    assert asked == MOST_WAITS


@pytest.mark.parametrize("epoch", [1, 2])
def test_a_node_does_not_wait_for_its_own_claim_of_before_its_restart(mesh, epoch):
    mesh.tables[A].claim("k", "x", Claim(C, "before", epoch), 0)
    assert mesh.settle(Run(Claim(C, "after"), (B,)), b"42") is None
    assert (C, "AnswerQuestion") not in mesh.asked
    mesh.tables[A].settle("k", "x", Claim(C, "before", epoch), 0, answer=b"41")
    assert mesh.settle(Run(Claim(C, "after"), (B,)), b"42") == Known(b"41"), "that was given to somebody"


def test_every_question_names_the_key_and_the_body():
    asks = next(claiming("k", "x", Claim(C, "t"), lambda: (A,), random.Random(1)))
    assert asks == (Ask(A, ClaimQuestion("k", "x", Claim(C, "t"))),)
