"""What calibration rows tell about the inputs of a layer: second moments, gathered batch by batch, never the inputs."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from edgelora.quant.gptq import inverse_factor

LARGEST_HESSIAN = 9216  # inputs: 325 MB of fp32, three times over while it is inverted; wider layers keep its diagonal


@dataclass
class Moments:
    """H = XᵀX `[K, K]` of inputs X `[T, K]`; for more than LARGEST_HESSIAN inputs its diagonal `[K]` alone."""

    num_inputs: int
    sums: Tensor = field(init=False)
    tokens: int = 0

    def __post_init__(self) -> None:
        size = (self.num_inputs,) * (2 if self.whole else 1)
        self.sums = torch.zeros(size)

    @property
    def whole(self) -> bool:
        return self.num_inputs <= LARGEST_HESSIAN

    def add(self, x: Tensor) -> None:
        """Count in inputs `[…, K]`."""
        flat_TK = x.reshape(-1, self.num_inputs).float()
        self.tokens += flat_TK.shape[0]
        if self.whole:
            self.sums.addmm_(flat_TK.t(), flat_TK)
        else:
            self.sums += flat_TK.square().sum(0)

    def importance(self) -> Tensor:
        """Return the mean square of each input `[K]`, a hundredth of their mean added: one that was 0 may not stay so."""
        diagonal = (torch.diagonal(self.sums) if self.whole else self.sums) / max(self.tokens, 1)
        return diagonal + max(0.01 * diagonal.mean().item(), 1e-12)

    def factor(self) -> Tensor:
        """Return `inverse_factor` of the mean Hessian."""
        assert self.whole
        return inverse_factor(self.sums / max(self.tokens, 1))

    def output_error(self, change_NK: Tensor) -> Tensor:
        """Return the mean squared change of each output `[N]` that a change of the weight makes on the rows."""
        if self.whole:
            return ((change_NK @ (self.sums / max(self.tokens, 1))) * change_NK).sum(1).clamp_(min=0.0)
        return change_NK.square() @ (self.sums / max(self.tokens, 1))
