"""AdamW (arXiv 1711.05101) over two groups of parameters: adapters, and the head that is trained from scratch."""

from __future__ import annotations

from torch import nn
from torch.optim import AdamW

from edgelora.adapters.inject import adapters

# A head begins at random and small, and is not scaled as an adapter is: it has further to go than an adapter.
HEAD_RATE = 10.0


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return what is trained, by its name in the model, in the model's order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def make_optimizer(model: nn.Module, learning_rate: float, weight_decay: float) -> AdamW:
    """Return AdamW with the adapters first and the head after; `lr_scale` of a group multiplies the schedule's rate."""
    of_adapters = {id(p) for adapter in adapters(model).values() for p in adapter.parameters()}
    parameters = list(trainable(model).values())
    groups = [
        {
            "params": [p for p in parameters if id(p) in of_adapters],
            "weight_decay": weight_decay,
            "lr_scale": 1.0,
        },
        {
            "params": [p for p in parameters if id(p) not in of_adapters],
            "weight_decay": 0.0,
            "lr_scale": HEAD_RATE,
        },
    ]
    # Not fused: the fused update leaves a tensor's version as it was, and the adapters' rounded weights go by versions.
    return AdamW([group for group in groups if group["params"]], lr=learning_rate, foreach=True)


def set_learning_rate(optimizer: AdamW, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]
