"""Matrix products in fp32 through the faster of torch's two libraries: its BLAS (MKL, OpenBLAS, Accelerate) or oneDNN.

MKL has no AVX-512 path for processors that are not Intel's; oneDNN writes its kernels for what the processor has. On an AMD
EPYC with AVX-512 the one reaches 190 GFLOP/s where the other reaches 430, on most Intel machines they are equal: `choose`
measures. The choice decides the last bits of every product, so a run records it and keeps it when it is resumed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edgelora.rates import fastest

BLAS, ONEDNN = "blas", "onednn"
TOKENS, OUTPUTS, INPUTS = 256, 1536, 576  # what `choose` times: a layer of a small model
PREFERRED_BY = 1.1  # oneDNN compiles a kernel for each new number of tokens: it must win by more than that costs

_library = BLAS


def has_onednn() -> bool:
    available = bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
    return available and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def use(library: str) -> None:
    """Compute with "blas" or "onednn" from now on; where there is no oneDNN, with the BLAS."""
    global _library
    _library = ONEDNN if library == ONEDNN and has_onednn() else BLAS


def library() -> str:
    return _library


def choose(threads: int, seconds: float = 0.3) -> str:
    """Return the faster library on this machine with so many threads, by measurement."""
    if not has_onednn():
        return BLAS
    before, threads_before = _library, torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        rates = {name: rate(name, TOKENS, OUTPUTS, INPUTS, seconds / 2) for name in (BLAS, ONEDNN)}
    finally:
        torch.set_num_threads(threads_before)
        use(before)
    return ONEDNN if rates[ONEDNN] > PREFERRED_BY * rates[BLAS] else BLAS


def rate(library: str, tokens: int, outputs: int, inputs: int, seconds: float) -> float:
    """Return the best GFLOP/s of x Wᵀ and of g W, x `[tokens, inputs]`, W `[outputs, inputs]`, in about so many seconds."""
    use(library)
    x, w, g = torch.ones(tokens, inputs), torch.ones(outputs, inputs), torch.ones(tokens, outputs)
    both = fastest(lambda: linear(x, w), seconds / 2) + fastest(lambda: linear(g, w.t()), seconds / 2)
    return 4.0 * tokens * outputs * inputs / both / 1e9


def linear(x_TK: Tensor, w_NK: Tensor) -> Tensor:
    """Return x Wᵀ, `[T, N]`. W may be a transposed view: the gradient of x is linear(g, w.t())."""
    if _library == ONEDNN:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x_TK, w_NK, None, "none", [], "")
        return y
    return torch.mm(x_TK, w_NK.t())
