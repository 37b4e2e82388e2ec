"""One description a second for all watchers, and none when nobody looks."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest

from tars.errors import Draining, Overloaded
from tars.web.status_feed import StatusFeed

BOUND = 5.0


async def test_all_watchers_share_one_description_each_time(service):
    allowed = asyncio.Semaphore(2)
    given = []

    async def describe():
        await allowed.acquire()
        given.append(service.description.model_copy())
        return given[-1]

    service.describe = describe
    feed = StatusFeed(service, interval_seconds=0.001)
    async with aclosing(feed.watch()) as first, aclosing(feed.watch()) as second, asyncio.timeout(BOUND):
        assert (await anext(first), await anext(second)) == (given[0], given[1]), "each sees something at once"
        allowed.release()
        assert await anext(first) is await anext(second) is given[2]


async def test_nothing_is_asked_of_the_node_while_nobody_looks(service):
    feed = StatusFeed(service, interval_seconds=0.001)
    async with aclosing(feed.watch()) as watch:
        await anext(watch)
        assert feed.watching == 1
    assert feed.watching == 0
    described = service.described
    await asyncio.sleep(0.02)
    assert service.described == described


async def test_a_slow_watcher_sees_the_newest_next_and_no_backlog(service):
    feed = StatusFeed(service, interval_seconds=0.001)
    async with aclosing(feed.watch()) as slow, aclosing(feed.watch()) as quick:
        await anext(slow)
        await anext(quick)
        newest = service.description.model_copy(update={"name": "newest"})
        async with asyncio.timeout(BOUND):
            for _ in range(5):
                await anext(quick)
            service.description = newest
            while await anext(quick) is not newest:
                pass
            assert await anext(slow) is newest


async def test_more_watchers_than_the_bound_are_refused_until_one_leaves(service):
    feed = StatusFeed(service, watchers=1)
    first = feed.watch()
    await anext(first)
    with pytest.raises(Overloaded) as refused:
        await anext(feed.watch())
    assert refused.value.retry_after_ms
    await first.aclose()
    async with aclosing(feed.watch()) as second:
        assert await anext(second)


async def test_closing_ends_every_watch_and_refuses_new_ones(service):
    feed = StatusFeed(service, interval_seconds=60)
    watch = feed.watch()
    await anext(watch)
    rest = asyncio.create_task(_collect(watch))
    await asyncio.sleep(0)
    await feed.close()
    async with asyncio.timeout(BOUND):
        assert await rest == [None]
    with pytest.raises(Draining):
        await anext(feed.watch())


async def test_a_node_that_cannot_be_described_gives_a_heartbeat_and_the_feed_goes_on(service):
    feed = StatusFeed(service, interval_seconds=0.001)
    whole = service.describe

    async def broken():
        raise RuntimeError("probe fell over")

    service.describe = broken
    async with aclosing(feed.watch()) as watch, asyncio.timeout(BOUND):
        assert await anext(watch) is None
        service.describe = whole
        while await anext(watch) is None:
            pass


async def _collect(watch) -> list:
    return [item async for item in watch]
