"""Files that go with a model: its LoRA adapters and its draft model.

Law of this file: headers only, each compared with the model's own, so that a file for another model is refused by name before anything is
loaded. As in `model_files`, no message names a path.
"""

from __future__ import annotations

from pathlib import Path

from tars.core.gguf import GgufHeader
from tars.core.types import Adapter, ModelShape
from tars.errors import BadModelFile, ModelFileMissing
from tars.model_files import inspect, read_header

VOCABULARY_DIFFERS_BY = 128
"""Tokens that a draft model's vocabulary may have more or fewer: padding rows (llama.cpp, SPEC_VOCAB_MAX_SIZE_DIFFERENCE)."""


def inspect_adapter(name: str, scale: float, path: Path, model: GgufHeader) -> Adapter:
    """The adapter in the file. Raises `BadModelFile`, which names it, for a file that is missing, damaged, no LoRA adapter, or one of
    another model: of another architecture, for tensors that the model lacks, or of other sizes (llama-adapter.cpp makes the same checks).
    """
    what = f"The adapter {name}"
    header = _header(what, path)
    kind, method = header.metadata.get("general.type"), header.metadata.get("adapter.type")
    if kind != "adapter" or method != "lora":
        raise BadModelFile(
            f"{what} is no LoRA adapter (its file says general.type {str(kind)[:50]!r}, adapter.type {str(method)[:50]!r}). Name the GGUF "
            "file that llama.cpp's convert_lora_to_gguf.py made."
        )
    if header.architecture != model.architecture:
        raise BadModelFile(
            f"{what} is for another model: it changes a {header.architecture[:50] or 'nameless'} model, this one is {model.architecture}. "
            "Use the adapter that was trained on this model, or take it out of `adapters`."
        )
    wrong = _not_of(header, model)
    if wrong is not None:
        raise BadModelFile(
            f"{what} is for another model: {wrong}. Use the adapter that was trained on this model, or take it out of `adapters`."
        )
    return Adapter(name=name, scale=scale, file_bytes=header.file_bytes)


def inspect_draft(path: Path, model: GgufHeader) -> ModelShape:
    """The draft model's shape. Raises `BadModelFile` for a file that is missing, bad, or of another vocabulary than the model's."""
    what = "The draft model"
    try:
        found = inspect(path)
    except (BadModelFile, ModelFileMissing) as error:
        raise _refused(what, error) from error
    draft = found.header
    apart = abs(draft.vocabulary_size - model.vocabulary_size)
    if draft.tokenizer_model != model.tokenizer_model or apart > VOCABULARY_DIFFERS_BY:
        raise BadModelFile(
            f"{what} has another vocabulary ({draft.tokenizer_model}, {draft.vocabulary_size} tokens) than the model "
            f"({model.tokenizer_model}, {model.vocabulary_size}), so that it cannot propose tokens for it. Use a small model of the same "
            "family, or take `draft` out."
        )
    return found.shape


def _header(what: str, path: Path) -> GgufHeader:
    try:
        return read_header(path)
    except (BadModelFile, ModelFileMissing) as error:
        raise _refused(what, error) from error


def _refused(what: str, error: BadModelFile | ModelFileMissing) -> BadModelFile:
    # Always a bad file, so that the model is not planned without it.
    if isinstance(error, ModelFileMissing):
        return BadModelFile(
            f"{what}: its file is not where it was said to be on this PC. Correct the path, or put the file there."
        )
    return BadModelFile(f"{what}: {error.message}")


def _not_of(adapter: GgufHeader, model: GgufHeader) -> str | None:
    """Why the adapter's tensors do not fit the model's; None where they do. Every change is a pair, `<tensor>.lora_a` and `.lora_b`."""
    theirs = {tensor.name: tensor.dimensions for tensor in adapter.tensors}
    ours = {tensor.name: tensor.dimensions for tensor in model.tensors}
    pairs = sorted(name.removesuffix(".lora_a") for name in theirs if name.endswith(".lora_a"))
    if not pairs:
        return "it changes no tensor"
    for name in pairs:
        first, second = theirs[f"{name}.lora_a"], theirs.get(f"{name}.lora_b")
        if name not in ours:
            return f"this model has no tensor {name[:80]}"
        if second is None or len(first) != 2 or len(second) != 2 or len(ours[name]) != 2:
            return f"it does not change {name[:80]} by a pair of matrices"
        rows, columns = ours[name]
        if name == "token_embd.weight":
            # Its first matrix is stored the other way round.
            fits = (rows, columns) == (second[1], first[1])
        else:
            fits = (rows, columns) == (first[0], second[1]) and first[1] == second[0]
        if not fits:
            return f"its sizes for {name[:80]} are not those of this model"
    return None
