"""Answers that leave while they run: with their state where it can be had, else with their tokens; nothing is left behind."""

import asyncio
import os
from types import SimpleNamespace

import pytest

from tars.core.types import Deadline, ReplicaId
from tars.errors import CallerError, DeadlineExceeded, Draining, PeerUnreachable
from tars.messages.base import CallContext, SavedState
from tars.messages.inference import CompleteParams, Delta, Generated, Timings, Usage
from tars.messages.node import LoadedInfo, TunedSettings
from tars.serving.kept_states import KeptStates
from tars.serving.running_answers import FETCH_SECONDS, RunningAnswers
from tars.workers.calls import CallHandle
from tars.workers.engine import Resume, Saved
from tars.workers.supervisor import SavedSequence

REPLICA = ReplicaId("m@n-cpu#0")
PROMPT = CompleteParams(prompt="x")
END = Generated(
    text="ab",
    finish_reason="stop",
    usage=Usage(prompt_tokens=1, completion_tokens=2, total_tokens=3),
    timings=Timings(),
)


class ScriptedWorker:
    """Says what is put into `events`; saves into a file as the real one does."""

    info = None
    spec = SimpleNamespace(kv_type="f16")

    def __init__(self, folder):
        self.folder = folder
        self.events = asyncio.Queue()
        self.handle = None
        self.resume = None
        self.saves = 0
        self.refuses = None
        self.may_save = asyncio.Event()
        self.may_save.set()
        self.generated = [1, 2, 3]
        self.closed = False

    async def run(self, work, deadline, *, resume=None, handle=None):
        self.resume, self.handle = resume, handle
        if handle is not None:
            handle.number = 7
        try:
            while True:
                event = await self.events.get()
                if isinstance(event, Exception):
                    raise event
                yield event
        finally:
            self.closed = True

    async def save(self, handle, deadline):
        assert handle is self.handle
        self.saves += 1
        await self.may_save.wait()
        if self.refuses is not None:
            raise self.refuses
        path = self.folder / f"sequence-{self.saves}.state"
        path.touch(0o600)
        path.write_bytes(b"cells")
        self.events.put_nowait(Draining("moved by the engine"))
        return SavedSequence(path, Saved(bytes=5, prompt_tokens=1, generated=self.generated, seed=9))

    def break_off(self, handle, error):
        if handle.number is not None:
            self.events.put_nowait(error)


class Peers:
    """A peer that gives what it is told to."""

    def __init__(self, folder, error=None):
        self.folder = folder
        self.error = error
        self.asked = []

    async def fetch(self, saved, seconds):
        self.asked.append((saved.id, seconds))
        if self.error is not None:
            raise self.error
        path = self.folder / "sequence-fetched"
        path.write_bytes(b"cells of a peer")
        return path


def context(peer=None, deadline=1e12):
    return CallContext(Deadline(deadline), "trace", peer=peer)


@pytest.fixture
def folder(tmp_path):
    return tmp_path


@pytest.fixture
async def answers(folder):
    made = RunningAnswers(KeptStates("n"))
    yield made
    await made.close()
    assert len(made) == 0
    assert os.listdir(folder) == []


@pytest.fixture
def worker(folder):
    return ScriptedWorker(folder)


async def until(condition):
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110  # what comes next is a matter of the loop's turns, not of an event
            await asyncio.sleep(0)


def everything(answer):
    return True


def started(answers, worker, work=PROMPT, call=None, resume=None, state=None):
    call = call or context()

    def start(resume, handle):
        return worker.run(work, call.deadline, resume=resume, handle=handle)

    return answers.run(REPLICA, worker, work, call, resume, state, start=start)


async def begun(answers, worker, work=PROMPT, *tokens, **more):
    """A call with so many deltas read."""
    events = started(answers, worker, work, context(**more))
    for token in tokens or (1,):
        worker.events.put_nowait(Delta(text="t", token_ids=[token]))
        assert (await anext(events)).token_ids == [token]
    return events


async def broken(events):
    with pytest.raises(Draining) as error:
        await anext(events)
    assert error.value.retryable
    return error.value.details


async def test_an_answer_that_is_left_alone_is_the_workers(answers, worker):
    events = await begun(answers, worker, PROMPT, 1, 2)
    assert len(answers) == 1
    worker.events.put_nowait(END)
    assert await anext(events) == END
    await events.aclose()
    assert worker.closed
    assert worker.saves == 0


async def test_one_that_leaves_says_where_its_state_is_and_all_its_tokens(answers, worker, folder):
    events = await begun(answers, worker, PROMPT, 1, 2)
    assert await answers.hand_over(everything) == 1
    details = await broken(events)
    assert details["tokens"] == [[1, 2, 3]], "one of them was held back"
    saved = SavedState.model_validate(details["saved"])
    assert (saved.node, saved.bytes) == ("n", 5)
    with answers.kept.taken(saved.id) as path:
        assert path.read_bytes() == b"cells"


async def test_only_those_that_shall_leave_do(answers, folder):
    mine, theirs = ScriptedWorker(folder), ScriptedWorker(folder)
    stays = await begun(answers, mine)
    leaves = await begun(answers, theirs, PROMPT, 1, peer="node-2")
    assert await answers.hand_over(lambda answer: answer.from_peer) == 1
    await broken(leaves)
    assert mine.saves == 0
    mine.events.put_nowait(END)
    assert await anext(stays) == END
    await stays.aclose()


async def test_one_that_cannot_be_saved_leaves_with_the_tokens_that_its_caller_has(answers, worker):
    events = await begun(answers, worker)
    worker.refuses = CallerError("no state")
    await answers.hand_over(everything)
    assert await broken(events) == {}


async def test_several_answers_to_one_prompt_and_one_without_a_token_leave_without_a_state(answers, folder):
    several, waiting = ScriptedWorker(folder), ScriptedWorker(folder)
    first = await begun(answers, several, CompleteParams(prompt="x", n=2))
    second = started(answers, waiting)
    reading = asyncio.create_task(broken(second))
    await until(lambda: waiting.handle is not None)
    assert await answers.hand_over(everything) == 2
    assert await broken(first) == await reading == {}
    assert several.saves == waiting.saves == 0


async def test_one_that_still_waits_for_its_turn_leaves_at_once(answers, worker):
    turn = asyncio.Event()

    async def start(resume, handle):
        await turn.wait()
        async for event in worker.run(PROMPT, None, resume=resume, handle=handle):
            yield event

    waiting = answers.run(REPLICA, worker, PROMPT, context(), start=start)
    reading = asyncio.create_task(broken(waiting))
    await until(lambda: len(answers) == 1)
    for _ in range(3):
        await asyncio.sleep(0)
    assert await answers.hand_over(everything) == 1
    assert await reading == {}
    assert worker.handle is None


async def test_a_timeout_of_a_lower_layer_is_passed_on(answers, worker):
    worker.events.put_nowait(TimeoutError("its own"))
    with pytest.raises(TimeoutError, match="its own"):
        await anext(started(answers, worker))


async def test_a_state_of_another_answer_is_not_offered(answers, worker, folder):
    worker.generated = [8, 9]
    events = await begun(answers, worker, PROMPT, 1, 2)
    await answers.hand_over(everything)
    assert await broken(events) == {}


async def test_an_answer_that_ends_by_itself_meanwhile_is_whole(answers, worker):
    events = await begun(answers, worker)
    worker.refuses = CallerError("not running here")
    worker.may_save.clear()
    leaving = asyncio.create_task(answers.hand_over(everything))
    await until(lambda: worker.saves)
    worker.events.put_nowait(END)
    assert await anext(events) == END
    worker.may_save.set()
    await leaving
    await events.aclose()


@pytest.mark.parametrize("when", ["while it is saved", "when it was saved"])
async def test_a_caller_who_goes_away_meanwhile_leaves_no_file(answers, worker, when):
    events = await begun(answers, worker)
    if when == "while it is saved":
        worker.may_save.clear()
        leaving = asyncio.create_task(answers.hand_over(everything))
        await until(lambda: worker.saves)
        await events.aclose()
        worker.may_save.set()
        await leaving
    else:
        await answers.hand_over(everything)
        await events.aclose()


async def test_a_caller_who_is_cancelled_while_its_state_is_taken_over_leaves_no_file(answers, worker):
    events = await begun(answers, worker)
    worker.may_save.clear()
    answers.hand_over_soon(everything)
    reading = asyncio.create_task(anext(events))
    await until(lambda: worker.saves)
    worker.events.put_nowait(Draining("the replica is stopped meanwhile"))
    for _ in range(5):
        await asyncio.sleep(0)
    worker.may_save.set()
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    await until(lambda: not answers._moves)


async def test_draining_that_is_no_move_is_passed_on(answers, worker):
    events = await begun(answers, worker)
    stopped = Draining("stopped", retry_after_ms=5)
    worker.events.put_nowait(stopped)
    with pytest.raises(Draining) as error:
        await anext(events)
    assert error.value is stopped


# --- coming ---------------------------------------------------------------------------------------------------------

RESUME = Resume(generated=[[1, 2, 3]], handed_out=[2], seed=9)
STATE = SavedState(node="other", id="one", bytes=5, sha256="0" * 64)


async def resumed(answers, worker, state=STATE, **more):
    events = started(answers, worker, PROMPT, context(**more), RESUME, state)
    worker.events.put_nowait(Delta(text="t", token_ids=[3]))
    assert (await anext(events)).token_ids == [3]
    return events


async def test_an_answer_goes_on_with_the_state_that_a_peer_keeps(worker, folder):
    peers = Peers(folder)
    answers = RunningAnswers(KeptStates("n"), peers)
    events = await resumed(answers, worker)
    assert worker.resume == RESUME.model_copy(update={"path": str(folder / "sequence-fetched")})
    assert peers.asked == [("one", FETCH_SECONDS)]
    assert os.listdir(folder) == [], "the engine has read it"
    # And leaves again: what its caller had before counts, too.
    await answers.hand_over(everything)
    assert (await broken(events))["tokens"] == [[1, 2, 3]]
    await answers.close()
    assert os.listdir(folder) == []


@pytest.mark.parametrize("error", [PeerUnreachable("gone"), DeadlineExceeded("slow"), OSError("disk full")])
async def test_without_the_state_the_tokens_are_computed_again(worker, folder, error):
    answers = RunningAnswers(KeptStates("n"), Peers(folder, error))
    events = await resumed(answers, worker)
    assert worker.resume == RESUME
    await events.aclose()


def loaded(backend="llama.cpp (llama-cpp-python 0.3.36), CPU", flash_attention=True):
    return LoadedInfo(
        model_kind="chat",
        memory_bytes=1,
        load_seconds=1.0,
        backend=backend,
        tuned=TunedSettings(flash_attention=flash_attention),
    )


@pytest.mark.parametrize(
    ("there", "had"),
    [
        (loaded(), True),
        (loaded("llama.cpp (llama-cpp-python 0.3.36), CUDA"), True),
        (loaded("llama.cpp (llama-cpp-python 0.4.0), CPU"), False),
        (loaded(flash_attention=False), False),
    ],
)
async def test_a_state_that_the_engine_would_refuse_is_not_fetched(answers, worker, folder, there, had):
    worker.info = loaded()
    events = await begun(answers, worker, PROMPT, 1, 2)
    await answers.hand_over(everything)
    saved = SavedState.model_validate((await broken(events))["saved"])
    successor, peers = ScriptedWorker(folder), Peers(folder)
    successor.info = there
    others = RunningAnswers(KeptStates("other"), peers)
    events = await resumed(others, successor, saved)
    assert (len(peers.asked), successor.resume.path is not None) == (int(had), had)
    await events.aclose()


async def test_a_state_that_this_node_keeps_itself_is_asked_of_nobody(answers, worker, folder):
    file = folder / "sequence-own"
    file.write_bytes(b"cells")
    saved = await answers.kept.keep(file)
    events = await resumed(answers, worker, saved)
    assert worker.resume.path is not None
    assert os.listdir(folder) == []
    await events.aclose()
    # It is had once.
    other = ScriptedWorker(folder)
    events = await resumed(answers, other, saved)
    assert other.resume == RESUME
    await events.aclose()


async def test_a_state_is_not_waited_for_beyond_the_calls_deadline(worker, folder):
    peers = Peers(folder)
    answers = RunningAnswers(KeptStates("n"), peers, now=lambda: 100.0)
    events = await resumed(answers, worker, deadline=100.5)
    assert peers.asked == [("one", 0.5)]
    await events.aclose()


async def test_a_replica_that_is_to_be_left_while_a_state_is_fetched_does_not_begin(worker, folder):
    class Slow(Peers):
        async def fetch(self, saved, seconds):
            assert await answers.hand_over(everything) == 1
            return await super().fetch(saved, seconds)

    answers = RunningAnswers(KeptStates("n"), Slow(folder))
    assert await broken(started(answers, worker, PROMPT, context(), RESUME, STATE)) == {}
    assert worker.handle is None
    assert os.listdir(folder) == []


async def test_a_worker_that_refuses_leaves_no_state_behind(worker, folder):
    answers = RunningAnswers(KeptStates("n"), Peers(folder))
    worker.events.put_nowait(PeerUnreachable("any error"))
    with pytest.raises(PeerUnreachable):
        await anext(started(answers, worker, PROMPT, context(), RESUME, STATE))
    assert os.listdir(folder) == []
    assert isinstance(worker.handle, CallHandle)
