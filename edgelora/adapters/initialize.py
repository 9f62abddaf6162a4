"""How the factors A `[r, K]` and B `[N, r]` of a new adapter begin: from chance, from the layer's weight W0 `[N, K]`, or from
what the layer is given (eva.py).

PiSSA and OLoRA train a part of the weight itself, s·B0 A0, and freeze the rest. Here W0 stays as it is stored, and what acts is
the same function written as a difference, which PEFT calls converting to LoRA:

    W = (W0 - s·B0 A0) + s·BA = W0 + s·[B, -B0] [A; A0]

so that an adapter ships as a plain LoRA of rank 2r, and what comes after training need not know.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from edgelora.errors import SettingsError

if TYPE_CHECKING:
    from edgelora.config import FinetuneConfig

Value = TypeVar("Value")

FROM_WEIGHT = ("pissa", "olora")  # these begin with a part of W0, which acts as its difference
OVERSAMPLING, POWERS = 8, 8  # of the block Krylov space


@dataclass(frozen=True)
class Start:
    """What an initialization may look at."""

    weight: Callable[[], Tensor]  # W0, fp32 [N, K]; not to be written to
    shape: tuple[int, int]  # N, K
    rank: int
    scale: float
    generator: torch.Generator


def kaiming(start: Start) -> tuple[Tensor, Tensor]:
    """A uniform within ±1 / sqrt(K), B zero (LoRA, arXiv 2106.09685, section 4.1, with PEFT's distribution)."""
    outputs, inputs = start.shape
    bound = 1.0 / math.sqrt(inputs)
    a = torch.empty(start.rank, inputs).uniform_(-bound, bound, generator=start.generator)
    return a, torch.zeros(outputs, start.rank)


def orthogonal(start: Start) -> tuple[Tensor, Tensor]:
    """Both factors from chance, neither zero, and BA = 0, for A = (X Q_odd)ᵀ / 10 and B = Y Q_even / 10.

    Q_odd and Q_even `[r/2, r]` are every other row of one orthogonal matrix, X `[K, r/2]` and Y `[N, r/2]` normal: PEFT's
    init_lora_weights="orthogonal" (https://datta0.github.io/posts/rethink-lora-init). The rank is even.
    """
    outputs, inputs = start.shape
    half = start.rank // 2
    q, _ = torch.linalg.qr(torch.randn(start.rank, start.rank, generator=start.generator))
    x = torch.randn(inputs, half, generator=start.generator)
    y = torch.randn(half, outputs, generator=start.generator)
    return (x @ q[0::2]).t().contiguous() / 10, y.t() @ q[1::2] / 10


def pissa(start: Start) -> tuple[Tensor, Tensor]:
    """The r largest singular values and vectors of W0 = U S Vᵀ, which the scale s divides (PiSSA, arXiv 2404.02948, eq. 2, 3):

    A0 = sqrt(S_r / s) V_rᵀ        B0 = U_r sqrt(S_r / s)
    """
    u, s, vt = principal(start.weight(), start.rank, start.generator)
    root = (s / start.scale).sqrt()
    return root.unsqueeze(1) * vt, u * root


def olora(start: Start) -> tuple[Tensor, Tensor]:
    """The first r columns and rows of W0 = QR (OLoRA, arXiv 2406.01775, section 3): B0 = Q_r, A0 = R_r = Q_rᵀ W0.

    The columns of Q depend on the columns of W0 before them alone, so that r columns of W0 are enough.
    """
    weight_NK = start.weight()
    q, _ = torch.linalg.qr(weight_NK[:, : start.rank])
    return q.t() @ weight_NK, q


# EVA begins like Kaiming; eva.py puts its A in once the layer's inputs are known.
INITIALIZATIONS: dict[str, Callable[[Start], tuple[Tensor, Tensor]]] = {
    "kaiming": kaiming, "orthogonal": orthogonal, "pissa": pissa, "olora": olora, "eva": kaiming,
}  # fmt: skip


def principal(weight_NK: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return the largest `rank` singular triplets: U `[N, r]`, S `[r]`, Vᵀ `[r, K]`.

    Where a few products with the weight span much less than it (randomized block Krylov iteration, arXiv 1504.05477,
    algorithm 2), they are taken from that span; otherwise from the whole decomposition.
    """
    width = rank + OVERSAMPLING
    if width * POWERS * 2 > min(weight_NK.shape):
        u, s, vt = torch.linalg.svd(weight_NK, full_matrices=False)
        return u[:, :rank], s[:rank], vt[:rank]
    block = torch.linalg.qr(weight_NK @ torch.randn(weight_NK.shape[1], width, generator=generator))[0]
    blocks = [block]
    for _ in range(POWERS - 1):
        block = torch.linalg.qr(weight_NK @ (weight_NK.t() @ block))[0]
        blocks.append(block)
    basis_NM = torch.linalg.qr(torch.cat(blocks, 1))[0]
    u, s, vt = torch.linalg.svd(basis_NM.t() @ weight_NK, full_matrices=False)
    return basis_NM @ u[:, :rank], s[:rank], vt[:rank]


def from_pattern(patterns: Mapping[str, Value], path: str, default: Value) -> Value:
    """Return the value of the first pattern that matches the end of the path, as PEFT's get_pattern_key does."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", path)), default)


def refuse_combinations(config: FinetuneConfig) -> None:
    """Raise SettingsError that lists every pair of settings that do not go together, and every pattern that is none."""
    problems = []
    if config.init in FROM_WEIGHT:
        why = f'init = "{config.init}" begins with a part of the weight: '
        if config.dora:
            problems.append(why + "dora has no magnitude for it")
        if config.dropout:
            problems.append(why + "dropout would act on the base model")
        if config.weight_decay:
            problems.append(why + "weight_decay would shrink the base model")
    ranks = {"rank": config.rank, **{f'rank_pattern "{key}"': rank for key, rank in (config.rank_pattern or {}).items()}}
    if config.init == "orthogonal":
        odd = [f"{name} is {rank}" for name, rank in ranks.items() if rank % 2]
        problems += [f'init = "orthogonal" needs even ranks; {found}' for found in odd]
    for name in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, name) or {}:
            try:
                re.compile(key)
            except re.error as error:
                problems.append(f'{name} "{key}" is no regular expression: {error}')
    if problems:
        raise SettingsError("\n  ".join(["settings that do not go together:", *problems]), hint="leave out one of each")
