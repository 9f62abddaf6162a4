"""Layers on one input as one product, and what stands before them, against plain autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tolerances import GRADIENT_RELATIVE, MERGED_FORWARD
from torch import Tensor, nn
from torch.nn.functional import dropout, linear

from edgelora.adapters.lora import LoRA, LoRASettings
from edgelora.models import linear_group
from edgelora.models.elementwise import Activation, Elementwise, FrozenNorm, apply
from edgelora.models.linear import FrozenLinear
from edgelora.models.linear_group import LinearGroup, linears
from edgelora.quant.grid import dequantize, quantize

INPUTS = 48  # not a multiple of the blocks of 32
OUTPUTS = (24, 8, 40)


pytestmark = pytest.mark.usefixtures("product_library")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def frozen(number: int, bits: int, *, bias: bool = True, block: int = 32) -> FrozenLinear:
    weight = random(OUTPUTS[number], INPUTS, seed=number)
    return FrozenLinear.from_weight(f"layer{number}", weight, random(OUTPUTS[number], seed=9) if bias else None, bits, block)


def lora(number: int, bits: int, *, grid: tuple[int, int] | None = None, rate: float = 0.0, **settings: Any) -> LoRA:
    rank = 3 + number
    layer = LoRA.from_base(frozen(number, bits, bias=number != 1), LoRASettings(rank=rank, alpha=7, dropout=rate, **settings))
    for parameter in layer.parameters():
        parameter.data += 0.1 * random(*parameter.shape, seed=number + 20)
    layer.grid = grid
    return layer


def off(layer: LoRA) -> LoRA:
    layer.enabled = False
    return layer


GROUPS: dict[str, Callable[[int], list[Any]]] = {
    "adapters on all": lambda bits: [lora(0, bits), lora(1, bits), lora(2, bits)],
    "on the middle": lambda bits: [frozen(0, bits), lora(1, bits), frozen(2, bits, bias=False)],
    "on the grid": lambda bits: [lora(i, bits, grid=(4, 32)) for i in range(3)],
    "one on a grid of wider blocks": lambda bits: [lora(0, bits), lora(1, bits, grid=(8, 64)), frozen(2, bits)],
    "mixed bits": lambda bits: [lora(0, bits), frozen(1, 32), lora(2, 16)],
    "mixed blocks": lambda bits: [lora(0, bits), FrozenLinear("x", frozen(1, 8, block=16).weight), frozen(2, 8, block=64)],
    "principal directions": lambda bits: [lora(0, bits, init="pissa"), lora(1, bits), off(lora(2, bits))],
    "dora beside plain": lambda bits: [lora(0, bits, dora=True), lora(1, bits), frozen(2, bits)],
    "dropout beside plain": lambda bits: [lora(0, bits, rate=0.5), lora(1, bits), frozen(2, bits)],
    "all frozen": lambda bits: [frozen(i, bits) for i in range(3)],
}
BEFORE: dict[str, Elementwise | None] = {
    "nothing": None,
    "rms": FrozenNorm("n", "rms", 1e-5, 1 + 0.3 * random(INPUTS, seed=5), None),
    "layer": FrozenNorm("n", "layer", 1e-5, 1 + 0.3 * random(INPUTS, seed=5), random(INPUTS, seed=6)),
    "gated": Activation("silu", gated=True),
    "gelu": Activation("gelu_tanh", gated=False),
}


def plain(f: Elementwise | None, x: Tensor) -> Tensor:
    """Return f(x) by torch's own functions."""
    if f is None:
        return x
    if isinstance(f, FrozenNorm):
        if f.kind == "layer":
            return nn.functional.layer_norm(x, x.shape[-1:], f.weight, f.bias, f.eps)
        return nn.functional.rms_norm(x, x.shape[-1:], f.weight, f.eps)
    assert isinstance(f, Activation)
    kinds: dict[str, Callable[[Tensor], Tensor]] = {
        "silu": nn.functional.silu, "relu": nn.functional.relu, "gelu": nn.functional.gelu,
        "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
    }  # fmt: skip
    if not f.gated:
        return kinds[f.kind](x)
    gate, up = x.chunk(2, -1)
    return kinds[f.kind](gate) * up


def plain_layer(module: FrozenLinear | LoRA, h: Tensor) -> Tensor:
    """Return a layer's output by its formula, with gradients to its own parameters."""
    weight, bias = module.frozen.weight_fp32().clone(), module.frozen.bias
    if not isinstance(module, LoRA) or not module.enabled:
        return linear(h, weight, bias)
    update = module.scale * module.lora_B @ module.lora_A
    if module.initial is not None:
        update = update - module.scale * module.initial[1] @ module.initial[0]
    if module.dropout:
        return linear(h, weight, bias) + linear(dropout(h, module.dropout), update)
    if module.grid is not None:
        return linear(h, dequantize(quantize(module.merge(), *module.grid)) + update - update.detach(), bias)
    if module.lora_magnitude_vector is not None:
        adapted = weight + update
        return linear(h, module.lora_magnitude_vector[:, None] * adapted / adapted.detach().norm(dim=1, keepdim=True), bias)
    return linear(h, weight + update, bias)


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


def check(modules: list[Any], f: Elementwise | None, tokens: int, *, residual: bool, pull: Callable[[Tensor], Tensor]) -> None:
    """Compare outputs and all gradients of the group with those of the formulas; `pull` makes a scalar of the output."""
    width = INPUTS * (2 if isinstance(f, Activation) and f.gated else 1)
    parameters = [parameter for module in modules for parameter in module.parameters()]
    x = random(tokens, width, seed=1).requires_grad_()
    rest = random(tokens, sum(OUTPUTS), seed=2).requires_grad_() if residual else None
    inputs = [
        x,
        *([rest] if rest is not None else []),
        *(p for m in modules for p in m.parameters() if getattr(m, "enabled", 1)),
    ]
    torch.manual_seed(0)
    y = linears(x, LinearGroup(modules), f, rest, 0.7 if residual else 1.0)
    found = torch.autograd.grad(pull(y), inputs)
    torch.manual_seed(0)
    h = plain(f, x)
    expected = torch.cat([plain_layer(module, h) for module in modules], -1)
    expected = expected if rest is None else rest + 0.7 * expected
    torch.testing.assert_close(y, expected, **MERGED_FORWARD)
    wanted = torch.autograd.grad(pull(expected), inputs)
    assert max(relative(a, b) for a, b in zip(found, wanted, strict=True)) < GRADIENT_RELATIVE
    assert all(parameter.grad is None for parameter in parameters)


def weighted(y: Tensor) -> Tensor:
    return (y * random(*y.shape, seed=3)).sum()


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("bits", [32, 16, 8, 4])
@pytest.mark.parametrize("before", ["nothing", "rms"])
def test_groups(group: str, bits: int, before: str) -> None:
    check(GROUPS[group](bits), BEFORE[before], 7, residual=bits == 8, pull=weighted)


@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("group", ["adapters on all", "dora beside plain", "all frozen"])
@pytest.mark.parametrize("tokens", [1, 5])
def test_what_stands_before(before: str, group: str, tokens: int) -> None:
    check(GROUPS[group](4), BEFORE[before], tokens, residual=True, pull=weighted)


PULLS: dict[str, Callable[[Tensor], Tensor]] = {
    "one number for all": lambda y: y.sum(),  # its gradient is expanded: all strides zero
    "turned": lambda y: (y.t() @ random(y.shape[0], 3, seed=3)).sum(),
    "every second column": lambda y: weighted(y[:, ::2]),
    "used twice": lambda y: weighted(y) + (y * y).sum(),
}


@pytest.mark.parametrize("pull", PULLS)
@pytest.mark.parametrize("residual", [True, False])
def test_gradients_that_come_in_any_form(pull: str, residual: bool) -> None:
    check(GROUPS["adapters on all"](4), BEFORE["rms"], 6, residual=residual, pull=PULLS[pull])


def test_frozen_alone_keeps_nothing_and_asks_for_nothing() -> None:
    group = LinearGroup(GROUPS["all frozen"](4))
    assert not linears(random(3, INPUTS), group, BEFORE["rms"]).requires_grad


@pytest.mark.parametrize("kind", ["silu", "relu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("gated", [True, False])
def test_activations_and_norms_by_themselves(kind: str, gated: bool) -> None:
    functions: list[Any] = [Activation(kind, gated=gated), BEFORE["rms"], BEFORE["layer"]]
    for f in functions:
        whole = random(4, 3, 2 * INPUTS, seed=1)
        x = whole[..., :INPUTS] if isinstance(f, FrozenNorm) else whole  # a part of a product, as q and k are
        x = x.detach().requires_grad_()
        y, wanted = apply(f, x), plain(f, x)
        torch.testing.assert_close(y, wanted, **MERGED_FORWARD)
        incoming = random(*y.shape, seed=2)
        before = incoming.clone()
        (found,) = torch.autograd.grad(y, x, incoming)
        assert torch.equal(incoming, before)  # `gradient` may overwrite what it gets, but not what is another's
        assert relative(found, torch.autograd.grad(wanted, x, incoming)[0]) < GRADIENT_RELATIVE


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("rows", [1, 10, 33])
def test_weights_unpacked_piece_by_piece(group: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_group, "TILE", rows * 64)
    check(GROUPS[group](4), BEFORE["rms"], 5, residual=True, pull=weighted)
