"""How workers are watched, in the words of this layer; the configuration's are `config_schema.workers`'.

Law of this file: values, their defaults and the reasons of these; nothing is done here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from tars.workers.lifecycle import Limits
from tars.workers.watchdog import ABORT_SECONDS

ENGINES: Mapping[str, str] = MappingProxyType(
    {
        "llama": "tars.workers.llama_engine:LlamaEngine",
        "sentence-transformers": "tars.workers.embedding_engine:EmbeddingEngine",
    }
)
"""`LoadSpec.engine` -> `module:Class`, imported in the child only."""


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """How workers are watched. Times in seconds; `[worker]` of the configuration, and `queue_per_replica` of `[limits]`."""

    start_timeout_seconds: float = 600.0
    """A load without any progress for so long is stuck; one that moves may take as long as it needs."""
    ping_interval_seconds: float = 2.0
    hang_seconds: float = 60.0
    """Far above the longest single step (a prefill chunk on a slow CPU), far below a caller's patience. At least three pings."""
    abort_seconds: float = ABORT_SECONDS
    """A step that stands still for so long is broken off inside the worker; at most a third of `hang_seconds`."""
    backoff_initial_seconds: float = 0.5
    backoff_most_seconds: float = 60.0
    stop_seconds: float = 5.0
    """From the request to end until SIGKILL."""
    stable_seconds: float = 60.0
    """READY for so long forgives earlier crashes."""
    crash_limit: int = 6
    """Quick crashes in a row until FAILED: with the backoff above about 30 s of trying."""
    cool_down_seconds: float = 300.0
    """From FAILED by crashes or for want of memory until the next single try is due."""
    queue_limit: int = 64
    """Calls that may wait behind the ones being served; one more is `Overloaded`."""
    nice: int = 5
    """Added to the node's own niceness (nice(2)) once a replica is loaded. The node answers its peers' probes with the same processors on
    which engines compute: in a benchmark of three nodes on two cores under five times their load, 84 of 620 attempts met a peer that seemed
    gone with 0, 3 with 5 and none with 10. A load stays as nice as the node: it starved beside the engines that serve."""
    engines: Mapping[str, str] = field(default_factory=lambda: ENGINES)
    environment: Mapping[str, str] = field(default_factory=dict)
    """Added to every worker's environment."""
    saved_folder: Path | None = None
    """Where the states of saved sequences are put; None is the system's folder for temporary files."""

    def limits(self) -> Limits:
        """The times as the lifecycle takes them."""
        return Limits(
            start_timeout=self.start_timeout_seconds,
            ping_interval=self.ping_interval_seconds,
            hang=max(self.hang_seconds, 3 * self.ping_interval_seconds),
            backoff_initial=self.backoff_initial_seconds,
            backoff_most=self.backoff_most_seconds,
            stop=self.stop_seconds,
            stable=self.stable_seconds,
            crash_limit=self.crash_limit,
            cool_down=self.cool_down_seconds,
        )

    def step_patience(self) -> float:
        """Seconds until a step that stands still is broken off: early enough that its second try ends before the worker counts as hung."""
        return min(self.abort_seconds, self.limits().hang / 3)
