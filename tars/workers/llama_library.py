"""llama.cpp's shared library: quick calls that keep the GIL, its log, and the memory of its devices.

Law of this file: importing it imports `llama_cpp`, so only the engine thread of a worker does. No model is known here.

`ctypes.CDLL` hands the GIL over around every call. For calls of microseconds that hand-over costs more than the call, so those are taken
from the same library opened as `ctypes.PyDLL`; what computes for long (decode, load, grammars) stays on `CDLL`, so that the event loop
can answer pings meanwhile.
"""

from __future__ import annotations

import ctypes
import sys
from collections import deque
from pathlib import Path
from typing import Any

import llama_cpp
from llama_cpp import llama_cpp as api

LOG_LINES_KEPT = 200
"""A refused file prints about five lines of reasons after a hundred of its metadata."""

WARNING, ERROR, CONTINUED = 3, 4, 5
"""ggml_log_level of ggml.h (llama_cpp's own `_logger.py` still has the numbers of an older one)."""

CPU_DEVICE = 0
"""GGML_BACKEND_DEVICE_TYPE_CPU of ggml-backend.h; everything above computes elsewhere."""


def _same_signature(library: ctypes.PyDLL, name: str) -> Any:
    """The function `name` of `library`, typed as llama_cpp types it."""
    typed = getattr(api, name)
    function = getattr(library, name)
    function.argtypes, function.restype = typed.argtypes, typed.restype
    return function


_quick_library = ctypes.PyDLL(api._lib._name)

get_logits = _same_signature(_quick_library, "llama_get_logits")
get_logits.restype = ctypes.c_void_p  # an address: a typed pointer costs ten times as much to make and to read
memory_seq_cp = _same_signature(_quick_library, "llama_memory_seq_cp")
memory_seq_rm = _same_signature(_quick_library, "llama_memory_seq_rm")
token_to_piece = _same_signature(_quick_library, "llama_token_to_piece")
vocab_is_eog = _same_signature(_quick_library, "llama_vocab_is_eog")


class NativeLog:
    """What llama.cpp says: warnings and errors to standard error (the node's log), the last lines of every level kept."""

    def __init__(self) -> None:
        self.lines: deque[str] = deque(maxlen=LOG_LINES_KEPT)
        self._level = ERROR
        self._callback = api.llama_log_callback(self._take)

    def install(self) -> None:
        """Replace llama_cpp's own callback."""
        # For ever: the library calls it until the process ends, also for a model that was freed.
        _installed.append(self)
        api.llama_log_set(self._callback, ctypes.c_void_p(0))

    def _take(self, level: int, text: bytes, user_data: object) -> None:
        self._level = self._level if level == CONTINUED else level
        line = text.decode("utf-8", "replace").rstrip("\n")
        if level == CONTINUED and self.lines:
            self.lines[-1] += line
        else:
            self.lines.append(line)
        if self._level in (WARNING, ERROR):
            print(line, file=sys.stderr, flush=True)


_installed: list[NativeLog] = []


def free_device_memory() -> int | None:
    """Bytes free on the devices other than the CPU that this process sees, or None without one (ggml-backend.h)."""
    base = ctypes.CDLL(_sibling("ggml-base"))
    ggml = ctypes.CDLL(_sibling("ggml"))
    ggml.ggml_backend_dev_count.restype = ctypes.c_size_t
    ggml.ggml_backend_dev_get.argtypes, ggml.ggml_backend_dev_get.restype = [ctypes.c_size_t], ctypes.c_void_p
    base.ggml_backend_dev_type.argtypes = [ctypes.c_void_p]
    base.ggml_backend_dev_memory.argtypes = [ctypes.c_void_p, *[ctypes.POINTER(ctypes.c_size_t)] * 2]
    base.ggml_backend_dev_memory.restype = None
    found = None
    for index in range(ggml.ggml_backend_dev_count()):
        device = ggml.ggml_backend_dev_get(index)
        if base.ggml_backend_dev_type(device) != CPU_DEVICE:
            free, total = ctypes.c_size_t(), ctypes.c_size_t()
            base.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
            found = (found or 0) + free.value
    return found


def _sibling(name: str) -> str:
    library = Path(api._lib._name)
    return str(library.with_name(library.name.replace("llama", name, 1)))


def version() -> str:
    """llama-cpp-python's version."""
    return str(llama_cpp.__version__)
