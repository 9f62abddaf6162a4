"""Scales-only training: gradients, what a run keeps, and that what ships is what was trained."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import save_decoder
from tolerances import GRADIENT_RELATIVE, MERGED_FORWARD
from torch import Tensor

from edgelora.adapters import inject, scales
from edgelora.adapters.scales import BlockScales
from edgelora.config import FinetuneConfig
from edgelora.errors import FolderError, SettingsError
from edgelora.evaluate import evaluate
from edgelora.folder import read_manifest
from edgelora.merging.merge import merge
from edgelora.models import scale_gradient
from edgelora.models.elementwise import FrozenNorm, apply
from edgelora.models.linear import FrozenLinear
from edgelora.models.linear_group import LinearGroup, linears
from edgelora.models.load import load_model
from edgelora.models.source import open_model
from edgelora.planning.planner import planner_for
from edgelora.planning.shape import ModelShape
from edgelora.quant.checkpoint import MergedCheckpoint
from edgelora.quant.grid import QuantizedTensor, dequantize, to_blocks
from edgelora.scales_delta import FILE, Delta, codes_digest, read_delta, write_delta
from edgelora.train import checkpoint
from edgelora.train.finetune import finetune
from edgelora.train.loop import Trainer

SIZES = {"hidden_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layer(bits: int, inputs: int = 80, outputs: int = 24, seed: int = 1) -> BlockScales:
    base = FrozenLinear.from_weight(f"layer{seed}", random(outputs, inputs, seed=seed), random(outputs, seed=9), bits, 32)
    found = BlockScales(base)
    found.change.data += 0.1 * random(*found.change.shape, seed=seed + 5)
    return found


def plain(member: BlockScales, h: Tensor, change: Tensor) -> Tensor:
    """Return h Wᵀ + b with w = (q - z) · bf16(s0 · (1 + c)), by plain autograd, the rounding passed straight through."""
    fixed = member.fixed
    ones = QuantizedTensor(fixed.codes, torch.ones_like(fixed.scales), fixed.bits, fixed.block_size, fixed.num_inputs)
    exact = fixed.scales * (1 + change)
    shipped = exact + (exact.bfloat16().float() - exact).detach()
    blocks = to_blocks(dequantize(ones), 32) * shipped.unsqueeze(-1)
    assert member.base.bias is not None
    return h @ blocks.flatten(1)[:, : fixed.num_inputs].t() + member.base.bias


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("normed", [False, True])
def test_gradients_are_those_of_a_plain_formula(bits: int, normed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale_gradient, "ROWS_AT_ONCE", 7 * 96)  # several pieces, and one that is not whole
    members = [layer(bits, outputs=24, seed=1), layer(bits, outputs=10, seed=2)]
    f = FrozenNorm("n", "rms", 1e-5, 1 + 0.3 * random(80, seed=5), None) if normed else None
    x, wanted = random(5, 80).requires_grad_(), random(5, 34, seed=3)
    y = linears(x, LinearGroup(members), f)
    (y * wanted).sum().backward()
    ours = [x.grad, *(member.change.grad for member in members)]
    again = x.detach().clone().requires_grad_()
    changes = [member.change.detach().clone().requires_grad_() for member in members]
    h = again if f is None else apply(f, again)
    expected = torch.cat([plain(member, h, change) for member, change in zip(members, changes, strict=True)], 1)
    torch.testing.assert_close(y, expected, **MERGED_FORWARD)
    (expected * wanted).sum().backward()
    for left, right in zip(ours, [again.grad, *(change.grad for change in changes)], strict=True):
        assert left is not None
        assert right is not None
        assert (left - right).norm() <= GRADIENT_RELATIVE * right.norm()


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scales")
    save_decoder(folder / "model", **SIZES)
    words = ("one", "two", "six", "ten", "red", "sky")
    lines = [json.dumps({"prompt": f"say {word}", "completion": f"{word} {word}"}) for word in words]
    (folder / "rows.jsonl").write_text("\n".join(lines * 2))
    return folder / "rows.jsonl"


def train(rows: Path, out: Path, *, resume: bool = False, **settings: object) -> dict[str, object]:
    values = {
        "threads": 1,
        "max_steps": 4,
        "batch_size": 4,
        "learning_rate": 0.05,
        "evaluations": 1,
        "method": "scales",
        **settings,
    }
    config = FinetuneConfig(**values)  # type: ignore[arg-type]
    return finetune(str(rows.parent / "model"), str(rows), out, config, resume=resume)


@pytest.fixture(scope="module")
def run(rows: Path) -> Path:
    out = rows.parent / "run"
    train(rows, out)
    return out


def test_what_ships_is_the_base_codes_with_the_trained_scales(run: Path, rows: Path, tmp_path: Path) -> None:
    merge(run, tmp_path / "merged")
    merge(None, tmp_path / "base", model=str(rows.parent / "model"))
    merged, base = (MergedCheckpoint.open(tmp_path / name) for name in ("merged", "base"))
    delta = read_delta(run)
    model = load_model(open_model(str(run)), "text-generation", base_bits=4, bits=read_manifest(run, "run")["grid"]["bits"])
    scales.apply(model, delta)
    found = scales.scaled_layers(model)
    assert set(found) == set(delta.scales) == set(model.linears())
    for path, trained in found.items():
        shipped, before = merged.read_linear(path), base.read_linear(path)
        assert isinstance(shipped, QuantizedTensor)
        assert isinstance(before, QuantizedTensor)
        assert torch.equal(trained.weight_data().codes, shipped.codes)
        assert torch.equal(before.codes, shipped.codes)
        assert torch.equal(trained.scales(), shipped.scales)
        assert not torch.equal(before.scales, shipped.scales)
    delta.refuse_other({p: codes_digest(base.read_linear(p).codes.numpy(), *grid_of(base, p)) for p in found}, "base")


def grid_of(merged: MergedCheckpoint, path: str) -> tuple[int, int]:
    return merged.layers[path]["bits"], merged.layers[path]["block_size"]


def test_evaluate_computes_with_the_kept_scales(run: Path, tmp_path: Path) -> None:
    wanted = next(row for row in read_manifest(run, "run")["results"] if row["what"] == "adapter")["loss"]
    assert evaluate(run, generate=False)["metrics"]["loss"] == pytest.approx(wanted, rel=1e-6)
    merge(run, tmp_path / "merged")
    rows = str(run / "data" / "valid.jsonl")
    assert evaluate(tmp_path / "merged", rows, generate=False)["metrics"]["loss"] == pytest.approx(wanted, rel=1e-5)
    with pytest.raises(SettingsError, match="no float base"):
        evaluate(run, float_=True)


def test_it_learns(run: Path) -> None:
    results = {row["what"]: row for row in read_manifest(run, "run")["results"]}
    assert results["adapter"]["loss"] < 0.98 * results["base"]["loss"]


def test_a_resumed_run_is_bit_identical(rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(rows, tmp_path / "whole")
    step = Trainer.one_step

    def stop_in_the_middle(self: Trainer, *arguments: object, **named: object) -> None:
        if self.state.step == 2:
            raise KeyboardInterrupt
        step(self, *arguments, **named)  # type: ignore[arg-type]
        self.save()

    monkeypatch.setattr(Trainer, "one_step", stop_in_the_middle)
    with pytest.raises(Exception, match="kept"):
        train(rows, tmp_path / "parts")
    monkeypatch.setattr(Trainer, "one_step", step)
    assert checkpoint.exists(tmp_path / "parts")
    train(rows, tmp_path / "parts", resume=True)
    whole, parts = (read_delta(tmp_path / name) for name in ("whole", "parts"))
    assert all(np.array_equal(whole.scales[path], parts.scales[path]) for path in whole.scales)
    assert (tmp_path / "whole" / FILE).read_bytes() == (tmp_path / "parts" / FILE).read_bytes()


def test_switched_off_it_is_the_base(rows: Path) -> None:
    model = load_model(open_model(str(rows.parent / "model")), "text-generation", base_bits=8)
    ids, starts = torch.tensor([1, 2, 3, 4]), torch.tensor([0, 4])
    before = model.hidden(ids, starts)
    added = scales.attach(model, "q_proj,down_proj")
    assert len(added) == 4
    assert torch.equal(model.hidden(ids, starts), before)
    for module in added.values():
        module.change.data += 0.2
    assert not torch.allclose(model.hidden(ids, starts), before)
    with inject.switched_off(model):
        assert torch.equal(model.hidden(ids, starts), before)


def test_training_on_a_merged_folder_keeps_its_codes(rows: Path, tmp_path: Path) -> None:
    merge(None, tmp_path / "model", model=str(rows.parent / "model"), block_size=64)
    (tmp_path / "rows.jsonl").write_bytes(rows.read_bytes())
    train(tmp_path / "rows.jsonl", tmp_path / "run")
    merge(tmp_path / "run", tmp_path / "merged")
    base, merged = (MergedCheckpoint.open(tmp_path / name) for name in ("model", "merged"))
    for path, array in read_delta(tmp_path / "run").scales.items():
        before, after = base.read_linear(path), merged.read_linear(path)
        assert isinstance(before, QuantizedTensor)
        assert isinstance(after, QuantizedTensor)
        assert after.block_size == 64
        assert torch.equal(before.codes, after.codes)
        assert np.array_equal(after.scales.numpy(), array)


def test_a_merged_folder_of_another_precision_is_refused(rows: Path, tmp_path: Path) -> None:
    merge(None, tmp_path / "model", model=str(rows.parent / "model"), precision="int8")
    (tmp_path / "rows.jsonl").write_bytes(rows.read_bytes())
    with pytest.raises(SettingsError, match="was merged to int8, not int4"):
        train(tmp_path / "rows.jsonl", tmp_path / "run")


def test_settings_of_adapters_are_refused(rows: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"rank is for adapters\n.*dora is for adapters\n.*fp32 has no block scales"):
        train(rows, tmp_path / "run", rank=4, dora=True, precision="fp32")
    assert not os.listdir(tmp_path)


def test_a_merge_that_would_change_the_integers_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="its precision is int4, not int8"):
        merge(run, tmp_path / "merged", precision="int8")


def sample() -> Delta:
    values = (random(6, 3) * 0.01).bfloat16().float().numpy()
    return Delta({"a.b": values}, {"a.b": "x" * 64, "a.c": "y" * 64}, {"classifier.weight": random(2, 5).numpy()}, "model")


def test_a_delta_reads_back_as_it_was_written(tmp_path: Path) -> None:
    wrote = sample()
    write_delta(tmp_path / FILE, wrote)
    found = read_delta(tmp_path)
    assert (found.layers, found.base, found.model) == (wrote.layers, wrote.base, wrote.model)
    assert np.array_equal(found.scales["a.b"], wrote.scales["a.b"])
    assert found.scales["a.b"].dtype == np.float32
    assert np.array_equal(found.tensors["classifier.weight"], wrote.tensors["classifier.weight"])
    from safetensors.torch import load_file

    assert load_file(tmp_path / FILE)["a.b.scales"].dtype == torch.bfloat16


def test_a_delta_of_another_base_is_refused() -> None:
    delta = sample()
    delta.refuse_other({**delta.layers, "embedding": "z"}, "bundle")
    with pytest.raises(FolderError, match=r"than those of bundle:\n  a\.c: not on the grid there\n  a\.b: other codes"):
        delta.refuse_other({"a.b": "z" * 64}, "bundle")


def test_a_damaged_delta_is_refused(tmp_path: Path) -> None:
    write_delta(tmp_path / FILE, sample())
    whole = (tmp_path / FILE).read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    other = [whole[:5], whole[:100], whole[:-1], b"\xff" * 40, whole[:8] + b"[]" + whole[10:]]
    other += [
        whole.replace(b"edgelora-scales", b"edgelora-sca1es"),
        whole.replace(b"xxxx", b"xxxz"),
        whole.replace(b"BF16", b"BF17"),
    ]
    other += [whole.replace(b'"shape":[6,3]', b'"shape":[3,3]'), whole[:header] + b"\xff" * (len(whole) - header)]
    for number, data in enumerate(other):
        assert data != whole, number
        (tmp_path / FILE).write_bytes(data)
        with pytest.raises(FolderError, match="no file of scales"):
            read_delta(tmp_path)


def test_its_plan_takes_less_memory_than_adapters_on_the_grid(rows: Path) -> None:
    source = open_model(str(save_decoder(rows.parent / "large", hidden_size=256, intermediate_size=1024)))
    lengths = np.full(20, 30)
    made = {}
    for method, bits in (("scales", None), ("lora", 8)):
        config = FinetuneConfig(method=method, base_bits=bits, threads=1, batch_size=1, max_steps=2)
        made[method] = planner_for(source, lengths, config).plan()[0]
    parts = {method: plan.parts for method, plan in made.items()}
    assert made["scales"].base_bits == 4
    assert parts["scales"]["base weights"] < 0.7 * parts["lora"]["base weights"]
    assert "rounded weights" not in parts["scales"]
    assert made["scales"].predicted_peak_mb < made["lora"].predicted_peak_mb
    blocks = sum(n * -(-k // 32) for _, n, k in ModelShape.of(source, "text-generation").linears)
    assert parts["scales"]["adapters and optimizer"] == pytest.approx(16 * blocks / 2**20, abs=0.1)
