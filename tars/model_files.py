"""Model files on this machine: is this one whole, what is in it, and what is its sha256.

Law of this file: it opens what an operator named, reads headers only (but for the hash), and answers with values or with one clear
`BadModelFile` or `ModelFileMissing`. Those reach callers, so they never name a path; the path goes to the operator's log.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import stat
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tars.core.gguf import GgufHeader, parse_gguf
from tars.core.gguf_reader import GgufError, GgufHeaderLonger
from tars.core.types import Bytes, ModelShape
from tars.errors import BadModelFile, ModelError, ModelFileMissing
from tars.state_folder import StateFolder

log = logging.getLogger(__name__)

FIRST_READ = 16 * 2**20
"""Holds every header known but the largest: 8 MB for Llama 3.1's vocabulary and merges."""
MOST_HEADER = 256 * 2**20
"""A header that does not end here is damaged; 30 times the largest known."""
MOST_JSON = 32 * 2**20
"""config.json is a few KiB; a safetensors header a few hundred."""
HASH_CHUNK = 4 * 2**20
"""Large enough that Python's share of the time is nothing, small enough for a smooth progress bar."""
HASHES = "file_hashes.json"
MOST_HASHES = 1000
"""Files remembered: oldest leave first, and cost a second hashing."""
ENCODERS = frozenset(
    {
        "bert",
        "eurobert",
        "gemma-embedding",
        "jina-bert-v2",
        "jina-bert-v3",
        "modern-bert",
        "neo-bert",
        "nomic-bert",
        "nomic-bert-moe",
        "t5encoder",
    }
)
"""llama.cpp's architectures that produce vectors and no text."""
DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
"""safetensors' element types -> bytes."""


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What tells that a file is still the one that was read: size in bytes, and time of its last change in ns."""

    size: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A GGUF file whose header was read and found whole."""

    path: Path
    header: GgufHeader
    shape: ModelShape
    fingerprint: Fingerprint


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A sentence-transformers folder. `shape.tensor_bytes` counts its parameters in fp32, whatever they are stored as."""

    path: Path
    shape: ModelShape
    reranker: bool
    """True where the model scores pairs (a sequence classifier) and embeds nothing."""


def inspect(path: Path) -> ModelFile:
    """Read a GGUF file's header. Milliseconds for a small vocabulary, some tens for 128k tokens with merges.

    Raises `BadModelFile` (not a file, unreadable, empty, not GGUF, truncated, damaged, split, without a tokenizer, of an architecture
    that the llama engine does not chat with) or `ModelFileMissing`. Never blocks on a FIFO or a device.
    """
    header, fingerprint = _read_header(path)
    try:
        shape = header.shape()
    except GgufError as error:
        raise _bad(path, str(error)) from error
    if shape.architecture in ENCODERS:
        raise _bad(
            path,
            f"This GGUF file holds an encoder ({shape.architecture}), which cannot chat. TARS serves embedding models from their "
            "sentence-transformers folder: name that one instead.",
        )
    if header.tokenizer_model is None:
        raise _bad(
            path,
            "This GGUF file carries no tokenizer, so no text can be sent to it. Convert the model again with its tokenizer.",
        )
    return ModelFile(path, header, shape, fingerprint)


def read_header(path: Path) -> GgufHeader:
    """The header of any GGUF file, whether it holds a model or not. Raises `BadModelFile` or `ModelFileMissing`, as `inspect` does."""
    return _read_header(path)[0]


def inspect_folder(path: Path) -> ModelFolder:
    """Read a sentence-transformers (or plain Hugging Face encoder) folder: config.json and the headers of its safetensors files.

    Raises `BadModelFile` for a folder without them, with pickled weights only (which TARS does not load), or with a truncated file; and
    `ModelFileMissing`.
    """
    if not path.exists():
        raise _missing(path)
    if not path.is_dir():
        raise _bad(path, "This is a file; an embedding model is a folder with config.json and model.safetensors in it.")
    config = _json_file(path, "config.json")
    transformer = next(
        (path / module["path"] for module in _modules(path) if str(module.get("type", "")).endswith(".Transformer")),
        path,
    )
    if not config and transformer != path:
        config = _json_file(transformer, "config.json")
    if not config:
        raise _bad(
            path, "This folder has no readable config.json, so it is no sentence-transformers model. Download it again."
        )
    weights = sorted(transformer.glob("*.safetensors")) or sorted(path.glob("*.safetensors"))
    if not weights:
        pickled = any(path.glob("pytorch_model*.bin"))
        raise _bad(
            path,
            "This folder has only pickled weights (pytorch_model.bin), which may run code and are never loaded. Use the model's "
            "safetensors files."
            if pickled
            else "This folder has no model.safetensors. Download the model again, with its weights.",
        )
    parameters = stored = 0
    for file in weights:
        counted, size = _safetensors(file)
        parameters += counted
        stored += size
    sentence = _json_file(path, "sentence_bert_config.json") or _json_file(transformer, "sentence_bert_config.json")
    return ModelFolder(
        path,
        _encoder_shape(path, config, sentence, parameters=parameters, stored=stored),
        reranker=any("SequenceClassification" in str(name) for name in _list(config.get("architectures"))),
    )


class FileHashes:
    """sha256 of model files, remembered in the state folder by (path, size, time of change). Thread-safe."""

    def __init__(self, folder: StateFolder):
        self._folder = folder
        self._lock = threading.Lock()
        self._closed = False

    def close(self) -> None:
        """Save nothing from now on: waits for a write that has begun, so that the process may end. Idempotent."""
        with self._lock:
            self._closed = True

    def known(self, path: Path) -> str | None:
        """The hash if it is remembered and the file has not changed since; never reads the file's content."""
        try:
            found = os.stat(path)
        except OSError:
            return None
        with self._lock:
            row = self._rows().get(_key(path))
        return row["sha256"] if row and row["size"] == found.st_size and row["mtime_ns"] == found.st_mtime_ns else None

    def sha256(self, path: Path, progress: Callable[[float], None] = lambda percent: None) -> str:
        """The file's hash in hexadecimal; `progress(percent)` while it is computed. Seconds for a large file: not in an event loop.

        Raises `BadModelFile` (unreadable, or changed while it was read) or `ModelFileMissing`. A hash that cannot be saved (disk full) is
        still right and answered.
        """
        remembered = self.known(path)
        if remembered is not None:
            return remembered
        descriptor, before = _open(path)
        try:
            digest = hashlib.sha256()
            done = 0
            while chunk := _read(path, descriptor, HASH_CHUNK, done):
                digest.update(chunk)
                done += len(chunk)
                progress(min(100.0, 100.0 * done / max(1, before.size)))
            found = os.fstat(descriptor)
        finally:
            os.close(descriptor)
        if Fingerprint(found.st_size, found.st_mtime_ns) != before or done != before.size:
            raise _bad(
                path, "The file changed while it was read: is it still being downloaded? Try again when it is complete."
            )
        answer = digest.hexdigest()
        self._remember(path, before, answer)
        return answer

    def remember(self, path: Path, sha256: str) -> None:
        """Take the word of whoever has just hashed these very bytes and put them here. A file that is gone again is not remembered."""
        with suppress(OSError):
            found = os.stat(path)
            self._remember(path, Fingerprint(found.st_size, found.st_mtime_ns), sha256)

    def _rows(self) -> dict[str, dict[str, Any]]:
        stored = self._folder.read_json(HASHES)
        rows = stored.get("files") if isinstance(stored, dict) else None
        fields = {"sha256": str, "size": int, "mtime_ns": int}
        return {
            key: row
            for key, row in (rows.items() if isinstance(rows, dict) else ())
            if isinstance(row, dict) and all(type(row.get(name)) is kind for name, kind in fields.items())
        }

    def _remember(self, path: Path, fingerprint: Fingerprint, answer: str) -> None:
        with self._lock:
            if self._closed:
                return
            rows = self._rows()
            rows.pop(_key(path), None)
            rows[_key(path)] = {"sha256": answer, "size": fingerprint.size, "mtime_ns": fingerprint.mtime_ns}
            kept = dict(list(rows.items())[-MOST_HASHES:])
            try:
                self._folder.write_json(HASHES, {"version": 1, "files": kept})
            except (ModelError, OSError) as error:
                log.warning("the hash of %s was not saved: %s", path, error)


# --- inside -----------------------------------------------------------------------------------------------------------


def _key(path: Path) -> str:
    # Backslash-escaped: a file name need not be UTF-8, a JSON string must.
    return os.fsencode(path.absolute()).decode("utf-8", "backslashreplace")


def _bad(path: Path, message: str) -> BadModelFile:
    log.warning("%s: %s", path, message)
    return BadModelFile(message)


def _missing(path: Path) -> ModelFileMissing:
    log.warning("%s: no such model file", path)
    return ModelFileMissing(
        "The model's file is not where it was said to be on this PC. Correct the path, or put the file there."
    )


def _open(path: Path) -> tuple[int, Fingerprint]:
    try:
        # Asked before it is opened, because opening a device can have effects; without blocking, in case it is swapped meanwhile.
        found = os.stat(path)
        if stat.S_ISREG(found.st_mode):
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            found = os.fstat(descriptor)
            if stat.S_ISREG(found.st_mode):
                return descriptor, Fingerprint(found.st_size, found.st_mtime_ns)
            os.close(descriptor)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            raise _missing(path) from error
        raise _bad(
            path, f"The model's file cannot be opened ({_reason(error)}). Let the user that runs tars-node read it."
        ) from error
    except ValueError as error:
        raise _bad(path, "The model's path holds a NUL character. Correct it.") from error
    what = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe, socket or device"
    raise _bad(path, f"This is {what}, not a GGUF file. Name the .gguf file itself.")


def _read_header(path: Path) -> tuple[GgufHeader, Fingerprint]:
    try:
        descriptor, fingerprint = _open(path)
        try:
            return _header(descriptor, fingerprint.size), fingerprint
        finally:
            os.close(descriptor)
    except GgufError as error:
        raise _bad(path, str(error)) from error


def _read(path: Path, descriptor: int, size: int, offset: int) -> bytes:
    try:
        return os.pread(descriptor, size, offset)
    except OSError as error:
        raise _bad(path, f"The model's file cannot be read ({_reason(error)}). Check the disk.") from error


def _reason(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno else "unknown reason"


def _header(descriptor: int, size: int) -> GgufHeader:
    # Read, not mapped: a file that somebody truncates under a mapping ends the whole node with SIGBUS.
    for most in (FIRST_READ, MOST_HEADER):
        try:
            start = b"".join(_prefix(descriptor, min(most, size)))
            return parse_gguf(start, size)
        except OSError as error:
            raise GgufError(f"The file cannot be read ({_reason(error)}). Check the disk.") from error
        except GgufHeaderLonger:
            if most == MOST_HEADER:
                raise
    raise AssertionError("unreachable")


def _prefix(descriptor: int, size: int) -> list[bytes]:
    pieces: list[bytes] = []
    done = 0
    while done < size and (piece := os.pread(descriptor, size - done, done)):
        pieces.append(piece)
        done += len(piece)
    return pieces


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _json_file(folder: Path, name: str) -> dict[str, Any]:
    """The object in the file; {} where there is none."""
    file = folder / name
    try:
        if not file.is_file() or file.stat().st_size > MOST_JSON:
            return {}
        value = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _modules(path: Path) -> list[dict[str, Any]]:
    file = path / "modules.json"
    try:
        if not file.is_file() or file.stat().st_size > MOST_JSON:
            return []
        rows = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return []
    # A module's folder stands directly in the model's: nothing else is read, whatever the file says.
    return [
        row
        for row in _list(rows)
        if isinstance(row, dict)
        and isinstance(row.get("path"), str)
        and re.fullmatch(r"([A-Za-z0-9_][A-Za-z0-9_.-]*)?", row["path"])
    ]


def _safetensors(file: Path) -> tuple[int, int]:
    """Parameters and file bytes, from the header: 8 bytes of length, then JSON of name -> dtype, shape, data_offsets."""
    descriptor, fingerprint = _open(file)
    try:
        length = int.from_bytes(_read(file, descriptor, 8, 0), "little")
        if not 2 <= length <= min(MOST_JSON, fingerprint.size - 8):
            raise _bad(file, "A safetensors file of this model is truncated or damaged. Download it again.")
        text = _read(file, descriptor, length, 8)
    finally:
        os.close(descriptor)
    parameters = end = 0
    try:
        for name, row in json.loads(text).items():
            if name == "__metadata__":
                continue
            begin, stop = row["data_offsets"]
            size = DTYPE_BYTES[row["dtype"]]
            if (
                type(begin) is not int
                or type(stop) is not int
                or not 0 <= begin <= stop < 2**62
                or (stop - begin) % size
            ):
                raise ValueError(name)
            parameters += (stop - begin) // size
            end = max(end, stop)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _bad(file, "The header of a safetensors file of this model is damaged. Download it again.") from error
    missing = 8 + length + end - fingerprint.size
    if missing > 0:
        raise _bad(
            file, f"A safetensors file of this model is truncated: {missing:,} bytes are missing. Download it again."
        )
    return parameters, fingerprint.size


def _encoder_shape(
    path: Path, config: dict[str, Any], sentence: dict[str, Any], *, parameters: int, stored: int
) -> ModelShape:
    def count(*names: str, default: int | None = None) -> int:
        for name in names:
            value = config.get(name)
            if type(value) is int and 0 < value < 2**31:
                return value
        if default is None:
            raise _bad(path, f"This model's config.json has no usable {names[0]}. Download it again.")
        return default

    embedding = count("hidden_size", "n_embd", "dim")
    heads = count("num_attention_heads", "n_head", "n_heads")
    positions = count("max_position_embeddings", "n_positions", default=512)
    longest = sentence.get("max_seq_length")
    architecture = str(config.get("model_type", "bert"))[:50]
    return ModelShape(
        architecture="nomic-bert" if architecture == "nomic_bert" else architecture,
        layers=count("num_hidden_layers", "n_layer", "n_layers"),
        embedding=embedding,
        heads=heads,
        kv_heads=heads,
        feed_forward=count("intermediate_size", "n_inner", "hidden_dim", default=4 * embedding),
        vocabulary=count("vocab_size"),
        key_length=embedding // heads,
        value_length=embedding // heads,
        context_trained=min(positions, longest) if type(longest) is int and longest > 0 else positions,
        tensor_bytes=Bytes(4 * parameters),
        host_bytes=Bytes(0),
        file_bytes=Bytes(stored),
    )
