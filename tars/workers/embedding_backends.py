"""Rows of token ids in, vectors or scores out: the back ends that compute with torch.

Law of this file: one batch at a time, in the engine thread; which rows, and which back end, is decided elsewhere. Those of other run-time
libraries are in `embedding_exports`.

`TorchPadded` fills a rectangle and runs any model. `TorchPacked` lays the texts end to end, so that nothing is padding: measured on two
AVX2 cores in fp32, 100 tokens a text, CPU seconds for 50 texts: `encode` 3.5, padded 2.7 (a budget of 1,024) and 3.4 (4,096), packed 2.0,
OpenVINO 2.6, ONNX Runtime 3.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tars.errors import InternalError
from tars.workers.embedding_batches import next_batch, next_packed, padded
from tars.workers.embedding_model import LoadedModel
from tars.workers.embedding_tokenizer import Row

PACKABLE = frozenset({"bert", "roberta", "xlm-roberta", "camembert", "electra"})
"""Families whose only tie between tokens is full attention, which Hugging Face lets us replace; a check against the padded form follows."""

POSITION_OFFSET = frozenset({"roberta", "xlm-roberta", "camembert"})
"""Families that count positions from the padding id + 1."""

PACKED_ATTENTION = "tars_packed"


class Backend(Protocol):
    """See the module's law. Raises `InternalError` on NaN, and its library's own errors where memory runs out (`is_out_of_memory`)."""

    name: str

    def forward(self, rows: Sequence[Row]) -> NDArray[np.float32]:
        """[rows, dimensions] of unit length, or [rows, 1] scores."""
        ...

    def select(self, lengths: Sequence[int], budget: int) -> list[int]:
        """Which of the waiting rows go together; the first is always among them."""
        ...

    def cost(self, lengths: Sequence[int]) -> int:
        """Tokens that are computed for these rows, padding included."""
        ...


class CannotBuild(Exception):
    """This back end is not to be had for this model; the text is for the node's log."""


def finite(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """The values. Raises `InternalError` where one is not a number."""
    if not np.isfinite(values).all():
        raise InternalError(
            "The model computed something that is not a number; in half precision some devices do. Deploy it with precision fp32."
        )
    return values


def rectangle(
    rows: Sequence[Row], pad_id: int, most: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Ids, attention mask and token types [rows, width], padded on the right to a multiple of 16."""
    width = padded(max(map(len, rows)), most)
    ids = np.full((len(rows), width), pad_id, dtype=np.int64)
    mask = np.zeros((len(rows), width), dtype=np.int64)
    types = np.zeros((len(rows), width), dtype=np.int64)
    for index, row in enumerate(rows):
        length = len(row)
        ids[index, :length] = row.ids
        mask[index, :length] = 1
        types[index, :length] = row.type_ids
    return ids, mask, types


class PaddedBatches:
    """The half of `Backend` that chooses batches for a rectangle."""

    def __init__(self, most: int) -> None:
        self._most = most

    def select(self, lengths: Sequence[int], budget: int) -> list[int]:
        """See `Backend`."""
        return next_batch(lengths, budget, self._most)

    def cost(self, lengths: Sequence[int]) -> int:
        """See `Backend`."""
        return len(lengths) * padded(max(lengths), self._most)


class TorchPadded(PaddedBatches):
    """Any model, any device, any precision."""

    def __init__(self, model: LoadedModel, most: int, name: str) -> None:
        super().__init__(most)
        self.name = name
        self._model = model
        self._pad_id = model.pad_id
        self._wants_type_ids = model.wants_type_ids

    def forward(self, rows: Sequence[Row]) -> NDArray[np.float32]:
        """See `Backend`."""
        self._model.use_attention(None)
        torch, device = self._model.torch, self._model.device
        ids, mask, types = rectangle(rows, self._pad_id, self._most)
        features = {
            "input_ids": torch.from_numpy(ids).to(device),
            "attention_mask": torch.from_numpy(mask).to(device),
        }
        if self._wants_type_ids:
            features["token_type_ids"] = torch.from_numpy(types).to(device)
        with torch.inference_mode():
            return finite(self._model.run_modules(features, rows))


class TorchPacked:
    """Texts end to end in one row of tokens; attention one text at a time. Everything else of a transformer works token by token."""

    def __init__(self, model: LoadedModel, name: str) -> None:
        self.name = name
        self._model = model
        self._lengths: list[int] = []
        self._wants_type_ids = model.wants_type_ids
        if model.network is None or model.architecture not in PACKABLE or getattr(model.config, "is_decoder", False):
            raise CannotBuild(f"{model.architecture or 'this model'} cannot be computed without padding")
        pad_id = getattr(model.config, "pad_token_id", None) or 0
        self._first_position = pad_id + 1 if model.architecture in POSITION_OFFSET else 0
        self._base = model.network if model.kind == "embedding" else model.network.base_model
        try:
            from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

            self._register = ALL_ATTENTION_FUNCTIONS.register
        except (ImportError, AttributeError) as error:
            raise CannotBuild(f"this transformers has no replaceable attention ({error})") from None

    def select(self, lengths: Sequence[int], budget: int) -> list[int]:
        """See `Backend`."""
        return next_packed(lengths, budget)

    def cost(self, lengths: Sequence[int]) -> int:
        """See `Backend`."""
        return sum(lengths)

    def forward(self, rows: Sequence[Row]) -> NDArray[np.float32]:
        """See `Backend`."""
        torch = self._model.torch
        # Each time: back ends of one model are tried side by side, and the name is the process's.
        self._register(PACKED_ATTENTION, self._attention)
        self._model.use_attention(PACKED_ATTENTION)
        self._lengths = [len(row) for row in rows]
        positions = np.concatenate([np.arange(length) for length in self._lengths]) + self._first_position
        inputs = {
            "input_ids": torch.from_numpy(np.concatenate([row.ids for row in rows]))[None],
            "position_ids": torch.from_numpy(positions)[None],
        }
        if self._wants_type_ids:
            inputs["token_type_ids"] = torch.from_numpy(np.concatenate([row.type_ids for row in rows]))[None]
        with torch.inference_mode():
            hidden = self._base(**inputs, attention_mask=None).last_hidden_state[0]
            # Pooling knows rectangles only; filling one is a copy, cheap beside the model.
            states = torch.nn.utils.rnn.pad_sequence(hidden.split(self._lengths), batch_first=True)
            if self._model.kind == "rerank":
                return finite(self._model.scores(self._head(states)))
            width = torch.arange(states.shape[1])[None]
            mask = (width < torch.tensor(self._lengths)[:, None]).long()
            return finite(self._model.vectors({"token_embeddings": states, "attention_mask": mask}, rows))

    def _head(self, states: Any) -> Any:
        """A sequence classifier's logits: BERT's pools the first token before it, RoBERTa's and ELECTRA's head does so itself."""
        pooler = getattr(self._base, "pooler", None)
        return self._model.network.classifier(states if pooler is None else pooler(states))

    def _attention(
        self, module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float | None = None, **_: Any
    ) -> tuple[Any, None]:
        """Hugging Face's attention interface: [1, heads, tokens, size] in, [1, tokens, heads, size] out."""
        torch = self._model.torch
        out = torch.empty(1, query.shape[2], query.shape[1], value.shape[3], dtype=query.dtype)
        at = 0
        for length in self._lengths:
            span = slice(at, at + length)
            one = torch.nn.functional.scaled_dot_product_attention(
                query[:, :, span], key[:, :, span], value[:, :, span], scale=scaling
            )
            out[:, span] = one.transpose(1, 2)
            at += length
        return out, None
