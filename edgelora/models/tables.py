"""The word embeddings and the LM head of an encoder-decoder: which modules read the same table, and one frozen table in all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edgelora.models.linear import FrozenEmbedding, FrozenWeight

WORDS = ("word_embeddings", "embed_tokens", "shared", "wte")


@dataclass(frozen=True)
class Table:
    """`path` is the module whose weight the checkpoint has; `modules` are all that read it, that one among them; `head` is the
    LM head where it is one of these."""

    path: str
    modules: tuple[str, ...]
    head: str | None = None


class ScaledEmbedding(FrozenEmbedding):
    """Rows of a table times a constant (BART's embed_scale)."""

    def __init__(self, path: str, weight: FrozenWeight, scale: float) -> None:
        super().__init__(path, weight)
        self.scale = scale

    def forward(self, ids: Tensor) -> Tensor:
        rows = super().forward(ids)
        return rows if self.scale == 1.0 else rows * self.scale


class HiddenStates(nn.Module):
    """Stands where the LM head stood: the class's "logits" are the hidden states that the head would read, `[B, T, H]`."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden


def tables(network: Any) -> list[Table]:
    """Return the tables of transformers' class, in the order of its modules; encoder and decoder may have different ones."""
    head = network.get_output_embeddings()
    found: dict[int, list[str]] = {}
    heads: dict[int, str] = {}
    for path, module in network.named_modules():
        is_words = isinstance(module, nn.Embedding) and path.rpartition(".")[2] in WORDS
        if module is head:
            heads[id(module.weight)] = path
        if is_words or module is head:
            found.setdefault(id(module.weight), []).append(path)
    return [Table(paths[0], tuple(paths), heads.get(key)) for key, paths in found.items()]


def scale_of(module: nn.Module) -> float:
    return float(getattr(module, "embed_scale", 1.0))


def replace_tables(network: nn.Module, weights: Mapping[str, FrozenWeight]) -> None:
    """Let every module of each table read `weights[table.path]`; the LM head gives its input back."""
    for table in tables(network):
        for path in table.modules:
            old = network.get_submodule(path)
            new = HiddenStates() if path == table.head else ScaledEmbedding(table.path, weights[table.path], scale_of(old))
            network.set_submodule(path, new)


def compute_positions(network: nn.Module) -> None:
    """Give position tables that no checkpoint holds (sines and cosines) their values; they are no parameters any more."""
    tables: list[Any] = [module for module in network.modules() if isinstance(module, nn.Embedding)]
    for module in tables:
        if hasattr(module, "create_weight"):
            with torch.no_grad():
                values = module.create_weight()
            del module.weight
            module.register_buffer("weight", values, persistent=False)
