"""What an adapter makes of one layer's weight, fp32 `[N, K]`: the merge itself, apart from files and models.

PiSSA, OLoRA and KaSA take a part P of the weight out before training, W' = (W - P) + s·BA. PEFT computes P again whenever it
loads such an adapter over the plain base, and so does `base_part` here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from edgelora.adapters.lora import Factors, combine
from edgelora.errors import FolderError

if TYPE_CHECKING:
    from edgelora.adapters.peft_format import AdapterFile


def merged_weight(adapter: AdapterFile, path: str, weight_NK: Tensor) -> Tensor:
    """Return fp32 `[N, K]`: the weight of `path` with its adapter in it, or as it is where the adapter has none.

    Raises FolderError if the adapter was made for another shape.
    """
    return with_tokens(adapter, path, with_factors(adapter, path, weight_NK))


def with_factors(adapter: AdapterFile, path: str, weight_NK: Tensor) -> Tensor:
    factors, weight_NK = adapter.factors.get(path), weight_NK.float()
    if factors is None:
        return weight_NK
    check_shape(path, factors, (weight_NK.shape[0], weight_NK.shape[1]))
    if adapter.takes_part(path):
        weight_NK = weight_NK - base_part(adapter, path, weight_NK)
    if path not in adapter.embeddings or factors.magnitude is None:
        return adapter.scales.times(path, combine(weight_NK, factors))
    # DoRA's norm is that of an output's weights: of an embedding [V, H], the columns.
    turned = Factors(factors.b.t(), factors.a.t(), factors.scale, factors.magnitude)
    return combine(weight_NK.t(), turned).t().contiguous()


def with_tokens(adapter: AdapterFile, path: str, weight_NK: Tensor) -> Tensor:
    """Return an embedding with the rows of the tokens that were trained alone."""
    if path not in adapter.tokens:
        return weight_NK
    indices, rows_TK = adapter.tokens[path]
    if int(indices.max()) >= weight_NK.shape[0] or rows_TK.shape[1] != weight_NK.shape[1]:
        raise FolderError(
            f"the adapter of {path} trains token {int(indices.max())} in rows of {rows_TK.shape[1]}; "
            f"this model's embedding is {list(weight_NK.shape)}"
        )
    return weight_NK.index_copy(0, indices, rows_TK.float())


def delta(adapter: AdapterFile, path: str, weight_NK: Tensor) -> Tensor:
    """Return what the factors add to the weight, fp32 `[N, K]`: s·BA itself where it is no more than that."""
    factors = adapter.factors.get(path)
    if factors is None:
        return torch.zeros(weight_NK.shape)
    if factors.magnitude is not None or adapter.takes_part(path) or path in adapter.scales.logs:
        return with_factors(adapter, path, weight_NK) - weight_NK.float()
    check_shape(path, factors, (weight_NK.shape[0], weight_NK.shape[1]))
    return (factors.b.float() @ factors.a.float()).mul_(factors.scale)


def base_part(adapter: AdapterFile, path: str, weight_NK: Tensor) -> Tensor:
    """Return the part P of W `[N, K]` that training took out; r is the adapter's rank.

    PiSSA (arXiv 2404.02948, eq. 2, 3): the r largest singular values, P = U_r S_r V_rᵀ, whatever the scale.
    KaSA (arXiv 2412.06071, section 3.1): the r smallest.
    OLoRA (arXiv 2406.01775, section 3), W = QR: P = s · Q_r R_r, where PEFT takes a Conv1D's weight as it is stored, `[K, N]`.
    """
    factors = adapter.factors[path]
    if adapter.start == "olora":
        stored = weight_NK.t() if adapter.transposed else weight_NK
        # The columns of Q depend on the columns of W before them alone.
        q, _ = torch.linalg.qr(stored[:, : factors.rank])
        part: Tensor = factors.scale * (q @ (q.t() @ stored))
        return part.t() if adapter.transposed else part
    wide = weight_NK.shape[0] < weight_NK.shape[1]
    matrix = weight_NK.double() if wide else weight_NK.t().double()
    # The singular vectors of the shorter side, as eigenvectors of W Wᵀ in fp64: all that a projection needs.
    _, vectors = torch.linalg.eigh(matrix @ matrix.t())
    chosen = vectors[:, -factors.rank :] if adapter.start == "pissa" else vectors[:, : factors.rank]
    part = (chosen @ (chosen.t() @ matrix)).float()
    return part if wide else part.t()


def check_shape(path: str, factors: Factors, shape: tuple[int, int]) -> None:
    found = (factors.b.shape[0], factors.a.shape[1])
    if found != shape:
        raise FolderError(f"the adapter of {path} is for a weight of shape {list(found)}; this model's is {list(shape)}")
