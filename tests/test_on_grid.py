"""On-grid training: what the last step left is what the merged folder holds; gradients, learned scales, warm-up."""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import save_decoder
from tolerances import MERGED_FORWARD

from edgelora.adapters import inject, learned_scales, peft_format
from edgelora.adapters.lora import LoRA, LoRASettings
from edgelora.config import FinetuneConfig
from edgelora.errors import FolderError, SettingsError
from edgelora.evaluate import evaluate
from edgelora.export.adapters import refuse_unbranched
from edgelora.folder import read_manifest
from edgelora.merging.merge import merge
from edgelora.models import scale_gradient
from edgelora.models.linear import FrozenLinear
from edgelora.models.load import load_model
from edgelora.models.source import open_model
from edgelora.quant.checkpoint import MergedCheckpoint
from edgelora.quant.grid import QuantizedTensor, dequantize, quantize, round_to_int8, unpack
from edgelora.train import on_grid
from edgelora.train.checkpoint import State
from edgelora.train.finetune import finetune
from edgelora.train.loop import Trainer
from edgelora.train.optimizer import make_optimizer
from tests.test_lora import make_linear, moved

SIZES = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}


@dataclass(frozen=True)
class Trained:
    """A run, and the rounded layers as they were when its last step was done."""

    folder: Path
    last: dict[str, QuantizedTensor]


def train(folder: Path, **settings: Any) -> Trained:
    save_decoder(folder / "model", **SIZES)
    rows = [f'{{"prompt": "say {word}", "completion": "{word} {word}"}}' for word in ("one", "two", "six", "ten", "red", "sky")]
    (folder / "rows.jsonl").write_text("\n".join(rows * 2))
    last: dict[str, QuantizedTensor] = {}
    run = Trainer.run

    def watched(trainer: Trainer) -> State:
        state = run(trainer)
        for path, adapter in inject.adapters(trainer.job.model).items():
            rounded = adapter.rounded()
            last[path] = dataclasses.replace(rounded, codes=rounded.codes.clone(), scales=rounded.scales.clone())
        return state

    config = FinetuneConfig(threads=1, max_steps=4, batch_size=4, learning_rate=1e-2, evaluations=1, **settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "run", watched)
        finetune(str(folder / "model"), str(folder / "rows.jsonl"), folder / "run", config)
    return Trained(folder / "run", last)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train(tmp_path_factory.mktemp("grid"), base_bits=32)


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train(
        tmp_path_factory.mktemp("learned"), base_bits=16, grid_start="calibrated", grid_scales="learned", grid_warmup=0.5
    )


@pytest.fixture(scope="module")
def run(trained: Trained) -> Path:
    return trained.folder


@pytest.mark.parametrize("kind", ["trained", "learned"])
def test_the_merged_codes_are_those_of_the_last_step(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    found: Trained = request.getfixturevalue(kind)
    grid = read_manifest(found.folder, "run")["grid"]
    assert set(grid["bits"].values()) <= {4, 8}
    assert set(found.last) == set(grid["bits"])
    merge(found.folder, tmp_path / "merged", force=True)  # so few steps: what is kept of their gain is not asked here
    merged = MergedCheckpoint.open(tmp_path / "merged")
    for path, ours in found.last.items():
        shipped = merged.read_linear(path)
        assert isinstance(shipped, QuantizedTensor)
        assert torch.equal(ours.codes, shipped.codes), path
        assert torch.equal(ours.scales, shipped.scales), path


def test_scales_are_learned(learned: Trained) -> None:
    model = load_model(open_model(str(learned.folder)), "text-generation", base_bits=16)
    peft_format.apply(model, peft_format.load(learned.folder))
    grid = read_manifest(learned.folder, "run")["grid"]
    inject.put_on_grid(model, {**grid, "scales": "max"})
    moved = [
        not torch.equal(adapter.rounded().scales, learned.last[path].scales)
        for path, adapter in inject.adapters(model).items()
        if grid["bits"][path] == 4
    ]
    assert moved
    assert all(moved)
    assert all(torch.equal(tensor.scales, tensor.scales.bfloat16().float()) for tensor in learned.last.values())


def test_unrounded_weights_have_the_learned_scales_too(learned: Trained, tmp_path: Path) -> None:
    """As the closing table, `evaluate --float`, a merge to fp32 and one to int8 see them; without, A and B are half of it."""
    results = {row["what"]: row for row in read_manifest(learned.folder, "run")["results"]}
    ours = results["fp32 adapter"]["loss"]
    again = evaluate(learned.folder, generate=False, float_=True)["metrics"]["loss"]
    assert again == pytest.approx(ours, rel=1e-2)  # on a base of 32 bits instead of 16
    for precision, off in (("fp32", 1e-4), ("int8", 1e-2)):
        merge(learned.folder, tmp_path / precision, precision=precision, force=True)
        rows = str(learned.folder / "data" / "valid.jsonl")
        assert evaluate(tmp_path / precision, rows, generate=False)["metrics"]["loss"] == pytest.approx(again, rel=off)
    model = load_model(open_model(str(learned.folder)), "text-generation", base_bits=32)
    adapter = peft_format.load(learned.folder)
    peft_format.apply(model, adapter)
    x = torch.randn(3, 32)
    for path, layer in inject.adapters(model).items():
        if path not in adapter.scales.logs or layer.in_features != 32:
            continue
        wanted = adapter.merged_weight(path, layer.base.weight_fp32())
        assert not torch.equal(wanted, layer.merge())
        torch.testing.assert_close(layer(x), x @ wanted.t(), **MERGED_FORWARD)
    assert adapter.scales.logs
    with pytest.raises(SettingsError, match="learned block scales rescale the weight itself"):
        refuse_unbranched(adapter, list(adapter.factors), "run")
    file = tmp_path / "run"
    shutil.copytree(learned.folder, file)
    (file / learned_scales.FILE).write_bytes(b"cut short")
    with pytest.raises(FolderError, match=r"block_scales\.safetensors is damaged"):
        peft_format.load(file)


def test_a_run_without_its_rounded_layers_is_refused(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / on_grid.ROUNDED).write_bytes(b"cut short")
    with pytest.raises(FolderError, match=r"rounded\.safetensors"):
        merge(tmp_path / "run", tmp_path / "merged")


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


@pytest.mark.parametrize("inputs", [64, 40])
def test_block_scales_have_the_gradient_of_their_formula(inputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgelora.adapters.lora.TOKENS_PER_SCALE", 1)
    base = FrozenLinear.from_weight("block.q_proj", torch.randn(24, inputs), torch.randn(24), 32, 32)
    layer = moved(LoRA.from_base(base, LoRASettings(rank=4)))
    layer.grid = (4, 32)
    layer.learn_scales(32)
    x, wanted = torch.randn(5, inputs), torch.randn(5, 24)
    with torch.no_grad():
        layer.log_scales.normal_(0.0, 0.1)
    (layer(x) * wanted).sum().backward()
    ours = layer.log_scales.grad
    plain = quantize(layer.merge(), 4, 32)
    logs = layer.log_scales.detach().clone().requires_grad_()
    scales = plain.scales * torch.exp(logs)
    scales = scales * (scales.bfloat16().float() / scales).detach()  # straight through the rounding to bf16
    weight = (scales.unsqueeze(-1) * (unpack(plain.codes, 4).float() - 8)).flatten(1)[:, :inputs]
    expected = x @ weight.t() + layer.base.bias
    torch.testing.assert_close(layer(x), expected, **MERGED_FORWARD)
    (expected * wanted).sum().backward()
    torch.testing.assert_close(ours, logs.grad, **MERGED_FORWARD)


def test_a_sample_of_tokens_stands_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = moved(LoRA.from_base(make_linear(), LoRASettings(rank=4)))
    layer.grid = (4, 32)
    layer.learn_scales(32)
    x, grad = torch.randn(1, 64), torch.randn(1, 24)
    sampled = layer.scale_gradient(grad.repeat(8, 1), x.repeat(8, 1))
    monkeypatch.setattr("edgelora.adapters.lora.TOKENS_PER_SCALE", 1)
    torch.testing.assert_close(sampled, layer.scale_gradient(grad.repeat(8, 1), x.repeat(8, 1)), **MERGED_FORWARD)


def test_tokens_are_chosen_and_weighed_by_what_they_say() -> None:
    grad, x = torch.zeros(40, 24), torch.randn(40, 64)
    grad[[3, 17, 31]] = torch.randn(3, 24)
    size = grad.norm(dim=1) * x.norm(dim=1)
    grad[[3, 17, 31]] *= (torch.tensor([1.0, 3.0, 6.0]) / size[[3, 17, 31]]).unsqueeze(1)
    few_grad, few_x = scale_gradient.telling(grad, x, 10)
    assert [int((x == row).all(1).nonzero()) for row in few_x] == [3, *[17] * 3, *[31] * 6]
    torch.testing.assert_close(few_grad.t() @ few_x, grad.t() @ x, **MERGED_FORWARD)
    assert not scale_gradient.telling(torch.zeros(40, 24), x, 10)[0].any()


def test_the_first_steps_may_go_without_rounding() -> None:
    layer = moved(LoRA.from_base(make_linear(), LoRASettings(rank=4)))
    layer.grid = (4, 32)
    x = torch.randn(5, 64)
    float_ = x @ layer.merge().t() + layer.base.bias
    for step, rounds in ((0, False), (4, False), (5, True), (9, True)):
        with on_grid.warming_up(layer, step, 10, 0.5):
            assert torch.allclose(layer(x), float_, rtol=1e-4, atol=1e-5) != rounds, step
    assert not torch.allclose(layer(x), float_, rtol=1e-4, atol=1e-5)


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


def test_inputs_are_rounded_as_the_kernels_do_and_the_gradient_goes_through() -> None:
    """On the grid alone: what is computed without rounding sees its input as it is."""
    layer = moved(LoRA.from_base(make_linear(bias=False), LoRASettings(rank=4, alpha=8)))
    layer.grid, layer.input_block = (4, 32), 32
    x = torch.randn(5, 64, requires_grad=True)
    weight = dequantize(layer.rounded())
    found = layer(x)
    torch.testing.assert_close(found, round_to_int8(x.detach(), 32) @ weight.t(), rtol=1e-4, atol=1e-4)
    assert (found - x.detach() @ weight.t()).abs().max() > 1e-3
    found.sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(5, 64), rtol=1e-4, atol=1e-4)
    layer.unrounded = True
    torch.testing.assert_close(layer(x), x @ layer.merge().t(), rtol=1e-4, atol=1e-4)
