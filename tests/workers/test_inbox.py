from __future__ import annotations

import threading

from tars.messages.inference import TokenizeParams
from tars.workers.engine import Submission
from tars.workers.inbox import Inbox, Taken


def submission(number: int) -> Submission:
    return Submission(number, TokenizeParams(text="x"), None)


def test_everything_is_taken_once_and_in_order() -> None:
    inbox = Inbox()
    inbox.put(submission(1))
    inbox.cancel(7)
    inbox.put(submission(2))
    taken = inbox.take(wait=True)
    assert [one.sequence for one in taken.submissions] == [1, 2]
    assert taken.cancelled == {7}
    assert inbox.take(wait=False) == Taken([], set(), False)


def test_what_was_taken_does_not_change_when_more_arrives() -> None:
    inbox = Inbox()
    inbox.put(submission(1))
    taken = inbox.take(wait=False)
    inbox.put(submission(2))
    inbox.cancel(2)
    assert len(taken.submissions) == 1
    assert taken.cancelled == set()


def test_a_waiting_engine_wakes_for_work_for_a_cancellation_and_for_the_end() -> None:
    inbox = Inbox()
    seen: list[Taken] = []

    def engine() -> None:
        while not (seen and seen[-1].closed):
            seen.append(inbox.take(wait=True))
            arrived.release()

    arrived = threading.Semaphore(0)
    thread = threading.Thread(target=engine)
    thread.start()
    for act in (lambda: inbox.put(submission(1)), lambda: inbox.cancel(3), inbox.close):
        act()
        assert arrived.acquire(timeout=10)
    thread.join(10)
    assert not thread.is_alive()
    assert [bool(taken.submissions) for taken in seen] == [True, False, False]
