"""Everything that PEFT's LoRA writes, made by PEFT on a tiny model: what is merged equals PEFT's, weights and logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import KasaConfig, MontecloraConfig, VeloraConfig
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from edgelora.adapters.peft_config import CONFIG
from edgelora.merging.merge import merge
from edgelora.quant.checkpoint import MergedCheckpoint
from tests.test_merge import BUILDERS, saved
from tests.tolerances import MERGED_WEIGHT, PART_OF_WEIGHT, PEFT_LOGITS, REDRAWN_PISSA

# PEFT 0.21 asks transformers 5.23 for a property that the latter has renamed.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore:.*rank_pattern keys did not match.*:RuntimeWarning"),
]
IDS = torch.tensor([[5, 9, 2, 31, 7, 40, 11]])

# name → (model, options of LoraConfig)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "rank and alpha by pattern": ("llama", {
        "target_modules": ["q_proj", "down_proj"], "rank_pattern": {r"layers\.1\..*q_proj": 2, "down_proj": 6},
        "alpha_pattern": {"layers.0.self_attn.q_proj": 5}, "use_rslora": True}),
    "some layers": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}),
    "excluded": ("llama", {"target_modules": "all-linear", "exclude_modules": ["down_proj"]}),
    "a regular expression": ("llama", {"target_modules": r".*layers\.0\.self_attn\.(q|k)_proj"}),
    "dora and rslora": ("llama", {"target_modules": "all-linear", "use_dora": True, "use_rslora": True}),
    "dora of an embedding": ("untied llama", {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}),
    "lora of a tied embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "lora of a tied pair": ("llama", {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}),
    "lora of a tied head": ("llama", {"target_modules": ["lm_head", "q_proj"]}),
    "trained embedding": ("untied llama", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
    "trained tied embedding": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "trained tied pair": (
        "llama", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "trained norms and layers": (
        "llama", {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm", "norm", "mlp"]}),
    "trained conv1d": ("gpt2", {"target_modules": ["c_attn"], "modules_to_save": ["c_fc", "ln_f"], "fan_in_fan_out": True}),
    "single tokens": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [1, 5, 9]}),
    "single tokens of two layers": ("untied llama", {
        "target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [1, 2], "lm_head": [3]}}),
    "pissa": ("llama", {"target_modules": ["q_proj", "up_proj", "down_proj"], "init_lora_weights": "pissa", "lora_alpha": 3}),
    "pissa of conv1d": ("gpt2", {"target_modules": ["c_attn"], "init_lora_weights": "pissa", "fan_in_fan_out": True}),
    "pissa with dora": ("llama", {"target_modules": ["q_proj"], "init_lora_weights": "pissa", "use_dora": True}),
    "olora": ("llama", {"target_modules": ["q_proj", "k_proj", "down_proj"], "init_lora_weights": "olora", "use_rslora": True}),
    "olora of conv1d": ("gpt2", {"target_modules": [r"attn.c_proj"], "init_lora_weights": "olora", "fan_in_fan_out": True}),
    "mica": ("llama", {"target_modules": ["q_proj"], "init_lora_weights": "mica"}),
    "orthogonal": ("llama", {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"}),
    "kasa": ("llama", {"target_modules": ["q_proj", "down_proj"], "kasa_config": KasaConfig()}),
    "velora": ("llama", {"target_modules": ["q_proj"], "velora_config": VeloraConfig(num_groups=4)}),
    "monteclora": ("llama", {"target_modules": ["q_proj"], "monteclora_config": MontecloraConfig()}),
    "parameters": ("llama", {
        "target_modules": [], "target_parameters": ["mlp.down_proj.weight", "up_proj.weight"],
        "rank_pattern": {"up_proj.weight": 2}}),
    "small embeddings": (
        "bert", {"target_modules": ["query", "word_embeddings", "token_type_embeddings"], "task_type": "SEQ_CLS"}),
    "shifted biases": ("bert", {"target_modules": ["query"], "lora_bias": True, "task_type": "SEQ_CLS"}),
    "all biases": ("gpt2", {"target_modules": ["c_attn", "wpe"], "bias": "all", "fan_in_fan_out": True}),
}  # fmt: skip
# Of these, head and embedding are one tensor no more.
PARTED = ("lora of a tied embedding", "lora of a tied head", "trained tied embedding")
# PEFT's merge_and_unload changes one tensor there that its own forward pass keeps apart, or changes it twice.
TIED_IN_PEFT = (*PARTED, "lora of a tied pair")


def train(model: PreTrainedModel, **options: Any) -> Any:
    """Return PEFT's model with everything that it trains moved from where it began."""
    torch.manual_seed(1)
    theirs = get_peft_model(model, LoraConfig(r=4, **options)).eval()
    with torch.no_grad():
        for parameter in {id(p): p for p in theirs.parameters() if p.requires_grad}.values():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return theirs


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    return found


def shipped_model(folder: Path) -> PreTrainedModel:
    """Return a merged fp32 folder as transformers' model."""
    checkpoint = MergedCheckpoint.open(folder)
    config = AutoConfig.for_model(**checkpoint.config)
    kind = AutoModelForSequenceClassification if checkpoint.task == "text-classification" else AutoModelForCausalLM
    model: PreTrainedModel = kind.from_config(config).eval()
    turned = config.model_type == "gpt2"
    state = {}
    for name in checkpoint.names():
        tensor = checkpoint.read(name)
        conv1d = turned and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        state[name] = tensor.t() if conv1d else tensor
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert unexpected == []
    assert set(missing) <= ({"lm_head.weight"} if config.tie_word_embeddings else set())
    model.tie_weights()
    return model


@pytest.mark.parametrize("name", CASES)
def test_an_adapter_ships_as_peft_computes_it(name: str, tmp_path: Path) -> None:
    kind, options = CASES[name]
    torch.manual_seed(0)
    model = BUILDERS[kind]().eval()
    reference = saved(model, tmp_path / "model")
    before = logits(model)
    theirs = train(model, **options)
    theirs.save_pretrained(tmp_path / "adapter")
    wanted = logits(theirs)
    result = merge(None, tmp_path / "out", adapter=tmp_path / "adapter", model=reference, precision="fp32")
    assert (wanted - before).abs().max() > 20 * PEFT_LOGITS["atol"]
    ours = shipped_model(tmp_path / "out")
    torch.testing.assert_close(logits(ours), wanted, **PEFT_LOGITS)
    assert result["notes"] == []
    if kind == "llama":
        assert ours.config.tie_word_embeddings == (name not in PARTED)
    if name not in TIED_IN_PEFT:
        state, tolerance = theirs.merge_and_unload().state_dict(), PART_OF_WEIGHT if "pissa" in name else MERGED_WEIGHT
        for key, tensor in ours.state_dict().items():
            torch.testing.assert_close(tensor, state[key], **tolerance, msg=f"{name}: {key}")


def test_pissa_drawn_at_random_is_merged_with_the_exact_principal_part(tmp_path: Path) -> None:
    model = BUILDERS["llama"]().eval()
    saved(model, tmp_path / "model")
    weight = model.get_submodule("model.layers.0.self_attn.q_proj").weight
    u, s, v = torch.linalg.svd(weight.detach())
    weight.data = u @ torch.diag(4 * 0.5 ** torch.arange(len(s))) @ v  # trained weights have a few large singular values
    model.save_pretrained(tmp_path / "model")
    theirs = train(model, target_modules=["layers.0.self_attn.q_proj"], init_lora_weights="pissa_niter_16")
    theirs.save_pretrained(tmp_path / "adapter")
    result = merge(None, tmp_path / "out", adapter=tmp_path / "adapter", model=str(tmp_path / "model"), precision="fp32")
    torch.testing.assert_close(logits(shipped_model(tmp_path / "out")), logits(theirs), **REDRAWN_PISSA)
    assert "began with pissa_niter_16, a random approximation that was not stored" in result["notes"][0]


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_converted_adapter_is_plain(start: str, tmp_path: Path) -> None:
    model = BUILDERS["llama"]().eval()
    reference = saved(model, tmp_path / "model")
    torch.manual_seed(1)
    options: dict[str, Any] = {"rank_pattern": {"up_proj": 2}, "lora_alpha": 6}
    theirs = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=start, **options))
    theirs.save_pretrained(tmp_path / "begun")
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    wanted = logits(theirs.eval())
    theirs.save_pretrained(tmp_path / "adapter", path_initial_model_for_weight_conversion=str(tmp_path / "begun"))
    assert json.loads((tmp_path / "adapter" / CONFIG).read_text())["init_lora_weights"] is True
    merge(None, tmp_path / "out", adapter=tmp_path / "adapter", model=reference, precision="fp32")
    torch.testing.assert_close(logits(shipped_model(tmp_path / "out")), wanted, **PEFT_LOGITS)


@pytest.mark.parametrize("kind", ["llama", "untied llama"])
@pytest.mark.parametrize("size", [100, 90])
def test_a_resized_vocabulary_ships(kind: str, size: int, tmp_path: Path) -> None:
    model = BUILDERS[kind]()
    reference = saved(model, tmp_path / "model")
    model.resize_token_embeddings(size)
    theirs = train(model, target_modules=["q_proj"])
    theirs.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    (tmp_path / "adapter" / "tokenizer.json").write_text('{"knows": "the new tokens"}')
    wanted = logits(theirs)
    merge(None, tmp_path / "out", adapter=tmp_path / "adapter", model=reference, precision="fp32")
    ours = shipped_model(tmp_path / "out")
    assert (ours.config.vocab_size, ours.config.tie_word_embeddings) == (size, kind == "llama")
    torch.testing.assert_close(logits(ours), wanted, **PEFT_LOGITS)
    assert json.loads((tmp_path / "out" / "tokenizer.json").read_text()) == {"knows": "the new tokens"}
    merge(None, tmp_path / "int4", adapter=tmp_path / "adapter", model=reference)
    assert MergedCheckpoint.open(tmp_path / "int4").layers["model.embed_tokens"]["shape"] == [size, 64]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_factors_of_16_bits_are_merged_in_fp32(dtype: torch.dtype, tmp_path: Path) -> None:
    model = BUILDERS["llama"]()
    reference = saved(model, tmp_path / "model")
    theirs = train(model, target_modules=["q_proj"])
    adapter = theirs.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    adapter.lora_A["default"].to(dtype)
    adapter.lora_B["default"].to(dtype)
    a, b = adapter.lora_A["default"].weight.float(), adapter.lora_B["default"].weight.float()
    theirs.save_pretrained(tmp_path / "adapter")
    merge(None, tmp_path / "out", adapter=tmp_path / "adapter", model=reference, precision="fp32")
    found = MergedCheckpoint.open(tmp_path / "out").read("model.layers.0.self_attn.q_proj.weight")
    wanted = adapter.base_layer.weight + (8 / 4) * (b @ a)
    torch.testing.assert_close(found, wanted.detach(), **MERGED_WEIGHT)
