"""Merging on tiny models: what is written, how large the errors are, foreign adapters, refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from edgelora.folder import write_json
from edgelora.merging.merge import merge
from edgelora.quant.checkpoint import MergedCheckpoint
from edgelora.quant.grid import QuantizedTensor, dequantize, quantize
from tests.tolerances import MERGED_WEIGHT

# PEFT 0.21 asks transformers 5.23 for a property that the latter has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def tiny_llama(*, tied: bool = True) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        tie_word_embeddings=tied, max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def tiny_gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=32))


def bert_config() -> BertConfig:
    return BertConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_labels=5
    )


def tiny_bert() -> PreTrainedModel:
    return BertForSequenceClassification(bert_config())


def tiny_distilbert() -> PreTrainedModel:
    return DistilBertForSequenceClassification(DistilBertConfig(vocab_size=96, dim=64, hidden_dim=96, n_layers=2, n_heads=4))


BUILDERS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": tiny_llama,
    "untied llama": lambda: tiny_llama(tied=False),
    "gpt2": tiny_gpt2,
    "bert": tiny_bert,
    "distilbert": tiny_distilbert,
}


def saved(model: PreTrainedModel, folder: Path) -> str:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    write_json(folder / "tokenizer.json", {"stands": "for a tokenizer"})
    write_json(folder / "tokenizer_config.json", {})
    return str(folder)


def weight_NK(model: PreTrainedModel, path: str) -> Tensor:
    module = model.get_submodule(path)
    weight: Tensor = module.weight.detach()
    return weight.t() if isinstance(module, Conv1D) else weight


@pytest.mark.parametrize("kind", BUILDERS)
@pytest.mark.parametrize(("precision", "block_size"), [("int4", 32), ("int4", 64), ("int8", 32)])
def test_each_layer_is_its_weight_rounded_once(kind: str, precision: str, block_size: int, tmp_path: Path) -> None:
    model = BUILDERS[kind]()
    result = merge(None, tmp_path / "out", model=saved(model, tmp_path / "model"), precision=precision, block_size=block_size)
    checkpoint = MergedCheckpoint.open(tmp_path / "out")
    assert result["layers"] == len(checkpoint.layers) > 8
    for path, layer in checkpoint.layers.items():
        shipped, wanted = checkpoint.read_linear(path), quantize(weight_NK(model, path), layer["bits"], block_size)
        assert isinstance(shipped, QuantizedTensor)
        assert torch.equal(shipped.codes, wanted.codes)
        assert torch.equal(shipped.scales, wanted.scales)
        weight = weight_NK(model, path)
        error = (dequantize(wanted) - weight).norm() / weight.norm()
        assert layer["error"] == pytest.approx(error.item(), rel=1e-3)


@pytest.mark.parametrize("kind", BUILDERS)
def test_all_other_tensors_stay_as_they_are(kind: str, tmp_path: Path) -> None:
    model = BUILDERS[kind]()
    merge(None, tmp_path / "out", model=saved(model, tmp_path / "model"))
    checkpoint = MergedCheckpoint.open(tmp_path / "out")
    state = model.state_dict()
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    assert set(checkpoint.names()) == set(state) - tied
    plain = [name for name in checkpoint.names() if name.removesuffix(".weight") not in checkpoint.layers]
    assert plain
    for name in plain:
        assert torch.equal(checkpoint.read(name), state[name]), name


def test_embedding_and_head_get_8_bits_and_a_head_of_a_classifier_stays_fp32(tmp_path: Path) -> None:
    result = merge(None, tmp_path / "a", model=saved(tiny_llama(tied=False), tmp_path / "llama"))
    assert {"model.embed_tokens", "lm_head"} <= set(result["layers_8_bits"])
    merge(None, tmp_path / "b", model=saved(tiny_bert(), tmp_path / "bert"))
    layers = MergedCheckpoint.open(tmp_path / "b").layers
    assert layers["bert.embeddings.word_embeddings"]["bits"] == 8
    assert "classifier" not in layers
    assert "bert.embeddings.position_embeddings" not in layers


def test_fp32_changes_nothing(tmp_path: Path) -> None:
    model = tiny_gpt2()
    merge(None, tmp_path / "out", model=saved(model, tmp_path / "model"), precision="fp32")
    checkpoint = MergedCheckpoint.open(tmp_path / "out")
    assert checkpoint.layers == {}
    path = "transformer.h.1.mlp.c_fc"
    assert torch.equal(checkpoint.read(f"{path}.weight"), weight_NK(model, path))  # [N, K], not Conv1D's [K, N]


@pytest.mark.parametrize("precision", ["int4", "fp32"])
def test_merging_a_merged_folder_again_gives_the_same_weights(precision: str, tmp_path: Path) -> None:
    merge(None, tmp_path / "once", model=saved(tiny_gpt2(), tmp_path / "model"), precision=precision)
    merge(None, tmp_path / "twice", model=str(tmp_path / "once"), precision=precision)
    once, twice = MergedCheckpoint.open(tmp_path / "once"), MergedCheckpoint.open(tmp_path / "twice")
    assert once.names() == twice.names()
    # To the last bit but for the scales' own rounding where a block's extreme is not hit by its code.
    assert all(torch.allclose(once.read(name), twice.read(name), rtol=1e-6, atol=0) for name in once.names())


def peft_adapter(model: PreTrainedModel, folder: Path, **options: Any) -> PreTrainedModel:
    """Save a PEFT adapter with random B; return the model with the adapter merged by PEFT, in fp32."""
    torch.manual_seed(1)
    adapted = get_peft_model(model, LoraConfig(r=4, **options))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    adapted.save_pretrained(folder)
    merged: PreTrainedModel = adapted.merge_and_unload()
    return merged


ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("llama", {"task_type": "CAUSAL_LM", "target_modules": "all-linear"}),
    "rslora with patterns": (
        "llama",
        {"target_modules": ["q_proj", "up_proj"], "use_rslora": True,
         "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3}},
    ),
    "dora": ("llama", {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "task_type": "CAUSAL_LM"}),
    "head and biases": ("bert", {"target_modules": ["query", "value"], "task_type": "SEQ_CLS", "bias": "lora_only"}),
    "distilbert's two-layer head": ("distilbert", {"target_modules": ["q_lin"], "task_type": "SEQ_CLS"}),
    "embedding": ("untied llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "head of a tied model": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*:UserWarning", "ignore:.*save_embedding_layers.*:UserWarning")
@pytest.mark.parametrize("name", ADAPTERS)
def test_a_peft_adapter_ships_as_peft_merges_it(name: str, tmp_path: Path) -> None:
    kind, options = ADAPTERS[name]
    model = BUILDERS[kind]()
    reference = saved(model, tmp_path / "model")
    state = {key: value.clone() for key, value in peft_adapter(model, tmp_path / "adapter", **options).state_dict().items()}
    merge(None, tmp_path / "out", adapter=tmp_path / "adapter", model=reference, precision="fp32")
    checkpoint = MergedCheckpoint.open(tmp_path / "out")
    assert len(checkpoint.names()) >= len(state) - 1  # a tied head is not stored
    for key in checkpoint.names():
        path = key.removesuffix(".weight")
        turned = kind == "gpt2" and path.endswith(("c_attn", "c_proj", "c_fc"))
        torch.testing.assert_close(checkpoint.read(key), state[key].t() if turned else state[key], **MERGED_WEIGHT, msg=key)


def test_a_tied_head_that_the_adapter_changed_is_parted_from_the_embedding(tmp_path: Path) -> None:
    model = tiny_llama()
    reference = saved(model, tmp_path / "model")
    before = model.state_dict()["model.embed_tokens.weight"].clone()
    with pytest.warns(UserWarning, match="tie"):
        peft_adapter(model, tmp_path / "adapter", target_modules=["q_proj"], modules_to_save=["lm_head"])
    merge(None, tmp_path / "out", adapter=tmp_path / "adapter", model=reference, precision="fp32")
    checkpoint = MergedCheckpoint.open(tmp_path / "out")
    assert checkpoint.config["tie_word_embeddings"] is False
    assert torch.equal(checkpoint.read("model.embed_tokens.weight"), before)
    assert not torch.equal(checkpoint.read("lm_head.weight"), before)


def test_the_update_that_survives_is_measured(tmp_path: Path) -> None:
    model = tiny_llama()
    reference = saved(model, tmp_path / "model")
    peft_adapter(model, tmp_path / "adapter", target_modules=["q_proj", "v_proj"])
    result = merge(None, tmp_path / "out", adapter=tmp_path / "adapter", model=reference, precision="int8")
    layers = MergedCheckpoint.open(tmp_path / "out").layers
    changed = {path for path, layer in layers.items() if "delta_kept" in layer}
    assert changed == {f"model.layers.{i}.self_attn.{name}_proj" for i in range(2) for name in "qv"}
    for path in changed:
        layer = layers[path]
        assert layer["delta_kept"] == pytest.approx(1.0, abs=0.02)  # int8 is fine enough to keep all of it
        assert layer["delta_noise"] == pytest.approx(layer["error"] / layer["delta"], rel=1e-3)
    assert result["delta_kept"] == pytest.approx(1.0, abs=0.02)
    row = next(row for row in result["table"] if row["layers"] == "model.layers.*.self_attn.q_proj")
    assert (row["count"], row["bits"]) == (2, 8)


def test_an_update_below_half_a_step_is_seen_to_vanish(tmp_path: Path) -> None:
    """Weights that lie on the grid already, and a change too small to leave it: FACTS of every merge into 4 bits."""
    model = tiny_llama()
    merge(None, tmp_path / "grid", model=saved(model, tmp_path / "model"))
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(r=1, target_modules=["up_proj"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.fill_(1e-4)
    adapted.save_pretrained(tmp_path / "adapter")
    result = merge(None, tmp_path / "out", adapter=tmp_path / "adapter", model=str(tmp_path / "grid"))
    assert result["delta_kept"] < 0.5
    assert result["delta_noise"] > 0.8
