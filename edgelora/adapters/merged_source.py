"""A model with its adapter merged in, as a source that `load_model` reads: every tensor fp32, computed when it is asked for."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from edgelora.adapters.adapted import Adapted, merged_config

if TYPE_CHECKING:
    from edgelora.models.source import ModelSource
    from edgelora.quant.checkpoint import MergedCheckpoint


@dataclass(frozen=True)
class MergedTensors:
    """What `ModelSource.merged` offers. Without `linears` their weights come without memory (on the meta device): they are put
    in later, layer by layer."""

    adapted: Adapted
    linears: bool

    def read_linear(self, path: str) -> Tensor:
        if not self.linears and path in self.adapted.layout.linears:
            return torch.empty(self.adapted.shape(f"{path}.weight"), device="meta")
        return merged_weight(self.adapted, path)


def merged_weight(adapted: Adapted, path: str) -> Tensor:
    """Return the weight [N, K] of a layer as it is with its adapter, fp32."""
    base, merged = adapted.weight(path)
    return (base if merged is None else merged).float()


def merged_source(adapted: Adapted, labels: list[str], *, linears: bool) -> ModelSource:
    """Return the source of the merged model; `linears` says whether its linear layers have their weights."""
    quantizable = {f"{path}.weight" for path in (*adapted.layout.embeddings, *adapted.layout.linears)}

    def read(name: str) -> Tensor:
        return merged_weight(adapted, name.removesuffix(".weight")) if name in quantizable else adapted.plain(name)

    tensors = {name: (adapted.shape(name), functools.partial(read, name)) for name in adapted.layout.names()}
    merged = cast("MergedCheckpoint", MergedTensors(adapted, linears))
    config = merged_config(adapted, labels)
    return dataclasses.replace(adapted.source, config=config, tensors=tensors, rows={}, merged=merged)
