"""What a call has behind it decides who may go on with it, and when it is taken for what kills its workers."""

from tars.core.call_effects import Failure
from tars.core.call_progress import CallProgress
from tars.core.routing import Candidate
from tars.core.types import ModelKind, ReplicaId, ReplicaState

CRASH = Failure("worker_crashed", sent=True)


def replica(name, file=None, exact=False):
    return Candidate(ReplicaId(name), "m", ModelKind.CHAT, ReplicaState.READY, file_sha256=file, exact=exact)


def names(candidates):
    return [each.replica for each in candidates]


def test_before_the_first_token_anybody_may_take_it_and_then_only_the_same_file():
    progress = CallProgress()
    fleet = [replica("a", "f1"), replica("b", "f2"), replica("c", "f1")]
    assert names(progress.able(fleet)) == ["a", "b", "c"]
    progress.gave(fleet[0], 0, [5])
    assert progress.begun
    assert names(progress.able(fleet)) == ["a", "c"]


def test_an_exact_call_goes_on_only_where_it_is_exact():
    progress = CallProgress(exact=True)
    fleet = [replica("a", "f1", exact=True), replica("b", "f1"), replica("c", "f1", exact=True)]
    progress.gave(fleet[0], 0, [5])
    assert names(progress.able(fleet)) == ["a", "c"]
    fast = CallProgress(exact=True)
    fast.gave(fleet[1], 0, [5])
    assert names(fast.able(fleet)) == ["a", "b", "c"], (
        "what was not exact cannot be kept so, and is not given up for it"
    )


def test_where_the_file_is_not_known_only_the_replica_itself_goes_on():
    progress = CallProgress()
    fleet = [replica("a"), replica("b"), replica("c", "f1")]
    progress.gave(fleet[0], 0, [5])
    assert names(progress.able(fleet)) == ["a"]


def test_the_tokens_of_each_answer_are_kept_apart():
    progress = CallProgress(answers=2)
    for index, ids in ((0, [1, 2]), (1, [7]), (0, [3])):
        progress.gave(replica("a"), index, ids)
    assert progress.tokens == ((1, 2, 3), (7,))


def test_two_workers_that_die_at_one_token_are_enough_and_new_tokens_forgive():
    progress = CallProgress()
    progress.ended(ReplicaId("a"), CRASH, 1.0, tokens=4)
    assert not progress.kills_what_runs_it
    progress.ended(ReplicaId("b"), CRASH, 2.0, tokens=1)
    assert not progress.kills_what_runs_it
    progress.ended(ReplicaId("c"), CRASH, 3.0, tokens=0)
    assert progress.kills_what_runs_it


def test_even_with_tokens_in_between_there_is_an_end_of_workers():
    progress = CallProgress()
    for number in range(4):
        assert not progress.kills_what_runs_it
        progress.ended(ReplicaId(f"r{number}"), CRASH, 1.0, tokens=1)
    assert progress.kills_what_runs_it


def test_who_failed_is_asked_again_when_its_time_has_come_and_after_new_tokens():
    progress = CallProgress()
    a, b, c = (ReplicaId(name) for name in "abc")
    soon, later = (Failure("overloaded", retry_after=seconds) for seconds in (2.0, 5.0))
    progress.ended(a, soon, 10.0, tokens=0)
    progress.ended(b, later, 10.0, tokens=0)
    assert progress.again_from([b, a], 10.0) == (12.0, soon)
    assert progress.again_from([b], 10.0) == (15.0, later)
    assert progress.again_from([c], 10.0) == (10.0, None)
    progress.forgive(12.0)
    assert set(progress.tried) == {b}
    progress.ended(c, Failure("overloaded"), 13.0, tokens=3)
    assert set(progress.tried) == {c}
