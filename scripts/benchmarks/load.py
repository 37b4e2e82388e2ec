"""Load on one HTTP address: so many keep-alive connections, each asking again as soon as it has its answer.

Law of this file: it measures the server and not itself. `wrk`, used where it is installed, costs a tenth of what a Python server
does; the asyncio stand-in costs about as much as the server, on another core, so its absolute numbers are low, and it hides part of
the difference between fast servers.
"""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
import time
from pathlib import Path

BODY = b'{"jsonrpc":"2.0","method":"node.ping","id":1}'


def generator() -> str:
    return "wrk" if shutil.which("wrk") else "asyncio (install wrk for truer absolute numbers)"


def requests_per_second(port: int, connections: int, seconds: int) -> float:
    """Raises RuntimeError where an answer was no 200, or none came."""
    return (_wrk if shutil.which("wrk") else _asyncio)(port, connections, seconds)


def _wrk(port: int, connections: int, seconds: int) -> float:
    script = Path(__file__).with_name("ping.lua")
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "-s", str(script), f"http://127.0.0.1:{port}/rpc"]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=seconds + 30).stdout
    rate = re.search(r"Requests/sec:\s+([\d.]+)", said)
    if rate is None or float(rate[1]) == 0 or "Non-2xx" in said:
        raise RuntimeError(f"not every answer was good:\n{said}")
    return float(rate[1])


def _asyncio(port: int, connections: int, seconds: int) -> float:
    request = (
        b"POST /rpc HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
        % (port, len(BODY), BODY)
    )

    async def caller(ends_at: float) -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        answered = 0
        while time.monotonic() < ends_at:
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            if not head.startswith(b"HTTP/1.1 200"):
                raise RuntimeError(f"not every answer was good: {head!r}")
            length = re.search(rb"(?i)content-length: *(\d+)", head)
            if length is None:
                raise RuntimeError(f"an answer without a length: {head!r}")
            await reader.readexactly(int(length[1]))
            answered += 1
        writer.close()
        return answered

    async def all_callers() -> int:
        ends_at = time.monotonic() + seconds
        return sum(await asyncio.gather(*(caller(ends_at) for _ in range(connections))))

    return asyncio.run(all_callers()) / seconds
