"""One description of the node a second, made once for all who look at the status page, and not at all when nobody looks.

Law of this file: it asks the service and shares the answer; what it looks like on the wire is `status_page.py`'s. The number of
watchers is bounded, so that open browser tabs cannot use up the node's connections.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator

from tars.errors import Draining, Overloaded, TarsError
from tars.messages.node import NodeDescription
from tars.serving.service import NodeService

log = logging.getLogger(__name__)

INTERVAL_SECONDS = 1.0
"""Devices are probed once a second at most (`NodeService.describe`), so more often would show nothing new."""

WATCHERS = 32
"""Ten people with three tabs each; a page that was forgotten costs one small write a second."""

RETRY_AFTER_MS = 5_000
"""When one who was refused may try again: a closed tab frees its place at its next write."""


class StatusFeed:
    """Shares descriptions among watchers. One task describes the node while at least one watches."""

    def __init__(self, service: NodeService, *, interval_seconds: float = INTERVAL_SECONDS, watchers: int = WATCHERS):
        self._service = service
        self._interval_seconds = interval_seconds
        self._most_watchers = watchers
        self._watchers: set[asyncio.Queue[NodeDescription | None]] = set()
        self._ticker: asyncio.Task[None] | None = None
        self._closed = False
        self.looks = 0
        """How often the node was asked: what was made beside a description is good for all who watch until it grows."""

    @property
    def watching(self) -> int:
        """How many watch now."""
        return len(self._watchers)

    async def watch(self) -> AsyncGenerator[NodeDescription | None, None]:
        """Descriptions until the feed closes; None is a heartbeat (the node could not be described this time).

        Raises `Overloaded` where too many watch already, `Draining` after `close`. Closing the iterator frees the place.
        """
        if self._closed:
            raise Draining("this node is stopping; reload the page when it is back")
        if len(self._watchers) >= self._most_watchers:
            raise Overloaded(
                f"{self._most_watchers} status pages are open already; close one of them and reload",
                retry_after_ms=RETRY_AFTER_MS,
            )
        # One place only: a slow reader sees the newest description next, never a backlog of old ones.
        queue: asyncio.Queue[NodeDescription | None] = asyncio.Queue(maxsize=1)
        self._watchers.add(queue)
        try:
            if self._ticker is None:
                self._ticker = asyncio.create_task(self._tick(), name="status-feed")
            yield await self._describe()
            while not self._closed:
                yield await queue.get()
        finally:
            self._leave(queue)

    async def close(self) -> None:
        """End every watch; the node stops."""
        self._closed = True
        for queue in self._watchers:
            _put_newest(queue, None)
        if self._ticker is not None:
            self._ticker.cancel()
            await asyncio.gather(self._ticker, return_exceptions=True)
            self._ticker = None

    def _leave(self, queue: asyncio.Queue[NodeDescription | None]) -> None:
        self._watchers.discard(queue)
        if not self._watchers and self._ticker is not None:
            self._ticker.cancel()
            self._ticker = None

    async def _tick(self) -> None:
        loop = asyncio.get_running_loop()
        next_at = loop.time() + self._interval_seconds
        while True:
            await asyncio.sleep(max(0.0, next_at - loop.time()))
            next_at = max(next_at + self._interval_seconds, loop.time())
            description = await self._describe()
            for queue in self._watchers:
                _put_newest(queue, description)

    async def _describe(self) -> NodeDescription | None:
        self.looks += 1
        try:
            return await self._service.describe()
        except TarsError as error:
            log.warning("the status page could not describe the node: %s", error.kind)
        except Exception:  # a broken probe must not end the page that would show it
            log.exception("the status page could not describe the node")
        return None


def _put_newest(queue: asyncio.Queue[NodeDescription | None], item: NodeDescription | None) -> None:
    if queue.full():
        queue.get_nowait()
    queue.put_nowait(item)
