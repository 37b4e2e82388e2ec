"""A context of llama.cpp: its KV cache and its decodes of many sequences at once.

Law of this file: native calls and the arrays that they read; what is computed when is the engine's decision, what lies where the
`kv_cache`'s. Everything but the abort flag belongs to the engine thread. Enum values: llama.h of the llama.cpp that llama-cpp-python ships.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from llama_cpp import llama_cpp as api

from tars.errors import DoesNotFit, InternalError, ReplicaFailed
from tars.workers import llama_library as library
from tars.workers.engine import LoadSpec
from tars.workers.kv_cache import Action, Copy
from tars.workers.llama_model import Model, load_error

Rows = np.ndarray[Any, np.dtype[np.float32]]
"""Logits: [rows, vocabulary]."""

KV_TYPES = {"f16": 1, "q8_0": 8, "q4_0": 2}
"""ggml_type of ggml.h."""

STREAMS_MOST = 256
"""LLAMA_MAX_SEQ of llama.cpp's llama-cparams.h."""


class Aborted(Exception):
    """The abort flag was set during a decode: the cells of the batch's tokens must be removed."""


class NoRoom(Exception):
    """The KV cache has no place for the batch; nothing was computed and nothing changed."""


class AbortFlag:
    """Stops a running decode from another thread.

    llama.cpp asks its abort callback between two graph nodes, without the GIL, thousands of times a token: it must be native. C's `strlen`
    on this flag is one: 0 for the empty string, 1 (true) once a byte is set. It works on CPUs; a GPU's step is short anyway.
    """

    def __init__(self) -> None:
        self._buffer = ctypes.create_string_buffer(2)
        self.callback = ctypes.cast(ctypes.CDLL(None).strlen, api.ggml_abort_callback)
        self.data = ctypes.cast(self._buffer, ctypes.c_void_p)

    @property
    def is_set(self) -> bool:
        """Whether the next graph node would be the last."""
        return self._buffer[0] != b"\x00"

    def set(self) -> None:
        """Abort the running decode, or the next one."""
        self._buffer[0] = b"\x01"

    def clear(self) -> None:
        """Let decodes run."""
        self._buffer[0] = b"\x00"


def shares_cells(spec: LoadSpec) -> bool:
    """Whether the slots share one pool of cells: where there are fewer than all of them could use."""
    return spec.kv_tokens is not None and spec.kv_tokens < spec.slots * spec.context


def spare_streams(spec: LoadSpec, model: Model) -> int:
    """Sequences beyond the slots for answers that were begun elsewhere: as many as there are slots, where a sequence costs no memory.

    That is where the slots share their cells; a recurrent model has a state for each in any case.
    """
    if not shares_cells(spec) or not model.forgets_partly or spec.kv_tokens is None:
        return 0
    return max(0, min(spec.slots, STREAMS_MOST - spec.slots, spec.kv_tokens - spec.slots))


class Context:
    """KV cache and compute buffers of `spec.slots` sequences of `spec.context` tokens each, and of `spare` more.

    One stream per sequence where each has all its cells (faster on a CPU, and the only layout whose results do not depend on what else
    runs); llama.cpp's unified cache where the slots share them.
    """

    def __init__(
        self,
        model: Model,
        spec: LoadSpec,
        log: library.NativeLog,
        *,
        chunk: int,
        flash_attention: bool,
        abort: AbortFlag | None = None,
        spare: int = 0,
    ) -> None:
        """`chunk`: tokens of one decode at most; `abort`: of another context, to be stopped with it. Raises `DoesNotFit` where memory is
        short, `ReplicaFailed` for settings that contradict each other.
        """
        self._model = model
        if spec.slots > STREAMS_MOST:
            raise ReplicaFailed(
                f"llama.cpp computes at most {STREAMS_MOST} sequences at once, not {spec.slots}. Set fewer slots."
            )
        self.shared = shares_cells(spec)
        self.slots = spec.slots
        self.streams = spec.slots + spare
        self.native_seconds = 0.0
        self.decodes = 0
        self.copying = False
        """Streams are still to be copied: the next decode does that first. `set_state` writes at once and must not come before it."""
        self.abort = AbortFlag() if abort is None else abort
        size = max(chunk, self.streams)
        params = api.llama_context_default_params()
        params.n_ctx = spec.kv_tokens if self.shared else spec.context * spec.slots
        params.n_batch = max(spec.batch, size)
        params.n_ubatch = min(params.n_batch, max(spec.micro_batch, size))
        params.n_seq_max = self.streams
        params.kv_unified = self.shared
        params.n_threads = params.n_threads_batch = spec.threads
        params.flash_attn_type = int(flash_attention)
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
        self._logits_address = 0
        self._logits_rows: Rows = np.empty((0, model.tokens), dtype=np.float32)
        self._make_batch(params.n_batch)

    @property
    def most(self) -> int:
        """Tokens of one decode at most."""
        return len(self._tokens)

    def decode(
        self, tokens: Sequence[int], positions: Sequence[int], streams: Sequence[int], wanted: Sequence[int]
    ) -> Rows:
        """Compute `tokens`, each at its position of its stream; the logits of those at the batch's indices `wanted`, in that (ascending)
        order, valid until the next decode.

        In split streams llama.cpp makes one pass over the weights for each run of consecutive stream numbers: give them ascending.
        Raises `Aborted` or `NoRoom`; anything worse is a `RuntimeError` that must end the worker.
        """
        count = len(tokens)
        assert 0 < count <= self.most
        self._tokens[:count] = tokens
        self._positions[:count] = positions
        self._sequences[:count] = streams
        self._wants[:count] = 0
        if wanted:
            self._wants[list(wanted)] = 1
        self._batch.n_tokens = count
        began = time.perf_counter()
        status = api.llama_decode(self.pointer, self._batch)
        if status == 0 and wanted:
            # A GPU still computes: wait for it without the GIL, so that the quick call below does not.
            api.llama_synchronize(self.pointer)
        self.native_seconds += time.perf_counter() - began
        self.decodes += 1
        self.copying = False
        if status == 2:
            raise Aborted
        if status == 1:
            raise NoRoom
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")
        if not wanted:
            return np.empty((0, self._model.tokens), dtype=np.float32)
        return self._logits(len(wanted))

    def _logits(self, count: int) -> Rows:
        """llama.cpp's output buffer, which seldom moves: the view of it is kept, for making one takes as long as sampling a token."""
        address = library.get_logits(self.pointer)
        if address != self._logits_address or count > len(self._logits_rows):
            numbers = (ctypes.c_float * (count * self._model.tokens)).from_address(address)
            self._logits_rows = np.ctypeslib.as_array(numbers).reshape(count, self._model.tokens)
            self._logits_address = address
        return self._logits_rows[:count]

    def perform(self, actions: Sequence[Action]) -> bool:
        """Carry out the cache's decisions; False where the model cannot drop a part of a sequence (then all of that stream is gone)."""
        done = True
        for action in actions:
            if isinstance(action, Copy):
                # Between split streams llama.cpp copies whole ones only.
                end = action.length if self.shared else -1
                library.memory_seq_cp(self._memory, action.source, action.target, 0 if self.shared else -1, end)
                if not self.shared:
                    self.copying = True
                    done = self.forget(action.target, action.length) and done
            else:
                done = self.forget(action.stream, action.length) and done
        return done

    def forget(self, stream: int, position: int) -> bool:
        """Drop a stream's cells from `position` on; False where the model can only forget all, which is then done."""
        if library.memory_seq_rm(self._memory, stream, position, -1):
            return True
        library.memory_seq_rm(self._memory, stream, -1, -1)
        return False

    def state(self, stream: int) -> bytes:
        """A stream's cells as llama.cpp writes them (llama_state_seq_get_data)."""
        size = api.llama_state_seq_get_size(self.pointer, stream)
        buffer = (ctypes.c_uint8 * size)()
        written = api.llama_state_seq_get_data(self.pointer, buffer, size, stream)
        if written != size:
            raise InternalError("A sequence's state could not be read.")
        return bytes(buffer)

    def set_state(self, stream: int, data: bytes, tokens: int) -> bool:
        """Put saved cells into an empty stream; False where they do not suit this context or are not those of so many tokens (the stream is
        empty then).
        """
        try:
            buffer = (ctypes.c_uint8 * len(data)).from_buffer_copy(data)
        except MemoryError:
            return False
        taken = api.llama_state_seq_set_data(self.pointer, buffer, len(data), stream)
        # A sequence that is longer or shorter than the engine believes would end the worker at its next decode.
        if taken == len(data) and api.llama_memory_seq_pos_max(self._memory, stream) == tokens - 1:
            return True
        self.forget(stream, 0)
        return False

    def close(self) -> None:
        """Free it."""
        api.llama_free(self.pointer)

    def _make_batch(self, size: int) -> None:
        """A llama_batch over numpy memory, so that a step fills it by slices."""
        self._tokens = np.zeros(size, dtype=np.int32)
        self._positions = np.zeros(size, dtype=np.int32)
        self._counts = np.ones(size, dtype=np.int32)
        self._sequences = np.zeros(size, dtype=np.int32)
        step = self._sequences.itemsize
        self._sequence_pointers = (self._sequences.ctypes.data + np.arange(size, dtype=np.uintp) * step).astype(
            np.uintp
        )
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
