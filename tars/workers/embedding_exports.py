"""The transformer exported to ONNX Runtime or OpenVINO: back ends for those who have these packages installed.

Law of this file: export once from the folder, offline, into a cache folder of this machine's user, never into the model's folder; compute
with it; pooling and activation stay torch's (`LoadedModel`). What cannot be exported is `CannotBuild`, and nobody's error.

Both are exported from torch directly. The exporters behind sentence-transformers' `backend="onnx"` and `"openvino"` (optimum) hold
transformers below 5, which today's sentence-transformers does not accept: installing them takes its newer version away.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tars.workers.embedding_backends import CannotBuild, PaddedBatches, finite, rectangle
from tars.workers.embedding_model import LoadedModel
from tars.workers.embedding_tokenizer import Row

PACKAGES = {"onnx": ("onnxruntime", "onnx"), "openvino": ("openvino",)}
"""What each needs besides torch; extras of the same names in setup.cfg."""

EXPORT_FORMAT = 1
"""Grows when what is exported changes, so that older files are not taken."""


def installed(name: str) -> bool:
    """Whether the packages of `onnx` or `openvino` are there."""
    return all(importlib.util.find_spec(package) is not None for package in PACKAGES[name])


def cache_folder() -> Path:
    """Where exports are kept: the user's cache, as the XDG base directory specification says. They can be deleted at any time."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tars" / "embedding-exports"


def export_key(model: LoadedModel, name: str) -> str:
    """Changes with the weights, the configuration and the versions of what exports them."""
    digest = hashlib.sha256(f"{EXPORT_FORMAT} {name} {model.kind} {model.torch.__version__}".encode())
    for package in PACKAGES[name]:
        digest.update(str(getattr(importlib.import_module(package), "__version__", "")).encode())
    for file in sorted(Path(model.path).glob("*")):
        if file.suffix in (".json", ".safetensors"):
            stat = file.stat()
            digest.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns}".encode())
    return digest.hexdigest()[:32]


def _network(model: LoadedModel) -> tuple[Any, tuple[Any, ...], list[str]]:
    """The transformer as a module of plain tensors, an example input, and the inputs' names."""
    torch, inner = model.torch, model.network
    if inner is None:
        raise CannotBuild("this model has no transformer that could be exported")
    names = ["input_ids", "attention_mask", *(["token_type_ids"] if model.wants_type_ids else [])]
    scores = model.kind == "rerank"

    class Network(torch.nn.Module):  # type: ignore[misc,name-defined]  # torch is a value here, so that importing this file stays cheap
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *tensors: Any) -> Any:
            out = self.inner(**dict(zip(names, tensors, strict=True)))
            return out.logits if scores else out.last_hidden_state

    example = torch.ones(2, 16, dtype=torch.long)
    return Network().eval(), (example,) * len(names), names


def _exported(model: LoadedModel, name: str, file: str, export: Any) -> Path:
    """The exported file in the cache, made by `export(folder)` where it is not there yet. Half-made exports are never seen."""
    try:
        folder = cache_folder() / export_key(model, name)
        if not (folder / file).is_file():
            folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            partial = Path(tempfile.mkdtemp(prefix="partial-", dir=folder.parent))
            try:
                with warnings.catch_warnings(), model.torch.no_grad():
                    warnings.simplefilter(
                        "ignore"
                    )  # tracing warns of every shape that it fixes; the check against fp32 judges
                    export(partial)
                if not folder.exists():
                    partial.rename(folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except Exception as error:  # an exporter fails in any way there is; then this back end is not a candidate
        raise CannotBuild(f"export to {name} failed: {type(error).__name__}: {str(error)[:300]}") from error
    return folder / file


class _Exported(PaddedBatches):
    """What the two share: rectangles in, torch's pooling behind."""

    def __init__(self, model: LoadedModel, most: int, name: str) -> None:
        super().__init__(most)
        self.name = name
        self._model = model
        self._pad_id = model.pad_id
        self._wants_type_ids = model.wants_type_ids
        model.use_attention(None)

    def _run(self, inputs: list[NDArray[np.int64]]) -> NDArray[np.float32]:
        raise NotImplementedError

    def forward(self, rows: Sequence[Row]) -> NDArray[np.float32]:
        """See `Backend`."""
        torch = self._model.torch
        ids, mask, types = rectangle(rows, self._pad_id, self._most)
        out = torch.from_numpy(self._run([ids, mask, types] if self._wants_type_ids else [ids, mask]))
        with torch.inference_mode():
            if self._model.kind == "rerank":
                return finite(self._model.scores(out))
            return finite(
                self._model.vectors({"token_embeddings": out, "attention_mask": torch.from_numpy(mask)}, rows)
            )


class OnnxBackend(_Exported):
    """ONNX Runtime on the CPU, float32."""

    def __init__(self, model: LoadedModel, most: int, threads: int) -> None:
        super().__init__(model, most, "onnx")
        onnxruntime = importlib.import_module("onnxruntime")
        network, example, names = _network(model)

        def export(folder: Path) -> None:
            axes = {name: {0: "texts", 1: "tokens"} for name in names}
            axes["out"] = {0: "texts"} if model.kind == "rerank" else {0: "texts", 1: "tokens"}
            model.torch.onnx.export(
                network,
                example,
                str(folder / "model.onnx"),
                input_names=names,
                output_names=["out"],
                dynamic_axes=axes,
                # The new exporter needs one more package and minutes for large models.
                dynamo=False,
            )

        path = _exported(model, "onnx", "model.onnx", export)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = max(1, threads)
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its own error types, none of them public
            raise CannotBuild(f"ONNX Runtime refused the export: {str(error)[:300]}") from error
        self._names = names

    def _run(self, inputs: list[NDArray[np.int64]]) -> NDArray[np.float32]:
        out = self._session.run(None, dict(zip(self._names, inputs, strict=True)))[0]
        return np.asarray(out, dtype=np.float32)


class OpenVinoBackend(_Exported):
    """OpenVINO on the CPU in float32, or in bf16 where the CPU computes it natively."""

    def __init__(self, model: LoadedModel, most: int, threads: int, precision: str) -> None:
        super().__init__(model, most, "openvino" if precision == "fp32" else f"openvino-{precision}")
        openvino = importlib.import_module("openvino")
        network, example, names = _network(model)

        def export(folder: Path) -> None:
            converted = openvino.convert_model(network, example_input=example)
            # Weights as they are: the default halves them.
            openvino.save_model(converted, str(folder / "model.xml"), compress_to_fp16=False)

        path = _exported(model, "openvino", "model.xml", export)
        hint = {"INFERENCE_PRECISION_HINT": "f32" if precision == "fp32" else "bf16"}
        try:
            compiled = openvino.Core().compile_model(
                str(path), "CPU", {**hint, "INFERENCE_NUM_THREADS": max(1, threads)}
            )
        except Exception as error:  # its own error types, none of them public
            raise CannotBuild(f"OpenVINO refused the export: {str(error)[:300]}") from error
        self._compiled = compiled
        self._names = names

    def _run(self, inputs: list[NDArray[np.int64]]) -> NDArray[np.float32]:
        return np.array(self._compiled(inputs)[0], dtype=np.float32)
