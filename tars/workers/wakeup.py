"""How the engine thread wakes the event loop without giving the interpreter away.

Law of this file: one byte through a pipe, nothing about what it means. POSIX only, as workers are.

`loop.call_soon_threadsafe` writes its byte through Python's own socket, which releases the GIL around the system call: the event loop's
thread, woken on the other core, takes the GIL, and the engine thread has to get it back: it stood still for up to 5.7 ms a step (the
interpreter's switch interval; measured with 16 sequences on two busy cores). A `write` through `ctypes.PyDLL` keeps the GIL, so that the
event loop has its turn when the engine thread enters `llama_decode`, which releases it anyway.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
from collections.abc import Callable


class Wakeup:
    """Call it from any thread and `callback` runs in the event loop soon, once for all calls before it began."""

    def __init__(self, loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
        self._callback = callback
        self._read, self._write_end = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(self._write_end, False)
        write = ctypes.PyDLL(None).write
        write.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t]
        write.restype = ctypes.c_ssize_t
        self._write = write
        self._loop = loop
        self._pending = False
        loop.add_reader(self._read, self._woken)

    def __call__(self) -> None:
        """Never blocks. Whatever was done before this call is seen by the callback: no lock, the GIL orders the two."""
        if not self._pending:
            self._pending = True
            self._write(self._write_end, b"\0", 1)

    def close(self) -> None:
        """Give the pipe back. In the event loop's thread; nobody may call afterwards."""
        self._loop.remove_reader(self._read)
        os.close(self._read)
        os.close(self._write_end)

    def _woken(self) -> None:
        os.read(self._read, 4096)
        # Before the callback looks: what is posted while it runs wakes again.
        self._pending = False
        self._callback()
