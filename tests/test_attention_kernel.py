"""The attention kernel against the same in double precision: outputs, gradients, any widths, documents, windows and threads."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from tolerances import ATTENTION_KERNEL
from torch import Tensor

from edgelora.models import attention_kernel
from edgelora.models.attention_kernel import PackedAttention, usable

pytestmark = pytest.mark.skipif(attention_kernel.library() is None, reason="no kernel for this processor")
# heads, kv heads, head_dim, tokens of the documents, window, rotated pairs
CASES = {
    "SmolLM2": (9, 3, 64, (100, 37, 1, 64, 300), 0, 32),
    "narrower than a register": (4, 2, 8, (5, 1, 17), 0, 4),
    "no whole registers, a window": (4, 2, 12, (40, 3), 5, 6),
    "half of it rotated": (4, 4, 16, (70, 25), 9, 4),
    "a window of whole blocks": (14, 2, 64, (256,), 64, 32),
    "without rotation": (2, 1, 96, (50, 24, 25, 48), 0, 0),
    "a window of one": (2, 2, 80, (33,), 1, 20),
}


def plainly(q: Tensor, k: Tensor, v: Tensor, turn: Any, starts: list[int], scale: float, window: int) -> Tensor:
    """Return softmax(scale · q kᵀ) v of each document, with q and k rotated, written out."""

    def rotate(x: Tensor) -> Tensor:
        if turn is None:
            return x
        cos, sin = (part.to(x.dtype) for part in turn)
        half = cos.shape[-1]
        left, right, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return torch.cat([left * cos - right * sin, right * cos + left * sin, rest], -1)

    outputs, groups = [], q.shape[1] // k.shape[1]
    q, k, v = rotate(q), rotate(k).repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    for start, stop in itertools.pairwise(starts):
        seen = torch.ones(stop - start, stop - start, dtype=torch.bool).tril()
        seen = seen.triu(1 - window) if window else seen
        scores = scale * torch.einsum("qhd,khd->hqk", q[start:stop], k[start:stop])
        shares = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", shares, v[start:stop]))
    return torch.cat(outputs)


def parts(case: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, tuple[Tensor, ...], tuple[Any, ...], Tensor]:
    """Return a leaf [T, W], q, k and v in it, what else the function takes, and a gradient of its output."""
    heads, kv_heads, width, lengths, window, half = CASES[case]
    generator = torch.Generator().manual_seed(len(case))
    tokens = sum(lengths)
    leaf = torch.randn(tokens, (heads + 2 * kv_heads) * width, generator=generator).to(dtype).requires_grad_()
    sizes = [heads * width, kv_heads * width, kv_heads * width]
    split = tuple(x.view(tokens, -1, width) for x in torch.split(leaf * 1, sizes, -1))
    angles = torch.randn(tokens, 1, half, generator=generator)
    turn = (angles.cos(), angles.sin()) if half else None
    given = (turn, [0, *itertools.accumulate(lengths)], width**-0.5, window)
    return leaf, split, given, torch.randn(tokens, heads, width, generator=generator).to(dtype)


def computed(case: str) -> tuple[Tensor, Tensor]:
    leaf, split, given, gradient = parts(case)
    assert usable(*split)
    out: Tensor = PackedAttention.apply(*split, *given)  # type: ignore[no-untyped-call]
    return out.detach(), torch.autograd.grad(out, leaf, gradient)[0]


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_those_of_attention_written_out(case: str) -> None:
    leaf, split, given, gradient = parts(case, torch.float64)
    wanted = plainly(*split, *given)
    wanted_gradient = torch.autograd.grad(wanted, leaf, gradient)[0]
    for found, right in zip(computed(case), (wanted.detach(), wanted_gradient), strict=True):
        assert float((found - right).abs().max() / right.abs().max()) < ATTENTION_KERNEL


def test_the_same_bits_with_any_number_of_threads() -> None:
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(computed("SmolLM2"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(other, found[0], strict=True))


def test_large_scores_and_none() -> None:
    """Scores of thousands neither overflow nor lose the largest; a first token sees itself alone."""
    q = torch.full((40, 1, 16), 60.0)
    v = torch.randn(40, 1, 16)
    out: Tensor = PackedAttention.apply(q, q * torch.linspace(0.1, 1, 40)[:, None, None], v, None, [0, 40], 1.0, 0)  # type: ignore[no-untyped-call]
    torch.testing.assert_close(out, v)
    zero: Tensor = PackedAttention.apply(q * 0, q, v, None, [0, 40], 1.0, 0)  # type: ignore[no-untyped-call]
    torch.testing.assert_close(zero, v.cumsum(0) / torch.arange(1, 41)[:, None, None])


def test_what_the_kernel_does_not_take() -> None:
    x = torch.zeros(4, 2, 8)
    assert usable(x, x)
    assert not usable(x, x.double())
    assert not usable(x.transpose(0, 1), x)
    assert not usable(x[..., :4], x)
