"""The methods through whole runs: each learns, resumes to the same bits, and ships what was trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import save_decoder

from edgelora.adapters import inject, peft_format
from edgelora.config import FinetuneConfig
from edgelora.errors import SettingsError
from edgelora.evaluate import evaluate
from edgelora.folder import read_manifest
from edgelora.merging.merge import merge
from edgelora.models.load import load_model
from edgelora.models.source import open_model
from edgelora.planning.plan import plan
from edgelora.quant.checkpoint import MergedCheckpoint
from edgelora.quant.grid import QuantizedTensor
from edgelora.train import checkpoint, on_grid
from edgelora.train.finetune import finetune
from edgelora.train.loop import Trainer

METHODS: dict[str, dict[str, Any]] = {
    "pissa": {"init": "pissa", "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 4.0}},
    "olora": {"init": "olora", "loraplus_ratio": 4.0},
    "orthogonal": {"init": "orthogonal", "rslora": True, "weight_decay": 0.1},
    "eva": {"init": "eva", "dora": True, "dropout": 0.1},
    "8 bits": {"optimizer_bits": 8, "rank": 128},  # at this rank the tiny layers have 4096 weights
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("model")
    rows = [json.dumps({"prompt": f"say {n}", "completion": str(n) * 3}) for n in range(40)]
    (folder / "rows.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return str(save_decoder(folder / "model", intermediate_size=64)), str(folder / "rows.jsonl")


def settings(**changes: Any) -> FinetuneConfig:
    common = {"threads": 1, "max_steps": 12, "learning_rate": 1e-2, "batch_size": 4, "evaluations": 2, "base_bits": 32}
    return FinetuneConfig(**{**common, **changes})


@pytest.mark.parametrize("name", METHODS)
def test_a_run_learns_and_resumes_to_the_same_bits(
    name: str, inputs: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(checkpoint_minutes=0.0, **METHODS[name])
    result = finetune(*inputs, tmp_path / "whole", config)
    base, *_, adapter = result["table"]
    assert adapter["loss"] < base["loss"] - 0.2
    gradients = Trainer.gradients

    def failing(self: Trainer, *arguments: Any) -> Any:
        if self.state.step == 7:
            raise SystemExit
        return gradients(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "gradients", failing)
        with pytest.raises(SystemExit):
            finetune(*inputs, tmp_path / "run", config)
    held = load_file(tmp_path / "run" / checkpoint.FOLDER / checkpoint.FILE)
    assert any("initial_A" in key for key in held) == (config.init in ("pissa", "olora"))
    assert any(tensor.dtype == torch.uint8 for key, tensor in held.items() if "exp_avg" in key) == (name == "8 bits")
    finetune(*inputs, tmp_path / "run", FinetuneConfig(), resume=True)
    wanted, found = (load_file(tmp_path / run / peft_format.WEIGHTS) for run in ("whole", "run"))
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert torch.equal(found[key], tensor), key


@pytest.mark.parametrize("precision", ["int8", "fp32"])
def test_a_part_of_the_weight_that_was_trained_ships_exactly(precision: str, inputs: tuple[str, str], tmp_path: Path) -> None:
    """The closing table's loss, the run's, and that of the merged weights, which know nothing of PiSSA."""
    run = tmp_path / "run"
    result = finetune(*inputs, run, settings(precision=precision, **METHODS["pissa"]))
    assert read_manifest(run, "run")["settings"]["rank_pattern"] == {"q_proj": 2}
    ranks = {path: factors.rank for path, factors in peft_format.load(run).factors.items()}
    assert {rank for path, rank in ranks.items() if path.endswith("q_proj")} == {4}
    assert {rank for path, rank in ranks.items() if not path.endswith("q_proj")} == {16}
    loss = result["table"][-1]["loss"]
    assert evaluate(run, generate=False)["metrics"]["loss"] == pytest.approx(loss, rel=1e-5)
    merge(run, tmp_path / "merged", precision=precision)
    if precision == "fp32":
        of_rows = [evaluate(tmp_path / name, inputs[1], generate=False)["metrics"]["loss"] for name in ("merged", "run")]
        assert of_rows[0] == pytest.approx(of_rows[1], rel=1e-5)
        return
    merged = MergedCheckpoint.open(tmp_path / "merged")
    model = load_model(open_model(str(run)), "text-generation", base_bits=32)
    peft_format.apply(model, peft_format.load(run))
    grid = read_manifest(run, "run")["grid"]
    inject.put_on_grid(model, grid)
    on_grid.ship(model, run, grid)
    for path, layer in inject.adapters(model).items():
        ours, shipped = layer.rounded(), merged.read_linear(path)
        assert isinstance(shipped, QuantizedTensor)
        assert torch.equal(ours.codes, shipped.codes), path
        assert torch.equal(ours.scales, shipped.scales), path


def test_what_does_not_go_together_is_refused_before_anything_is_read(inputs: tuple[str, str], tmp_path: Path) -> None:
    wrong = settings(init="pissa", dora=True)
    for call in (lambda: finetune(*inputs, tmp_path / "run", wrong), lambda: plan(*inputs, wrong, probe=False)):
        with pytest.raises(SettingsError, match='init = "pissa" begins with a part of the weight: dora'):
            call()
    with pytest.raises(SettingsError, match='rank_pattern "q_poj" is the end of no target layer'):
        finetune(*inputs, tmp_path / "run", settings(rank_pattern={"q_poj": 2}))
    assert list(tmp_path.iterdir()) == []
