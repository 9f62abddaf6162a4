"""Attention over packed documents, and over a cache during generation. Tensors are `[tokens, heads, head_dim]`."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from edgelora.models import attention_kernel
from edgelora.models.attention_kernel import PackedAttention
from edgelora.models.rope import Rope

Rotation = tuple[Tensor, Tensor]  # cos and sin, [T, 1, half of the rotated channels]
LONGEST_PADDING = 1.25  # documents are computed together up to so many times their own tokens


@dataclass(frozen=True)
class Layout:
    """How packed documents are laid out for attention: runs of (documents, padded length), one after the other.

    gather: int64 `[padded]`, the packed token at each padded place; back: int64 `[T]`, the padded place of each packed token.
    Both None where nothing is padded.
    """

    runs: tuple[tuple[int, int], ...]
    gather: Tensor | None = None
    back: Tensor | None = None


def lay_out(starts: Sequence[int]) -> Layout:
    """Return the layout of documents with boundaries `[0, …, T]`: neighbours of like length form a run."""
    runs: list[list[int]] = []
    for length in (stop - start for start, stop in itertools.pairwise(starts)):
        if runs:
            together = [*runs[-1], length]
            if len(together) * max(together) <= LONGEST_PADDING * sum(together):
                runs[-1] = together
                continue
        runs.append([length])
    shape = tuple((len(run), max(run)) for run in runs)
    if sum(documents * length for documents, length in shape) == starts[-1]:
        return Layout(shape)
    gather, back, token, place = [], [], 0, 0
    for run in runs:
        for length in run:
            places = torch.arange(max(run))
            gather.append((token + places).clamp_(max=token + length - 1))
            back.append(place + places[:length])
            token, place = token + length, place + max(run)
    return Layout(shape, torch.cat(gather), torch.cat(back))


@dataclass
class Context:
    """What all blocks of one forward pass share.

    starts: document boundaries, `[0, …, T]`; positions: int64 `[T]`, restarting per document
    cache: keys and values of all layers while generating
    """

    starts: Sequence[int]
    positions: Tensor
    cache: Cache | None = None
    _rotations: dict[tuple[Rope, bool], Rotation] = field(default_factory=dict)

    @functools.cached_property
    def layout(self) -> Layout:
        return lay_out(self.starts)

    def rotation(self, rope: Rope) -> Rotation:
        """Return cos and sin at the tokens' positions, `[T, 1, half]`."""
        return self._rotation(rope, self.positions, padded=False)

    def padded_rotation(self, rope: Rope) -> Rotation:
        """Return cos and sin at every place of the layout."""
        gather = self.layout.gather
        positions = self.positions if gather is None else self.positions[gather]
        return self._rotation(rope, positions, padded=True)

    def _rotation(self, rope: Rope, positions: Tensor, *, padded: bool) -> Rotation:
        if (rope, padded) not in self._rotations:
            frequencies = torch.tensor(rope.inverse_frequencies, dtype=torch.float32)
            angles = positions.float().unsqueeze(-1) * frequencies
            cos, sin = angles.cos().mul_(rope.attention_factor), angles.sin().mul_(rope.attention_factor)
            self._rotations[rope, padded] = cos.unsqueeze(1), sin.unsqueeze(1)
        return self._rotations[rope, padded]


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
        for kept in (self.keys, self.values):  # one tensor after the other: never the whole cache twice
            for layer, tensor in enumerate(kept):
                kept[layer] = tensor[rows]
        self.lengths = self.lengths[rows]

    def part(self, first: int, stop: int) -> Cache:
        """Return the cache of some of the documents, in the same memory."""
        part = copy.copy(self)
        part.keys, part.values = ([tensor[first:stop] for tensor in kept] for kept in (self.keys, self.values))
        part.lengths = self.lengths[first:stop]
        return part


class _Rotate(torch.autograd.Function):
    """x `[T, heads, head_dim]`, gathered by `index` if there is one, and rotated in its first 2 * cos.shape[-1] channels.

    The gradient is rotated back and scattered; where a token was gathered as padding it is not in `back`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, rotation: Rotation | None, layout: Layout) -> Tensor:
        ctx.rotation, ctx.layout = rotation, layout
        if layout.gather is not None:
            x = x.index_select(0, layout.gather)
        elif rotation is None:
            return x.clone(memory_format=torch.contiguous_format)
        return x if rotation is None else rotated(x, *rotation)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        grad = grads[0]
        if ctx.rotation is not None:
            cos, sin = ctx.rotation
            grad = rotated(grad, cos, -sin)
        return (grad if ctx.layout.back is None else grad.index_select(0, ctx.layout.back)), None, None


class _Unpad(torch.autograd.Function):
    """Attention's output `[padded, W]` at the real tokens, `[T, W]`; padding gets no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, back: Tensor) -> Tensor:
        ctx.back, ctx.size = back, x.shape[0]
        return x.index_select(0, back)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].new_zeros(ctx.size, grads[0].shape[1])
        return grad.index_copy_(0, ctx.back, grads[0]), None


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x `[T, heads, head_dim]` with the pairs (i, i + half) turned; cos and sin are `[T, 1, half]`."""
    half = cos.shape[-1]
    left, right = x[..., :half], x[..., half : 2 * half]
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    torch.mul(left, cos, out=out[..., :half]).addcmul_(right, sin, value=-1)
    torch.mul(right, cos, out=out[..., half : 2 * half]).addcmul_(left, sin)
    if 2 * half < x.shape[-1]:
        out[..., 2 * half :] = x[..., 2 * half :]
    return out


@dataclass(frozen=True)
class Scores:
    """How scores come from q and k: `scale` multiplies q·k, `window` tokens are seen at most (the current one included),
    and `softcap`, unless 0, bounds them."""

    scale: float
    window: int | None
    softcap: float


def attend_packed(q: Tensor, k: Tensor, v: Tensor, rope: Rope | None, context: Context, scores: Scores) -> Tensor:
    """Causal attention inside each document; q `[T, heads, head_dim]` → `[T, heads * head_dim]`.

    Without the kernel, documents of like length are computed together, the shorter ones padded at their end: there nothing real
    looks, for what is behind a token is masked for it anyway. So no document sees another, and the padding needs no mask.
    """
    if not scores.softcap and attention_kernel.usable(q, k, v):
        turn = context.rotation(rope) if rope is not None else None
        found: Tensor = PackedAttention.apply(q, k, v, turn, context.starts, scores.scale, scores.window or 0)  # type: ignore[no-untyped-call]
        return found.flatten(1)
    layout = context.layout
    rotation = context.padded_rotation(rope) if rope is not None else None
    parts = [_Rotate.apply(x, turn, layout) for x, turn in ((q, rotation), (k, rotation), (v, None))]  # type: ignore[no-untyped-call]
    sizes = [documents * length for documents, length in layout.runs]
    outputs = []
    for (documents, length), run in zip(layout.runs, zip(*(part.split(sizes) for part in parts), strict=True), strict=True):
        q1, k1, v1 = (x.view(documents, length, x.shape[1], x.shape[2]).transpose(1, 2) for x in run)
        masked = scores.softcap or (scores.window is not None and scores.window < length)
        mask = _causal_mask(length, scores.window) if masked else None
        outputs.append(_attend(q1, k1, v1, mask, scores).transpose(1, 2).reshape(documents * length, -1))
    padded = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    if layout.back is None:
        return padded
    out: Tensor = _Unpad.apply(padded, layout.back)  # type: ignore[no-untyped-call]
    return out


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
