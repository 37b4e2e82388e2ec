"""Chat load on TARS and its peers: tokens/s and latencies by number of callers, with shared prefixes, and beside a long prompt.

Law of this file: one run, all servers up, rounds interleaved, and another server first in each round. A first pass over every setting of
llama-server picks those that are measured in the rounds: the best two at each number of callers, so that luck in one pass decides
nothing.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from engine_build import LlamaPrograms
from engine_prompts import prompts, prompts_with_common_beginning, words_for_tokens
from engine_results import (
    Aim,
    Answer,
    Measurement,
    best_setting,
    chat_aims,
    median_of,
    paired_ratio,
    prefix_aims,
    quantile,
    summarise,
)
from engine_servers import (
    Deployed,
    LlamaSetting,
    llama_cpp_python_server,
    llama_server,
    processors,
    replicas,
    rpc,
    tars_node,
)
from generation_load import LlamaServerManner, Manner, OpenAiManner, TarsManner, run_beside_a_long_prompt, run_load

SLOTS = 16
PROMPT_TOKENS, COMMON_TOKENS, NEW_TOKENS = 200, 170, 96
CONTEXT = 512
LONG_PROMPT_TOKENS, LONG_CONTEXT, RUNNING = 4000, 4608, 4
AIM_OF_PYTHON_SERVER = 3.0
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Model:
    """A chat model under measurement."""

    name: str
    path: Path
    words: Sequence[str]
    tokens_per_word: float = 1.0
    never: tuple[int, ...] = ()
    prompt_tokens: int = PROMPT_TOKENS
    small: bool = False
    """So small that one thread may be faster than several."""


@dataclass(frozen=True, slots=True)
class Peer:
    """A running server and how it is asked."""

    name: str
    url: str
    manner: Manner


@dataclass(slots=True)
class Section:
    """What one part of the benchmark found."""

    title: str
    rows: list[tuple[str, int, Measurement]] = field(default_factory=list)
    """(server, callers, median of rounds)."""
    aims: list[Aim] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    raw: dict[str, Any] = field(default_factory=dict)


def llama_settings(threads: int, *, on_card: bool, small: bool, quick: bool) -> list[LlamaSetting]:
    """What is tried: KV cache split or unified, flash attention off or on, batches of the default and of a small size, threads.

    The host-memory prompt cache is off where it only costs; llama-server's own defaults are tried too.
    """
    no_cache = ("-cram", "0")
    if on_card:
        ways = {
            "split kv, fa": (*no_cache, "-fa", "on"),
            "unified kv, fa": (*no_cache, "-kvu", "-fa", "on"),
            "split kv, fa, ub 1024": (*no_cache, "-fa", "on", "-ub", "1024"),
            "unified kv, no fa": (*no_cache, "-kvu", "-fa", "off"),
            "defaults": (),
        }
        threads_tried: list[tuple[str, ...]] = [()]
    else:
        ways = {
            "split kv, no fa": (*no_cache, "-fa", "off"),
            "split kv, fa": (*no_cache, "-fa", "on"),
            "unified kv, no fa": (*no_cache, "-kvu", "-fa", "off"),
            "unified kv, fa": (*no_cache, "-kvu", "-fa", "on"),
            "split kv, no fa, b 256": (*no_cache, "-fa", "off", "-b", "256", "-ub", "256"),
            "split kv, no fa, b 64": (*no_cache, "-fa", "off", "-b", "64", "-ub", "64"),
            "defaults": (),
        }
        threads_tried = [
            ("-t", str(count), "-tb", str(count)) for count in dict.fromkeys([threads, 1] if small else [threads])
        ]
    if quick:
        ways = dict(list(ways.items())[:3])
    settings = []
    for name, arguments in ways.items():
        for more in threads_tried:
            label = f"{name}, {more[1]} threads" if len(threads_tried) > 1 else name
            settings.append(LlamaSetting(label, (*arguments, *more)))
    if not quick:
        first = settings[0]
        settings.append(LlamaSetting(f"{first.name}, no prompt cache", first.arguments, cache_prompt=False))
    return settings


def model_under_node(url: str, name: str, path: Path, words: Sequence[str], *, small: bool = False) -> Model:
    """How many tokens a word of such a prompt takes, asked from the node."""
    sample = prompts(words, 1, 200, "sample")[0]
    tokens = rpc(url, "inference.tokenize", {"model": name, "text": sample})["count"]
    return Model(name, path, words, tokens_per_word=tokens / 200, small=small)


@dataclass(frozen=True, slots=True)
class Work:
    """The prompts of one round for some number of callers: (callers, seed) -> each caller's prompts."""

    make: Callable[[int, str], list[list[str]]]
    callers: tuple[int, ...]


def plain_work(model: Model, callers: tuple[int, ...], each: int) -> Work:
    """Prompts that share nothing; `each` per caller, one after the other."""
    length = words_for_tokens(model.prompt_tokens, model.tokens_per_word)

    def make(count: int, seed: str) -> list[list[str]]:
        return [prompts(model.words, each, length, f"{seed}/{caller}") for caller in range(count)]

    return Work(make, callers)


def shared_work(model: Model, callers: tuple[int, ...], each: int) -> Work:
    """Prompts of which 170 of 200 tokens are the same in all."""
    length = words_for_tokens(model.prompt_tokens, model.tokens_per_word)
    common = words_for_tokens(COMMON_TOKENS, model.tokens_per_word)

    def make(count: int, seed: str) -> list[list[str]]:
        return [
            prompts_with_common_beginning(model.words, each, length, common, f"{seed}/{caller}")
            for caller in range(count)
        ]

    return Work(make, callers)


def compare(
    ours: Peer, settings: Sequence[Peer], work: Work, rounds: int, say: Say
) -> tuple[dict[int, list[Measurement]], dict[int, dict[str, list[Measurement]]]]:
    """Rounds of every number of callers: TARS's, and llama-server's best two settings'."""
    for peer in (ours, *settings):
        run_load(peer.url, peer.manner, work.make(max(work.callers), "warm"), 8)
    kept: dict[int, list[Peer]] = {}
    for callers in work.callers:
        tried = {
            peer.name: [summarise(run_load(peer.url, peer.manner, work.make(callers, "pick"), NEW_TOKENS))]
            for peer in settings
        }
        ranked = sorted(settings, key=lambda peer: -tried[peer.name][0].tokens_per_second)
        kept[callers] = ranked[:2]
        say(
            f"{callers} callers, llama-server's settings: "
            + "; ".join(f"{peer.name} {tried[peer.name][0].tokens_per_second:.0f}" for peer in ranked)
        )
    mine: dict[int, list[Measurement]] = {callers: [] for callers in work.callers}
    theirs: dict[int, dict[str, list[Measurement]]] = {
        callers: {peer.name: [] for peer in kept[callers]} for callers in work.callers
    }
    for number in range(rounds):
        for callers in work.callers:
            asked = work.make(callers, f"round {number}")
            order = [ours, *kept[callers]]
            turn = number % len(order)
            for peer in (*order[turn:], *order[:turn]):
                measured = summarise(run_load(peer.url, peer.manner, asked, NEW_TOKENS))
                (mine[callers] if peer is ours else theirs[callers][peer.name]).append(measured)
            best = theirs[callers][best_setting(theirs[callers])][-1]
            say(
                f"round {number + 1} of {rounds}, {callers} callers: tars {mine[callers][-1].tokens_per_second:.0f} tokens/s, "
                f"llama-server {best.tokens_per_second:.0f}"
            )
    return mine, theirs


def _start_llama_servers(
    stack: ExitStack, programs: LlamaPrograms, model: Model, settings: Sequence[LlamaSetting], slots: int, context: int
) -> list[Peer]:
    peers = []
    for setting in settings:
        server = stack.enter_context(llama_server(programs, model.path, setting, slots=slots, context=context))
        peers.append(Peer(setting.name, server.url, LlamaServerManner(setting.cache_prompt)))
    return peers


def _fill(
    section: Section,
    mine: Mapping[int, Sequence[Measurement]],
    theirs: Mapping[int, Mapping[str, Sequence[Measurement]]],
) -> None:
    for callers, rounds in mine.items():
        section.rows.append(("tars", callers, median_of(rounds)))
        best = best_setting(theirs[callers])
        section.rows.append((f"llama-server ({best})", callers, median_of(theirs[callers][best])))
    section.raw = {
        "tars": {callers: [asdict(each) for each in rounds] for callers, rounds in mine.items()},
        "llama-server": {
            callers: {name: [asdict(each) for each in rounds] for name, rounds in settings.items()}
            for callers, settings in theirs.items()
        },
    }


def measure_chat(
    programs: LlamaPrograms, server_python: Path | None, name: str, path: Path, words: Sequence[str],
    *, callers: tuple[int, ...], rounds: int, quick: bool, small: bool, say: Say,
) -> Section:  # fmt: skip
    """tokens/s and latencies at each number of callers; at 8 also against llama-cpp-python's own server; Python's share of a step."""
    section = Section(f"{name}: ~{PROMPT_TOKENS} prompt tokens, {NEW_TOKENS} new ones, greedy")
    with ExitStack() as stack:
        node = stack.enter_context(tars_node([Deployed(name, path, slots=SLOTS, context=CONTEXT)]))
        model = model_under_node(node.url, name, path, words, small=small)
        never = ending_tokens(path) if small else ()
        settings = llama_settings(processors(), on_card=programs.cuda, small=small, quick=quick)
        peers = _start_llama_servers(stack, programs, model, settings, SLOTS, CONTEXT)
        tars = Peer("tars", node.url, TarsManner(name, never))
        work = plain_work(model, callers, 1 if quick else 2)
        before = counters(node.url)
        mine, theirs = compare(tars, peers, work, rounds, say)
        section.lines += [describe_python_share(before, counters(node.url))]
        _fill(section, mine, theirs)
        section.aims = chat_aims(mine, theirs, name)
        if server_python is not None and 8 in callers:
            python_server = stack.enter_context(
                llama_cpp_python_server(
                    server_python, path, context=CONTEXT, threads=processors(), on_card=programs.cuda
                )
            )
            other = Peer("llama-cpp-python's server", python_server.url, OpenAiManner())
            run_load(other.url, other.manner, work.make(1, "warm"), 8)
            ratios = []
            for number in range(max(1, rounds // 2)):
                asked = work.make(8, f"python server {number}")
                theirs_now = summarise(run_load(other.url, other.manner, asked, NEW_TOKENS))
                ours_now = summarise(run_load(tars.url, tars.manner, asked, NEW_TOKENS))
                ratios.append((ours_now.tokens_per_second, theirs_now.tokens_per_second))
            section.rows.append((other.name, 8, theirs_now))
            ratio = paired_ratio([one for one, _ in ratios], [other for _, other in ratios])
            what = f"tokens/s, {name}, 8 callers, to llama-cpp-python's own server"
            section.aims.append(Aim(what, ratio, at_least=AIM_OF_PYTHON_SERVER))
            section.raw["llama-cpp-python's server"] = ratios
    return section


def measure_prefix(
    programs: LlamaPrograms, name: str, path: Path, words: Sequence[str],
    *, callers: tuple[int, ...], rounds: int, quick: bool, say: Say,
) -> Section:  # fmt: skip
    """Prompts with a common beginning of 170 of 200 tokens."""
    section = Section(f"{name}: {COMMON_TOKENS} of {PROMPT_TOKENS} prompt tokens common, {NEW_TOKENS} new ones, greedy")
    with ExitStack() as stack:
        node = stack.enter_context(tars_node([Deployed(name, path, slots=SLOTS, context=CONTEXT)]))
        model = model_under_node(node.url, name, path, words)
        settings = llama_settings(processors(), on_card=programs.cuda, small=False, quick=quick)
        settings = [setting for setting in settings if setting.cache_prompt]
        peers = _start_llama_servers(stack, programs, model, settings, SLOTS, CONTEXT)
        tars = Peer("tars", node.url, TarsManner(name))
        before = counters(node.url)
        mine, theirs = compare(tars, peers, shared_work(model, callers, 1 if quick else 2), rounds, say)
        section.lines.append(describe_reuse(before, counters(node.url)))
    _fill(section, mine, theirs)
    section.aims = prefix_aims(mine, theirs)
    return section


def measure_long(
    programs: LlamaPrograms, name: str, path: Path, words: Sequence[str], *, rounds: int, quick: bool, say: Say
) -> Section:
    """What a prompt of 4,000 tokens that comes in does to four running answers."""
    section = Section(f"{name}: {RUNNING} running answers while a {LONG_PROMPT_TOKENS}-token prompt comes in")
    tokens = 200 if quick else 400
    settings = [
        LlamaSetting("defaults"),
        LlamaSetting("split kv, no fa", ("-cram", "0", "-fa", "off")),
        LlamaSetting("split kv, no fa, b 128", ("-cram", "0", "-fa", "off", "-b", "128", "-ub", "128")),
    ]
    if programs.cuda:
        settings = [
            LlamaSetting("defaults"),
            LlamaSetting("fa, b 256", ("-cram", "0", "-fa", "on", "-b", "256", "-ub", "256")),
        ]
    found: dict[str, list[dict[str, float]]] = {}
    with ExitStack() as stack:
        node = stack.enter_context(tars_node([Deployed(name, path, slots=RUNNING + 1, context=LONG_CONTEXT)]))
        model = model_under_node(node.url, name, path, words)
        peers = [Peer("tars", node.url, TarsManner(name))]
        peers += [
            Peer(f"llama-server ({peer.name})", peer.url, peer.manner)
            for peer in _start_llama_servers(stack, programs, model, settings, RUNNING + 1, LONG_CONTEXT)
        ]
        length = words_for_tokens(PROMPT_TOKENS, model.tokens_per_word)
        long_length = words_for_tokens(LONG_PROMPT_TOKENS, model.tokens_per_word)
        for number in range(rounds):
            asked = prompts(words, RUNNING, length, f"running {number}")
            long_prompt = prompts(words, 1, long_length, f"long {number}")[0]
            for peer in peers:
                running, long = run_beside_a_long_prompt(peer.url, peer.manner, asked, tokens, long_prompt)
                found.setdefault(peer.name, []).append(beside(running, long))
                say(f"round {number + 1} of {rounds}: {peer.name}: {found[peer.name][-1]}")
    for peer_name, each in found.items():
        numbers = {key: quantile([one[key] for one in each], 0.5) for key in each[0]}
        section.lines.append(
            f"{peer_name}: running answers' inter-token p50 {numbers['p50_ms']:.0f} p99 {numbers['p99_ms']:.0f} "
            f"max {numbers['max_ms']:.0f} ms meanwhile; long prompt's first token after {numbers['long_first_ms']:.0f} ms"
        )
    section.raw = {"rounds": found}
    return section


def beside(running: Sequence[Answer], long: Answer) -> dict[str, float]:
    """Milliseconds between tokens of the running answers while the long prompt was computed, each gap that touches that time."""
    begins, ends = long.sent, long.token_times[0]
    gaps = [
        (later - earlier) * 1000
        for answer in running
        for earlier, later in zip(answer.token_times, answer.token_times[1:], strict=False)
        if later > begins and earlier < ends
    ]
    if not gaps:
        raise RuntimeError("the answers had ended before the long prompt came in: there is nothing to measure")
    return {
        "p50_ms": quantile(gaps, 0.5),
        "p99_ms": quantile(gaps, 0.99),
        "max_ms": max(gaps),
        "long_first_ms": (ends - begins) * 1000,
    }


def counters(url: str) -> dict[str, Any] | None:
    """The engine's counters as of now: the node hears of them with every other second's ping."""
    time.sleep(2.5)
    return replicas(url)[0].get("counters")


def describe_python_share(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> str:
    """Python's part of the engine's steps, from the engine's own counters."""
    if not before or not after or not after.get("steps", 0) > before.get("steps", 0):
        return "Python's share of a step: the engine counts no steps"
    steps = after["steps"] - before["steps"]
    python = after["python_seconds"] - before["python_seconds"]
    native = after["native_seconds"] - before["native_seconds"]
    share = python / max(python + native, 1e-9)
    return (
        f"Python's share: {python / steps * 1e6:.0f} microseconds a step of {(python + native) / steps * 1e3:.2f} ms, "
        f"{share:.1%} ({steps} steps; aim: under 5 %)"
    )


def describe_reuse(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> str:
    """How many prompt tokens were not computed again."""
    if not before or not after or not after.get("prompt_tokens", 0) > before.get("prompt_tokens", 0):
        return "prompt tokens reused: the engine does not count them"
    cached = after["prompt_tokens_cached"] - before["prompt_tokens_cached"]
    return f"prompt tokens reused: {cached / (after['prompt_tokens'] - before['prompt_tokens']):.1%} (the common beginning is 85 %)"


def ending_tokens(path: Path) -> tuple[int, ...]:
    """Ids of the tokens with which an answer may end, from the file's header: llama.cpp takes control tokens for such by name too."""
    import gguf

    fields = gguf.GGUFReader(str(path)).fields
    names = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
    types = fields["tokenizer.ggml.token_type"].contents() if "tokenizer.ggml.token_type" in fields else []
    control = [token for token, kind in enumerate(types) if kind == gguf.TokenType.CONTROL]
    return tuple(dict.fromkeys([*(int(fields[name].contents()) for name in names if name in fields), *control]))


def llama_bench_decode(programs: LlamaPrograms, model: Path, *, threads: int, tokens: int = 64) -> float:
    """llama-bench's decode tokens/s for one sequence; on a card the better of flash attention off and on, on a CPU without it, once."""
    ways = ("-ngl", "999", "-fa", "0,1", "-r", "3") if programs.cuda else ("-t", str(threads), "-fa", "0", "-r", "1")
    command = [str(programs.bench), "-m", str(model), "-p", "0", "-n", str(tokens), *ways, "-o", "json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    if done.returncode:
        raise SystemExit(f"bench: llama-bench failed:\n{done.stderr[-1500:]}")
    return max(float(each["avg_ts"]) for each in json.loads(done.stdout))
