"""AdamW in 32 and 8 bits against torch's and its formulas, LoRA+, clipping, and what an import costs."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tolerances import ADAMW_STEPS, EIGHT_BIT_LOSS
from torch import Tensor, nn

from edgelora.adapters import inject
from edgelora.adapters.lora import LoRA, LoRASettings
from edgelora.train.adamw8 import BLOCK, codebook, decode, encode
from edgelora.train.optimizer import (
    HEAD_RATE,
    AdamW,
    clip_grad_norm,
    load_state,
    make_optimizer,
    set_learning_rate,
    state_bytes,
    state_tensors,
)
from tests.test_lora import load_tiny, make_linear

# PEFT 0.21 asks transformers 5.23 for a property that the latter has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def random_parameters(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_thirty_two_bits_are_those_of_torch(decay: float) -> None:
    ours, theirs = (random_parameters((8, 40), (24, 8), (5,)) for _ in range(2))
    optimizer = AdamW([{"params": ours, "weight_decay": decay}], 0.0)
    wanted = torch.optim.AdamW(theirs, lr=0.0, weight_decay=decay)
    generator = torch.Generator().manual_seed(1)
    for step in range(30):
        for one, other in zip(ours, theirs, strict=True):
            grad = torch.randn(one.shape, generator=generator) * 10.0 ** (step % 5 - 3)
            one.grad, other.grad = grad.clone(), grad.clone()
        if step == 7:  # one without a gradient is left alone, its count of steps too
            ours[1].grad = theirs[1].grad = None
        for groups in (optimizer.param_groups, wanted.param_groups):
            groups[0]["lr"] = 1e-2 / (step + 1)
        optimizer.step()
        wanted.step()
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, **ADAMW_STEPS)
    assert float(optimizer.state[ours[1]]["step"]) == 29


def test_weight_decay_shrinks_weights_apart_from_their_gradient() -> None:
    """Decoupled: with no gradient to speak of, w becomes (1 - rate · decay)ᵗ w."""
    layer = LoRA.from_base(make_linear(), LoRASettings(rank=4, dora=True, init="orthogonal"))
    before = [parameter.detach().clone() for parameter in layer.parameters()]
    optimizer = make_optimizer(layer, 0.1, weight_decay=0.5)
    for _ in range(3):
        for parameter in layer.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    for parameter, start in zip(layer.parameters(), before, strict=True):
        share = 1.0 if parameter is layer.lora_magnitude_vector else (1 - 0.1 * 0.5) ** 3
        torch.testing.assert_close(parameter.detach(), share * start, **ADAMW_STEPS)


@pytest.mark.parametrize("bits", [32, 8])
def test_update_is_seen_by_what_goes_by_versions_and_uses_up_the_gradient(bits: int) -> None:
    (parameter,) = random_parameters((100, 64))
    optimizer = AdamW([{"params": [parameter]}], 0.1, bits=bits)
    parameter.grad = torch.ones(64, 100).t()  # no contiguous memory
    version = parameter._version
    optimizer.step()
    assert parameter._version > version
    assert parameter.grad is not None
    assert not parameter.grad.any()
    torch.testing.assert_close(parameter.detach(), random_parameters((100, 64))[0].detach() - 0.1, **ADAMW_STEPS)


def test_values_of_the_codes_are_those_of_the_paper() -> None:
    """Sign, exponent as the number of zeros, indicator, and a linear fraction in the bits left (section 1.3)."""
    for signed in (True, False):
        values = codebook(signed)
        assert len(set(values.tolist())) == 256
        assert float(values.abs().max()) == 1.0
        assert 0.0 in values.tolist()
        tenths = values[(values > 0.1) & (values < 1)]
        assert len(tenths) == (64 if signed else 128)
        steps = tenths.diff()
        torch.testing.assert_close(steps, torch.full_like(steps, 0.9 / len(tenths)), rtol=1e-3, atol=0.0)
        assert float(values[values > 0][0]) == pytest.approx(0.55e-6 if signed else 0.325e-6)


@pytest.mark.parametrize("count", [1000, 2 * BLOCK])
@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_the_nearest_values_of_their_block(signed: bool, count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(count, generator=generator) * torch.logspace(-3, 3, count)
    values = values if signed else values.square()
    codes, scales = encode(values, signed=signed)
    assert (codes.dtype, codes.shape, scales.shape) == (torch.uint8, (count,), (math.ceil(count / BLOCK),))
    found = decode(codes, scales, signed=signed)
    for i, (part, back) in enumerate(zip(values.split(BLOCK), found.split(BLOCK), strict=True)):
        assert float(scales[i]) == float(part.abs().max())
        nearest = (part.unsqueeze(1) - codebook(signed) * scales[i]).abs().amin(1)
        torch.testing.assert_close((part - back).abs(), nearest, rtol=1e-3, atol=1e-6 * float(scales[i]))
    assert torch.equal(decode(*encode(torch.zeros(300), signed=signed), signed=signed), torch.zeros(300))


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_those_of_a_search_among_the_borders(signed: bool) -> None:
    """On both sides of every border, and at every exponent."""
    values = codebook(signed)
    borders = (values[:-1] + values[1:]) / 2
    generator = torch.Generator().manual_seed(0)
    drawn = torch.rand(1 << 16, generator=generator) * 10.0 ** -torch.randint(0, 12, (1 << 16,), generator=generator)
    quotients = torch.cat([borders, torch.nextafter(borders, torch.tensor(2.0)), values, drawn, -drawn if signed else drawn])
    quotients = torch.cat([quotients, torch.zeros(-quotients.numel() % (BLOCK - 1))]).view(-1, BLOCK - 1)
    quotients = torch.cat([quotients, torch.ones(len(quotients), 1)], 1)  # so that each block's scale is 1
    found = torch.bucketize(quotients, borders)
    expected = found if signed else found.clamp_min((quotients > 0).int())
    assert torch.equal(encode(quotients.view(-1), signed=signed)[0].int(), expected.view(-1).int())


def test_a_small_second_moment_does_not_vanish() -> None:
    values = torch.full((BLOCK,), 1e-12)
    values[0] = 1.0
    values[1] = 0.0
    found = decode(*encode(values, signed=False), signed=False)
    assert float(found[1]) == 0.0
    assert float(found[2:].min()) > 1e-12


def test_eight_bits_keep_to_the_path_of_thirty_two() -> None:
    """Least squares with noisy gradients: both fall to a like loss; weights of fewer than 4096 go on in 32 bits."""
    losses = {}
    for bits in (32, 8):
        generator = torch.Generator().manual_seed(0)
        wanted = torch.randn(96, 64, generator=generator)
        weight, bias = nn.Parameter(torch.zeros(96, 64)), nn.Parameter(torch.zeros(96))
        optimizer = AdamW([{"params": [weight, bias]}], 3e-2, bits=bits)
        for _ in range(150):
            x = torch.randn(32, 64, generator=generator)
            loss = (nn.functional.linear(x, weight, bias) - x @ wanted.t() - 1).square().mean()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        losses[bits] = float((weight.detach() - wanted).square().mean() + (bias.detach() - 1).square().mean())
        moments = {"exp_avg", "exp_avg_sq"} if bits == 32 else {"exp_avg_scale", "exp_avg_sq_scale"}
        whole = {name for name, tensor in optimizer.state[weight].items() if tensor.dtype == torch.float32}
        assert whole == {"step", *moments}
        assert set(optimizer.state[bias]) == {"step", "exp_avg", "exp_avg_sq"}
        held = sum(t.numel() * t.element_size() for name, t in optimizer.state[weight].items() if name != "step")
        assert held == state_bytes(96 * 64, bits)
    assert losses[32] < 0.02  # of 2 at the start
    assert losses[8] == pytest.approx(losses[32], **EIGHT_BIT_LOSS)


@pytest.mark.parametrize("bits", [32, 8])
def test_state_put_back_goes_on_to_the_same_bits(bits: int) -> None:
    (parameter,) = random_parameters((70, 1000))  # more than is unpacked at once
    optimizer = AdamW([{"params": [parameter]}], 1e-2, bits=bits)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(70, 1000, generator=generator) for _ in range(6)]

    def go_on(parameter: nn.Parameter, optimizer: AdamW, grads: list[Tensor]) -> None:
        for grad in grads:
            parameter.grad = grad.clone()
            optimizer.step()

    assert state_tensors(optimizer, parameter) == {}
    go_on(parameter, optimizer, grads[:3])
    other = nn.Parameter(parameter.detach().clone())
    fresh = AdamW([{"params": [other]}], 1e-2, bits=bits)
    load_state(fresh, other, {name: tensor.clone() for name, tensor in state_tensors(optimizer, parameter).items()})
    go_on(parameter, optimizer, grads[3:])
    go_on(other, fresh, grads[3:])
    assert torch.equal(parameter, other)
    load_state(fresh, other, {})
    assert state_tensors(fresh, other) == {}


@pytest.mark.parametrize("ratio", [None, 16.0])
def test_loraplus_gives_b_its_rate_and_the_head_its_own(ratio: float | None, tmp_path: Path) -> None:
    model = load_tiny(tmp_path, "bert", 32)
    inject.attach(model, LoRASettings(rank=2, dora=True), "query,value")
    optimizer = make_optimizer(model, 1e-3, weight_decay=0.1, loraplus_ratio=ratio)
    set_learning_rate(optimizer, 1e-4)
    rates = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    layers = inject.adapters(model)
    assert len(layers) == 4
    for adapter in layers.values():
        assert rates.pop(id(adapter.lora_A)) == (1e-4, 0.1)
        assert rates.pop(id(adapter.lora_B)) == (pytest.approx(1e-4 * (ratio or 1)), 0.1)
        assert rates.pop(id(adapter.lora_magnitude_vector)) == (1e-4, 0.0)
    assert rates
    assert all(found == (pytest.approx(1e-4 * HEAD_RATE), 0.0) for found in rates.values())


def test_groups_of_loraplus_are_those_of_peft(tmp_path: Path) -> None:
    import transformers
    from peft import LoraConfig, get_peft_model
    from peft.optimizers import create_loraplus_optimizer

    model = load_tiny(tmp_path, "llama", 32)
    inject.attach(model, LoRASettings(rank=2), "all-linear")
    ours = {}
    for group in make_optimizer(model, 1e-3, weight_decay=0.0, loraplus_ratio=8.0).param_groups:
        ours |= {id(p): group["lr_scale"] * 1e-3 for p in group["params"]}
    network: Any = get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path), LoraConfig(r=2, target_modules="all-linear")
    )
    groups = create_loraplus_optimizer(network, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8.0).param_groups
    theirs = {id(p): group["lr"] for group in groups for p in group["params"]}
    for path, adapter in inject.adapters(model).items():
        other = network.base_model.model.get_submodule(path)
        assert ours[id(adapter.lora_A)] == pytest.approx(theirs[id(other.lora_A.default.weight)])
        assert ours[id(adapter.lora_B)] == pytest.approx(theirs[id(other.lora_B.default.weight)])


@pytest.mark.parametrize("limit", [1.0, 1e6])
def test_clipping_is_that_of_torch(limit: float) -> None:
    ours, theirs = (random_parameters((8, 40), (24, 8), (5,)) for _ in range(2))
    for one, other in zip(ours, theirs, strict=True):
        one.grad, other.grad = 3 * one.detach().clone(), 3 * other.detach().clone()
    ours[2].grad = theirs[2].grad = None
    wanted = torch.nn.utils.clip_grad_norm_(theirs, limit)
    assert clip_grad_norm(ours, limit) == pytest.approx(float(wanted))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad, **ADAMW_STEPS)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_changes_nothing(bad: float) -> None:
    first, second = random_parameters((3,), (4,))
    first.grad, second.grad = torch.tensor([1.0, bad, 2.0]), torch.ones(4)
    assert not math.isfinite(clip_grad_norm([first, second], 1.0))
    assert torch.equal(second.grad, torch.ones(4))


def test_a_step_does_not_load_the_compiler() -> None:
    """torch._dynamo comes with torch's own optimizers: 70 MB of anonymous memory."""
    program = """
import sys, torch
from torch import nn
from edgelora.train.optimizer import AdamW, clip_grad_norm
parameter = nn.Parameter(torch.zeros(5000))
for bits in (32, 8):
    optimizer = AdamW([{"params": [parameter]}], 1e-3, bits=bits)
    parameter.grad = torch.ones(5000)
    clip_grad_norm([parameter], 1.0)
    optimizer.step()
    optimizer.zero_grad()
print("torch._dynamo" in sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
