"""llama.cpp's library as the engine uses it, in a process of its own: importing it here would slow every other test."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.model


def run(program):
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done


def test_quick_calls_are_typed_as_llama_cpp_types_them():
    run(
        "from llama_cpp import llama_cpp as api\n"
        "from tars.workers import llama_library as library\n"
        "for name in ('memory_seq_rm', 'memory_seq_cp', 'token_to_piece', 'vocab_is_eog'):\n"
        "    quick, typed = getattr(library, name), getattr(api, 'llama_' + name)\n"
        "    assert quick.argtypes == typed.argtypes and quick.restype == typed.restype, name\n"
    )


def test_the_log_keeps_every_line_and_prints_only_warnings_and_errors():
    done = run(
        "from tars.workers.llama_library import CONTINUED, ERROR, NativeLog\n"
        "log = NativeLog()\n"
        "log._take(2, b'only information\\n', None)\n"
        "log._take(ERROR, b'it broke', None)\n"
        "log._take(CONTINUED, b' badly\\n', None)\n"
        "assert list(log.lines) == ['only information', 'it broke badly'], log.lines\n"
    )
    assert "only information" not in done.stderr
    assert "it broke" in done.stderr


def test_a_cpu_build_knows_no_device_memory_and_a_gpu_build_some():
    run(
        "import llama_cpp\n"
        "from tars.workers.llama_library import free_device_memory, version\n"
        "free = free_device_memory()\n"
        "assert (free is None) or llama_cpp.llama_supports_gpu_offload() and free > 0, free\n"
        "assert version() == llama_cpp.__version__\n"
    )
