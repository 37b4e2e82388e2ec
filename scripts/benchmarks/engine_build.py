"""What `scripts/bench engine` compares with, made ready under the bench's own folder: llama-server and llama-bench, two Python servers.

Law of this file: the peers are built from the source distribution of the very llama-cpp-python that TARS runs on, with the same options,
so that both sides have the same kernels. Nothing is installed into `.venv`; the peers' environments see its packages (a .pth file),
because torch and llama-cpp-python must not be built or fetched twice. What is there already is taken as it is.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path

LLAMA_PACKAGE = "llama-cpp-python"
SERVER_EXTRA = "llama-cpp-python[server]"
INFINITY = (
    "infinity-emb[torch,server]==0.0.78",
    # Its imports fail with newer ones, and pip alone searches for these for many minutes.
    "transformers==4.48.3",
    "huggingface_hub<1",
    "sentence-transformers==3.4.1",
    "optimum==1.27.0",
)
BUILD_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    # No download at run time, and none while building.
    "-DLLAMA_CURL=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DBUILD_SHARED_LIBS=OFF",
)
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class LlamaPrograms:
    """The two programs, and whether they were built for the card."""

    server: Path
    bench: Path
    cuda: bool


@cache
def engine_uses_card() -> bool:
    """Whether the installed llama-cpp-python offloads to a GPU; asked in another process, so that no CUDA context stays in this one."""
    asked = subprocess.run(
        [sys.executable, "-c", "import llama_cpp; print(bool(llama_cpp.llama_supports_gpu_offload()))"],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return asked.stdout.strip().endswith("True")


def llama_programs(folder: Path, source: Path | None, say: Say) -> LlamaPrograms:
    """Find or build llama-server and llama-bench in `folder`. `source`: llama.cpp's tree, llama-cpp-python's, or its .tar.gz.

    Raises SystemExit that says what is missing.
    """
    cuda = engine_uses_card() and shutil.which("nvcc") is not None
    package = version(LLAMA_PACKAGE)
    build = folder / f"llama.cpp-{package}-{'cuda' if cuda else 'cpu'}" / "build"
    programs = LlamaPrograms(build / "bin" / "llama-server", build / "bin" / "llama-bench", cuda)
    if not (programs.server.is_file() and programs.bench.is_file()):
        tree = _source_tree(build.parent, package, source, say)
        _build(tree, build, cuda, say)
    for program in (programs.server, programs.bench):
        if not program.is_file():
            raise SystemExit(f"bench: the build made no {program.name}")
    return programs


def _source_tree(folder: Path, package: str, source: Path | None, say: Say) -> Path:
    kept = folder / "source"
    if source is not None and source.is_dir():
        for tree in (source, source / "vendor" / "llama.cpp"):
            if (tree / "tools" / "server").is_dir():
                return tree.resolve()
        raise SystemExit(f"bench: {source} holds neither llama.cpp's tree nor llama-cpp-python's")
    if not (kept / "tools" / "server").is_dir():
        with tempfile.TemporaryDirectory() as scratch:
            archive = source or _downloaded(Path(scratch), package, say)
            unpacked = Path(scratch) / "unpacked"
            with tarfile.open(archive) as packed:
                packed.extractall(unpacked, filter="data")
            found = next(unpacked.glob("*/vendor/llama.cpp"), None)
            if found is None:
                raise SystemExit(
                    f"bench: {archive.name} holds no vendor/llama.cpp; is it llama-cpp-python's source distribution?"
                )
            folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(kept, ignore_errors=True)
            shutil.move(found, kept)
    return kept


def _downloaded(folder: Path, package: str, say: Say) -> Path:
    say(
        f"fetching the source distribution of {LLAMA_PACKAGE} {package} (about 75 MB; pip also prepares its build, a minute or two)"
    )
    command = [
        "download",
        "--no-deps",
        "--no-binary",
        LLAMA_PACKAGE,
        "-q",
        "-d",
        str(folder),
        f"{LLAMA_PACKAGE}=={package}",
    ]
    _pip(Path(sys.executable), command, "--llama-source names a copy of it instead")
    found = next(folder.glob("llama_cpp_python-*.tar.gz"), None)
    if found is None:
        raise SystemExit(
            "bench: pip fetched no source distribution of llama-cpp-python; --llama-source names a copy of it"
        )
    return found


def _build(tree: Path, build: Path, cuda: bool, say: Say) -> None:
    cmake = shutil.which("cmake") or _installed_cmake(build.parent.parent)
    options = [*BUILD_OPTIONS, f"-DGGML_CUDA={'ON' if cuda else 'OFF'}"]
    if shutil.which("ninja"):
        options += ["-G", "Ninja"]
    jobs = str(os.cpu_count() or 1)
    say(
        f"building llama-server and llama-bench for the {'card' if cuda else 'CPU'} ({'20' if cuda else '5'} minutes or so), once"
    )
    for words in (
        [cmake, "-S", str(tree), "-B", str(build), *options],
        [cmake, "--build", str(build), "--target", "llama-server", "llama-bench", "-j", jobs],
    ):
        done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
        if done.returncode:
            raise SystemExit(f"bench: {' '.join(words[:2])} failed:\n{done.stdout[-3000:]}")


def _installed_cmake(folder: Path) -> str:
    environment = python_environment(folder / "engine", (), lambda _: None)
    _pip(environment, ["install", "-q", "cmake"], "or install cmake with the system's package manager")
    return str(environment.with_name("cmake"))


def python_environment(folder: Path, packages: Sequence[str], say: Say) -> Path:
    """The interpreter of a virtual environment in `folder` that sees this one's packages and has `packages`. Raises SystemExit."""
    python = folder / "bin" / "python"
    wanted = "\n".join(packages)
    done = folder / ".installed"
    if not python.is_file():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    # Its own packages come first, this environment's after them.
    version_folder = f"python{sys.version_info.major}.{sys.version_info.minor}"
    path_file = folder / "lib" / version_folder / "site-packages" / "tars-venv.pth"
    path_file.write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    if packages and (not done.is_file() or done.read_text(encoding="utf-8") != wanted):
        say(f"installing {packages[0]} into {folder.parent.name}/{folder.name}")
        _pip(python, ["install", "-q", *packages], "the rest of the benchmark runs without it")
        done.write_text(wanted, encoding="utf-8")
    return python


def _pip(python: Path, words: Sequence[str], otherwise: str) -> None:
    command = [str(python), "-m", "pip", "--disable-pip-version-check", *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=1800)
    if done.returncode:
        raise SystemExit(f"bench: pip failed ({otherwise}):\n{done.stdout[-1500:]}")
