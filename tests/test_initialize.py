"""How adapters begin, against PEFT's own classes and the papers' formulas; and what does not go together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tolerances import GRADIENT_RELATIVE, INITIAL_FACTORS, MERGED_FORWARD, MERGED_WEIGHT, PEFT_LOGITS
from torch import nn

from edgelora.adapters import initialize, inject, peft_format
from edgelora.adapters.initialize import Start, refuse_combinations
from edgelora.adapters.lora import LoRA, LoRASettings
from edgelora.config import FinetuneConfig
from edgelora.errors import SettingsError
from edgelora.models.linear import FrozenLinear
from tests.test_lora import decoder_loss, decoder_loss_of_transformers, load_tiny, make_linear, moved, theirs

# PEFT 0.21 asks transformers 5.23 for a property that the latter has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

FROM_WEIGHT = ["pissa", "olora"]


def peft_layer(base: FrozenLinear, how: Any, *, rank: int = 4, alpha: float = 12, rslora: bool = False) -> Any:
    """Return PEFT's LoRA on a copy of a frozen layer."""
    from peft import LoraConfig, get_peft_model

    linear = nn.Linear(base.in_features, base.out_features)
    linear.weight.data, linear.bias.data = base.weight_fp32().clone(), base.bias.clone()  # type: ignore[union-attr]
    config = LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights=how, use_rslora=rslora, target_modules=["0"])
    return get_peft_model(nn.Sequential(linear), config).base_model.model[0]  # type: ignore[arg-type]


@pytest.mark.parametrize("how", FROM_WEIGHT)
@pytest.mark.parametrize("rslora", [False, True])
def test_parts_of_the_weight_are_those_of_peft(how: str, rslora: bool) -> None:
    base = make_linear()
    wanted = peft_layer(base, how, rslora=rslora)
    layer = LoRA.from_base(base, LoRASettings(rank=4, alpha=12, rslora=rslora, init=how))
    assert layer.initial is not None
    a, b = layer.initial
    # A pair of singular vectors is known up to its sign, which the product does not show.
    torch.testing.assert_close(b @ a, wanted.lora_B.default.weight @ wanted.lora_A.default.weight, **INITIAL_FACTORS)
    residual = base.weight_fp32() - layer.scale * b @ a
    torch.testing.assert_close(residual, wanted.base_layer.weight, **INITIAL_FACTORS)


def test_pissa_is_the_principal_part_with_equal_shares() -> None:
    base = make_linear()
    layer = LoRA.from_base(base, LoRASettings(rank=4, alpha=12, init="pissa"))
    u, s, vt = torch.linalg.svd(base.weight_fp32(), full_matrices=False)
    wanted = u[:, :4] * s[:4] @ vt[:4]
    torch.testing.assert_close(layer.scale * layer.lora_B @ layer.lora_A, wanted, **INITIAL_FACTORS)
    torch.testing.assert_close(layer.lora_A.norm(dim=1), (s[:4] / 3).sqrt(), **INITIAL_FACTORS)
    torch.testing.assert_close(layer.lora_B.norm(dim=0), (s[:4] / 3).sqrt(), **INITIAL_FACTORS)


def test_krylov_finds_the_singular_values_of_a_large_weight() -> None:
    """Singular values that fall as 1 / √i, slower than those of trained weights."""
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, 300, generator=generator))[0] for n in (400, 300))
    values = torch.arange(1, 301) ** -0.5
    weight = u * values @ v.t()
    found_u, found, found_vt = initialize.principal(weight, 8, generator)
    torch.testing.assert_close(found, values[:8], rtol=1e-3, atol=0.0)
    best = values[8:].norm()  # the error of the best approximation of this rank (Eckart and Young)
    assert float((weight - found_u * found @ found_vt).norm()) < 1.001 * float(best)


@pytest.mark.parametrize("rank", [2, 4])
def test_orthogonal_is_that_of_peft(rank: int) -> None:
    base = make_linear()
    wanted = peft_layer(base, True, rank=rank)
    torch.manual_seed(5)
    wanted.orthogonal_init("default")
    start = Start(base.weight_fp32, (24, 64), rank, 1.0, torch.Generator().manual_seed(5))
    a, b = initialize.orthogonal(start)
    torch.testing.assert_close(a, wanted.lora_A.default.weight.detach(), **INITIAL_FACTORS)
    torch.testing.assert_close(b, wanted.lora_B.default.weight.detach(), **INITIAL_FACTORS)
    torch.testing.assert_close(b @ a, torch.zeros(24, 64), **INITIAL_FACTORS)
    assert float(a.norm()) > 0.1
    assert float(b.norm()) > 0.1


@pytest.mark.parametrize("bits", [32, 4])
@pytest.mark.parametrize("how", ["orthogonal", *FROM_WEIGHT])
def test_training_begins_at_the_base(how: str, bits: int) -> None:
    base = make_linear(bits)
    layer = LoRA.from_base(base, LoRASettings(rank=4, init=how))
    assert bool(layer.lora_B.any())
    x = torch.randn(5, 64)
    torch.testing.assert_close(layer(x), base(x), **MERGED_FORWARD)
    again = LoRA.from_base(make_linear(bits), LoRASettings(rank=4, init=how))
    assert torch.equal(layer.lora_A, again.lora_A)
    assert torch.equal(layer.lora_B, again.lora_B)


@pytest.mark.parametrize("grid", [None, (4, 32)])
@pytest.mark.parametrize("how", FROM_WEIGHT)
def test_what_acts_is_the_difference_to_the_beginning(how: str, grid: tuple[int, int] | None) -> None:
    base = make_linear()
    layer = LoRA.from_base(base, LoRASettings(rank=4, alpha=12, init=how))
    a0, b0 = layer.lora_A.detach().clone(), layer.lora_B.detach().clone()
    moved(layer)
    wanted = base.weight_fp32() - 3 * b0 @ a0 + 3 * layer.lora_B.detach() @ layer.lora_A.detach()
    torch.testing.assert_close(layer.merge(), wanted, **MERGED_WEIGHT)
    torch.testing.assert_close(base.weight_fp32() + layer.delta(), wanted, **MERGED_WEIGHT)
    assert layer.factors.rank == 8
    layer.grid = grid
    if grid is not None:
        from edgelora.quant.grid import dequantize, quantize

        wanted = dequantize(quantize(layer.merge(), *grid))
    x = torch.randn(5, 64)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, wanted, base.bias), **MERGED_FORWARD)


@pytest.mark.parametrize("how", FROM_WEIGHT)
def test_gradients_are_those_of_the_residual_form(how: str) -> None:
    """Against plain autograd on the papers' own form, a frozen residual and a trained product."""
    base = make_linear()
    layer = moved(LoRA.from_base(base, LoRASettings(rank=4, alpha=12, init=how)))
    assert layer.initial is not None
    residual = base.weight_fp32() - 3 * layer.initial[1] @ layer.initial[0]
    a, b = (nn.Parameter(p.detach().clone()) for p in (layer.lora_A, layer.lora_B))
    x = torch.randn(7, 64)
    nn.functional.linear(x, residual + 3 * b @ a, base.bias).square().sum().backward()  # type: ignore[no-untyped-call]
    layer(x).square().sum().backward()
    for ours, wanted in ((layer.lora_A, a), (layer.lora_B, b)):
        assert ours.grad is not None
        assert wanted.grad is not None
        assert float((ours.grad - wanted.grad).abs().max() / wanted.grad.abs().max()) < GRADIENT_RELATIVE


@pytest.mark.parametrize(("how", "rslora"), [("pissa", False), ("olora", False), ("pissa", True)])
def test_it_ships_as_a_plain_adapter_of_twice_the_rank(how: str, rslora: bool, tmp_path: Path) -> None:
    """In a fresh model, in one that begins in the same way, and in PEFT."""
    settings = LoRASettings(rank=3, alpha=7, init=how, rslora=rslora)
    model = load_tiny(tmp_path, "llama", 32)
    for layer in inject.attach(model, settings, "all-linear").values():
        moved(layer)
    loss = decoder_loss(model)
    saved = peft_format.from_model(model, rslora=rslora, dropout=0.0, base=None, task_type="CAUSAL_LM")
    peft_format.save(saved, tmp_path / "adapter", paths=list(model.linears()))
    read = peft_format.load(tmp_path / "adapter")
    assert {factors.rank for factors in read.factors.values()} == {6}
    plain = load_tiny(tmp_path, "llama", 32)
    peft_format.apply(plain, read)
    torch.testing.assert_close(decoder_loss(plain), loss, **PEFT_LOGITS)
    again = load_tiny(tmp_path, "llama", 32)
    added = inject.attach(again, settings, "all-linear")
    peft_format.apply(again, read)
    for path, layer in added.items():
        assert torch.equal(layer.factors.a, read.factors[path].a)
        assert torch.equal(layer.factors.b, read.factors[path].b)
    if not rslora:  # `theirs` writes adapters without it
        torch.testing.assert_close(loss, decoder_loss_of_transformers(theirs(tmp_path, model, trainable=False)), **PEFT_LOGITS)


PATTERNS: dict[str, Any] = {
    "rank_pattern": {"down_proj": 6, r"layers\.1\.self_attn\.q_proj": 2, "v_proj": 3},
    "alpha_pattern": {"model.layers.0.self_attn.q_proj": 5.0, "o_proj|v_proj": 3.0},
}


@pytest.mark.parametrize("rslora", [False, True])
def test_ranks_and_alphas_per_layer_are_those_of_peft(rslora: bool, tmp_path: Path) -> None:
    import transformers
    from peft import LoraConfig, get_peft_model

    model = load_tiny(tmp_path, "llama", 32)
    settings = LoRASettings(rank=4, alpha=8, rslora=rslora, **PATTERNS)
    added = inject.attach(model, settings, "all-linear")
    network = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    config = LoraConfig(r=4, lora_alpha=8, use_rslora=rslora, target_modules="all-linear", **PATTERNS)
    peft: Any = get_peft_model(network, config)
    for path, layer in added.items():
        wanted = peft.base_model.model.get_submodule(path)
        assert layer.lora_A.shape[0] == wanted.r["default"], path
        assert layer.scale == pytest.approx(wanted.scaling["default"]), path
    assert {layer.lora_A.shape[0] for layer in added.values()} == {2, 3, 4, 6}


def test_alpha_is_twice_the_layers_own_rank_unless_given() -> None:
    settings = LoRASettings(rank=4, rank_pattern={"v_proj": 16})
    assert (settings.scale_of("a.q_proj"), settings.scale_of("a.v_proj")) == (2.0, 2.0)
    settings = LoRASettings.from_config(FinetuneConfig(rank=4, alpha=8.0, rank_pattern={"v_proj": 16}, rslora=True))
    assert (settings.scale_of("a.q_proj"), settings.scale_of("a.v_proj")) == (4.0, 2.0)


def test_what_does_not_fit_the_model_is_refused(tmp_path: Path) -> None:
    model = load_tiny(tmp_path, "llama", 32)
    settings = LoRASettings(rank=4, init="pissa", rank_pattern={"q_poj": 2, "k_proj": 17}, alpha_pattern={"up_proj": 2.0})
    with pytest.raises(SettingsError) as caught:
        inject.attach(model, settings, "q_proj,k_proj")
    assert caught.value.message.splitlines() == [
        "the adapters do not fit the model:",
        '  rank_pattern "q_poj" is the end of no target layer\'s name',
        '  alpha_pattern "up_proj" is the end of no target layer\'s name',
        '  init = "pissa" at rank 17: model.layers.0.self_attn.k_proj has but 16 directions',
        '  init = "pissa" at rank 17: model.layers.1.self_attn.k_proj has but 16 directions',
    ]
    assert caught.value.hint == "it has q_proj, k_proj"
    assert not inject.adapters(model)


def test_settings_that_do_not_go_together_are_listed() -> None:
    refuse_combinations(FinetuneConfig(dora=True, dropout=0.1, weight_decay=0.1, init="eva", rank=3))
    refuse_combinations(FinetuneConfig(init="orthogonal", rank_pattern={"q_proj": 6}, dora=True))
    with pytest.raises(SettingsError) as caught:
        refuse_combinations(FinetuneConfig(dora=True, dropout=0.1, weight_decay=0.1, init="olora", alpha_pattern={"(q": 2.0}))
    assert caught.value.message.splitlines() == [
        "settings that do not go together:",
        '  init = "olora" begins with a part of the weight: dora has no magnitude for it',
        '  init = "olora" begins with a part of the weight: dropout would act on the base model',
        '  init = "olora" begins with a part of the weight: weight_decay would shrink the base model',
        '  alpha_pattern "(q" is no regular expression: missing ), unterminated subpattern at position 0',
    ]
    with pytest.raises(SettingsError) as caught:
        refuse_combinations(FinetuneConfig(init="orthogonal", rank=5, rank_pattern={"q_proj": 3, "v_proj": 2}))
    assert caught.value.message.splitlines()[1:] == [
        '  init = "orthogonal" needs even ranks; rank is 5',
        '  init = "orthogonal" needs even ranks; rank_pattern "q_proj" is 3',
    ]
