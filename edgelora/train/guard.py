"""Truth guards: what must hold while training, or it stops with a message."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import fmean

import torch
from torch import Tensor, nn

from edgelora.adapters.inject import adapters
from edgelora.adapters.scales import scaled_layers
from edgelora.errors import DataError, SettingsError

WINDOW = 40  # steps whose mean loss the latest are compared with
LATEST = 8  # the mean of so many, for one batch of odd or mislabelled rows is no divergence
SPIKE = 3.0  # a spike is a mean this many times the window's …
SPIKE_NATS = 2.0  # … and this much above it: a loss near 0 may triple harmlessly


def broken(loss: float, grad_norm: float, recent: list[float]) -> str | None:
    """Return what is wrong with a step's mean loss and gradient norm, or None.

    Wrong is what is not finite, and a loss that has risen far above the `recent` ones, which end with the step before.
    """
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    if not math.isfinite(grad_norm):
        return f"the gradient's norm is {grad_norm}"
    if len(recent) == WINDOW:
        losses = [*recent, loss]
        before, now = fmean(losses[:-LATEST]), fmean(losses[-LATEST:])
        if now > SPIKE * before and now > before + SPIKE_NATS:
            return f"the loss rose to {now:.3f} from {before:.3f}"
    return None


def refuse_unsupervised(count: int, rows: list[int]) -> None:
    """Raise DataError when a step has nothing to learn from."""
    if count == 0:
        raise DataError(
            f"the {len(rows)} rows of a step have no supervised token", hint="edgelora data DATA shows what is trained on"
        )


def moving(model: nn.Module) -> dict[str, Tensor]:
    """Return what the first update must move: each adapter's B, and the change of each layer's scales."""
    found = {path: adapter.lora_B.detach() for path, adapter in adapters(model).items()}
    return found | {path: layer.change.detach() for path, layer in scaled_layers(model).items()}


def copies(model: nn.Module) -> dict[str, Tensor | None]:
    """Return what must move as it is, None where it is zero: what `check_moved` compares with."""
    return {path: tensor.clone() if bool(tensor.any()) else None for path, tensor in moving(model).items()}


def check_moved(model: nn.Module, before: Mapping[str, Tensor | None]) -> None:
    """After the first update everything that is trained must have moved. Raises SettingsError naming the others."""
    still = [path for path, tensor in moving(model).items() if same(tensor, before[path])]
    if still:
        listed = ", ".join(still[:8]) + (f" and {len(still) - 8} more" if len(still) > 8 else "")
        raise SettingsError(
            f"{len(still)} layers got no gradient in the first step: {listed}",
            hint="name only layers that the loss depends on: --target-modules",
        )


def same(now: Tensor, before: Tensor | None) -> bool:
    return not bool(now.any()) if before is None else torch.equal(now, before)


def gave_up(problem: str, step: int, learning_rate: float) -> SettingsError:
    """Return the error of a run that broke again after its one roll-back."""
    return SettingsError(
        f"training broke twice: at step {step + 1} {problem}, though the learning rate had been halved to {learning_rate:g}",
        hint=f"start again with --learning-rate {learning_rate / 5:g}",
    )
