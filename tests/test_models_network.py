"""Encoders with a classification head: equal to transformers, heads fresh or kept, base-only checkpoints, low bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from tolerances import LOGITS_FP32

from edgelora.errors import ModelError
from edgelora.models.linear import FrozenEmbedding, FrozenLinear
from edgelora.models.load import load_model
from edgelora.models.network import Network
from edgelora.models.recompute import Keeping
from edgelora.models.source import open_model

IDS = torch.tensor([[262, 5, 9, 200, 31, 263], [262, 7, 90, 263, 260, 260]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
BATCH = {"input_ids": IDS, "attention_mask": MASK}


def load(folder: Path, bits: int = 32, labels: list[str] | None = None) -> Network:
    model = load_model(open_model(str(folder)), "text-classification", base_bits=bits, labels=labels or [])
    assert isinstance(model, Network)
    return model.eval()


@pytest.mark.parametrize("family", tiny.ENCODERS)
def test_logits_equal_transformers(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    folder = tiny.save_encoder(tmp_path / "model", family)
    reference = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    ours = load(folder)
    with torch.no_grad():
        wanted = reference(input_ids=IDS, attention_mask=MASK).logits
        torch.testing.assert_close(ours.logits(**BATCH), wanted, **LOGITS_FP32)
    assert len(ours.linears()) >= 8
    assert not any(name.startswith(ours.head_names) for name in ours.linears())
    assert all(p.requires_grad == n.startswith(ours.head_names) for n, p in ours.network.named_parameters())


@pytest.mark.parametrize("family", tiny.ENCODERS)
def test_low_bits_train_the_head_and_stay_close(family: str, tmp_path: Path) -> None:
    folder = tiny.save_encoder(tmp_path / "model", family)
    full, small = load(folder, 32), load(folder, 8)
    kinds = [type(module) for module in small.network.modules()]
    assert FrozenLinear in kinds
    assert FrozenEmbedding in kinds
    with torch.no_grad():
        assert torch.nn.functional.cosine_similarity(full.logits(**BATCH), small.logits(**BATCH)).min() > 0.99
    small.logits(**BATCH).square().sum().backward()
    wanted = {name: parameter.grad.clone() for name, parameter in small.head_parameters().items()}
    small.zero_grad()
    small.keeping = Keeping(0)
    small.logits(**BATCH).square().sum().backward()
    for name, parameter in small.head_parameters().items():
        torch.testing.assert_close(parameter.grad, wanted[name], **LOGITS_FP32)
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in small.head_parameters().values())


def test_base_only_checkpoint_gets_a_fresh_seeded_head(tmp_path: Path) -> None:
    folder = tiny.save_encoder(tmp_path / "model", "bert", base_only=True)
    torch.manual_seed(1)
    first = load(folder, labels=["a", "b", "c", "d"])
    torch.manual_seed(1)
    second = load(folder, labels=["a", "b", "c", "d"])
    torch.manual_seed(2)
    third = load(folder, labels=["a", "b", "c", "d"])
    assert first.head_names == ("classifier",)
    assert first.logits(**BATCH).shape == (2, 4)
    assert torch.equal(first.logits(**BATCH), second.logits(**BATCH))
    assert not torch.equal(first.logits(**BATCH), third.logits(**BATCH))
    assert first.config["id2label"] == {0: "a", 1: "b", 2: "c", 3: "d"}


def test_base_without_pooler_trains_one(tmp_path: Path) -> None:
    import safetensors.torch

    folder = tiny.save_encoder(tmp_path / "model", "bert", base_only=True)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("pooler.")}
    safetensors.torch.save_file(kept, folder / "model.safetensors")
    model = load(folder, labels=["a", "b"])
    assert set(model.head_names) == {"classifier", "bert.pooler"}
    assert {"bert.pooler.dense.weight", "classifier.weight"} <= set(model.head_parameters())


def test_missing_tensors_are_listed_at_once(tmp_path: Path) -> None:
    import safetensors.torch

    folder = tiny.save_encoder(tmp_path / "model", "bert")
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    del tensors["bert.encoder.layer.0.output.dense.weight"]
    tensors["bert.encoder.layer.1.attention.self.query.bias"] = torch.zeros(3)
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelError) as caught:
        load(folder)
    assert caught.value.message == (
        f"{folder} does not hold the model of its config.json:\n"
        "  bert.encoder.layer.0.output.dense.weight: missing\n"
        "  bert.encoder.layer.1.attention.self.query.bias: shape [3], config.json asks for [32]"
    )


def test_no_classifier_for_the_model_type(tmp_path: Path) -> None:
    folder = tiny.save_encoder(tmp_path / "model", "bert")
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"model_type": "bert"', '"model_type": "bart_unknown"'))
    with pytest.raises(ModelError, match='does not know the model type "bart_unknown"'):
        load(folder)
