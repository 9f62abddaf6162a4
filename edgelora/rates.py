"""Rates measured on this machine in about two seconds: matrix products by dtype, and reading memory.

`doctor` shows them; `plan` turns operations into seconds with them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

# One layer of a small model at 512 tokens: large enough for the kernels' full speed, small enough to time in bf16 without AMX.
TOKENS, INPUTS, OUTPUTS = 512, 576, 1536


def matrix_rates(seconds: float = 0.75, fp32: float | None = None) -> dict[str, float]:
    """Return GFLOP/s of matrix products in fp32 and, where torch is installed, bf16 and int8 (int32 sums).

    `fp32`: the rate of the products that training takes (models/gemm.py), where it was measured.
    """
    from importlib.util import find_spec

    if find_spec("torch") is None:
        return {"fp32": fp32 or _numpy_rate(seconds)}
    import torch

    return {
        "fp32": fp32 or _rate(_product(torch, torch.float32), seconds),
        "bf16": _rate(_product(torch, torch.bfloat16), seconds / 2),
        "int8": _rate(_int8_product(torch), seconds / 2),
    }


def fast_dtypes(rates: dict[str, float]) -> list[str]:
    """Return the dtypes that are worth computing in: fp32, and each that is at least as fast."""
    return [name for name, rate in rates.items() if rate >= rates["fp32"] * 0.95]


def read_bandwidth(cores: int, free: int, seconds: float = 0.5) -> float:
    """Return GB/s (10^9 bytes) of reading memory on `cores` cores, with a buffer far smaller than the `free` bytes."""
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np

    size = max(1 << 20, min(256 << 20, free // 8))  # far above any cache, far below the memory
    parts = np.array_split(np.ones(size // 4, np.float32), cores)
    with ThreadPoolExecutor(cores) as pool:
        # A maximum is one vector instruction per 32 bytes: memory is the limit, and numpy lets other threads run meanwhile.
        return _rate(lambda: list(pool.map(np.max, parts)), seconds, operations=size)


def _product(torch: Any, dtype: Any) -> Callable[[], Any]:
    x, w = torch.ones(TOKENS, INPUTS, dtype=dtype), torch.ones(OUTPUTS, INPUTS, dtype=dtype)
    return lambda: torch.mm(x, w.t())


def _int8_product(torch: Any) -> Callable[[], Any]:
    x, w = torch.ones(TOKENS, INPUTS, dtype=torch.int8), torch.ones(INPUTS, OUTPUTS, dtype=torch.int8)
    return lambda: torch._int_mm(x, w)  # torch's only int8 product without a quantized module around it


def _numpy_rate(seconds: float) -> float:
    import numpy as np

    x, w = np.ones((TOKENS, INPUTS), np.float32), np.ones((OUTPUTS, INPUTS), np.float32)
    return _rate(lambda: x @ w.T, seconds)


def _rate(run: Callable[[], Any], seconds: float, operations: float = 2.0 * TOKENS * INPUTS * OUTPUTS) -> float:
    """Return 10^9 operations a second of `run`."""
    return operations / fastest(run, seconds) / 1e9


def fastest(run: Callable[[], Any], seconds: float) -> float:
    """Return the seconds of one call of `run`: the best of its calls, so that other processes disturb it least."""
    run()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        started = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - started)
    return best
