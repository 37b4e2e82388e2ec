from __future__ import annotations

import asyncio
import threading

from tars.workers.wakeup import Wakeup


async def test_everything_posted_by_another_thread_is_seen_and_many_posts_are_few_wakes() -> None:
    loop = asyncio.get_running_loop()
    posted: list[int] = []
    seen: list[int] = []
    wakes = 0
    done = asyncio.Event()

    def look() -> None:
        nonlocal wakes
        wakes += 1
        while posted:
            seen.append(posted.pop(0))
        if len(seen) == 5000:
            done.set()

    wakeup = Wakeup(loop, look)

    def engine() -> None:
        for number in range(5000):
            posted.append(number)
            wakeup()

    thread = threading.Thread(target=engine)
    thread.start()
    async with asyncio.timeout(20):
        await done.wait()
    await asyncio.to_thread(thread.join, 10)
    assert seen == list(range(5000))
    assert 1 <= wakes <= 5001
    wakeup.close()


async def test_calls_before_the_loop_looks_are_one_wake() -> None:
    wakes: list[None] = []
    wakeup = Wakeup(asyncio.get_running_loop(), lambda: wakes.append(None))
    for _ in range(100):
        wakeup()
    async with asyncio.timeout(10):
        while not wakes:  # noqa: ASYNC110  # the loop's own next round, not another task, brings it
            await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert len(wakes) == 1
    wakeup()
    async with asyncio.timeout(10):
        while len(wakes) < 2:  # noqa: ASYNC110  # see above
            await asyncio.sleep(0)
    wakeup.close()
