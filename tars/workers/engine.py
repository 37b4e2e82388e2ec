"""The one narrow protocol behind which every engine stands.

Law of this file: no engine package is imported here, and an engine knows nothing of pipes, asyncio or JSON-RPC. The child process
(`process.py`) calls `load` and then `run` in the one engine thread, and `submit`s work from its event loop; the engine answers through
`emit`, from the engine thread, once a step with everything that the step brought. Many sequences may be in flight.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from pydantic import Field

from tars.messages.base import Message
from tars.messages.inference import (
    ChatParams,
    CompleteParams,
    Delta,
    Embedded,
    EmbedParams,
    Generated,
    Reranked,
    RerankParams,
    Tokenized,
    TokenizeParams,
)
from tars.messages.node import EngineCounters, LoadedInfo, TunedSettings


class SaveParams(Message):
    """Write a running sequence's state to a file and end the sequence: how a running answer moves to another replica.

    The sequence ends with `errors.Draining`; whoever asked goes on with `Resume(path=...)` elsewhere.
    """

    sequence: int
    path: str
    """A file that this node's process made for it, never a path from the wire of another machine."""


class Saved(Message):
    """The state is in the file: everything that `Resume` needs."""

    bytes: int
    prompt_tokens: int
    generated: list[int]
    """Token ids so far, those held back by a stop string or an unfinished character included."""
    seed: int


class Resume(Message):
    """Go on with answers that were broken off, `n` of them: of each, `generated` is replayed (or read with the state in `path`),
    `max_tokens` still counts from the very beginning, and `handed_out` of the generated tokens' text was given to the caller already and
    does not come again. Those whose index is in `ended` were whole.
    """

    generated: list[list[int]]
    handed_out: list[int]
    seed: int
    ended: list[int] = Field(default_factory=list)
    path: str | None = None


Work = ChatParams | CompleteParams | EmbedParams | RerankParams | TokenizeParams | SaveParams
"""What can be submitted to an engine."""

Finished = Generated | Embedded | Reranked | Tokenized | Saved
"""What ends it well; a `TarsError` ends it badly."""

Event = Delta | Finished
"""What comes back for one piece of work: any number of `Delta`, then exactly one `Finished`."""


class AdapterSpec(Message):
    """A LoRA adapter that is loaded beside a model; calls name it as `model:name`."""

    name: str
    path: str
    scale: float = 1.0


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
    """Tokens of one sequence at most."""
    slots: int = 1
    """Sequences computed at once at most."""
    kv_tokens: int | None = None
    """Tokens that the KV cache holds in all; None is `slots` x `context`. Fewer are shared by the slots: when they are used up, the
    youngest sequence waits."""
    gpu_layers: int = 0
    threads: int = 1
    batch: int = 512
    micro_batch: int = 512
    flash_attention: bool = False
    kv_type: str = "f16"
    mmap: bool = True
    precision: str = "fp32"
    batch_tokens: int = 4096
    inter_token_ms: float = 50.0
    """How long a prompt that comes in may hold up the next token of the running answers."""
    exact: bool = False
    """Compute every sequence in fixed shapes, so that its text does not depend on what else runs; slower."""
    adapters: list[AdapterSpec] = Field(default_factory=list)
    draft_path: str | None = None
    """A small model of the same vocabulary that proposes tokens."""
    backend: str | None = None
    """Embeddings: take this back end instead of the fastest faithful one."""
    tuned: TunedSettings | None = None
    """What an earlier load of the very same measured; None measures now."""


Emit = Callable[[Sequence[tuple[int, "Event | Exception"]]], None]
"""`emit([(sequence, event), ...])`: thread-safe, never blocks, once a step. An exception (a `TarsError` where possible) ends a sequence."""

Progress = Callable[[str, float], None]
"""`progress(stage, percent)`: stages in `messages.node.LoadProgress`."""


@dataclass(frozen=True, slots=True)
class Submission:
    """One piece of work. `deadline` is on this process's monotonic clock, None is no limit."""

    sequence: int
    work: Work
    deadline: float | None
    resume: Resume | None = None
    received: float = field(default_factory=time.monotonic)
    """On the same clock."""


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

    def counters(self) -> EngineCounters:
        """What it did and how it stands."""
        ...

    def progress_mark(self) -> int:
        """A number that grows while the engine gets on with its work: how a supervisor tells busy from hung."""
        ...

    def unload(self) -> None:
        """Make `run` free everything and return; after it only the process's end follows."""
        ...
