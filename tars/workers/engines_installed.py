"""Which engines this Python has, and whether they can use an NVIDIA card. `python -m tars.workers.engines_installed` prints it as JSON.

Law of this file: asked in a process of its own, once per node start: importing llama.cpp's library takes half a second and, built for CUDA,
opens the driver, which the node's process must never do (a CUDA context costs 450 MiB on a 4090). torch is not imported at all.
A pip-installed llama-cpp-python is built without CUDA unless it was asked for (llama-cpp-python#1824): the commonest way to a slow GPU PC.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tars.core.types import DeviceKind, DeviceSnapshot, ModelKind

log = logging.getLogger(__name__)

PROBE_SECONDS = 60.0
"""An import from a cold, slow disk; the node goes on without an answer and lets the workers find out."""
CUDA_BUILD = 'CMAKE_ARGS="-DGGML_CUDA=on" pip install --force-reinstall --no-cache-dir llama-cpp-python'
"""README, "Using a real GPU"."""


@dataclass(frozen=True, slots=True)
class EnginesInstalled:
    """None: not known (the probe failed), so nothing is ruled out."""

    llama: bool | None = None
    llama_cuda: bool | None = None
    torch: bool | None = None
    torch_cuda: bool | None = None

    def cannot_run(self, device: DeviceSnapshot) -> tuple[tuple[ModelKind, str], ...]:
        """Kinds that these engines cannot run on the device, with what to do. A simulated device computes on the CPU."""
        on_card = device.kind is DeviceKind.CUDA and not device.simulated
        reasons: list[tuple[ModelKind, str]] = []
        if self.llama is False:
            reasons.append((ModelKind.CHAT, "llama-cpp-python is not installed on this node: pip install '.[chat]'"))
        elif on_card and self.llama_cuda is False:
            reasons.append(
                (ModelKind.CHAT, f"llama-cpp-python is built without CUDA on this node; rebuild it: {CUDA_BUILD}")
            )
        if self.torch is False:
            why = "sentence-transformers is not installed on this node: pip install '.[embeddings]'"
        elif on_card and self.torch_cuda is False:
            why = 'torch is a CPU build on this node; install its CUDA build (README, "Using a real GPU")'
        else:
            return tuple(reasons)
        return (*reasons, (ModelKind.EMBEDDING, why), (ModelKind.RERANK, why))

    @property
    def cpu_share(self) -> float:
        """The CPU's part of a memory that it shares with a card: none where the card runs every model, all where it runs none.

        Half where one engine is built for the card and the other is not: which models will be wanted is not known here.
        """
        no_card = [self.llama_cuda is False, self.torch_cuda is False]
        return sum(no_card) / len(no_card)

    def annotate(self, devices: Sequence[DeviceSnapshot]) -> tuple[DeviceSnapshot, ...]:
        """The devices with what they cannot run, which is also a note for people."""
        return tuple(
            replace(device, cannot_run=bars, notes=(*device.notes, *dict.fromkeys(reason for _, reason in bars)))
            for device in devices
            for bars in [self.cannot_run(device)]
        )


def probe_engines() -> EnginesInstalled:
    """Ask in a process of its own; blocks for about a second. Never raises: an engine that crashes its probe is 'not known'."""
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "tars.workers.engines_installed"],
            capture_output=True,
            timeout=PROBE_SECONDS,
            check=True,
            stdin=subprocess.DEVNULL,
        )
        return EnginesInstalled(**json.loads(done.stdout.splitlines()[-1]))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError, TypeError) as error:
        log.warning("which engines are installed could not be found out (%s); workers will tell", type(error).__name__)
        return EnginesInstalled()


def look() -> EnginesInstalled:
    """What this very Python has."""
    llama = importlib.util.find_spec("llama_cpp") is not None
    torch = importlib.util.find_spec("torch")
    transformers = importlib.util.find_spec("sentence_transformers") is not None
    return EnginesInstalled(
        llama=llama,
        llama_cuda=llama and _llama_offloads(),
        torch=torch is not None and transformers,
        torch_cuda=torch is not None and torch.origin is not None and _built_for_cuda(Path(torch.origin).parent),
    )


def _llama_offloads() -> bool | None:
    try:
        import llama_cpp
    except Exception:  # noqa: BLE001  # a build for another processor or driver fails in many ways; the worker's load will say how
        return None
    return bool(llama_cpp.llama_supports_gpu_offload())


def _built_for_cuda(package: Path) -> bool | None:
    """`torch/version.py` says `cuda: Optional[str] = '12.8'`, or None for a CPU build; importing torch to ask takes seconds."""
    try:
        found = re.search(r"^cuda\b[^=]*=\s*(.+)$", (package / "version.py").read_text(), re.MULTILINE)
    except OSError:
        return None
    return None if found is None else found.group(1).strip() != "None"


if __name__ == "__main__":
    engines = look()
    print(json.dumps({name: getattr(engines, name) for name in EnginesInstalled.__slots__}))
