"""A GGUF model and its context through llama.cpp's C interface: load, tokenize, decode.

Law of this file: one class per native object, created, used and freed in the engine thread. No sampling, no requests; lengths are checked
by the caller. Formulas and enum values: llama.h of the llama.cpp that llama-cpp-python ships.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from llama_cpp import llama_cpp as api

from tars.errors import BadModelFile, DoesNotFit, InternalError, ReplicaFailed, TarsError
from tars.workers import llama_library as library
from tars.workers.engine import LoadSpec

Logits = np.ndarray[Any, np.dtype[np.float32]]

KV_TYPES = {"f16": 1, "q8_0": 8, "q4_0": 2}
"""ggml_type of ggml.h."""

LOAD_MODE_NONE, LOAD_MODE_MMAP = 0, 1
"""llama_load_mode of llama.h."""

PIECE_BYTES = 256
"""First buffer for one token's text; the longest common ones (128 spaces in Llama 3) fit."""

LOSSLESS_VOCABULARIES = (1, 2)
"""LLAMA_VOCAB_TYPE_SPM and _BPE: every byte of a text comes back from its tokens, so bytes give a lower bound of tokens."""

_OUT_OF_MEMORY = re.compile(
    r"out of memory|failed to allocate|unable to allocate|alloc.*failed|insufficient memory", re.I
)
_ARCHITECTURE = re.compile(r"unknown (?:model )?architecture: '([\w.-]{1,60})'")
_TRUNCATED = re.compile(
    r"not within the file bounds|incomplete|unexpected(ly)? (reached )?(end|eof)|file is too small|truncated", re.I
)


class Aborted(Exception):
    """The abort flag was set during a decode; the sequence's cells from the batch's first position on must be removed."""


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


class Model:
    """Weights and vocabulary."""

    def __init__(self, spec: LoadSpec, log: library.NativeLog, on_percent: Callable[[float], None]) -> None:
        """Load; `on_percent` gets 0..100, only when it grew by a whole percent. Raises `BadModelFile` or `DoesNotFit`."""
        params = api.llama_model_default_params()
        params.n_gpu_layers = spec.gpu_layers
        params.load_mode = LOAD_MODE_MMAP if spec.mmap else LOAD_MODE_NONE
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
        self.continuing_tokens = [token for token, piece in enumerate(self.pieces) if piece and 0x80 <= piece[0] < 0xC0]
        """Tokens that begin inside a character of UTF-8."""
        lossless = api.llama_vocab_type(self.vocabulary_pointer) in LOSSLESS_VOCABULARIES
        # Control tokens count with their names, which a text may spell out.
        lengths = (len(piece or self._piece(token, special=True)) for token, piece in enumerate(self.pieces))
        self._longest_piece = max(lengths, default=0) if lossless else 0

    def special_text(self, token: int) -> str:
        """A control token's text, such as `<s>`; empty for no token (-1)."""
        return self._piece(token, special=True).decode("utf-8", "replace") if 0 <= token < self.tokens else ""

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


class AbortFlag:
    """Stops a running decode from another thread.

    llama.cpp asks its abort callback between two graph nodes, without the GIL, thousands of times a token: it must be native. C's `strlen`
    on this flag is one: 0 for the empty string, 1 (true) once a byte is set. It works on CPUs; a GPU's step is short anyway.
    """

    def __init__(self) -> None:
        self._buffer = ctypes.create_string_buffer(2)
        self.callback = ctypes.cast(ctypes.CDLL(None).strlen, api.ggml_abort_callback)
        self.data = ctypes.cast(self._buffer, ctypes.c_void_p)

    def set(self) -> None:
        """Abort the running decode, or the next one."""
        self._buffer[0] = b"\x01"

    def clear(self) -> None:
        """Let decodes run."""
        self._buffer[0] = b"\x00"


class Context:
    """KV cache and compute buffers of `spec.slots` sequences of `spec.context` tokens each."""

    def __init__(self, model: Model, spec: LoadSpec, chunk: int, log: library.NativeLog) -> None:
        """Raises `DoesNotFit` where memory is short, `ReplicaFailed` where the settings contradict each other."""
        self._model = model
        self._chunk = chunk
        self.abort = AbortFlag()
        params = api.llama_context_default_params()
        params.n_ctx = spec.context * spec.slots
        params.n_batch = max(spec.batch, chunk)
        params.n_ubatch = max(min(spec.micro_batch, params.n_batch), chunk)
        params.n_seq_max = spec.slots
        params.kv_unified = False
        params.n_threads = params.n_threads_batch = spec.threads
        params.flash_attn_type = int(spec.flash_attention)
        params.type_k = params.type_v = KV_TYPES[spec.kv_type]
        params.abort_callback = self.abort.callback
        params.abort_callback_data = self.abort.data
        params.no_perf = True
        self.pointer = api.llama_init_from_model(model.pointer, params)
        if not self.pointer:
            error = load_error(log.lines)
            if isinstance(error, DoesNotFit):
                raise error
            raise ReplicaFailed(
                "llama.cpp refused the context's settings (a quantised KV cache needs flash attention, which not every model can). "
                "Deploy the model with kv_type f16. The worker's lines in the node's log say more."
            )
        self._memory = api.llama_get_memory(self.pointer)
        self._make_batch(chunk)

    def decode(self, tokens: Sequence[int], position: int, sequence: int = 0) -> Logits:
        """Compute `tokens` (at most a chunk) at `position` of `sequence`; the last one's logits, [vocabulary], valid until the next call.

        Raises `Aborted`, or `InternalError` where the cache has no room; anything worse is a `RuntimeError` that must end the worker.
        """
        count = len(tokens)
        assert 0 < count <= self._chunk
        self._tokens[:count] = tokens
        self._positions[:count] = np.arange(position, position + count, dtype=np.int32)
        self._sequences[0] = sequence
        self._wants[:count] = 0
        self._wants[count - 1] = 1
        self._batch.n_tokens = count
        status = api.llama_decode(self.pointer, self._batch)
        if status == 2:
            raise Aborted
        if status == 1:
            raise InternalError("The KV cache is full although the prompt was measured; this is a bug in TARS.")
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")
        return np.ctypeslib.as_array(library.get_logits_ith(self.pointer, count - 1), (self._model.tokens,))

    def forget(self, position: int, sequence: int = 0) -> int:
        """Drop a sequence's cells from `position` on; where the next token goes: `position`, or 0 where the model can only forget all."""
        if self._memory and library.memory_seq_rm(self._memory, sequence, position, -1):
            return position
        if self._memory:
            library.memory_seq_rm(self._memory, sequence, -1, -1)
        return 0

    def close(self) -> None:
        """Free it."""
        api.llama_free(self.pointer)

    def _make_batch(self, size: int) -> None:
        """A llama_batch over numpy memory, so that a step fills it by slices."""
        self._tokens = np.zeros(size, dtype=np.int32)
        self._positions = np.zeros(size, dtype=np.int32)
        self._counts = np.ones(size, dtype=np.int32)
        self._sequences = np.zeros(1, dtype=np.int32)
        self._sequence_pointers = np.full(size, self._sequences.ctypes.data, dtype=np.uintp)
        self._wants = np.zeros(size, dtype=np.int8)
        fields = dict(api.llama_batch._fields_)
        self._batch = api.llama_batch()
        for name, array in (
            ("token", self._tokens),
            ("pos", self._positions),
            ("n_seq_id", self._counts),
            ("seq_id", self._sequence_pointers),
            ("logits", self._wants),
        ):
            setattr(self._batch, name, array.ctypes.data_as(fields[name]))
