"""--last-layers: adapters in the last layers only, and what the others compute is computed once."""

from __future__ import annotations

import errno
import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import save_decoder, save_encoder
from tolerances import LOGITS_FP32

from edgelora.adapters import peft_format
from edgelora.config import FinetuneConfig
from edgelora.errors import Interrupted, SettingsError
from edgelora.models.decoder import Decoder
from edgelora.models.load import load_model
from edgelora.models.source import open_model
from edgelora.train import checkpoint, prefix
from edgelora.train.finetune import finetune
from edgelora.train.loop import Trainer
from edgelora.train.prefix import Prefix
from edgelora.train.targets import target_modules

SETTINGS: dict[str, Any] = {
    "threads": 1, "epochs": 3.0, "learning_rate": 1e-2, "batch_size": 4, "micro_batch": 2, "last_layers": 1, "evaluations": 3,
    "valid_rows": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("model")
    rows = [json.dumps({"prompt": f"say {n}", "completion": str(n) * (1 + n % 4)}) for n in range(20)]
    (folder / "rows.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return str(save_decoder(folder / "model", num_hidden_layers=3, intermediate_size=64)), str(folder / "rows.jsonl")


@pytest.fixture(scope="module")
def cached(inputs: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("cached") / "run"
    finetune(*inputs, run, FinetuneConfig(**SETTINGS))
    return run


def check_same(run: Path, wanted: Path) -> None:
    ours, theirs = load_file(run / peft_format.WEIGHTS), load_file(wanted / peft_format.WEIGHTS)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line["loss"] if "loss" in line else line["valid"]["loss"] for line in lines]


def test_the_adapter_is_the_same_without_the_files(
    inputs: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Steps of one row: in other company the last bits of attention's sums differ."""
    config = FinetuneConfig(**{**SETTINGS, "batch_size": 1, "epochs": 2.0})
    finetune(*inputs, tmp_path / "with", config)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(prefix.shutil, "disk_usage", lambda path: usage._replace(free=prefix.SPARE + 1000))
    monkeypatch.setattr(Prefix, "states", None)
    finetune(*inputs, tmp_path / "without", config)
    warning = "warning: what the first 2 layers compute of each row would take 0 MB of disk, 0 MB are free: "
    assert warning in capsys.readouterr().err
    check_same(tmp_path / "without", tmp_path / "with")
    assert losses(tmp_path / "without") == losses(tmp_path / "with")


def test_only_the_last_layers_have_adapters(cached: Path) -> None:
    paths = peft_format.load(cached).factors
    assert {path.split(".")[2] for path in paths} == {"2"}
    assert len(paths) == 7
    assert not (cached / checkpoint.FOLDER).exists()


def test_each_row_goes_through_the_frozen_layers_once(
    inputs: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, ...]] = []
    lowest, compute = [], Decoder.prefix

    def counted(self: Decoder, ids_T: torch.Tensor, starts: torch.Tensor, blocks: int) -> torch.Tensor:
        if blocks:  # the calibrated start begins at the embedding
            seen.extend(tuple(ids_T[start:stop].tolist()) for start, stop in itertools.pairwise(starts))
            lowest.append(blocks)
        return compute(self, ids_T, starts, blocks)

    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "prefix", counted)
        finetune(*inputs, tmp_path / "run", FinetuneConfig(**SETTINGS))
    assert set(lowest) == {2}
    assert len(seen) == len(set(seen)) == 20  # training rows and validation rows


def test_a_killed_run_goes_on_with_its_files(
    inputs: tuple[str, str], cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the middle of the first epoch: rows of the done steps are read, the others computed."""
    gradients = Trainer.gradients

    def failing(self: Trainer, *arguments: Any) -> Any:
        if self.state.step == 3:
            raise KeyboardInterrupt
        return gradients(self, *arguments)

    def counted(self: Prefix, rows: Any, *arguments: Any) -> torch.Tensor:
        if self.path.name == prefix.TRAIN:
            computed.extend(row for row in rows if not self.held[row])
        return states(self, rows, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "gradients", failing)
        with pytest.raises(Interrupted):
            finetune(*inputs, tmp_path / "run", FinetuneConfig(**SETTINGS, checkpoint_minutes=1e-9))
    computed: list[int] = []
    states = Prefix.states
    with monkeypatch.context() as patch:
        patch.setattr(Prefix, "states", counted)
        finetune(*inputs, tmp_path / "run", FinetuneConfig(), resume=True)
    lines = [json.loads(line) for line in (cached / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    first_epoch = [line["rows"] for line in lines if "rows" in line][:5]
    assert sorted(computed) == sorted(row for rows in first_epoch[3:] for row in rows)
    check_same(tmp_path / "run", cached)
    assert losses(tmp_path / "run") == losses(cached)


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Prefix]:
    model = load_model(open_model(str(save_decoder(tmp_path / "model"))), "text-generation", base_bits=32)
    prefix = Prefix(model, 1, tmp_path / "prefix", np.array([4, 3]))
    yield prefix
    prefix.close()
    assert not prefix.path.exists()


def test_states_read_are_the_states_computed(kept: Prefix) -> None:
    ids, starts = torch.tensor([5, 6, 7, 8, 9, 10]), torch.tensor([0, 4, 6])
    first = kept.states([0, 1], ids, starts)
    assert kept.num_bytes == kept.path.stat().st_size == 7 * 32 * 4
    assert torch.equal(kept.states([0, 1], ids, starts), first)
    assert torch.equal(kept.states([1], ids[4:], torch.tensor([0, 2])), first[4:])
    torch.testing.assert_close(kept.hidden([0, 1], ids, starts), kept.model.hidden(ids, starts), **LOGITS_FP32)


def test_a_disk_that_fills_up_ends_the_keeping(
    kept: Prefix, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, starts = torch.tensor([5, 6, 7, 8]), torch.tensor([0, 4])
    first = kept.states([0], ids, starts)

    def full(self: Prefix, *arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Prefix, "_write", full)
    capsys.readouterr()
    kept.states([1], ids[:3], torch.tensor([0, 3]))
    assert capsys.readouterr().err == "warning: the disk is full: the frozen layers are computed again in every epoch\n"
    assert torch.equal(kept.states([0], ids, starts), first)
    assert kept.path.stat().st_size == 0


def test_target_modules_of_the_last_layers() -> None:
    paths = [f"bert.encoder.layer.{n}.attention.self.{name}" for n in range(12) for name in ("query", "value")]
    paths = ["bert.embeddings_project", *paths, "bert.pooler.dense"]
    chosen = target_modules(paths, FinetuneConfig(last_layers=2, target_modules="query"), "text-classification")
    assert chosen == "bert.encoder.layer.10.attention.self.query,bert.encoder.layer.11.attention.self.query"
    chosen = target_modules(paths, FinetuneConfig(last_layers=1, target_modules="all-linear"), "text-classification")
    assert chosen.split(",") == paths[-3:]
    assert target_modules(paths, FinetuneConfig(target_modules="query"), "text-classification") == "query"
    with pytest.raises(SettingsError, match="last_layers is 13; allowed: 1 to 12, the layers of this model"):
        target_modules(paths, FinetuneConfig(last_layers=13), "text-classification")
    with pytest.raises(
        SettingsError, match=r"none of the target modules layer\.0\.attention\.self\.query is in the last 2 layers"
    ):
        target_modules(
            paths, FinetuneConfig(last_layers=2, target_modules="layer.0.attention.self.query"), "text-classification"
        )


def test_an_encoder_trains_its_last_layer(tmp_path: Path) -> None:
    rows = [json.dumps({"text": f"{'ab'[n % 2]} {n}", "label": "ab"[n % 2]}) for n in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    model = str(save_encoder(tmp_path / "model", base_only=True))
    config = FinetuneConfig(threads=1, max_steps=2, last_layers=1, batch_size=4)
    finetune(model, str(tmp_path / "rows.jsonl"), tmp_path / "run", config)
    paths = peft_format.load(tmp_path / "run").factors
    assert paths
    assert not any(".layer.0." in path for path in paths)
