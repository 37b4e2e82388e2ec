"""`scripts/bench engine`: a real tars-node against llama-server, llama-cpp-python's server, infinity-emb and the limits of the machine.

Law of this file: the order of the parts, what is printed and what is written; each part measures in its own file. Every part compares
within itself, on the same cores in the same minutes; absolute numbers belong to the machine, ratios to the programs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from engine_build import SERVER_EXTRA, LlamaPrograms, engine_uses_card, llama_programs, python_environment
from engine_chat import Section, measure_chat, measure_long, measure_prefix
from engine_embeddings import measure_embeddings
from engine_memory import measure_memory
from engine_prompts import COMMON_WORDS
from engine_results import Aim, verdict
from random_model import english_words, random_model
from rich.console import Console
from rich.table import Table
from server_process import end_on_signals

PARTS = ("chat", "demo", "prefix", "long", "memory", "embeddings")
CALLERS = (1, 4, 8, 16)
SHARED_CALLERS = (4, 8, 16)


class Benchmark:
    """One run; `result` grows part by part, and is written after each, so that an interrupted run leaves what it has."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.console = Console(width=150, highlight=False)
        self.words = english_words()[:COMMON_WORDS]
        self.quick: bool = options.quick
        self.rounds: int = options.rounds or (1 if self.quick else 3)
        self.models = options.folder / "models"
        self.result: dict[str, Any] = {
            "benchmark": "engine",
            "machine": {
                "processors": os.cpu_count(),
                "architecture": platform.machine(),
                "python": platform.python_version(),
                "system": platform.system(),
                "llama_cpp_python": version("llama-cpp-python"),
                "card": engine_uses_card(),
            },
            "rounds": self.rounds,
            "quick": self.quick,
            "parts": {},
        }
        self.aims: list[Aim] = []

    def say(self, line: str) -> None:
        self.console.print(line, style="dim", markup=False)

    def programs(self) -> LlamaPrograms:
        return llama_programs(self.options.folder, self.options.llama_source, self.say)

    def server_python(self) -> Path | None:
        try:
            return python_environment(self.options.folder / "engine", (SERVER_EXTRA,), self.say)
        except SystemExit as problem:
            self.say(f"llama-cpp-python's own server is not measured: {problem}")
            return None

    # --- the parts ---

    def chat(self) -> None:
        path = random_model(self.models, "small")
        callers = (1, 8) if self.quick else CALLERS
        self.section(
            "chat",
            measure_chat(
                self.programs(), self.server_python(), "random-124m", path, self.words,
                callers=callers, rounds=self.rounds, quick=self.quick, small=False, say=self.say,
            ),
        )  # fmt: skip

    def demo(self) -> None:
        from tars.demo import help_desk_gguf

        callers = (1, 8) if self.quick else CALLERS
        self.section(
            "demo",
            measure_chat(
                self.programs(), None, "demo-model", help_desk_gguf(), self.words,
                callers=callers, rounds=self.rounds, quick=self.quick, small=True, say=self.say,
            ),
        )  # fmt: skip

    def prefix(self) -> None:
        path = random_model(self.models, "small")
        callers = (8,) if self.quick else SHARED_CALLERS
        self.section(
            "prefix",
            measure_prefix(
                self.programs(), "random-124m", path, self.words,
                callers=callers, rounds=self.rounds, quick=self.quick, say=self.say,
            ),
        )  # fmt: skip

    def long(self) -> None:
        path = random_model(self.models, "small")
        self.section(
            "long",
            measure_long(
                self.programs(), "random-124m", path, self.words, rounds=self.rounds, quick=self.quick, say=self.say
            ),
        )

    def memory(self) -> None:
        self.say("making a Mistral-7B-shaped file of random weights, 3.9 GiB, where it is not there yet")
        path = random_model(self.models, "mistral-7b", quantisation="Q4_0")
        report = measure_memory(
            self.programs(), "random-mistral-7b", path, self.words, rounds=1 if self.quick else 2, say=self.say
        )
        self.show("memory", "a Mistral-7B-shaped file in Q4_0", report.lines, report.aims, report.raw)

    def embeddings(self) -> None:
        count = self.options.texts or (256 if self.quick else 2000)
        report = measure_embeddings(
            self.options.folder, self.words, count=count, rounds=self.rounds, singles=40 if self.quick else 200,
            say=self.say,
        )  # fmt: skip
        table = Table(title=f"embeddings, {count} texts of 8-200 words, texts/s (median of {self.rounds} rounds)")
        patterns = list(next(iter(report.rates.values())))
        for heading in ("", *patterns):
            table.add_column(heading, justify="right" if heading else "left")
        for peer, rates in report.rates.items():
            table.add_row(peer, *(f"{_median(rates[pattern]):.1f}" for pattern in patterns))
        table.add_row(
            "raw forward pass (the limit)", *(f"{_median(report.limit[pattern]):.1f}" for pattern in patterns)
        )
        self.console.print(table)
        raw = {"texts_per_second": report.rates, "limit": report.limit, "added_ms": report.added_ms}
        self.show("embeddings", "embeddings", report.lines, report.aims, {**raw, "backend": report.backend})

    # --- what is said of them ---

    def section(self, part: str, section: Section) -> None:
        if section.rows:
            table = Table(title=f"{section.title} (median of {self.rounds} rounds)")
            for heading in ("callers", "server", "tokens/s", "first token ms", "inter-token ms p50", "p99", "max"):
                table.add_column(heading, justify="left" if heading == "server" else "right")
            for name, callers, measured in section.rows:
                table.add_row(
                    str(callers), name, f"{measured.tokens_per_second:.1f}", f"{measured.first_token_ms:.0f}",
                    f"{measured.inter_token_p50_ms:.1f}", f"{measured.inter_token_p99_ms:.0f}",
                    f"{measured.inter_token_max_ms:.0f}",
                )  # fmt: skip
            self.console.print(table)
        self.show(part, section.title, section.lines, section.aims, section.raw)

    def show(self, part: str, title: str, lines: Sequence[str], aims: Sequence[Aim], raw: Any) -> None:
        self.console.print(f"{title}:", markup=False)
        for line in (*lines, *map(str, aims)):
            self.console.print(f"  {line}", markup=False)
        self.console.print()
        self.aims += aims
        self.result["parts"][part] = {"lines": list(lines), "aims": [aim.to_json() for aim in aims], "measured": raw}
        if self.options.json is not None:
            self.options.json.write_text(json.dumps(self.result, indent=2, default=asdict) + "\n", encoding="utf-8")


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def parts_of(text: str) -> list[str]:
    """`chat,long` as a list, in the order in which they run. Raises ValueError for a name that is none."""
    asked = [part.strip() for part in text.split(",") if part.strip()]
    unknown = [part for part in asked if part not in PARTS]
    if unknown or not asked:
        raise ValueError(f"{', '.join(unknown) or 'nothing'} is no part; there are {', '.join(PARTS)}")
    return [part for part in PARTS if part in asked]


def _parts(text: str) -> list[str]:
    try:
        return parts_of(text)
    except ValueError as problem:
        raise argparse.ArgumentTypeError(str(problem)) from None


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench engine", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="few callers, settings and texts: minutes, and rough numbers"
    )
    parser.add_argument("--only", type=_parts, default=list(PARTS), help=f"some of {','.join(PARTS)} (default: all)")
    parser.add_argument("--rounds", type=int, help="interleaved measurements of each; the median counts (default: 3)")
    parser.add_argument("--texts", type=int, help="to embed (default: 2000)")
    parser.add_argument("--json", type=Path, help="also write everything measured to this file")
    parser.add_argument(
        "--llama-source", type=Path, default=os.environ.get("TARS_BENCH_LLAMA_SOURCE"),
        help="llama.cpp's or llama-cpp-python's source, a folder or the .tar.gz, instead of fetching it",
    )  # fmt: skip
    parser.add_argument("--folder", type=Path, required=True, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if (options.rounds is not None and options.rounds < 1) or (options.texts is not None and options.texts < 64):
        parser.error("--rounds must be at least 1, --texts at least 64")
    if options.llama_source is not None:
        options.llama_source = Path(options.llama_source)
    options.folder = options.folder.resolve()
    end_on_signals()
    began = time.monotonic()
    benchmark = Benchmark(options)
    for part in options.only:
        getattr(benchmark, part)()
    benchmark.console.print(f"{verdict(benchmark.aims)}; {(time.monotonic() - began) / 60:.1f} minutes", markup=False)
    for aim in benchmark.aims:
        if not aim.reached:
            benchmark.console.print(f"  {aim}", markup=False)


if __name__ == "__main__":
    main()
