"""attention.c, called through ctypes: causal attention inside packed documents, with its gradients, on torch's own threads."""

from __future__ import annotations

import ctypes
import importlib.util
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MODULE = "edgelora.native.attention"  # where the package's build puts the library
SWITCH = "EDGELORA_NATIVE"  # 0: torch's
Given = tuple[tuple[Tensor, Tensor] | None, Sequence[int], float, int]  # cos and sin [T, 1, pairs], starts, scale, window


class Job(ctypes.Structure):
    """attention.c's Job, field for field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v")),
        *((name, ctypes.c_int64) for name in ("q_row", "k_row", "v_row")),
        *((name, ctypes.c_void_p) for name in ("cos", "sin", "starts")),
        *((name, ctypes.c_int64) for name in ("documents", "heads", "kv_heads", "dim", "half", "window")),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("out", "lse", "d_out", "dq", "dk", "dv", "scratch")),
        *((name, ctypes.c_int64) for name in ("floats", "entered", "next")),
    ]


@cache
def library() -> tuple[ctypes.CDLL, Any] | None:
    """Return the library and torch's own GOMP_parallel (of GCC's OpenMP runtime), None where one of them is not there.

    Threads of our own would share the processors with torch's, which wait for work by looking for it.
    """
    found = importlib.util.find_spec(MODULE)
    runtime = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    if os.environ.get(SWITCH) == "0" or found is None or found.origin is None or not runtime:
        return None
    try:
        loaded, parallel = ctypes.CDLL(found.origin), ctypes.CDLL(str(runtime[0])).GOMP_parallel
        if not loaded.edgelora_attention_supported():
            return None
    except (OSError, AttributeError):  # of another system, or compiled for another processor
        return None
    loaded.edgelora_attention_floats.restype = ctypes.c_int64
    loaded.edgelora_attention_floats.argtypes = [ctypes.c_int64, ctypes.c_int64, ctypes.c_int]
    parallel.restype, parallel.argtypes = None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    return loaded, parallel


def usable(*tensors: Tensor) -> bool:
    """Return whether the kernel takes these q, k and v `[tokens, heads, head_dim]`: fp32, each token's row contiguous."""
    return library() is not None and all(
        x.dtype == torch.float32 and x.stride(2) == 1 and x.stride(1) == x.shape[2] for x in tensors
    )


class PackedAttention(torch.autograd.Function):
    """Causal attention inside documents: q `[T, heads, head_dim]`, k and v `[T, kv_heads, head_dim]` → `[T, heads, head_dim]`.

    Equal to softmax(scale · rotated(q) · rotated(k)ᵀ) · v; `window` tokens are seen at most, the current one included (0: all).
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, rotation: Any, starts: Sequence[int], scale: float, window: int
    ) -> Tensor:
        out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:2])
        whole, ctx.places = joined((q, k, v))
        ctx.save_for_backward(*whole, out, lse)
        ctx.given = rotation, starts, scale, window
        compute((q, k, v, out, lse), ctx.given)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *whole, out, lse = ctx.saved_tensors
        if ctx.places is not None:
            start = whole[0].storage_offset()
            whole = [whole[0].as_strided(shape, stride, start + offset) for shape, stride, offset in ctx.places]
        q, k, v = whole
        gradients = [q.new_empty(q.shape) for _ in range(3)]
        compute((q, k, v, out, lse), ctx.given, (grads[0].contiguous(), *gradients))
        groups = (k.shape[0], k.shape[1], -1, k.shape[2])
        dk, dv = (gradient if q.shape == k.shape else gradient.view(groups).sum(2) for gradient in gradients[1:])
        return gradients[0], dk, dv, None, None, None, None


def joined(tensors: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], list[Any] | None]:
    """Return the one tensor that all are parts of, and where they lie in it; themselves and None where there is none.

    A part alone has gaps, and could not be kept in bf16 (models/recompute.py).
    """
    base = tensors[0]._base
    if base is None or not base.is_contiguous() or any(x._base is not base for x in tensors):
        return tensors, None
    return (base.detach(),), [(x.shape, x.stride(), x.storage_offset() - base.storage_offset()) for x in tensors]


def compute(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor], given: Given, back: tuple[Tensor, ...] | None = None
) -> None:
    """Write out and lse, the last two of `tensors`; with `back`, out's gradient and places for those of q, k and v, these."""
    q, k, v, out, lse = tensors
    rotation, starts, scale, window = given
    found = library()
    assert found is not None
    loaded, parallel = found
    bounds = torch.tensor(starts)
    threads, longest = torch.get_num_threads(), int(bounds.diff().max())
    floats = loaded.edgelora_attention_floats(longest, q.shape[2], back is not None)
    scratch = q.new_empty(threads * floats)
    cos, sin = rotation or (None, None)
    job = Job(
        q=q.data_ptr(), k=k.data_ptr(), v=v.data_ptr(), q_row=q.stride(0), k_row=k.stride(0), v_row=v.stride(0),
        cos=None if cos is None else cos.data_ptr(), sin=None if sin is None else sin.data_ptr(), starts=bounds.data_ptr(),
        documents=len(starts) - 1, heads=q.shape[1], kv_heads=k.shape[1], dim=q.shape[2],
        half=0 if cos is None else cos.shape[-1], window=window, scale=scale,
        out=out.data_ptr(), lse=lse.data_ptr(), scratch=scratch.data_ptr(), floats=floats,
    )  # fmt: skip
    if back is not None:
        job.d_out, job.dq, job.dk, job.dv = (tensor.data_ptr() for tensor in back)
    parallel(ctypes.cast(loaded.edgelora_attention, ctypes.c_void_p), ctypes.addressof(job), threads, 0)
