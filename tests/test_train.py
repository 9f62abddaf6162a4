"""Training end to end on tiny random models: it learns, keeps the best, guards itself, and says what is wrong."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import save_decoder, save_encoder
from tolerances import SAME_STEP

from edgelora.adapters import inject, peft_format
from edgelora.config import FinetuneConfig
from edgelora.errors import FolderError, SettingsError
from edgelora.folder import check_files, read_manifest
from edgelora.train import guard
from edgelora.train.batches import Schedule, epoch_batches, split
from edgelora.train.finetune import finetune
from edgelora.train.loop import Trainer
from edgelora.train.schedule import learning_rate_factor

COLOURS = ("red", "green", "blue")


def write_rows(path: Path, task: str, count: int = 48) -> Path:
    rows: list[dict[str, Any]] = []
    for number in range(count):
        colour = COLOURS[number % 3]
        if task == "text-generation":
            rows.append({"prompt": f"{number}: {colour[::-1]}?", "completion": colour})
        else:
            rows.append({"text": f"{colour} {number}", "label": colour})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("decoder")
    model = save_decoder(folder / "model", tie_word_embeddings=True)
    return str(model), str(write_rows(folder / "rows.jsonl", "text-generation"))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("encoder")
    model = save_encoder(folder / "model", base_only=True)
    return str(model), str(write_rows(folder / "rows.jsonl", "text-classification"))


def settings(**changes: Any) -> FinetuneConfig:
    return FinetuneConfig(**{"threads": 1, "max_steps": 4, "learning_rate": 1e-2, "batch_size": 4, "evaluations": 2, **changes})


def log_lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def test_decoder_learns_and_leaves_a_complete_run(decoder: tuple[str, str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = finetune(*decoder, run, settings(max_steps=60, base_bits=8, epochs=100.0))
    base, exact, adapter = result["table"]
    assert [row["what"] for row in result["table"]] == ["base", "fp32 adapter", "adapter"]
    assert exact["loss"] < base["loss"] / 3
    assert adapter["loss"] < base["loss"] / 3  # a random model begins near ln 288
    assert {"exact_match", "contains"} <= set(adapter)
    wanted = {"steps", "tokens", "tokens_per_s", "peak_rss_mb", "predicted_peak_mb", "train_loss", "valid", "table", "seconds"}
    assert wanted <= set(result)
    assert result["steps"] == 60
    assert result["tokens_per_s"] > 0
    manifest = read_manifest(run, "run")
    check_files(run, manifest)
    assert manifest["complete"] is True
    assert manifest["task"] == "text-generation"
    assert manifest["settings"]["batch_size"] == 4
    assert manifest["results"] == result["table"]
    assert manifest["model"]["reference"] == decoder[0]
    assert {"config.json", "tokenizer.json", "adapter_config.json", "adapter_model.safetensors", "log.jsonl"} <= set(
        manifest["files"]
    )
    assert not (run / "checkpoint").exists()
    steps = [line for line in log_lines(run) if "rows" in line]
    assert [line["step"] for line in steps] == list(range(1, 61))
    assert sum(line["tokens"] for line in steps) == result["tokens"]


def test_classifier_learns_and_its_head_loads_in_peft(encoder: tuple[str, str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = finetune(*encoder, run, settings(max_steps=60, epochs=100.0, valid="0.2"))
    majority, base, _, adapter = result["table"]
    assert majority["accuracy"] < 0.5
    assert adapter["accuracy"] == 1.0
    assert adapter["loss"] < base["loss"] / 3
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    assert config["id2label"] == {"0": "blue", "1": "green", "2": "red"}
    saved = peft_format.load(run)
    assert saved.task_type == "SEQ_CLS"
    assert "classifier" in saved.modules_to_save
    assert {"classifier.weight", "classifier.bias"} <= set(saved.saved_modules)


def test_batches_hold_every_row_once_and_like_lengths_together() -> None:
    lengths = np.random.default_rng(0).integers(5, 100, 203)
    for epoch in (0, 1):
        batches = epoch_batches(lengths, 8, seed=3, epoch=epoch)
        assert sorted(row for batch in batches for row in batch) == list(range(203))
        assert np.mean([np.ptp(lengths[batch]) for batch in batches]) < 10  # at random it would be about 75
    assert epoch_batches(lengths, 8, 3, 0) == epoch_batches(lengths, 8, 3, 0) != epoch_batches(lengths, 8, 3, 1)
    rows = Schedule(lengths, 8, 3)
    assert rows.num_steps(2.0, None) == 2 * math.ceil(203 / 8)
    assert rows.num_steps(2.0, 5) == 5
    assert sorted(rows.rows(26)) == sorted(epoch_batches(lengths, 8, 3, 1)[0])
    assert split(np.full(10, 5), [4, 2, 9, 1, 7], 2) == [[4, 2], [9, 1], [7]]


def test_schedules_rise_and_fall() -> None:
    def factors(schedule: str) -> list[float]:
        return [learning_rate_factor(step, 20, schedule=schedule, warmup_ratio=0.2) for step in range(20)]

    for schedule in ("cosine", "linear", "constant"):
        assert factors(schedule)[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
        assert min(factors(schedule)) > 0
    assert factors("constant")[4:] == [1.0] * 16
    assert factors("linear")[12] == pytest.approx(0.5)
    assert factors("cosine")[8] == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))


def trained_weights(run: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(run / peft_format.WEIGHTS)


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_micro_batches_weigh_every_token_the_same(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    model, data = request.getfixturevalue(kind)
    for size in (1, 4):
        config = settings(micro_batch=size, max_steps=1, evaluations=1, gradient_checkpointing=size == 1)
        finetune(model, data, tmp_path / f"run{size}", config)
    lines = [next(line for line in log_lines(tmp_path / f"run{size}") if "rows" in line) for size in (1, 4)]
    assert lines[0]["rows"] == lines[1]["rows"]
    if kind == "decoder":  # the encoder's own dropout draws other numbers for other shapes
        assert lines[0]["loss"] == pytest.approx(lines[1]["loss"], rel=SAME_STEP)
        assert lines[0]["grad_norm"] == pytest.approx(lines[1]["grad_norm"], rel=SAME_STEP)


@pytest.mark.parametrize("first", [3.0, float("nan")])
def test_best_adapter_is_kept_and_patience_ends_the_run(
    first: float, decoder: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([first, 2.0, 2.5, 2.6, 1.0])
    kept: list[int] = []
    begin = Trainer.__init__

    def scripted(self: Trainer, job: Any) -> None:
        def keep() -> None:
            kept.append(self.state.step)
            job.keep()

        begin(self, dataclasses.replace(job, score=lambda: {"loss": next(scores)}, keep=keep))

    monkeypatch.setattr(Trainer, "__init__", scripted)
    result = finetune(*decoder, tmp_path / "run", settings(max_steps=10, evaluations=5, patience=2))
    assert kept == [2, 4]
    assert result["best_step"] == 4
    assert result["steps"] == 8


def test_broken_step_rolls_back_once_then_stops(
    decoder: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gradients = Trainer.gradients
    broken_calls = [3]
    calls = [0]

    def sometimes_nan(self: Trainer, *arguments: Any) -> tuple[float, int]:
        calls[0] += 1
        total, items = gradients(self, *arguments)
        return (math.nan if calls[0] in broken_calls else total), items

    monkeypatch.setattr(Trainer, "gradients", sometimes_nan)
    finetune(*decoder, tmp_path / "once", settings(checkpoint_minutes=0.0, schedule="constant", warmup_ratio=0.0))
    assert "warning: step 3: the loss is nan; back to step 2 with half the learning rate" in capsys.readouterr().err
    rates = [line["learning_rate"] for line in log_lines(tmp_path / "once") if "rows" in line]
    assert rates == [1e-2, 1e-2, 5e-3, 5e-3]
    calls[0] = 0
    broken_calls.append(5)
    with pytest.raises(SettingsError) as caught:
        finetune(*decoder, tmp_path / "twice", settings(checkpoint_minutes=0.0, schedule="constant", warmup_ratio=0.0))
    assert caught.value.message == (
        "training broke twice: at step 4 the loss is nan, though the learning rate had been halved to 0.005"
    )
    assert caught.value.hint == "start again with --learning-rate 0.001"


def test_divergence_is_told_from_one_odd_batch() -> None:
    assert guard.broken(9.0, 1.0, [1.0] * 39) is None  # too early to tell
    assert guard.broken(9.0, 1.0, [1.0] * 40) is None  # one batch of odd rows
    assert guard.broken(2.5, 1.0, [1.0] * 33 + [2.5] * 7) is None
    assert guard.broken(9.0, 1.0, [1.0] * 33 + [9.0] * 7) == "the loss rose to 9.000 from 1.000"
    assert guard.broken(0.5, 1.0, [0.01] * 33 + [0.5] * 7) is None
    assert guard.broken(1.0, math.inf, []) == "the gradient's norm is inf"


def test_adapter_without_gradient_is_refused(decoder: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attach = inject.attach

    def attach_with_a_loose_end(model: Any, *arguments: Any) -> Any:
        added = attach(model, *arguments)
        added["model.layers.1.self_attn.v_proj"].enabled = False
        return added

    monkeypatch.setattr(inject, "attach", attach_with_a_loose_end)
    monkeypatch.setattr(inject, "switched_off", lambda model: contextlib.nullcontext())
    with pytest.raises(SettingsError) as caught:
        finetune(*decoder, tmp_path / "run", settings())
    assert caught.value.message == "1 layers got no gradient in the first step: model.layers.1.self_attn.v_proj"


def test_what_is_refused_leaves_nothing_behind(decoder: tuple[str, str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(SettingsError, match='"q_poj" is no linear layer of this model'):
        finetune(*decoder, run, settings(target_modules="q_poj"))
    assert list(tmp_path.iterdir()) == []
    finetune(*decoder, run, settings(max_steps=1))
    before = read_manifest(run, "run")
    with pytest.raises(FolderError, match="exists already"):
        finetune(*decoder, run, settings())
    with pytest.raises(SettingsError, match="q_poj"):
        finetune(*decoder, run, settings(target_modules="q_poj"), overwrite=True)
    assert read_manifest(run, "run") == before
    with pytest.raises(FolderError) as caught:
        finetune(*decoder, run, FinetuneConfig(), resume=True)
    assert caught.value.message == f"{run} is complete: there is nothing to resume"
