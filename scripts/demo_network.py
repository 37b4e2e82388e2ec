"""The network of the demo chat model: a small llama in plain torch.

RMSNorm, rotary positions, grouped-query attention, SwiGLU, embeddings tied to the output. It knows nothing of text, training or files.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Shape:
    """Sizes of the network. Widths are multiples of 256, so that every block quantisation of llama.cpp applies."""

    vocabulary: int = 2048
    context: int = 1024
    layers: int = 3
    width: int = 256
    heads: int = 4
    kv_heads: int = 2
    hidden: int = 512
    norm_epsilon: float = 1e-5
    rope_base: float = 10_000.0

    @property
    def head_width(self) -> int:
        return self.width // self.heads


def rotate(states: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary positions on (batch, heads, length, head width), neighbouring pairs together.

    That is llama.cpp's NORM layout, the one that it uses for the llama architecture, so the query and key weights are
    exported as they are; Hugging Face's half-and-half layout would need its usual permutation.
    """
    even, odd = states[..., 0::2], states[..., 1::2]
    return torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), dim=-1).flatten(-2)


class Norm(nn.Module):
    """RMSNorm over the last dimension."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape.width))
        self.epsilon = shape.norm_epsilon

    def forward(self, states: Tensor) -> Tensor:
        return functional.rms_norm(states, (states.shape[-1],), self.weight, self.epsilon)


class Layer(nn.Module):
    """One llama layer: (batch, length, width) to the same."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        kv_width = shape.kv_heads * shape.head_width
        self.attention_norm, self.feed_forward_norm = Norm(shape), Norm(shape)
        self.query = nn.Linear(shape.width, shape.width, bias=False)
        self.key = nn.Linear(shape.width, kv_width, bias=False)
        self.value = nn.Linear(shape.width, kv_width, bias=False)
        self.output = nn.Linear(shape.width, shape.width, bias=False)
        self.gate = nn.Linear(shape.width, shape.hidden, bias=False)
        self.up = nn.Linear(shape.width, shape.hidden, bias=False)
        self.down = nn.Linear(shape.hidden, shape.width, bias=False)

    def forward(self, states: Tensor, cosine: Tensor, sine: Tensor, dropout: float) -> Tensor:
        batch, length, _ = states.shape

        def heads(projected: Tensor) -> Tensor:
            return projected.view(batch, length, -1, self.shape.head_width).transpose(1, 2)

        normed = self.attention_norm(states)
        query = rotate(heads(self.query(normed)), cosine, sine)
        key = rotate(heads(self.key(normed)), cosine, sine)
        mixed = functional.scaled_dot_product_attention(
            query, key, heads(self.value(normed)), is_causal=True, enable_gqa=True
        )
        attended = self.output(mixed.transpose(1, 2).reshape(batch, length, -1))
        states = states + functional.dropout(attended, dropout, self.training)
        normed = self.feed_forward_norm(states)
        fed = self.down(functional.silu(self.gate(normed)) * self.up(normed))
        return states + functional.dropout(fed, dropout, self.training)


class HelpDeskModel(nn.Module):
    """The whole network."""

    def __init__(self, shape: Shape, dropout: float) -> None:
        super().__init__()
        self.shape, self.dropout = shape, dropout
        self.embedding = nn.Embedding(shape.vocabulary, shape.width)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = Norm(shape)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                scale = 0.02 / (2 * shape.layers) ** 0.5 if name.endswith(("output.weight", "down.weight")) else 0.02
                nn.init.normal_(parameter, std=scale)
        frequencies = shape.rope_base ** (-torch.arange(0, shape.head_width, 2) / shape.head_width)
        angles = torch.outer(torch.arange(shape.context), frequencies)
        self.cosine, self.sine = angles.cos(), angles.sin()

    def forward(self, ids: Tensor) -> Tensor:
        """(batch, length) token ids to (batch, length, width) final states."""
        states = functional.dropout(self.embedding(ids), self.dropout, self.training)
        cosine, sine = self.cosine[: ids.shape[1]], self.sine[: ids.shape[1]]
        for layer in self.layers:
            states = layer(states, cosine, sine, self.dropout)
        return self.norm(states)

    def logits(self, states: Tensor) -> Tensor:
        return states @ self.embedding.weight.T
