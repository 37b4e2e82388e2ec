"""A GGUF model through llama.cpp's C interface: weights, vocabulary, tokenizer.

Law of this file: created and freed in the engine thread; `tokenize` may be called from any, for the vocabulary never changes. No sampling,
no requests; lengths are checked by the caller. Formulas and enum values: llama.h of the llama.cpp that llama-cpp-python ships.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
from llama_cpp import llama_cpp as api

from tars.errors import BadModelFile, DoesNotFit, InternalError, TarsError
from tars.workers import llama_library as library
from tars.workers.engine import LoadSpec

Logits = np.ndarray[Any, np.dtype[np.float32]]
"""One row of them: [vocabulary]."""

LOAD_MODE_NONE, LOAD_MODE_MMAP = 0, 1
"""llama_load_mode of llama.h."""

PIECE_BYTES = 256
"""First buffer for one token's text; the longest common ones (128 spaces in Llama 3) fit."""

LOSSLESS_VOCABULARIES = (1, 2)
"""LLAMA_VOCAB_TYPE_SPM and _BPE: every byte of a text comes back from its tokens, so bytes give a lower bound of tokens."""

MADV_DONTNEED = 4
"""Of Linux's madvise(2): the pages leave the process and are read again where they are touched."""

_OUT_OF_MEMORY = re.compile(
    r"out of memory|failed to allocate|unable to allocate|alloc.*failed|insufficient memory", re.I
)
_ARCHITECTURE = re.compile(r"unknown (?:model )?architecture: '([\w.-]{1,60})'")
_TRUNCATED = re.compile(
    r"not within the file bounds|incomplete|unexpected(ly)? (reached )?(end|eof)|file is too small|truncated", re.I
)


def load_error(lines: Sequence[str]) -> TarsError:
    """What llama.cpp's last lines mean for a person; none of their text but an architecture's name is passed on."""
    text = "\n".join(lines)
    if _OUT_OF_MEMORY.search(text):
        return DoesNotFit(
            "The device ran out of memory while the model was loaded. Free some, or deploy it with a smaller context or quantisation."
        )
    if found := _ARCHITECTURE.search(text):
        return BadModelFile(
            f"The model's architecture, {found.group(1)}, is not known to this llama.cpp. Update llama-cpp-python, or take another model."
        )
    if _TRUNCATED.search(text):
        return BadModelFile("The model file is truncated: it ends before its tensors do. Copy or download it again.")
    return BadModelFile(
        "llama.cpp refused the model file: it is damaged, or not a complete model. The worker's lines in the node's log say why. "
        "Copy or download it again."
    )


def forget_pages(path: str) -> None:
    """Let go of a mapped file's pages. Weights that llama.cpp rearranged for this CPU are read from its copy from then on, and the file's
    pages would count as this process's memory until the system runs short: as much again as the model. Nothing where there is no /proc.
    """
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
            ranges = [line.split()[0] for line in maps if line.rstrip("\n").endswith(" " + os.path.realpath(path))]
    except OSError:
        return
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for each in ranges:
        start, end = (int(border, 16) for border in each.split("-"))
        madvise(start, end - start, MADV_DONTNEED)


class Model:
    """Weights and vocabulary."""

    def __init__(self, spec: LoadSpec, log: library.NativeLog, on_percent: Callable[[float], None]) -> None:
        """Load; `on_percent` gets 0..100, only when it grew by a whole percent. Raises `BadModelFile` or `DoesNotFit`."""
        params = api.llama_model_default_params()
        params.n_gpu_layers = spec.gpu_layers
        params.load_mode = LOAD_MODE_MMAP if spec.mmap else LOAD_MODE_NONE
        # Repacked weights are multiplied by other kernels for one row than for four.
        params.use_extra_bufts = not spec.exact
        last = -1.0

        def progress(part: float, user_data: object) -> bool:
            nonlocal last
            if part * 100 - last >= 1:
                last = part * 100
                on_percent(last)
            return True

        params.progress_callback = api.llama_progress_callback(progress)
        self.pointer = api.llama_model_load_from_file(spec.path.encode(), params)
        if not self.pointer:
            raise load_error(log.lines)
        if spec.mmap and any("repack tensor" in line for line in log.lines):
            forget_pages(spec.path)
        self.vocabulary_pointer = api.llama_model_get_vocab(self.pointer)
        if not api.llama_model_has_decoder(self.pointer) or api.llama_model_has_encoder(self.pointer):
            raise BadModelFile("The file holds an encoder (an embedding or translation model); it cannot chat.")
        if api.llama_vocab_type(self.vocabulary_pointer) == 0:
            raise BadModelFile("The file holds no tokenizer; get another conversion of the model.")
        self.tokens = int(api.llama_vocab_n_tokens(self.vocabulary_pointer))
        self.context_trained = int(api.llama_model_n_ctx_train(self.pointer))
        self.bos = int(api.llama_vocab_bos(self.vocabulary_pointer))
        self.eos = int(api.llama_vocab_eos(self.vocabulary_pointer))
        self.architecture = self._metadata(b"general.architecture") or ""
        template = api.llama_model_chat_template(self.pointer, None)
        self.chat_template: str | None = template.decode("utf-8", "replace") if template else None
        self.pieces = [self._piece(token, special=False) for token in range(self.tokens)]
        """Bytes of every token; empty for control tokens."""
        self.end_tokens = frozenset(
            token for token in range(self.tokens) if library.vocab_is_eog(self.vocabulary_pointer, token)
        )
        self.forgets_partly = not (
            api.llama_model_is_recurrent(self.pointer) or api.llama_model_is_hybrid(self.pointer)
        )
        """False where a sequence's state can only be kept or dropped whole."""
        self.continuing_tokens = [token for token, piece in enumerate(self.pieces) if piece and 0x80 <= piece[0] < 0xC0]
        """Tokens that begin inside a character of UTF-8."""
        lossless = api.llama_vocab_type(self.vocabulary_pointer) in LOSSLESS_VOCABULARIES
        # Control tokens count with their names, which a text may spell out.
        lengths = (len(piece or self._piece(token, special=True)) for token, piece in enumerate(self.pieces))
        self._longest_piece = max(lengths, default=0) if lossless else 0

    def special_text(self, token: int) -> str:
        """A control token's text, such as `<s>`; empty for no token (-1)."""
        return self._piece(token, special=True).decode("utf-8", "replace") if 0 <= token < self.tokens else ""

    def show(self, markers: Collection[str]) -> None:
        """Let control tokens with these texts come out as text: a chat format's marks of tool calls and reasoning."""
        if not markers:
            return
        for token, piece in enumerate(self.pieces):
            if not piece and token not in self.end_tokens and (text := self.special_text(token)) in markers:
                self.pieces[token] = text.encode()

    def fewest_tokens(self, text: bytes) -> int:
        """A lower bound of the tokens of `text`, without tokenizing it: nobody waits for 4 MiB that cannot fit anyway."""
        return -(-len(text) // self._longest_piece) if self._longest_piece else 0

    def tokenize(self, text: bytes, *, add_special: bool) -> list[int]:
        """Token ids; control tokens that are spelled out in the text are recognised."""
        room = len(text) + 8
        buffer = np.empty(room, dtype=np.int32)
        pointer = buffer.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        count = api.llama_tokenize(self.vocabulary_pointer, text, len(text), pointer, room, add_special, True)
        if count < 0:
            raise InternalError("The tokenizer failed on this text.")
        return [int(token) for token in buffer[:count]]

    def close(self) -> None:
        """Free the weights; the context must be gone."""
        api.llama_model_free(self.pointer)

    def _piece(self, token: int, *, special: bool) -> bytes:
        size = PIECE_BYTES
        while True:
            buffer = ctypes.create_string_buffer(size)
            count = library.token_to_piece(self.vocabulary_pointer, token, buffer, size, 0, special)
            if count >= 0:
                return buffer.raw[:count]
            size = -count

    def _metadata(self, key: bytes) -> str | None:
        buffer = ctypes.create_string_buffer(256)
        count = api.llama_model_meta_val_str(self.pointer, key, buffer, len(buffer))
        return buffer.value.decode("utf-8", "replace") if count >= 0 else None
