"""AdamW (arXiv 1711.05101, algorithm 2) with moments in 32 or 8 bits, and what it trains at which rate.

Our own, for torch's loads its compiler (torch._dynamo, 70 MB) with the first optimizer that is made.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from edgelora.adapters.inject import adapters
from edgelora.adapters.scales import RATE, scaled_layers
from edgelora.train.adamw8 import BLOCK, CHUNK, LEAST, decode, encode

# A head begins at random and small, and is not scaled as an adapter is: it has further to go than an adapter.
HEAD_RATE = 10.0
# Logarithms of block scales beside an adapter, at 1e-3 for it: 0.005 of a scale in a step. SmolLM2, 300 steps on E2E rows from
# a calibrated start, held-out loss above the fp32 adapter's: 1.6% without learned scales and at 0.2, 0.5% at 5.
SCALE_RATE = 5.0


class AdamW:
    """For a gradient g at step t, each weight w of a group with learning rate η and weight decay λ:

        m = β1 m + (1 - β1) g        v = β2 v + (1 - β2) g²
        w = (1 - η λ) w - η · m / (1 - β1ᵗ) / (sqrt(v / (1 - β2ᵗ)) + ε)

    `state[parameter]` holds tensors alone: `step`, and `exp_avg` m and `exp_avg_sq` v, in fp32 or, with `bits` 8 and from 4096
    weights on, as codes with `…_scale` beside them (adamw8.py).
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        learning_rate: float,
        *,
        bits: int = 32,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        self.param_groups = [{"lr": learning_rate, "weight_decay": 0.0, "lr_scale": 1.0, **group} for group in groups]
        self.state: dict[Tensor, dict[str, Tensor]] = {}
        self.bits, self.betas, self.eps = bits, betas, eps
        self._space = torch.empty(0)  # for moments in fp32 that are not there yet

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter that has a gradient. The gradients are zero afterwards: their memory is the work space."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group["lr"], group["weight_decay"])
                    parameter.grad.zero_()

    @torch.no_grad()
    def zero_grad(self) -> None:
        """Set all gradients to zero, in one piece of memory that stays.

        Made anew in every backward pass they would lie between its temporaries, and hold the heap open there.
        """
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        if any(parameter.grad is None for parameter in parameters):
            whole = torch.zeros(sum(parameter.numel() for parameter in parameters))
            for parameter, part in zip(parameters, torch.split(whole, [p.numel() for p in parameters]), strict=True):
                parameter.grad = part.view_as(parameter)
            return
        for parameter in parameters:
            assert parameter.grad is not None
            parameter.grad.zero_()

    def _update(self, parameter: nn.Parameter, grad: Tensor, rate: float, decay: float) -> None:
        if parameter not in self.state:
            self.state[parameter] = self._begin(parameter)
        state = self.state[parameter]
        state["step"] += 1
        step = float(state["step"])
        if decay:
            parameter.mul_(1 - rate * decay)
        if "exp_avg_scale" not in state:
            self._advance(state["exp_avg"], state["exp_avg_sq"], grad)
            self._move(parameter, state["exp_avg"], state["exp_avg_sq"], grad, rate, step)
            return
        weights, grads = parameter.view(-1), grad.reshape(-1)
        for start in range(0, weights.numel(), CHUNK):
            part, blocks = slice(start, start + CHUNK), slice(start // BLOCK, (start + CHUNK) // BLOCK)
            m, v = (
                decode(state[name][part], state[f"{name}_scale"][blocks], signed=signed) for name, signed in MOMENTS.items()
            )
            self._advance(m, v, grads[part])
            for (name, signed), moment in zip(MOMENTS.items(), (m, v), strict=True):
                state[name][part], state[f"{name}_scale"][blocks] = encode(moment, signed=signed)
            self._move(weights[part], m, v, grads[part], rate, step)

    def _begin(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        state = {"step": torch.tensor(0.0)}
        for name in MOMENTS:
            if self.bits == 8 and parameter.numel() >= LEAST:
                state[name] = torch.zeros(parameter.numel(), dtype=torch.uint8)
                state[f"{name}_scale"] = torch.zeros(math.ceil(parameter.numel() / BLOCK))
            else:
                state[name] = self._zeros(parameter)
        return state

    def _zeros(self, parameter: nn.Parameter) -> Tensor:
        """Return zeros of a parameter's shape: a part of one piece of memory, as gradients are."""
        if self._space.numel() < parameter.numel():
            new = [p for group in self.param_groups for p in group["params"] if p not in self.state]
            self._space = torch.zeros(len(MOMENTS) * sum(p.numel() for p in new if self.bits != 8 or p.numel() < LEAST))
        part, self._space = self._space[: parameter.numel()], self._space[parameter.numel() :]
        return part.view_as(parameter)

    def _advance(self, m: Tensor, v: Tensor, grad: Tensor) -> None:
        m.lerp_(grad, 1 - self.betas[0])
        v.mul_(self.betas[1]).addcmul_(grad, grad, value=1 - self.betas[1])

    def _move(self, weights: Tensor, m: Tensor, v: Tensor, space: Tensor, rate: float, step: float) -> None:
        """Move the weights; `space`, of their shape, is overwritten."""
        torch.sqrt(v, out=space).div_(math.sqrt(1 - self.betas[1] ** step)).add_(self.eps)
        weights.addcdiv_(m, space, value=-rate / (1 - self.betas[0] ** step))


MOMENTS = {"exp_avg": True, "exp_avg_sq": False}  # name → whether it has a sign


def state_bytes(num_weights: int, bits: int) -> int:
    """Return the bytes of both moments of one tensor."""
    if bits == 8 and num_weights >= LEAST:
        return 2 * (num_weights + 4 * math.ceil(num_weights / BLOCK))
    return 8 * num_weights


def state_tensors(optimizer: AdamW, parameter: Tensor) -> dict[str, Tensor]:
    """Return what the optimizer holds of a parameter, by name; nothing before its first update."""
    return dict(optimizer.state.get(parameter, {}))


def load_state(optimizer: AdamW, parameter: Tensor, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `state_tensors` gave."""
    optimizer.state.pop(parameter, None)
    if tensors:
        optimizer.state[parameter] = dict(tensors)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return what is trained, by its name in the model, in the model's order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def make_optimizer(
    model: nn.Module, learning_rate: float, weight_decay: float, *, loraplus_ratio: float | None = None, bits: int = 32
) -> AdamW:
    """Return AdamW over the adapters' A, their B, DoRA's magnitudes, block scales' changes and the head; `lr_scale` multiplies
    the schedule's rate.

    LoRA+ (arXiv 2402.12354, section 4): B learns at `loraplus_ratio` times the rate of A. Decay is for A, B and the changes: it
    would shrink a magnitude, which is as large as the weight itself, and not an update of it.
    """
    kinds: dict[str, list[nn.Parameter]] = {"A": [], "B": [], "magnitude": [], "scales": [], "log_scales": [], "head": []}
    place: dict[int, str] = {}
    for adapter in adapters(model).values():
        place |= {id(adapter.lora_A): "A", id(adapter.lora_B): "B", id(adapter.lora_magnitude_vector): "magnitude"}
        place |= {id(adapter.log_scales): "log_scales"}
    place |= {id(layer.change): "scales" for layer in scaled_layers(model).values()}
    for parameter in trainable(model).values():
        kinds[place.get(id(parameter), "head")].append(parameter)
    scales = {"B": loraplus_ratio or 1.0, "head": HEAD_RATE / (RATE if kinds["scales"] else 1.0), "log_scales": SCALE_RATE}
    groups = [
        {
            "params": parameters,
            "weight_decay": weight_decay if kind in ("A", "B", "scales") else 0.0,
            "lr_scale": scales.get(kind, 1.0),
        }
        for kind, parameters in kinds.items()
    ]
    return AdamW([group for group in groups if group["params"]], learning_rate, bits=bits)


def set_learning_rate(optimizer: AdamW, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> float:
    """Scale all gradients so that their common 2-norm is at most `max_norm`; return what it was.

    A norm that is not finite is returned and changes nothing.
    """
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = math.sqrt(sum(float(torch.linalg.vector_norm(grad)) ** 2 for grad in grads))
    if math.isfinite(norm) and norm > max_norm:
        for grad in grads:
            grad.mul_(max_norm / norm)
    return norm
