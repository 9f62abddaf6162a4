"""Convolutions with an adapter: gradients, what is kept for backward, merging, batch norm."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import tiny
import torch
from tolerances import CONVOLUTION
from torch import Tensor, nn

from edgelora.adapters import inject, peft_format
from edgelora.adapters.lora import LoRA, LoRASettings
from edgelora.errors import SettingsError
from edgelora.models.convolution import FrozenBatchNorm, FrozenConv, can_freeze
from edgelora.models.load import load_model
from edgelora.models.network import Network
from edgelora.models.source import open_model

CONVOLUTIONS = {
    "1d": nn.Conv1d(6, 10, 3, padding=1),
    "2d": nn.Conv2d(6, 10, 3, stride=2, padding=1, bias=False),
    "dilated": nn.Conv2d(6, 10, (3, 1), dilation=2, padding=(2, 0)),
    "grouped": nn.Conv2d(6, 12, 3, groups=3),
    "depthwise": nn.Conv2d(6, 6, 3, groups=6, padding=1),
    "pointwise": nn.Conv2d(6, 4, 1, padding="valid"),
}


def adapted(like: nn.Conv1d | nn.Conv2d) -> LoRA:
    bias = None if like.bias is None else like.bias.detach()
    layer = LoRA.from_base(FrozenConv("conv", like, like.weight.detach(), bias), LoRASettings(rank=2))
    nn.init.normal_(layer.lora_B, std=0.3)
    return layer


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_gradients_are_those_of_plain_autograd_and_merged_is_unmerged(name: str) -> None:
    torch.manual_seed(0)
    plain = copy.deepcopy(CONVOLUTIONS[name])
    layer = adapted(plain)
    x = torch.randn(3, 6, *[9] * (plain.weight.ndim - 2), requires_grad=True)
    y = layer(x)
    weight = plain.weight.detach() + (layer.scale * layer.lora_B @ layer.lora_A).view_as(plain.weight)
    convolve = torch.conv1d if plain.weight.ndim == 3 else torch.conv2d
    wanted = convolve(x, weight, plain.bias, plain.stride, plain.padding, plain.dilation, plain.groups)
    torch.testing.assert_close(y, wanted, **CONVOLUTION)
    grad = torch.randn_like(y)
    ours = torch.autograd.grad(y, (x, layer.lora_A, layer.lora_B), grad)
    for found, expected in zip(ours, torch.autograd.grad(wanted, (x, layer.lora_A, layer.lora_B), grad), strict=True):
        torch.testing.assert_close(found, expected, **CONVOLUTION)
    layer.enabled = False
    off, wanted_x = (torch.autograd.grad(compute(x), x, grad)[0] for compute in (layer, plain))
    torch.testing.assert_close(off, wanted_x, **CONVOLUTION)


def kept_bytes(compute: nn.Module, x: Tensor) -> int:
    """Return the bytes of the distinct tensors that autograd keeps."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        compute(x)
    return sum(kept.values())


def test_backward_keeps_the_input_and_the_factors_alone() -> None:
    layer = adapted(nn.Conv2d(16, 16, 3, padding=1))
    x = torch.randn(8, 16, 32, 32, requires_grad=True)
    factors = 4 * (layer.lora_A.numel() + layer.lora_B.numel())
    assert kept_bytes(layer, x) <= 1.05 * x.numel() * 4 + factors
    assert kept_bytes(layer.base, x) == 0
    norm = nn.BatchNorm2d(16)
    statistics = {"running_mean": torch.randn(16), "running_var": torch.rand(16) + 0.5}
    assert kept_bytes(FrozenBatchNorm(norm, statistics), x) <= 16 * 4


@pytest.mark.parametrize("family", ["resnet", "mobilenet_v2"])
def test_a_network_keeps_less_than_one_that_is_trained_whole(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForImageClassification

    folder = tiny.save_vision(tmp_path / "model", family)
    model = load_model(open_model(str(folder)), "image-classification", base_bits=32)
    inject.attach(model, LoRASettings(rank=2), "all-linear")
    whole = AutoModelForImageClassification.from_pretrained(folder).train()
    x = torch.randn(8, 3, 32, 32)
    assert kept_bytes(model.train().network, x) <= 0.8 * kept_bytes(whole, x)


def test_batch_norm_keeps_its_statistics() -> None:
    torch.manual_seed(0)
    plain = nn.BatchNorm2d(5)
    nn.init.normal_(plain.running_mean)
    nn.init.uniform_(plain.running_var, 0.5, 2.0)
    nn.init.normal_(plain.weight)
    frozen = FrozenBatchNorm(plain, dict(plain.state_dict())).train()
    x = torch.randn(4, 5, 6, 6)
    torch.testing.assert_close(frozen(x), plain.eval()(x), **CONVOLUTION)


def test_padding_to_the_same_size_is_that_of_torch() -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(4, 4, 5, padding="same", dilation=2, groups=2)
    assert can_freeze(plain)
    assert not can_freeze(nn.Conv2d(4, 4, 2, padding="same")), "one zero more after than before"
    assert not can_freeze(nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3)))
    x = torch.randn(2, 4, 9, 9, requires_grad=True)
    frozen = FrozenConv("conv", plain, plain.weight.detach(), plain.bias.detach())
    torch.testing.assert_close(frozen(x), plain(x), **CONVOLUTION)
    (wanted,) = torch.autograd.grad(plain(x).square().sum(), x)
    (found,) = torch.autograd.grad(frozen(x).square().sum(), x)
    torch.testing.assert_close(found, wanted, **CONVOLUTION)


@pytest.mark.parametrize("family", tiny.VISION)
def test_networks_equal_transformers_and_learn_in_the_last_place(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForImageClassification

    folder = tiny.save_vision(tmp_path / "model", family)
    reference = AutoModelForImageClassification.from_pretrained(folder).eval()
    model = load_model(open_model(str(folder)), "image-classification", base_bits=32)
    assert isinstance(model, Network)
    x = torch.randn(2, 3, 32, 32)
    wanted = reference(pixel_values=x).logits.detach()
    if family == "resnet":  # without dropout: batch norm alone could differ in training
        torch.testing.assert_close(model.train().logits(pixel_values=x).detach(), wanted, **CONVOLUTION)
    torch.testing.assert_close(model.eval().logits(pixel_values=x).detach(), wanted, **CONVOLUTION)
    added = inject.attach(model, LoRASettings(rank=2), "all-linear")
    assert added
    convolutions = family in ("resnet", "mobilenet_v2", "efficientnet")
    assert all(isinstance(layer.base, FrozenConv) == convolutions for layer in added.values())
    if convolutions:
        assert len(added) == sum(isinstance(module, nn.Conv2d) for module in reference.modules())
    model.logits(pixel_values=x).square().sum().backward()
    assert all(layer.lora_B.grad is not None and layer.lora_B.grad.any() for layer in added.values())
    with torch.no_grad():
        for layer in added.values():
            nn.init.normal_(layer.lora_B, std=0.1)
    said = model.logits(pixel_values=x).detach()
    saved = peft_format.from_model(model, rslora=False, dropout=0.0, base=None, task_type=None)
    peft_format.save(saved, tmp_path / "adapter", paths=inject.adaptable(model))
    again = load_model(open_model(str(folder)), "image-classification", base_bits=32)
    peft_format.apply(again, peft_format.load(tmp_path / "adapter"))
    assert torch.equal(again.eval().logits(pixel_values=x).detach(), said)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing")  # PEFT asks transformers for it
def test_peft_reads_adapted_convolutions(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForImageClassification

    folder = tiny.save_vision(tmp_path / "model", "resnet")
    model = load_model(open_model(str(folder)), "image-classification", base_bits=32)
    for layer in inject.attach(model, LoRASettings(rank=2), "all-linear").values():
        nn.init.normal_(layer.lora_B, std=0.1)
    saved = peft_format.from_model(model, rslora=False, dropout=0.0, base=str(folder), task_type=None)
    peft_format.save(saved, tmp_path / "adapter", paths=inject.adaptable(model))
    base = AutoModelForImageClassification.from_pretrained(folder)
    theirs = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model.eval().logits(pixel_values=x), theirs(pixel_values=x).logits, **CONVOLUTION)


def test_what_convolutions_cannot_do_is_refused(tmp_path: Path) -> None:
    model = load_model(open_model(str(tiny.save_vision(tmp_path / "model"))), "image-classification", base_bits=32)
    with pytest.raises(SettingsError, match=r"dora is for linear layers; resnet\.embedder.+ is a convolution"):
        inject.attach(model, LoRASettings(rank=2, dora=True), "all-linear")
