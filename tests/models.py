"""Small models the tests share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Residual(nn.Module):
    """Its norm's gradient and that of the residual are added, cast and handed on."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(64, 64), nn.RMSNorm(64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        h = x + self.first(x)
        return h + self.second(self.norm(h))


class MLP(nn.Module):
    """A residual SwiGLU block: three sites, an input that two of them share."""

    def __init__(self, width: int = 64, hidden: int = 128, bias: bool = False) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.gate = nn.Linear(width, hidden, bias=bias)
        self.up = nn.Linear(width, hidden, bias=bias)
        self.down = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Attention(nn.Module):
    """Grouped-query attention with rotary embeddings."""

    def __init__(self, width: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head = heads, kv_heads, width // heads
        self.wq = nn.Linear(width, width, bias=False)
        self.wk = nn.Linear(width, kv_heads * self.head, bias=False)
        self.wv = nn.Linear(width, kv_heads * self.head, bias=False)
        self.wo = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q = self.wq(x).view(batch, tokens, self.heads, self.head).transpose(1, 2)
        k = self.wk(x).view(batch, tokens, self.kv_heads, self.head).transpose(1, 2)
        v = self.wv(x).view(batch, tokens, self.kv_heads, self.head).transpose(1, 2)
        out = F.scaled_dot_product_attention(
            rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True, enable_gqa=True
        )
        return self.wo(out.transpose(1, 2).reshape(batch, tokens, width))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


class Layer(nn.Module):
    def __init__(self, width: int, heads: int, kv_heads: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.attention = Attention(width, heads, kv_heads)
        self.mlp = MLP(width, hidden)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return self.mlp(x + self.attention(self.norm(x), cos, sin))


class Llama(nn.Module):
    """The Llama of the numerics gates: 4 layers, hidden 256, 8 heads, 4 KV heads, ff 512."""

    def __init__(
        self,
        layers: int = 4,
        width: int = 256,
        heads: int = 8,
        kv_heads: int = 4,
        hidden: int = 512,
        vocab: int = 256,
        max_tokens: int = 64,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.layers = nn.ModuleList(Layer(width, heads, kv_heads, hidden) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.lm_head = nn.Linear(width, vocab, bias=False)
        head = width // heads
        frequencies = 10000.0 ** (-torch.arange(0, head, 2) / head)
        angles = torch.outer(torch.arange(max_tokens), frequencies).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.lm_head(self.norm(x))


def sqnr_db(reference: Tensor, other: Tensor) -> float:
    """Signal to quantization noise in dB: ``10 log10(|ref|^2 / |ref - other|^2)``."""
    reference, other = reference.double(), other.double()
    return float(10 * torch.log10(reference.square().sum() / (reference - other).square().sum()))


class SharedInput(nn.Module):
    """Two sites with one input, and one behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(48, 64), nn.Linear(48, 32)
        self.out = nn.Linear(96, 48)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.cat([self.q(x), self.k(x)], -1).relu())
