"""A model folder in memory: a sentence-transformers model or a cross-encoder, as the parts that the back ends compute with.

Law of this file: torch and sentence_transformers are imported when a folder is loaded, and used for nothing but loading and for what
follows the transformer (pooling, dense layers, activation). Batching, calls and the choice of a back end are elsewhere.

No hub and no pickle: the folder is on this machine, weights are safetensors, remote code is refused.
"""

from __future__ import annotations

import gc
import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tars.errors import BadModelFile, DoesNotFit, ReplicaFailed
from tars.workers.embedding_tokenizer import Row, TextTokenizer

Kind = Literal["embedding", "rerank"]

MAX_TOKENS_ASSUMED = 512
"""For a model that does not say: BERT's position table."""

NO_LIMIT = 10**6
"""Tokenizers that know no limit say 10^30."""

POSITIONS_TAKEN: Mapping[str, int] = {"roberta": 2, "xlm-roberta": 2, "camembert": 2, "mpnet": 2}
"""Families whose position table starts behind the padding id: so many of its rows are not for tokens."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a back end's exception means that a smaller batch may work."""
    if isinstance(error, MemoryError) or type(error).__name__ in ("OutOfMemoryError", "AcceleratorError"):
        return type(error).__name__ != "AcceleratorError" or "out of memory" in str(error)
    text = str(error).lower()
    marks = ("can't allocate memory", "out of memory", "bad allocation", "bad_alloc", "failed to allocate")
    return isinstance(error, RuntimeError) and any(mark in text for mark in marks)


def kind_of(folder: Path) -> Kind:
    """What the folder holds. Raises `BadModelFile` where it is neither."""
    config = _json(folder / "config.json")
    if config is None and not (folder / "modules.json").is_file():
        raise BadModelFile(
            "The folder is not a sentence-transformers model: it needs config.json and modules.json (a cross-encoder: config.json). "
            "Download the whole repository of the model."
        )
    said = (_json(folder / "config_sentence_transformers.json") or {}).get("model_type")
    architecture = str(next(iter((config or {}).get("architectures") or []), ""))
    if said == "CrossEncoder" or (said is None and architecture.endswith("ForSequenceClassification")):
        return "rerank"
    if not (folder / "modules.json").is_file():
        raise BadModelFile(
            "The folder is neither a sentence-transformers model (it has no modules.json) nor a cross-encoder (its architecture is "
            f"{architecture or 'not named'}, not one ForSequenceClassification). Download the whole repository of the model."
        )
    return "embedding"


def _json(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        raise BadModelFile(f"The model's {path.name} cannot be read: it is damaged. Download it again.") from None
    return found if isinstance(found, dict) else {}


class LoadedModel:
    """`kind`, the transformer (`network`, a Hugging Face module, or None where the model is no such thing) and what follows it."""

    def __init__(self, path: str, kind: Kind) -> None:
        self.path = path
        self.kind = kind
        self.torch = importlib.import_module("torch")
        self.device = "cpu"
        self.network: Any = None
        self._whole: Any = None
        self._behind: list[Any] = []
        self._activation: Any = None
        self.load()

    def load(self) -> None:
        """Read the weights as float32 onto the CPU. Raises `BadModelFile` or `DoesNotFit`."""
        transformers = importlib.import_module("sentence_transformers")
        torch = self.torch
        kwargs: dict[str, Any] = {"device": "cpu", "local_files_only": True, "trust_remote_code": False}
        kwargs["model_kwargs"] = {"use_safetensors": True}
        try:
            make = transformers.SentenceTransformer if self.kind == "embedding" else transformers.CrossEncoder
            # Weights that are stored in half precision are computed in float32 unless the plan says otherwise.
            self._whole = make(self.path, **kwargs).eval().float()
            self._read_facts()
        except torch.OutOfMemoryError:
            raise DoesNotFit(
                "The device ran out of memory while the model was loaded. Free some, or use another."
            ) from None
        except MemoryError:
            raise DoesNotFit("The machine ran out of memory while the model was loaded.") from None
        except Exception as error:  # noqa: BLE001  # a damaged folder fails in as many ways as there are file formats in it
            # The text goes to the node's log, which the operator reads; the caller gets the meaning.
            print(f"embedding model refused: {type(error).__name__}: {error}", flush=True)
            raise BadModelFile(
                "sentence-transformers refused the model folder: a file in it is missing or damaged (weights must be safetensors). "
                "The worker's lines in the node's log say which. Download it again."
            ) from None
        if self.kind == "rerank" and self.labels != 1:
            raise BadModelFile(
                f"The cross-encoder gives {self.labels} numbers for a pair, not one relevance: it is a classifier, not a reranker."
            )

    def _read_facts(self) -> None:
        whole = self._whole
        if self.kind == "embedding":
            self._behind = list(whole)[1:]
            self.network = getattr(whole[0], "auto_model", None) or getattr(whole[0], "model", None)
        else:
            self.network = whole.model
            self._activation = getattr(whole, "activation_fn", None) or whole.default_activation_function
        config = getattr(self.network, "config", None)
        self.architecture = str(getattr(config, "model_type", "") or "")
        """`bert`, `xlm-roberta`..."""
        self.labels = int(getattr(config, "num_labels", 1))
        """Numbers that a cross-encoder gives for a pair."""
        self.prompts: dict[str, str | None] = dict(getattr(whole, "prompts", None) or {})
        """Name -> prefix."""
        self.default_prompt: str | None = getattr(whole, "default_prompt_name", None)
        """The name of the prefix that is used when nobody names one."""
        self._tokenizer = whole.tokenizer
        self.pad_id = int(self._tokenizer.pad_token_id or 0)
        """What fills a row up."""
        self.wants_type_ids = "token_type_ids" in self._tokenizer.model_input_names
        said = getattr(whole, "max_seq_length", None) or self._tokenizer.model_max_length
        table = getattr(config, "max_position_embeddings", None)
        positions = int(table) - POSITIONS_TAKEN.get(self.architecture, 0) if table else 0
        limits = [int(limit) for limit in (said, positions) if limit and 0 < limit < NO_LIMIT]
        self.most = min(limits) if limits else MAX_TOKENS_ASSUMED
        """Tokens of one row, special ones included."""
        self._attention = getattr(config, "_attn_implementation", None)

    def to(self, device: str, precision: str) -> None:
        """Move everything to the device; only the transformer takes half precision: pooling sums hundreds of tokens and keeps float32."""
        self.device = device
        self._whole.to(device)
        if precision != "fp32":
            half = self.torch.bfloat16 if precision == "bf16" else self.torch.float16
            (self.network if self.network is not None else self._whole[0]).to(half)

    def use_attention(self, name: str | None) -> None:
        """Make the transformer call the attention function registered under that name; None is the one it was loaded with."""
        if self.config is not None:
            # The one handle that old and new transformers share; every layer holds this very configuration.
            self.config._attn_implementation = name or self._attention

    def drop_network(self) -> None:
        """Free the transformer's weights: another back end computes with its own."""
        self.network = self._whole = None
        gc.collect()

    @property
    def config(self) -> Any:
        """The transformer's configuration, or None."""
        return getattr(self.network, "config", None)

    def tokenizer(self) -> TextTokenizer:
        """The fast tokenizer with the model's limit. Raises `BadModelFile` where there is none."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise BadModelFile(
                "The model has no tokenizer.json; TARS needs the fast tokenizer. Convert it with transformers."
            )
        skip = self.kind == "embedding" and any(
            getattr(module, "include_prompt", True) is False for module in self._behind
        )
        return TextTokenizer(backend, self.most, self.pad_id, skip_prompt=skip)

    # --- what follows the transformer ---

    def run_modules(self, features: dict[str, Any], rows: Sequence[Row]) -> NDArray[np.float32]:
        """The whole model on padded features: all modules of a sentence-transformers model, or the cross-encoder."""
        if self.kind == "rerank":
            return self.scores(self.network(**features).logits)
        features = self._whole[0](features)
        return self.vectors(features, rows)

    def vectors(self, features: dict[str, Any], rows: Sequence[Row]) -> NDArray[np.float32]:
        """Everything behind the transformer, on its `token_embeddings` [texts, width, hidden] and `attention_mask`: unit vectors."""
        torch = self.torch
        if "token_embeddings" in features:
            features["token_embeddings"] = features["token_embeddings"].float()
        if any(row.skip for row in rows):
            mask = features["attention_mask"].clone()
            for index, row in enumerate(rows):
                mask[index, : row.skip] = 0
            features["attention_mask"] = mask
        for module in self._behind:
            features = module(features)
        vectors = torch.nn.functional.normalize(features["sentence_embedding"].float(), dim=1)
        return np.asarray(vectors.cpu().numpy(), dtype=np.float32)

    def scores(self, logits: Any) -> NDArray[np.float32]:
        """A cross-encoder's logits [pairs, 1] through its own activation (sigmoid where the model names none)."""
        return np.asarray(self._activation(logits.float()).reshape(-1, 1).cpu().numpy(), dtype=np.float32)


def import_engine() -> None:
    """Bring torch and sentence-transformers in. Raises `ReplicaFailed` where they are not installed."""
    try:
        importlib.import_module("torch")
        importlib.import_module("sentence_transformers")
    except ImportError:
        raise ReplicaFailed(
            "sentence-transformers or torch is not installed, so embedding models cannot run. "
            "Install them with `pip install 'tars-node[embeddings]'` and restart the node."
        ) from None
