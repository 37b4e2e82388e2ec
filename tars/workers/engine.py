"""The one narrow protocol behind which every engine stands.

Law of this file: no engine package is imported here, and an engine knows nothing of pipes, asyncio or JSON-RPC. The child process
(`process.py`) calls `load` and then `run` in the one engine thread, and `submit`s work from its event loop; the engine answers through
`emit`, from the engine thread. Many sequences may be in flight: an engine with one slot queues them, one with many batches them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from tars.messages.base import Message
from tars.messages.inference import (
    ChatParams,
    CompleteParams,
    Delta,
    Embedded,
    EmbedParams,
    Generated,
    Tokenized,
    TokenizeParams,
)
from tars.messages.node import LoadedInfo

Work = ChatParams | CompleteParams | EmbedParams | TokenizeParams
"""What can be submitted to an engine."""

Finished = Generated | Embedded | Tokenized
"""What ends it well; a `TarsError` ends it badly."""

Event = Delta | Finished
"""What comes back for one piece of work: any number of `Delta`, then exactly one `Finished`."""


class LoadSpec(Message):
    """What a worker loads; made by the coordinator from the plan, sent once over the pipe."""

    replica: str
    model: str
    engine: str
    """`llama` or `sentence-transformers`."""
    path: str
    """A file or folder on this machine, never from the wire of another one."""
    sha256: str | None = None
    cuda_device: str | None = None
    """What CUDA_VISIBLE_DEVICES shows to the worker (an NVML uuid or ordinal); None computes on the CPU."""
    context: int = 2048
    slots: int = 1
    gpu_layers: int = 0
    threads: int = 1
    batch: int = 512
    micro_batch: int = 512
    flash_attention: bool = False
    kv_type: str = "f16"
    mmap: bool = True
    precision: str = "fp32"
    batch_tokens: int = 4096


Emit = Callable[[int, "Event | Exception"], None]
"""`emit(sequence, event)`: thread-safe, never blocks. An exception (a `TarsError` where possible) ends the sequence."""

Progress = Callable[[str, float], None]
"""`progress(stage, percent)`: stages in `messages.node.LoadProgress`."""


@dataclass(frozen=True, slots=True)
class Submission:
    """One piece of work. `deadline` is on this process's monotonic clock, None is no limit."""

    sequence: int
    work: Work
    deadline: float | None


class Engine(Protocol):
    """See the module's law. All methods but `load` and `run` return at once and may be called from any thread."""

    def load(self, spec: LoadSpec, progress: Progress, emit: Emit) -> LoadedInfo:
        """Load and warm the model; blocks. Raises `errors.BadModelFile`, `errors.DoesNotFit` or `errors.ReplicaFailed`."""
        ...

    def run(self) -> None:
        """Work until `unload` was called, then free everything and return; blocks, in the thread that called `load`."""
        ...

    def submit(self, submission: Submission) -> None:
        """Take one piece of work; its events come through `emit`."""
        ...

    def cancel(self, sequence: int) -> None:
        """Stop a sequence within one step and free its slot; it ends with `errors.Cancelled`. Unknown numbers are ignored."""
        ...

    def memory_bytes(self) -> int:
        """Bytes that the engine holds on its device now."""
        ...

    def progress_mark(self) -> int:
        """A number that grows while the engine gets on with its work: how a supervisor tells busy from hung."""
        ...

    def unload(self) -> None:
        """Make `run` free everything and return; after it only the process's end follows."""
        ...
