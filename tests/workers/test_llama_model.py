from __future__ import annotations

import mmap
from pathlib import Path

import pytest

from tars.errors import BadModelFile, DoesNotFit
from tars.workers.engine import LoadSpec

pytestmark = pytest.mark.model  # importing the module loads llama.cpp


@pytest.mark.parametrize(
    ("line", "kind", "words"),
    [
        ("llama_model_load: error loading model: unknown model architecture: 'whale'", BadModelFile, "whale"),
        (
            "tensor 'blk.0' data is not within the file bounds, model is corrupted or incomplete",
            BadModelFile,
            "truncated",
        ),
        (
            "ggml_backend_cuda_buffer_type_alloc_buffer: allocating 4096.00 MiB on device 0: cudaMalloc failed: out of memory",
            DoesNotFit,
            "ran out",
        ),
        ("llama_model_load: error loading model: unable to allocate CUDA0 buffer", DoesNotFit, "ran out"),
        ("gguf_init_from_file: invalid magic characters in /home/me/secret.gguf", BadModelFile, "refused"),
        ("", BadModelFile, "refused"),
    ],
)
def test_llama_cpps_words_become_an_error_that_shows_no_path(line: str, kind: type[Exception], words: str) -> None:
    from tars.workers.llama_model import load_error

    error = load_error(["print_info: all was well", line])
    assert type(error) is kind
    assert words in error.message
    assert "secret" not in error.message


def test_the_least_number_of_tokens_never_exceeds_the_real_one(tiny_gguf: Path) -> None:
    from tars.workers import llama_library
    from tars.workers.llama_model import Model

    log = llama_library.NativeLog()
    log.install()
    model = Model(LoadSpec(replica="r", model="m", engine="llama", path=str(tiny_gguf)), log, lambda percent: None)
    for text in ("", "hello world", "assistant" * 50, "🙂" * 20, "\0\n\t", "<|im_start|>" * 10):
        data = text.encode()
        assert model.fewest_tokens(data) <= len(model.tokenize(data, add_special=False))
    assert model.fewest_tokens(b"x" * 2**20) > 50_000
    model.close()


def resident(path: Path) -> int:
    """KiB of a mapped file that are in this process."""
    here, found = False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            here = line.endswith(str(path))
        elif here and line.startswith("Rss:"):
            found += int(line.split()[1])
    return found


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="the kernel's accounts are Linux's")
def test_a_mapped_files_pages_leave_and_come_back(tmp_path: Path) -> None:
    from tars.workers.llama_model import forget_pages

    path = tmp_path / "weights of a model.gguf"
    path.write_bytes(bytes(range(256)) * 2**14)
    link = tmp_path / "link.gguf"
    link.symlink_to(path)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert mapped[::4096] == bytes(1024)
        assert resident(path) == 4096
        forget_pages(str(link))
        assert resident(path) == 0
        assert mapped[:] == bytes(range(256)) * 2**14
    forget_pages(str(tmp_path / "not mapped"))
