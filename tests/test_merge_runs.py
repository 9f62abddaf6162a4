"""Merging runs: what they bring along, and everything that is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertForSequenceClassification, BertModel, LlamaConfig, LlamaForCausalLM

from edgelora.adapters.peft_config import CONFIG
from edgelora.errors import FolderError, ModelError, SettingsError
from edgelora.folder import write_json, write_manifest
from edgelora.merging.merge import merge
from edgelora.models.source import open_model
from edgelora.quant.checkpoint import MergedCheckpoint
from tests.test_merge import bert_config, peft_adapter, saved, tiny_bert, tiny_gpt2, tiny_llama
from tests.tolerances import MERGED_WEIGHT

# PEFT 0.21 asks transformers 5.23 for a property that the latter has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def a_run(folder: Path, reference: str, labels: list[str], **changes: Any) -> Path:
    """Make a run folder of the adapter that `folder` holds."""
    write_json(folder / "tokenizer.json", {"comes": "from the run"})
    source = open_model(reference)
    content = {
        "task": "text-classification", "labels": labels, "settings": {"rank": 4}, "plan": {"base_bits": 32}, "grid": {},
        "results": [{"model": "adapter", "accuracy": 1}],
        "model": {"reference": reference, "fingerprint": source.fingerprint, "license": source.license},
    }  # fmt: skip
    write_manifest(folder, "run", **(content | changes))
    return folder


def test_a_run_brings_its_labels_results_and_tokenizer(tmp_path: Path) -> None:
    base = BertModel(bert_config())  # a checkpoint without head and without "bert." in its names
    reference = saved(base, tmp_path / "model")
    model = BertForSequenceClassification.from_pretrained(reference, num_labels=3)
    state = peft_adapter(model, tmp_path / "run", target_modules=["query"], task_type="SEQ_CLS").state_dict()
    run = a_run(tmp_path / "run", reference, ["no", "perhaps", "yes"])
    result = merge(run, tmp_path / "out")
    checkpoint = MergedCheckpoint.open(tmp_path / "out")
    assert (result["task"], checkpoint.task) == ("text-classification", "text-classification")
    assert checkpoint.labels == ["no", "perhaps", "yes"]
    assert checkpoint.config["id2label"] == {"0": "no", "1": "perhaps", "2": "yes"}
    assert checkpoint.config["architectures"] == ["BertForSequenceClassification"]
    assert checkpoint.manifest["results"] == [{"model": "adapter", "accuracy": 1}]
    assert checkpoint.manifest["settings"] == {"rank": 4}
    assert checkpoint.manifest["model"]["reference"] == reference
    assert json.loads((tmp_path / "out" / "tokenizer.json").read_text()) == {"comes": "from the run"}
    torch.testing.assert_close(checkpoint.read("classifier.weight"), state["classifier.weight"], **MERGED_WEIGHT)


def test_a_pooler_that_was_trained_whole_stays_fp32(tmp_path: Path) -> None:
    reference = saved(BertModel(bert_config(), add_pooling_layer=False), tmp_path / "model")
    model = BertForSequenceClassification.from_pretrained(reference, num_labels=3)
    options = {"target_modules": ["query"], "modules_to_save": ["pooler", "classifier"], "task_type": "SEQ_CLS"}
    state = peft_adapter(model, tmp_path / "adapter", **options).state_dict()
    merge(None, tmp_path / "out", adapter=tmp_path / "adapter", model=reference)
    checkpoint = MergedCheckpoint.open(tmp_path / "out")
    assert checkpoint.labels == ["LABEL_0", "LABEL_1", "LABEL_2"]
    for name in ("bert.pooler.dense", "classifier"):
        assert name not in checkpoint.layers
        assert torch.equal(checkpoint.read(f"{name}.weight"), state[f"{name}.weight"])


def test_a_run_of_another_model_is_refused(tmp_path: Path) -> None:
    reference = saved(tiny_bert(), tmp_path / "model")
    peft_adapter(tiny_bert(), tmp_path / "run", target_modules=["query"], task_type="SEQ_CLS")
    fingerprint = {"reference": reference, "fingerprint": "0" * 64, "license": None}
    run = a_run(tmp_path / "run", reference, [], model=fingerprint)
    with pytest.raises(FolderError, match="was trained on another model than"):
        merge(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_with_too_few_labels_is_refused(tmp_path: Path) -> None:
    reference = saved(tiny_bert(), tmp_path / "model")
    peft_adapter(tiny_bert(), tmp_path / "run", target_modules=["query"], task_type="SEQ_CLS")
    with pytest.raises(FolderError, match="the classification head has 5 outputs for 2 labels"):
        merge(a_run(tmp_path / "run", reference, ["a", "b"]), tmp_path / "out")


def test_labels_that_the_run_has_not_learned_are_refused(tmp_path: Path) -> None:
    """Where the head does not tell how many there are, the labels that the run wrote into config.json count."""
    reference = saved(tiny_bert(), tmp_path / "model")
    peft_adapter(tiny_bert(), tmp_path / "run", target_modules=["query"], task_type="SEQ_CLS")
    run = a_run(tmp_path / "run", reference, ["a", "b", "c"], task="token-classification")
    write_json(run / "config.json", {"id2label": {"0": "a", "1": "b"}})
    with pytest.raises(FolderError, match="the classification head has 2 outputs for 3 labels"):
        merge(run, tmp_path / "out")


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    peft_adapter(tiny_gpt2(), tmp_path / "adapter", target_modules=["c_attn"], task_type="CAUSAL_LM", fan_in_fan_out=True)
    with pytest.raises(
        FolderError, match=r"the adapter changes what this model does not have:\n  transformer\.h\.0\.attn\.c_attn"
    ):
        merge(None, tmp_path / "out", adapter=tmp_path / "adapter", model=saved(tiny_llama(), tmp_path / "model"))


def test_an_embedding_of_another_size_is_refused(tmp_path: Path) -> None:
    grown = tiny_llama(tied=False)
    reference = saved(grown, tmp_path / "model")
    grown.resize_token_embeddings(100)
    peft_adapter(grown, tmp_path / "adapter", target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    with pytest.raises(
        FolderError, match=r"other shapes:\n  model\.embed_tokens\.weight is \[100, 64\], the model's is \[96, 64\]"
    ):
        merge(None, tmp_path / "out", adapter=tmp_path / "adapter", model=reference)


def test_a_model_without_a_classification_head_is_refused(tmp_path: Path) -> None:
    reference = saved(BertModel(bert_config()), tmp_path / "model")
    with pytest.raises(ModelError, match="the model has no head that EdgeLoRA ships: BertModel"):
        merge(None, tmp_path / "out", model=reference)


def test_wrong_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match='precision "int5" is not known; allowed: int2, int3, int4, int8, fp32'):
        merge(None, tmp_path / "out", model="x", precision="int5")
    with pytest.raises(SettingsError, match="block size 48 is not allowed; allowed: 32, 64"):
        merge(None, tmp_path / "out", model="x", block_size=48)
    with pytest.raises(SettingsError, match="nothing to merge"):
        merge(None, tmp_path / "out")


def test_a_base_of_packed_weights_is_refused(tmp_path: Path) -> None:
    reference = Path(saved(tiny_llama(), tmp_path / "model"))
    tensors = load_file(reference / "model.safetensors")
    path = "model.layers.0.self_attn.q_proj.weight"
    tensors |= {path: torch.zeros(64 * 64 // 2, 1, dtype=torch.uint8), f"{path}.absmax": torch.zeros(64)}
    save_file(tensors, reference / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((reference / "config.json").read_text())
    packed = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    write_json(reference / "config.json", {**config, "quantization_config": packed})
    with pytest.raises(ModelError, match=r"holds weights packed by bitsandbytes \(nf4\)"):
        merge(None, tmp_path / "out", model=str(reference))


def test_the_base_and_the_task_of_an_adapter_are_held_against_the_model(tmp_path: Path) -> None:
    model = tiny_bert()
    reference = saved(model, tmp_path / "model")
    peft_adapter(model, tmp_path / "adapter", target_modules=["query"], task_type="SEQ_CLS")
    config = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    write_json(tmp_path / "adapter" / CONFIG, {**config, "base_model_name_or_path": "somebody/another-bert"})
    with pytest.raises(SettingsError, match=r'nothing to merge.*; the adapter was trained on "somebody/another-bert"'):
        merge(None, tmp_path / "out", adapter=tmp_path / "adapter")
    result = merge(None, tmp_path / "out", adapter=tmp_path / "adapter", model=reference)
    assert result["notes"][0].startswith('the adapter was trained on "somebody/another-bert" and goes into ')
    write_json(tmp_path / "adapter" / CONFIG, {**config, "task_type": "IMAGE_CLS"})
    with pytest.raises(FolderError, match="the adapter is for the task IMAGE_CLS; EdgeLoRA ships CAUSAL_LM"):
        merge(None, tmp_path / "out2", adapter=tmp_path / "adapter", model=reference)


def test_every_misfit_is_listed(tmp_path: Path) -> None:
    small = LlamaForCausalLM(LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    ))  # fmt: skip
    peft_adapter(small, tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    with pytest.raises(FolderError) as caught:
        merge(None, tmp_path / "out", adapter=tmp_path / "adapter", model=saved(tiny_llama(), tmp_path / "model"))
    lines = caught.value.message.splitlines()
    assert lines[0] == "the adapter was made for tensors of other shapes:"
    assert sorted(lines[1:])[0] == "  model.layers.0.mlp.down_proj is adapted as [32, 80], the model's is [64, 80]"
    assert len(lines) == 5
