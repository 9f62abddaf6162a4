"""Adapters in PEFT's format, against the real PEFT: what it writes loads here, what is written here loads there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tolerances import PEFT_LOGITS
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from edgelora.adapters.lora import Factors
from edgelora.adapters.peft_config import CONFIG
from edgelora.adapters.peft_format import AdapterFile, load, save
from edgelora.adapters.weight_space import merged_weight
from edgelora.errors import FolderError

# PEFT 0.21 asks transformers 5.23 for a property that the latter has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

IDS = torch.tensor([[5, 9, 2, 31, 7, 40, 11]])


def tiny_llama() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    return LlamaForCausalLM(config).eval()


def tiny_gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32)).eval()


def tiny_bert() -> PreTrainedModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_labels=5
    )
    return BertForSequenceClassification(config).eval()


BUILDERS = {"llama": tiny_llama, "gpt2": tiny_gpt2, "bert": tiny_bert}


def merge_into(model: PreTrainedModel, adapter: AdapterFile) -> None:
    """Put the merged weights and the saved tensors into a transformers model."""
    used = set()
    for path, module in model.named_modules():
        if path in adapter.factors:
            used.add(path)
            transposed = isinstance(module, Conv1D)
            weight_NK = module.weight.data.t() if transposed else module.weight.data
            if isinstance(module, nn.Embedding):
                weight_NK = module.weight.data
            merged = merged_weight(adapter, path, weight_NK)
            module.weight.data = merged.t().contiguous() if transposed else merged
    assert used == set(adapter.factors)
    state = model.state_dict()
    assert set(adapter.saved_modules) <= set(state)
    model.load_state_dict({**state, **adapter.saved_modules})


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    return found


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    "all-linear": ("llama", {"target_modules": "all-linear", "use_rslora": True}),
    "dora": ("llama", {"target_modules": "all-linear", "use_dora": True}),
    "patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "down_proj", "o_proj"],
            "rank_pattern": {"down_proj": 6, "layers.1.self_attn.q_proj": 2},
            "alpha_pattern": {"model.layers.0.self_attn.q_proj": 5, "o_proj": 3},
        },
    ),
    "layers": ("llama", {"target_modules": ["q_proj", "gate_proj"], "layers_to_transform": [1]}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "gpt2-dora": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "use_dora": True}),
    "gpt2-bias-only": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "lora_only"}),
    "gpt2-bias-all": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "all"}),
    "bert-head": ("bert", {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}),
    "bert-bias-all": ("bert", {"target_modules": ["query", "value"], "task_type": "SEQ_CLS", "bias": "all"}),
    "embedding": ("gpt2", {"target_modules": ["wpe", "c_attn"], "fan_in_fan_out": True}),
}


@pytest.mark.filterwarnings("ignore:.*lora_only.*", "ignore:.*fan_in_fan_out.*")
@pytest.mark.parametrize("case", CASES)
def test_adapter_of_peft_loads_here(case: str, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    family, options = CASES[case]
    theirs = get_peft_model(BUILDERS[family](), LoraConfig(r=4, lora_alpha=8, **options))
    torch.manual_seed(1)
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path)
    adapter = load(tmp_path)
    ours = BUILDERS[family]()
    before = logits(ours)
    if options.get("task_type") == "SEQ_CLS":
        assert adapter.modules_to_save == ("classifier", "score")
        assert "classifier.weight" in adapter.saved_modules
    merge_into(ours, adapter)
    wanted = logits(theirs.eval())
    assert (before - wanted).abs().max() > 0.01  # the adapter does something
    torch.testing.assert_close(logits(ours), wanted, **PEFT_LOGITS)


def random_factors(
    model: PreTrainedModel, paths: dict[str, int], *, dora: bool = False, scale: float = 2.0
) -> dict[str, Factors]:
    generator = torch.Generator().manual_seed(2)
    found = {}
    for path, rank in paths.items():
        module = model.get_submodule(path)
        rows, columns = module.weight.shape[::-1] if isinstance(module, Conv1D) else module.weight.shape
        a, b = (torch.randn(*shape, generator=generator) * 0.1 for shape in ((rank, columns), (rows, rank)))
        magnitude = 1 + torch.rand(rows, generator=generator) if dora else None
        found[path] = Factors(a, b, scale, magnitude)
    return found


LLAMA_PATHS = [f"model.layers.{i}.self_attn.{name}_proj" for i in range(2) for name in "qkv"]


@pytest.mark.parametrize(
    ("family", "ranks", "options"),
    [
        ("llama", {LLAMA_PATHS[0]: 4, LLAMA_PATHS[2]: 4, LLAMA_PATHS[3]: 4}, {}),
        ("llama", dict.fromkeys(LLAMA_PATHS, 4), {"rslora": True}),
        ("llama", {LLAMA_PATHS[0]: 4, LLAMA_PATHS[3]: 2, LLAMA_PATHS[4]: 4}, {"rslora": True}),
        ("llama", dict.fromkeys(LLAMA_PATHS, 3), {"dora": True}),
        ("gpt2", {"transformer.h.0.attn.c_attn": 4, "transformer.h.1.mlp.c_fc": 4}, {"transposed": True}),
        (
            "bert",
            {"bert.encoder.layer.0.attention.self.query": 4},
            {"modules_to_save": ("classifier",), "task_type": "SEQ_CLS"},
        ),
    ],
)
def test_adapter_written_here_loads_in_peft(
    family: str, ranks: dict[str, int], options: dict[str, Any], tmp_path: Path
) -> None:
    from peft import PeftModel

    model = BUILDERS[family]()
    factors = random_factors(model, ranks, dora=options.pop("dora", False))
    saved = {}
    if family == "bert":
        saved = {name: torch.randn(p.shape) for name, p in model.state_dict().items() if name.startswith("classifier.")}
    adapter = AdapterFile(factors, saved, **options)
    paths = LLAMA_PATHS if family == "llama" else []
    save(adapter, tmp_path, paths=paths)
    theirs = PeftModel.from_pretrained(BUILDERS[family](), tmp_path).eval()
    merge_into(model, adapter)
    torch.testing.assert_close(logits(theirs), logits(model), **PEFT_LOGITS)
    again = load(tmp_path)
    assert {path: f.scale for path, f in again.factors.items()} == pytest.approx({path: f.scale for path, f in factors.items()})
    for path, found in again.factors.items():
        assert torch.equal(found.a, factors[path].a)
        assert torch.equal(found.b, factors[path].b)


def test_short_target_names_only_when_they_mean_the_same(tmp_path: Path) -> None:
    factors = random_factors(tiny_llama(), {path: 2 for path in LLAMA_PATHS if path.endswith("q_proj")})
    save(AdapterFile(factors), tmp_path, paths=LLAMA_PATHS)
    assert json.loads((tmp_path / CONFIG).read_text())["target_modules"] == ["q_proj"]
    save(AdapterFile({LLAMA_PATHS[0]: factors[LLAMA_PATHS[0]]}), tmp_path, paths=LLAMA_PATHS)
    assert json.loads((tmp_path / CONFIG).read_text())["target_modules"] == [LLAMA_PATHS[0]]


def test_wrong_shape_is_refused() -> None:
    adapter = AdapterFile({"a.q_proj": Factors(torch.zeros(2, 4), torch.zeros(6, 2), 1.0)})
    assert merged_weight(adapter, "a.k_proj", torch.ones(3, 3, dtype=torch.bfloat16)).dtype == torch.float32
    with pytest.raises(
        FolderError, match=r"the adapter of a.q_proj is for a weight of shape \[6, 4\]; this model's is \[6, 5\]"
    ):
        merged_weight(adapter, "a.q_proj", torch.zeros(6, 5))
