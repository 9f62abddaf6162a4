"""Matrix products through the fastest that torch has: its BLAS (MKL, OpenBLAS, Accelerate), oneDNN, or oneDNN in bf16.

MKL has no AVX-512 path for processors that are not Intel's; oneDNN writes its kernels for what the processor has. On an AMD
EPYC with AVX-512 the one reaches 190 GFLOP/s where the other reaches 430, on most Intel machines they are equal: `choose`
measures. Processors with AVX512-BF16 or AMX do twice that with bf16 operands (800 GFLOP/s on the same machine), others are far
slower with them. The choice decides the last bits of every product, so a run records it and keeps it when it is resumed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from edgelora.rates import fastest

BLAS, ONEDNN, BF16 = "blas", "onednn", "onednn-bf16"
TOKENS, OUTPUTS, INPUTS = 256, 1536, 576  # what `choose` times: a layer of a small model
PREFERRED_BY = 1.1  # oneDNN compiles a kernel for each new number of tokens: it must win by more than that costs
BF16_PREFERRED_BY = 1.3  # rounding must be worth it, and the passes that round cost some of it

_library = BLAS


def has_onednn() -> bool:
    available = bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
    return available and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def use(library: str) -> None:
    """Compute with "blas", "onednn" or "onednn-bf16" from now on; where there is no oneDNN, with the BLAS."""
    global _library
    _library = library if library in (ONEDNN, BF16) and has_onednn() else BLAS


def library() -> str:
    return _library


@contextmanager
def exact() -> Iterator[None]:
    """Compute every product in fp32 while the block runs: what scores a model must not depend on how it is trained."""
    before = _library
    use(ONEDNN if before == BF16 else before)
    try:
        yield
    finally:
        use(before)


def choose(threads: int, compute: str | None = None, seconds: float = 0.3) -> str:
    """Return the fastest library on this machine with so many threads, by measurement.

    compute: "fp32" or "bf16" where the user says it; bf16 without oneDNN is fp32.
    """
    return preferred(rates(threads, seconds), compute) if has_onednn() else BLAS


def preferred(rates: dict[str, float], compute: str | None = None) -> str:
    """Return the library that is worth taking, of what `rates` gave."""
    exact = ONEDNN if rates.get(ONEDNN, 0.0) > PREFERRED_BY * rates[BLAS] else BLAS
    rounded = rates.get(BF16, 0.0) > BF16_PREFERRED_BY * rates[exact] if compute is None else compute == "bf16"
    return BF16 if rounded and BF16 in rates else exact


def rates(threads: int, seconds: float = 0.3) -> dict[str, float]:
    """Return GFLOP/s of each library that is there with so many threads, by name."""
    before, threads_before = _library, torch.get_num_threads()
    names = (BLAS, ONEDNN, BF16) if has_onednn() else (BLAS,)
    torch.set_num_threads(threads)
    try:
        return {name: rate(name, TOKENS, OUTPUTS, INPUTS, seconds / len(names)) for name in names}
    finally:
        torch.set_num_threads(threads_before)
        use(before)


def rate(library: str, tokens: int, outputs: int, inputs: int, seconds: float) -> float:
    """Return the best GFLOP/s of x Wᵀ and of g W, x `[tokens, inputs]`, W `[outputs, inputs]`, in about so many seconds."""
    use(library)
    x, w, g = torch.ones(tokens, inputs), torch.ones(outputs, inputs), torch.ones(tokens, outputs)
    w = w.to(weight_dtype())
    both = fastest(lambda: product(x, w), seconds / 2) + fastest(lambda: product(g, w.t()), seconds / 2)
    return 4.0 * tokens * outputs * inputs / both / 1e9


def linear(x_TK: Tensor, w_NK: Tensor) -> Tensor:
    """Return x Wᵀ, `[T, N]`, in fp32. W may be a transposed view: the gradient of x is linear(g, w.t())."""
    if _library != BLAS:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x_TK, w_NK, None, "none", [], "")
        return y
    return torch.mm(x_TK, w_NK.t())


def weight_dtype() -> torch.dtype:
    """Return the dtype in which `product` wants a weight."""
    return torch.bfloat16 if _library == BF16 else torch.float32


def product(x_TK: Tensor, w_NK: Tensor) -> Tensor:
    """Return x Wᵀ, fp32 `[T, N]`, for a frozen weight of a block; in bf16 where that was chosen.

    Then x, W and y are rounded to bf16, sums are fp32, and everything between two products stays fp32, as in mixed-precision
    training (arXiv 1710.03740, with bf16's range no loss scaling). Adapters and the loss are computed by `linear`.
    """
    if _library != BF16:
        return linear(x_TK, w_NK)
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x_TK.bfloat16(), w_NK.bfloat16(), None, "none", [], "")
    return y.float()
