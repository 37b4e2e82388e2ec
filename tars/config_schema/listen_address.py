"""Where a node listens, as it is written: `host:port`.

Law of this file: text in, parts out; no name is resolved. An address of a peer is `core.addresses`' business.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

DEFAULT_PORT = 8000
"""vLLM's and most OpenAI-compatible servers' port, so that clients' examples work unchanged."""


@dataclass(frozen=True, slots=True)
class ListenAddress:
    """Where a node listens. Port 0 lets the system choose a free one."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> ListenAddress:
        """`127.0.0.1:8000`, `localhost:8000` or `[::1]:8000`; raises ValueError that says which form is right."""
        host, separator, port = text.rpartition(":")
        wrong = f'"{text}" is not host:port, such as "127.0.0.1:{DEFAULT_PORT}" or "[::1]:{DEFAULT_PORT}"'
        if not separator or not host or not (port.isascii() and port.isdigit()) or len(port) > 5 or int(port) > 65535:
            raise ValueError(wrong)
        if host.startswith("[") and host.endswith("]"):
            try:
                ipaddress.IPv6Address(host[1:-1].partition("%")[0])
            except ValueError:
                raise ValueError(wrong) from None
            return cls(host[1:-1], int(port))
        if ":" in host:
            raise ValueError(f'"{text}": an IPv6 address needs brackets, such as "[::1]:{DEFAULT_PORT}"')
        if any(character.isspace() or character in "/@[]" for character in host):
            raise ValueError(wrong)
        return cls(host, int(port))

    @property
    def is_loopback(self) -> bool:
        """True only for addresses that no other machine can reach; a name other than localhost counts as reachable."""
        if self.host.lower() == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"
