"""A 7B-shaped file: what the plan says that it takes, what its worker really takes, how long it loads, how fast it is alone.

Law of this file: the worker's memory is read from the kernel (`smaps_rollup`) after an answer, on a card from what the worker measured
there. PSS counts a shared page by its share, so that a mapped file that another program has open is not counted twice.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from engine_build import LlamaPrograms
from engine_chat import llama_bench_decode
from engine_prompts import prompts
from engine_results import Aim, summarise
from engine_servers import Deployed, processors, replicas, rpc, tars_node
from generation_load import TarsManner, run_load

CONTEXT = 4096
NEW_TOKENS = 24
MICRO_BATCH = 512
AIM_OFF_BY = 0.05
AIM_OF_LLAMA_BENCH = 0.95
MIB = 2**20


@dataclass(slots=True)
class MemoryReport:
    """Bytes, seconds and tokens per second."""

    lines: list[str] = field(default_factory=list)
    aims: list[Aim] = field(default_factory=list)
    raw: dict[str, Any] = field(default_factory=dict)


def kernel_memory(pid: int) -> dict[str, int]:
    """Bytes of a process by the kernel's own accounts: `Pss`, `Pss_Anon`, `Pss_File`, `Rss`; only `Rss` where there are no smaps."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
    except OSError:
        return {"Rss": int(psutil.Process(pid).memory_info().rss)}
    return parse_smaps(text)


def parse_smaps(text: str) -> dict[str, int]:
    """The lines of `smaps_rollup` that count here, in bytes."""
    found = {}
    for line in text.splitlines():
        name, _, rest = line.partition(":")
        if name in ("Rss", "Pss", "Pss_Anon", "Pss_File", "Pss_Shmem"):
            found[name] = int(rest.split()[0]) * 1024
    return found


def worker_of(node_pid: int) -> psutil.Process:
    """The largest child process: the worker with the model."""
    children = psutil.Process(node_pid).children(recursive=True)
    if not children:
        raise SystemExit("bench: the node has no worker process")
    return max(children, key=lambda child: child.memory_info().rss)


def measure_memory(
    programs: LlamaPrograms, name: str, path: Path, words: Sequence[str], *, rounds: int, say: Callable[[str], None]
) -> MemoryReport:
    """See the module's law."""
    report = MemoryReport()
    say(f"loading {path.stat().st_size / MIB:.0f} MiB")
    began = time.perf_counter()
    with tars_node([Deployed(name, path, slots=1, context=CONTEXT)]) as node:
        ready_seconds = time.perf_counter() - began
        planned = rpc(node.url, "mesh.plan")["assignments"][0]
        worker = worker_of(node.pid)
        manner = TarsManner(name)
        # A whole micro-batch: the compute buffers are real where they were used.
        run_load(node.url, manner, [prompts(words, 1, MICRO_BATCH, "warm")], 4)
        found = [
            summarise(run_load(node.url, manner, [prompts(words, 1, 32, f"{number}")], NEW_TOKENS))
            for number in range(rounds)
        ]
        info = replicas(node.url)[0]["info"]
        kernel = kernel_memory(worker.pid)
    on_card = planned["gpu_layers"] != 0
    real = info["memory_bytes"] if on_card else kernel.get("Pss", kernel["Rss"])
    tokens_per_second = statistics.median(each.tokens_per_second for each in found)
    # Without the first token, which is the prompt's.
    decode = statistics.median(1000 / each.inter_token_p50_ms for each in found)
    say("llama-bench on the same file")
    theirs = llama_bench_decode(programs, path, threads=processors(), tokens=NEW_TOKENS)
    parts = {key: planned[key] for key in ("weights_bytes", "kv_cache_bytes", "compute_bytes", "overhead_bytes")}
    # Not `needed_bytes`: by now that is what this load was measured to take.
    predicted = sum(parts.values())
    report.raw = {
        "predicted_bytes": predicted, "parts": parts, "kernel": kernel, "info": info, "ready_seconds": ready_seconds,
        "tokens_per_second": tokens_per_second, "decode_tokens_per_second": decode, "llama_bench": theirs,
    }  # fmt: skip
    shown = ", ".join(f"{key.removesuffix('_bytes')} {value / MIB:.0f}" for key, value in parts.items())
    report.lines = [
        f"predicted {predicted / MIB:.0f} MiB ({shown})",
        "real "
        + ", ".join(f"{key} {value / MIB:.0f}" for key, value in kernel.items())
        + f" MiB; by the worker's own count {info['memory_bytes'] / MIB:.0f} MiB",
        f"the prediction is {predicted / real:.3f} of {'the card' if on_card else 'PSS'}"
        # Pages of the mapped file whose weights were repacked are never read again, and the kernel may take them back.
        + (f", {predicted / kernel['Pss_Anon']:.3f} of what is no page of the file" if kernel.get("Pss_Anon") else ""),
        f"load {info['load_seconds']:.1f} s in the worker, {ready_seconds:.1f} s from the node's start to the model ready",
        f"one caller: {tokens_per_second:.2f} tokens/s with the prompt, {decode:.2f} without; llama-bench {theirs:.2f}",
    ]
    report.aims = [Aim(f"{name}: |predicted / real - 1|", abs(predicted / real - 1), at_most=AIM_OFF_BY)]
    if on_card:
        ratio = decode / theirs
        report.aims.append(Aim(f"{name}: decode at 1 caller, to llama-bench", ratio, at_least=AIM_OF_LLAMA_BENCH))
    return report
