"""Every thread of a process stands behind."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

PROGRAM = """
import os, sys, threading
from tars.workers import niceness

def own():
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

done, said = threading.Event(), []
threads = [threading.Thread(target=lambda: (done.wait(), said.append(own()))) for _ in range(3)]
for thread in threads:
    thread.start()
before = own()
if sys.argv[2] == "elsewhere":
    listdir = os.listdir
    niceness.os.listdir = lambda path: listdir("/no/such/folder")
niceness.stand_behind(int(sys.argv[1]))
later = threading.Thread(target=lambda: said.append(own()))
later.start()
done.set()
for thread in (*threads, later):
    thread.join()
print(before, own(), *said)
"""


def run(steps: int, where: str = "linux") -> list[int]:
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM), str(steps), where]
    return [int(word) for word in subprocess.run(command, capture_output=True, check=True, text=True).stdout.split()]


@pytest.mark.parametrize("steps", [0, 3, 19, 40])
def test_threads_that_are_there_and_those_that_come_stand_behind(steps: int) -> None:
    before, *after = run(steps)
    assert after == [min(19, before + steps)] * 5


def test_where_threads_cannot_be_listed_the_process_stands_behind() -> None:
    before, main, *_ = run(3, "elsewhere")
    assert main == min(19, before + 3)
