"""The LoRA class: its formulas, where it goes, and gradients equal to those of PEFT on the dequantized transformers model."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import save_decoder, save_encoder
from tolerances import GRADIENT_RELATIVE, MERGED_FORWARD, PEFT_LOGITS
from torch import Tensor, nn

from edgelora.adapters import inject, peft_format
from edgelora.adapters.lora import LoRA, LoRASettings
from edgelora.errors import FolderError, SettingsError
from edgelora.models.load import load_model
from edgelora.models.recompute import Keeping
from edgelora.models.source import open_model

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def make_linear(bits: int = 32, *, bias: bool = True) -> Any:
    from edgelora.models.linear import FrozenLinear

    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(24, 64, generator=generator)
    return FrozenLinear.from_weight("block.q_proj", weight, torch.randn(24, generator=generator) if bias else None, bits, 32)


def moved(layer: LoRA) -> LoRA:
    """Give every trained tensor of a layer random values."""
    generator = torch.Generator().manual_seed(4)
    for parameter in layer.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return layer


def test_new_adapter_changes_nothing_and_is_kaiming_uniform() -> None:
    base = make_linear()
    layer = LoRA.from_base(base, LoRASettings(rank=4, alpha=8, dora=True))
    x = torch.randn(5, 64)
    torch.testing.assert_close(layer(x), base(x), **MERGED_FORWARD)
    bound = 1 / math.sqrt(64)
    assert 0.9 * bound < float(layer.lora_A.detach().abs().max()) <= bound
    again = LoRA.from_base(make_linear(), LoRASettings(rank=4))
    assert torch.equal(layer.lora_A, again.lora_A)
    assert not torch.equal(layer.lora_A, LoRA.from_base(base, LoRASettings(rank=4, seed=1)).lora_A)


@pytest.mark.parametrize("bits", [32, 16, 8, 4])
@pytest.mark.parametrize("options", [{}, {"rslora": True}, {"dora": True}, {"dora": True, "rslora": True}])
def test_forward_is_the_product_with_the_merged_weight(bits: int, options: dict[str, bool]) -> None:
    base = make_linear(bits)
    layer = moved(LoRA.from_base(base, LoRASettings(rank=4, alpha=6, **options)))
    weight, delta = base.weight_fp32().clone(), layer.delta()
    scale = 6 / 2 if options.get("rslora") else 6 / 4
    torch.testing.assert_close(delta, scale * layer.lora_B @ layer.lora_A)
    wanted = weight + delta
    if layer.lora_magnitude_vector is not None:
        wanted = layer.lora_magnitude_vector[:, None] * wanted / wanted.norm(dim=1, keepdim=True)
    torch.testing.assert_close(layer.merge(), wanted)
    x = torch.randn(2, 3, 64)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, wanted, base.bias), **MERGED_FORWARD)
    layer.enabled = False
    assert torch.equal(layer(x), base(x))


def test_dora_follows_its_adapter_after_each_change() -> None:
    layer = moved(LoRA.from_base(make_linear(), LoRASettings(rank=4, dora=True)))
    x = torch.randn(3, 64)
    layer(x)
    with torch.no_grad():
        layer.lora_B.add_(0.5)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.merge(), layer.base.bias), **MERGED_FORWARD)


def test_dropout_acts_in_training_only() -> None:
    layer = moved(LoRA.from_base(make_linear(), LoRASettings(rank=4, dropout=0.5)))
    x = torch.randn(3, 64)
    torch.testing.assert_close(layer.eval()(x), nn.functional.linear(x, layer.merge(), layer.base.bias), **MERGED_FORWARD)
    layer.train()
    torch.manual_seed(0)
    first = layer(x)
    assert not torch.equal(first, layer(x))
    torch.manual_seed(0)
    assert torch.equal(first, layer(x))


PATHS = [f"model.layers.{i}.{name}" for i in (0, 1) for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")]


def test_targets_are_named_as_in_peft() -> None:
    assert inject.choose_targets(PATHS, "all-linear") == PATHS
    assert inject.choose_targets(PATHS, "q_proj, down_proj") == [PATHS[0], PATHS[2], PATHS[3], PATHS[5]]
    assert inject.choose_targets(PATHS, "layers.1.self_attn.v_proj") == [PATHS[4]]
    with pytest.raises(SettingsError) as caught:
        inject.choose_targets(PATHS, "q_poj,v_proj,lm_head")
    assert caught.value.message == (
        'target modules: "q_poj" is no linear layer of this model. Did you mean "q_proj"?\n'
        '  "lm_head" is no linear layer of this model.\n'
        "  it has q_proj, v_proj, down_proj"
    )
    assert caught.value.hint == "--target-modules all-linear"


def load_tiny(folder: Path, family: str, bits: int) -> Any:
    """Return our model of a tiny random family."""
    is_encoder = family == "bert"
    path = (save_encoder if is_encoder else save_decoder)(folder, family)
    task = "text-classification" if is_encoder else "text-generation"
    torch.manual_seed(0)
    labels = ["LABEL_0", "LABEL_1", "LABEL_2"] if is_encoder else []
    return load_model(open_model(str(path)), task, base_bits=bits, labels=labels)


def attach_moved(model: Any, **options: Any) -> None:
    for layer in inject.attach(model, LoRASettings(rank=4, alpha=8, **options), "all-linear").values():
        moved(layer)


def adapter_of(model: Any) -> peft_format.AdapterFile:
    kind = "SEQ_CLS" if hasattr(model, "network") else "CAUSAL_LM"
    return peft_format.from_model(model, rslora=False, dropout=0.0, base=None, task_type=kind)


def theirs(folder: Path, model: Any, *, trainable: bool) -> Any:
    """Return PEFT's model: transformers' with the frozen weights of ours, dequantized, and our adapter loaded by PEFT."""
    import transformers
    from peft import PeftModel

    encoder = hasattr(model, "network")
    name = "AutoModelForSequenceClassification" if encoder else "AutoModelForCausalLM"
    network = getattr(transformers, name).from_pretrained(folder, dtype=torch.float32)
    paths = list(model.linears())
    for path, layer in model.linears().items():
        frozen = layer.base if isinstance(layer, LoRA) else layer
        target = network.get_submodule(path)
        weight = frozen.weight_fp32()
        target.weight.data = weight.t().contiguous() if type(target).__name__ == "Conv1D" else weight.clone()
    if encoder:
        for path, module in model.network.named_modules():
            if type(module).__name__ == "FrozenEmbedding":
                network.get_submodule(path).weight.data = module.weight_fp32().clone()
    else:
        network.get_input_embeddings().weight.data = model.embed.weight_fp32().clone()
        network.get_output_embeddings().weight.data = model.head.weight.fp32().clone()
        if model.positions is not None:
            network.transformer.wpe.weight.data = model.positions.weight_fp32().clone()
    peft_format.save(adapter_of(model), folder / "adapter", paths=paths)
    return PeftModel.from_pretrained(network, folder / "adapter", is_trainable=trainable).eval()


DOCUMENTS = [[5, 9, 200, 31, 7, 40, 11, 99], [77, 3, 4], [250, 12, 13, 14, 61]]


def decoder_loss(model: Any) -> Tensor:
    """Return the summed loss of packed documents; all tokens but the first are supervised."""
    ids = torch.tensor([token for document in DOCUMENTS for token in document])
    starts = torch.tensor([0, *(len(document) for document in DOCUMENTS)]).cumsum(0)
    targets = torch.tensor([t for start, stop in pairwise(starts) for t in range(start + 1, stop)])
    loss: Tensor = model.nll(model.hidden(ids, starts)[targets - 1], ids[targets])
    return loss


def decoder_loss_of_transformers(model: Any) -> Tensor:
    """Return the same, each document by itself."""
    losses = []
    for document in DOCUMENTS:
        ids = torch.tensor([document])
        logits = model(input_ids=ids).logits[0, :-1]
        losses.append(nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
    return torch.stack(losses).sum()


def encoder_batch() -> dict[str, Tensor]:
    ids = torch.tensor([document + [260] * (8 - len(document)) for document in DOCUMENTS])
    return {"input_ids": ids, "attention_mask": (ids != 260).long()}


def check_same_gradients(model: Any, peft: Any) -> None:
    layers = inject.adapters(model)
    named = dict(peft.named_parameters())
    assert layers
    for path, layer in layers.items():
        for part in ("lora_A", "lora_B", "lora_magnitude_vector"):
            ours = getattr(layer, part)
            if ours is None:
                continue
            wanted = named[f"base_model.model.{path}.{part}.default.weight"].grad
            error = (ours.grad - wanted).abs().max() / wanted.abs().max()
            assert float(error) < GRADIENT_RELATIVE, (path, part)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "bert"])
@pytest.mark.parametrize(("bits", "checkpointing"), [(32, False), (4, True)])
def test_gradients_equal_plain_autograd(family: str, bits: int, checkpointing: bool, tmp_path: Path) -> None:
    model = load_tiny(tmp_path, family, bits)
    attach_moved(model)
    model.keeping = Keeping(0) if checkpointing else Keeping()
    peft = theirs(tmp_path, model, trainable=True)
    model.eval()
    if family == "bert":
        labels = torch.tensor([0, 2, 1])
        loss = nn.functional.cross_entropy(model.logits(**encoder_batch()), labels, reduction="sum")
        wanted = nn.functional.cross_entropy(peft(**encoder_batch()).logits, labels, reduction="sum")
    else:
        loss, wanted = decoder_loss(model), decoder_loss_of_transformers(peft)
    torch.testing.assert_close(loss, wanted, **PEFT_LOGITS)
    loss.backward()
    wanted.backward()
    check_same_gradients(model, peft)
    trained = {id(p) for layer in inject.adapters(model).values() for p in layer.parameters()}
    heads = set(dict(getattr(model, "head_parameters", dict)()))
    for name, parameter in model.named_parameters():
        is_trained = id(parameter) in trained or name.removeprefix("network.") in heads
        assert (parameter.grad is not None) == is_trained, name


def test_gradients_of_dora_equal_peft(tmp_path: Path) -> None:
    model = load_tiny(tmp_path, "qwen2", 8)
    attach_moved(model, dora=True)
    peft = theirs(tmp_path, model, trainable=True)
    decoder_loss(model).backward()
    decoder_loss_of_transformers(peft).backward()
    check_same_gradients(model, peft)


def test_nothing_is_computed_below_the_lowest_adapter(tmp_path: Path) -> None:
    model = load_tiny(tmp_path, "llama", 8)
    inject.attach(model, LoRASettings(rank=2), "model.layers.1.mlp.down_proj")
    seen: list[bool] = []
    model.blocks[0].register_forward_hook(lambda module, inputs, output: seen.append(output.requires_grad))
    model.blocks[1].register_forward_hook(lambda module, inputs, output: seen.append(output.requires_grad))
    decoder_loss(model).backward()
    assert seen == [False, True]


def test_switched_off_is_the_base(tmp_path: Path) -> None:
    model = load_tiny(tmp_path, "llama", 32)
    base = decoder_loss(model)
    attach_moved(model)
    assert bool((decoder_loss(model) - base).abs() > 0.1)
    with inject.switched_off(model):
        assert torch.equal(decoder_loss(model), base)


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_adapter_of_peft_is_applied_to_a_model(family: str, tmp_path: Path) -> None:
    """bias="all" on GPT-2 (layer norms too) and a trained head on BERT."""
    import transformers
    from peft import LoraConfig, get_peft_model

    options: dict[str, Any] = {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "all", "task_type": "CAUSAL_LM"}
    if family == "bert":
        options = {"target_modules": ["query"], "bias": "all", "task_type": "SEQ_CLS", "use_rslora": True}
    model = load_tiny(tmp_path, family, 32)
    kind = "AutoModelForSequenceClassification" if family == "bert" else "AutoModelForCausalLM"
    peft = get_peft_model(getattr(transformers, kind).from_pretrained(tmp_path), LoraConfig(r=3, **options)).eval()
    for parameter in peft.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn_like(parameter)
    peft.save_pretrained(tmp_path / "peft")
    peft_format.apply(model, peft_format.load(tmp_path / "peft"))
    model.eval()
    with torch.no_grad():
        if family == "bert":
            torch.testing.assert_close(model.logits(**encoder_batch()), peft(**encoder_batch()).logits, **PEFT_LOGITS)
        else:
            torch.testing.assert_close(decoder_loss(model), decoder_loss_of_transformers(peft), **PEFT_LOGITS)


def test_adapter_for_another_model_is_refused(tmp_path: Path) -> None:
    model = load_tiny(tmp_path, "llama", 32)
    factors = LoRA.from_base(make_linear(), LoRASettings(rank=2)).factors
    with pytest.raises(FolderError) as caught:
        peft_format.apply(model, peft_format.AdapterFile({"model.layers.7.self_attn.q_proj": factors}))
    assert caught.value.message == "the adapter changes what this model does not have:\n  model.layers.7.self_attn.q_proj"
    path = "model.layers.0.self_attn.q_proj"
    with pytest.raises(
        FolderError, match=rf"the adapter of {path} is for a weight of shape \[24, 64\]; this model's is \[32, 32\]"
    ):
        peft_format.apply(model, peft_format.AdapterFile({path: factors}))
