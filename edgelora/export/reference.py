"""What a merged folder computes in torch, with float activations or with the int8 ones of the accuracy_level 4 kernels."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from edgelora.adapters.lora import LoRA
from edgelora.export.graph import Array
from edgelora.models.linear import FrozenLinear
from edgelora.quant.grid import QuantizedTensor, round_to_int8

if TYPE_CHECKING:
    from edgelora.models.decoder import Decoder


@contextmanager
def rounded_activations(model: nn.Module, exact: Container[str] = ()) -> Iterator[None]:
    """Let every quantized linear of `model`, but those at the paths `exact`, see its input as level 4 kernels do."""

    def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        quantized = module.quantized
        assert isinstance(quantized, QuantizedTensor)
        return (round_to_int8(inputs[0], quantized.block_size), *inputs[1:])

    def stay_apart(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Being there is enough: a layer that is listened to computes its adapter beside its weight (LoRA.in_weight_space)."""

    found = [module for module in model.modules() if isinstance(module, FrozenLinear) and module.quantized is not None]
    layers = [layer for layer in found if layer.path not in exact]
    hooks = [layer.register_forward_pre_hook(before) for layer in layers]
    hooks += [module.register_forward_pre_hook(stay_apart) for module in model.modules() if isinstance(module, LoRA)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def decoder_logits(model: Decoder, sequences: Sequence[Sequence[int]], *, int8: bool) -> list[Array]:
    """Return the logits `[len(sequence), V]` of each sequence, all computed in one pass."""
    ids = torch.tensor([token for sequence in sequences for token in sequence])
    starts = np.cumsum([0, *map(len, sequences)])
    head = model.head.weight.data
    if int8:
        with rounded_activations(model):
            hidden = model.hidden(ids, torch.from_numpy(starts))
        if isinstance(head, QuantizedTensor):
            hidden = round_to_int8(hidden, head.block_size)
    else:
        hidden = model.hidden(ids, torch.from_numpy(starts))
    return np.split(model.logits(hidden).numpy(), starts[1:-1])
