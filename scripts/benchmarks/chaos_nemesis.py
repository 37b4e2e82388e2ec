"""Carries out the faults of `scripts/bench chaos` on its PCs, one after the other, and writes down when each struck and was mended.

Law of this file: what it broke it mends, also where it is interrupted; `chaos_faults` says whom a fault may strike. It spreads its faults
over the calls: the one with number k waits until that share of the calls was sent.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress

import psutil
from chaos_deck import MODELS
from chaos_faults import Fault, FaultKind, FaultRecord, chosen, victims
from chaos_mesh import READY_SECONDS, ChaosMesh
from mesh_processes import until
from running_node import frozen

from tars.errors import TarsError

DETECTION_SECONDS = 20.0
"""For so long it is watched whether the others know."""
SETTLE_SECONDS = 1.0
"""Between one fault that is mended and the next."""
RESTART_TRIES = 3


class Nemesis:
    """`burst` makes an overload of so many seconds; `due` waits until the fault with this number may come."""

    def __init__(
        self,
        mesh: ChaosMesh,
        faults: Sequence[Fault],
        burst: Callable[[float], Awaitable[None]],
        due: Callable[[int], Awaitable[None]],
        say: Callable[[str], None],
    ) -> None:
        self._mesh = mesh
        self._faults = faults
        self._burst = burst
        self._due = due
        self._say = say
        self._began = time.monotonic()
        self._pending: set[asyncio.Task[None]] = set()
        self.records: list[FaultRecord] = []

    async def run(self, seconds: float) -> bool:
        """All of them, or those that come within so many seconds; ends when what was struck is mended. Whether it was all of them."""
        striking = asyncio.create_task(self._strike_all())
        try:
            done, _ = await asyncio.wait({striking}, timeout=seconds)
            if not done:
                striking.cancel()
                await asyncio.wait({striking})
            if self._pending:
                await asyncio.wait(self._pending)
            return bool(done) and striking.exception() is None
        finally:
            left = {striking, *self._pending}
            for each in left:
                each.cancel()
            await asyncio.wait(left)

    async def _strike_all(self) -> None:
        for fault in self._faults:
            await self._due(fault.number)
            if self._pending and not fault.together:
                await asyncio.wait(self._pending)
                await asyncio.sleep(SETTLE_SECONDS)
            node, model = await self._victim(fault)
            record = FaultRecord(fault.number, fault.kind, node, model, time.monotonic())
            self.records.append(record)
            task = asyncio.create_task(self._carry_out(fault, record))
            self._pending = {each for each in self._pending if not each.done()} | {task}
            # Until it is in force, so that the next one knows.
            await asyncio.sleep(0.05)

    async def _victim(self, fault: Fault) -> tuple[str, str | None]:
        """Wait for somebody whom it may strike. Raises TimeoutError where nobody comes: the mesh has not mended itself."""
        async with asyncio.timeout(READY_SECONDS):
            while True:
                possible = victims(fault.kind, self._mesh.views(), MODELS)
                if possible:
                    return chosen(fault, possible)
                await asyncio.sleep(0.1)

    async def _carry_out(self, fault: Fault, record: FaultRecord) -> None:
        where = record.node if record.model is None else f"{record.model} on {record.node}"
        seeing = asyncio.create_task(self._detected(record))
        try:
            match fault.kind:
                case FaultKind.KILL | FaultKind.COORDINATOR:
                    await self._kill(record, fault.hold)
                case FaultKind.FREEZE:
                    await self._hold(record, fault.hold, lambda: frozen(self._mesh.processes(record.node)))
                case FaultKind.WORKER_KILL | FaultKind.WORKER_FREEZE:
                    await self._strike_worker(fault, record)
                case FaultKind.CUT | FaultKind.SWALLOW:
                    await self._hold(record, fault.hold, lambda: self._cut(record.node, fault.kind))
                case FaultKind.ROLLING:
                    await self._rolling(record, fault.hold)
                case FaultKind.OVERLOAD:
                    await self._burst(fault.hold)
            record.over = time.monotonic()
            await self._mesh.well()
            record.mended = time.monotonic()
        except TimeoutError:
            record.problems.append(f"not every replica was ready again within {READY_SECONDS:.0f} s")
        except (AssertionError, psutil.Error, OSError) as problem:
            record.problems.append(str(problem)[-2000:])
        finally:
            if record.detected is None and not seeing.done():
                await asyncio.wait([seeing], timeout=0.5)
            seeing.cancel()
            await asyncio.wait([seeing])
        known = "" if record.detected is None else f", known after {record.detected - record.struck:.1f} s"
        mended = "NOT mended" if record.mended is None else f"mended after {record.mended - record.struck:.1f} s"
        problems = "".join(f"; {problem.splitlines()[0]}" for problem in record.problems if problem)
        at = record.struck - self._began
        self._say(f"{at:6.0f} s  fault {fault.number + 1:3}: {fault.kind}, {where}{known}, {mended}{problems}")

    # --- each of them -----------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _harmed(self, name: str) -> AsyncIterator[None]:
        self._mesh.harmed.add(name)
        try:
            yield
        finally:
            self._mesh.harmed.discard(name)

    async def _kill(self, record: FaultRecord, seconds: float) -> None:
        pc = self._mesh.pcs[record.node]
        async with self._harmed(record.node):
            await pc.stop(signal.SIGKILL)
            await asyncio.sleep(seconds)
            await self._start(record.node)

    async def _start(self, name: str) -> None:
        pc = self._mesh.pcs[name]
        for again in range(RESTART_TRIES):
            try:
                await pc.start()
                break
            except AssertionError:
                await pc.stop(signal.SIGKILL)
                if again == RESTART_TRIES - 1:
                    raise
        self._mesh.processes(name)

    async def _hold(
        self, record: FaultRecord, seconds: float, force: Callable[[], AbstractAsyncContextManager[None]]
    ) -> None:
        async with self._harmed(record.node):
            async with force():
                await asyncio.sleep(seconds)
            await self._answers_again(record.node)

    async def _answers_again(self, name: str) -> None:
        async with asyncio.timeout(READY_SECONDS):
            while True:
                with suppress(TarsError, TimeoutError):
                    async with asyncio.timeout(2.0):
                        await self._mesh.observers[name].client.ping(timeout=2.0)
                    return
                await asyncio.sleep(0.1)

    @asynccontextmanager
    async def _cut(self, name: str, kind: FaultKind) -> AsyncIterator[None]:
        host = self._mesh.pcs[name].host
        assert host is not None
        cut, heal = (host.unplug, host.plug) if kind is FaultKind.CUT else (host.silence, host.speak)
        try:
            await asyncio.to_thread(cut)
            yield
        finally:
            heal()  # at once, and also where this is cancelled

    async def _strike_worker(self, fault: Fault, record: FaultRecord) -> None:
        assert record.model is not None
        process = await asyncio.to_thread(self._mesh.worker, record.node, record.model)
        if process is None:
            record.problems.append("its process was not found")
            return
        if fault.kind is FaultKind.WORKER_KILL:
            process.kill()
            # It is gone: from then on `well` is an answer.
            await until(
                lambda: self._same_worker(record, process), lambda same: not same, READY_SECONDS, "a new worker", 0.1
            )
        else:
            # Its other replica is what keeps the model alive meanwhile: nobody else may be struck at this one.
            async with self._harmed(record.node), frozen([process]):
                await asyncio.sleep(fault.hold)

    async def _same_worker(self, record: FaultRecord, process: psutil.Process) -> bool:
        assert record.model is not None
        found = await asyncio.to_thread(self._mesh.worker, record.node, record.model)
        return found is not None and found.pid == process.pid

    async def _rolling(self, record: FaultRecord, pause: float) -> None:
        for name, pc in self._mesh.pcs.items():
            await self._mesh.well()
            async with self._harmed(name):
                status = await pc.stop(signal.SIGTERM, 60.0)
                if status != 0:
                    record.problems.append(f"{name} ended with exit status {status}")
                await asyncio.sleep(pause)
                await self._start(name)

    # --- what the others know -----------------------------------------------------------------------------------------------

    async def _detected(self, record: FaultRecord) -> None:
        """Ask a PC that nothing is wrong with until it knows."""
        if record.kind in (FaultKind.ROLLING, FaultKind.OVERLOAD):
            return
        ends = record.struck + DETECTION_SECONDS
        while record.detected is None and time.monotonic() < ends:
            with suppress(TarsError, TimeoutError, StopIteration):
                async with asyncio.timeout(1.0):
                    if await self._known(record):
                        record.detected = time.monotonic()
            await asyncio.sleep(0.05)

    async def _known(self, record: FaultRecord) -> bool:
        if record.kind.strikes_worker:
            told = await self._mesh.observers[record.node].client.describe(timeout=1.0)
            return not any(each.model == record.model and each.state == "ready" for each in told.replicas)
        other = next(name for name in self._mesh.pcs if name != record.node and name not in self._mesh.harmed)
        peers = (await self._mesh.observers[other].client.peers(timeout=1.0)).peers
        return any(each.name == record.node and each.state != "ALIVE" for each in peers)
