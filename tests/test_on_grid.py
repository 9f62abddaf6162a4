"""On-grid training: what the last forward pass computed with is what the merged folder holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import save_decoder
from tolerances import MERGED_FORWARD

from edgelora.adapters import inject, peft_format
from edgelora.adapters.lora import LoRA, LoRASettings
from edgelora.config import FinetuneConfig
from edgelora.evaluate import evaluate
from edgelora.folder import read_manifest
from edgelora.merge import merge
from edgelora.models.load import load_model
from edgelora.models.source import open_model
from edgelora.quant.checkpoint import MergedCheckpoint
from edgelora.quant.grid import QuantizedTensor, dequantize, quantize
from edgelora.train import on_grid
from edgelora.train.finetune import finetune
from edgelora.train.optimizer import make_optimizer
from tests.test_lora import make_linear, moved

SIZES = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grid")
    save_decoder(folder / "model", **SIZES)
    rows = [f'{{"prompt": "say {word}", "completion": "{word} {word}"}}' for word in ("one", "two", "six", "ten", "red", "sky")]
    (folder / "rows.jsonl").write_text("\n".join(rows * 2))
    config = FinetuneConfig(threads=1, max_steps=4, batch_size=4, learning_rate=1e-2, evaluations=1, base_bits=32)
    finetune(str(folder / "model"), str(folder / "rows.jsonl"), folder / "run", config)
    return folder / "run"


def test_the_merged_codes_are_those_of_the_last_forward(run: Path, tmp_path: Path) -> None:
    manifest = read_manifest(run, "run")
    assert set(manifest["grid"]["bits"].values()) <= {4, 8}
    merge(run, tmp_path / "merged")
    merged = MergedCheckpoint.open(tmp_path / "merged")
    model = load_model(open_model(str(run)), "text-generation", base_bits=32)
    peft_format.apply(model, peft_format.load(run))
    inject.put_on_grid(model, manifest["grid"])
    found = inject.adapters(model)
    assert len(found) == len(manifest["grid"]["bits"])
    for path, adapter in found.items():
        ours, shipped = adapter.rounded(), merged.read_linear(path)
        assert isinstance(shipped, QuantizedTensor)
        assert torch.equal(ours.codes, shipped.codes), path
        assert torch.equal(ours.scales, shipped.scales), path


def test_evaluate_measures_what_was_trained_and_float_what_it_would_be_unrounded(run: Path) -> None:
    trained = evaluate(run, generate=False)["metrics"]["loss"]
    assert trained == pytest.approx(read_manifest(run, "run")["results"][-1]["loss"], rel=1e-6)
    assert evaluate(run, generate=False, float_=True)["metrics"]["loss"] != trained


def test_where_it_applies() -> None:
    assert on_grid.applies(FinetuneConfig(), 8)
    assert on_grid.applies(FinetuneConfig(precision="int8"), 32)
    assert not on_grid.applies(FinetuneConfig(precision="fp32"), 32)
    assert not on_grid.applies(FinetuneConfig(dora=True), 32)
    assert not on_grid.applies(FinetuneConfig(dropout=0.1), 32)
    assert not on_grid.applies(FinetuneConfig(), 4)


def test_int8_is_eight_bits_everywhere(tmp_path: Path) -> None:
    model = load_model(open_model(str(save_decoder(tmp_path / "model", **SIZES))), "text-generation", base_bits=32)
    inject.attach(model, LoRASettings(rank=2), "all-linear")
    assert set(on_grid.choose_grid(model, FinetuneConfig(precision="int8"))["bits"].values()) == {8}


@pytest.mark.parametrize("bits", [4, 8])
def test_on_the_grid_it_computes_with_the_rounded_weight_and_has_the_gradients_of_lora(bits: int) -> None:
    layer = moved(LoRA.from_base(make_linear(), LoRASettings(rank=4, alpha=6)))
    layer.grid = (bits, 32)
    x, wanted = torch.randn(5, 64, requires_grad=True), torch.randn(5, 24)
    (layer(x) * wanted).sum().backward()
    ours = [x.grad, layer.lora_A.grad, layer.lora_B.grad]
    x.grad = layer.lora_A.grad = layer.lora_B.grad = None
    shipped = dequantize(quantize(layer.merge(), bits, 32))
    update = 1.5 * layer.lora_B @ layer.lora_A
    expected = x @ (shipped + update - update.detach()).t() + layer.base.bias  # straight through
    torch.testing.assert_close(layer(x), expected, **MERGED_FORWARD)
    (expected * wanted).sum().backward()
    for left, right in zip(ours, [x.grad, layer.lora_A.grad, layer.lora_B.grad], strict=True):
        torch.testing.assert_close(left, right, **MERGED_FORWARD)


def test_the_rounded_weight_follows_every_update() -> None:
    layer = moved(LoRA.from_base(make_linear(), LoRASettings(rank=4)))
    layer.grid = (4, 32)
    before = layer.rounded()
    assert layer.rounded() is before
    codes = before.codes.clone()
    optimizer = make_optimizer(layer, 0.5, 0.0)
    layer(torch.randn(5, 64)).sum().backward()
    optimizer.step()
    assert not torch.equal(layer.rounded().codes, codes)
    assert torch.equal(layer.rounded().codes, quantize(layer.merge(), 4, 32).codes)
