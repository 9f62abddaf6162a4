"""Attention over packed documents, and over a cache during generation. Tensors are `[tokens, heads, head_dim]`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from edgelora.models.rope import Rope


@dataclass
class Context:
    """What all blocks of one forward pass share.

    starts: document boundaries, `[0, …, T]`; positions: int64 `[T]`, restarting per document
    rotations: cos and sin `[T, 1, dim / 2]` for each rotary embedding of the model; filled on first use
    cache: keys and values of all layers while generating
    """

    starts: Sequence[int]
    positions: Tensor
    rotations: dict[Rope, tuple[Tensor, Tensor]] = field(default_factory=dict)
    cache: Cache | None = None

    def rotation(self, rope: Rope) -> tuple[Tensor, Tensor]:
        if rope not in self.rotations:
            frequencies = torch.tensor(rope.inverse_frequencies, dtype=torch.float32)
            angles = self.positions.float().unsqueeze(-1) * frequencies
            cos, sin = angles.cos().mul_(rope.attention_factor), angles.sin().mul_(rope.attention_factor)
            self.rotations[rope] = cos.unsqueeze(1), sin.unsqueeze(1)
        return self.rotations[rope]


class Cache:
    """Keys and values of B documents, `[B, kv_heads, capacity, head_dim]` per layer; `lengths` are the filled positions."""

    def __init__(self, num_layers: int, documents: int, kv_heads: int, capacity: int, head_dim: int) -> None:
        shape = (documents, kv_heads, capacity, head_dim)
        self.keys = [torch.zeros(shape) for _ in range(num_layers)]
        self.values = [torch.zeros(shape) for _ in range(num_layers)]
        self.lengths = torch.zeros(documents, dtype=torch.int64)

    @property
    def started(self) -> bool:
        """Whether the prompts are in: from then on one token of each document comes at a time."""
        return bool(self.lengths.any())

    def fill(self, layer: int, starts: Sequence[int], keys: Tensor, values: Tensor) -> None:
        """Store the keys and values `[T, kv_heads, head_dim]` of whole documents."""
        for row, (start, stop) in enumerate(itertools.pairwise(starts)):
            self.keys[layer][row, :, : stop - start] = keys[start:stop].transpose(0, 1)
            self.values[layer][row, :, : stop - start] = values[start:stop].transpose(0, 1)

    def append(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Store one new position `[B, kv_heads, head_dim]` of each document behind its filled ones."""
        rows = torch.arange(len(self.lengths))
        self.keys[layer][rows, :, self.lengths] = keys
        self.values[layer][rows, :, self.lengths] = values

    def keep(self, rows: Tensor) -> None:
        """Forget all documents but `rows`."""
        self.keys = [keys[rows] for keys in self.keys]
        self.values = [values[rows] for values in self.values]
        self.lengths = self.lengths[rows]


class _Rotate(torch.autograd.Function):
    """x `[T, heads, head_dim]` rotated in its first 2 * cos.shape[-1] channels; the gradient is rotated back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grads[0], cos, -sin), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    left, right = x[..., :half], x[..., half : 2 * half]
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    torch.mul(left, cos, out=out[..., :half]).addcmul_(right, sin, value=-1)
    torch.mul(right, cos, out=out[..., half : 2 * half]).addcmul_(left, sin)
    out[..., 2 * half :] = x[..., 2 * half :]
    return out


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    out: Tensor = _Rotate.apply(x, *rotation)  # type: ignore[no-untyped-call]
    return out


@dataclass(frozen=True)
class Scores:
    """How scores come from q and k: `scale` multiplies q·k, `window` tokens are seen at most (the current one included),
    and `softcap`, unless 0, bounds them."""

    scale: float
    window: int | None
    softcap: float


def attend_packed(q: Tensor, k: Tensor, v: Tensor, starts: Sequence[int], scores: Scores) -> Tensor:
    """Causal attention inside each document; returns `[T, heads, head_dim]`."""
    parts = []
    for start, stop in itertools.pairwise(starts):
        q1, k1, v1 = (x[start:stop].transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        masked = scores.softcap or (scores.window is not None and scores.window < stop - start)
        mask = _causal_mask(stop - start, scores.window) if masked else None
        parts.append(_attend(q1, k1, v1, mask, scores).squeeze(0).transpose(0, 1))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def attend_cached(q: Tensor, cache: Cache, layer: int, scores: Scores) -> Tensor:
    """Attention of one new token per document, `[B, heads, head_dim]`, to its cached positions and itself."""
    longest = int(cache.lengths.max()) + 1
    keys, values = cache.keys[layer][:, :, :longest], cache.values[layer][:, :, :longest]
    position, last = torch.arange(longest), cache.lengths.unsqueeze(-1)
    seen = position <= last
    if scores.window is not None:
        seen &= position > last - scores.window
    return _attend(q.unsqueeze(2), keys, values, seen[:, None, None], scores).squeeze(2)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scores: Scores) -> Tensor:
    """Attention `[B, heads, S, head_dim]` over what `mask` lets through; without a mask: causal."""
    if not scores.softcap:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scores.scale, enable_gqa=True
        )
    # Scores capped as softcap * tanh(scores / softcap) (Gemma 2), which no fused kernel has.
    assert mask is not None
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    capped = torch.tanh((q * (scores.scale / scores.softcap)) @ k.transpose(-1, -2)) * scores.softcap
    return capped.masked_fill(~mask, float("-inf")).softmax(-1) @ v


def _causal_mask(length: int, window: int | None) -> Tensor:
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    return mask if window is None else mask.triu(1 - window)
