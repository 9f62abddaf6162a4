"""A run that is killed or interrupted goes on to bit-identical weights."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import save_decoder, save_encoder

from edgelora.adapters.peft_format import WEIGHTS
from edgelora.config import FinetuneConfig
from edgelora.errors import FolderError, Interrupted, SettingsError
from edgelora.folder import read_manifest
from edgelora.models import gemm
from edgelora.train import checkpoint
from edgelora.train.checkpoint import State
from edgelora.train.finetune import finetune
from edgelora.train.loop import Trainer
from edgelora.train.optimizer import AdamW
from edgelora.train.run import Run

# Dropout and a checkpoint after every step: what is resumed depends on every part of the state.
SETTINGS: dict[str, Any] = {
    "threads": 1, "max_steps": 9, "learning_rate": 1e-2, "batch_size": 4, "micro_batch": 2, "dropout": 0.1,
    "checkpoint_minutes": 0.0, "evaluations": 3, "valid_rows": 4,
}  # fmt: skip
CHILD = """
import json, os, signal, sys
from pathlib import Path
from edgelora.config import FinetuneConfig
from edgelora.models import gemm
from edgelora.train import checkpoint
from edgelora.train.finetune import finetune
from edgelora.train.loop import Trainer

model, data, out, where, number, settings = sys.argv[1:]
calls = 0
gemm.choose = lambda threads, compute=None: gemm.BLAS

def dying(function):
    def wrapped(*arguments, **options):
        global calls
        calls += 1
        if calls == int(number):
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return wrapped

if where == "step":
    Trainer.gradients = dying(Trainer.gradients)
else:
    checkpoint.sync = dying(checkpoint.sync)
finetune(model, data, Path(out), FinetuneConfig(**json.loads(settings)))
"""


@pytest.fixture(scope="module", autouse=True)
def one_library() -> Iterator[None]:
    """Multiply by one library: a measured choice may be another in the next run, whose last bits are others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gemm, "choose", lambda threads, compute=None: gemm.BLAS)
        yield


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("model")
    rows = [json.dumps({"prompt": f"say {n}", "completion": str(n) * 3}) for n in range(40)]
    (folder / "rows.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return str(save_decoder(folder / "model")), str(folder / "rows.jsonl")


@pytest.fixture(scope="module")
def undisturbed(inputs: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    finetune(*inputs, run, FinetuneConfig(**SETTINGS))
    return run


def check_same(run: Path, wanted: Path) -> None:
    """Compare the kept adapters bit for bit, and the steps of the logs."""
    ours, theirs = load_file(run / WEIGHTS), load_file(wanted / WEIGHTS)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert steps(run) == steps(wanted)
    assert read_manifest(run, "run")["complete"] is True


def steps(run: Path) -> list[tuple[int, float, list[int]]]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [(line["step"], line["loss"], line["rows"]) for line in lines if "rows" in line]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
@pytest.mark.parametrize(("where", "number"), [("step", 6), ("write", 9)])  # write 9: the file is written, not yet in place
def test_killed_run_resumes_to_the_same_bits(
    where: str, number: int, inputs: tuple[str, str], undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-c", CHILD, *inputs, str(run), where, str(number), json.dumps(SETTINGS)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    child = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert read_manifest(run, "run")["complete"] is False
    result = finetune(*inputs, run, FinetuneConfig(), resume=True)
    assert result["steps"] == SETTINGS["max_steps"]
    check_same(run, undisturbed)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_resumes_to_the_same_bits(
    number: signal.Signals, inputs: tuple[str, str], undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signal comes between two micro-batches; no checkpoint is due by the clock."""
    run = tmp_path / "run"
    loss = Trainer.gradients

    def interrupted(self: Trainer, *arguments: Any) -> Any:
        if self.state.step == 5:
            collate = self.job.collate

            def signalling(examples: Any) -> Any:
                signal.raise_signal(number)
                return collate(examples)

            self.job = type(self.job)(**{**vars(self.job), "collate": signalling})
        return loss(self, *arguments)

    config = FinetuneConfig(**{**SETTINGS, "checkpoint_minutes": 60.0})
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "gradients", interrupted)
        with pytest.raises(Interrupted) as caught:
            finetune(*inputs, run, config)
    assert caught.value.message == "interrupted after step 5 of 9; what was learned is kept"
    assert caught.value.hint == f"edgelora finetune {inputs[0]} {inputs[1]} -o {run} --resume"
    assert caught.value.exit_code == 130
    finetune(*inputs, run, FinetuneConfig(), resume=True)
    check_same(run, undisturbed)


def test_classifier_resumes_with_its_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [json.dumps({"text": f"{'ab'[n % 2]} {n}", "label": "ab"[n % 2]}) for n in range(30)]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(rows) + "\n", encoding="utf-8")
    model = str(save_encoder(tmp_path / "model", base_only=True))
    config = FinetuneConfig(**{**SETTINGS, "max_steps": 6})
    finetune(model, str(data), tmp_path / "wanted", config)
    gradients = Trainer.gradients

    def failing(self: Trainer, *arguments: Any) -> Any:
        if self.state.step == 3:
            raise KeyboardInterrupt
        return gradients(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "gradients", failing)
        with pytest.raises(Interrupted):
            finetune(model, str(data), tmp_path / "run", config)
    finetune(model, str(data), tmp_path / "run", FinetuneConfig(), resume=True)
    check_same(tmp_path / "run", tmp_path / "wanted")


@pytest.fixture
def stopped(inputs: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that was stopped before its second step."""
    save = Trainer.save

    def stopping(self: Trainer) -> None:
        save(self)
        if self.state.step == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "save", stopping)
        with pytest.raises(Interrupted):
            finetune(*inputs, tmp_path / "run", FinetuneConfig(**SETTINGS))
    return tmp_path / "run"


def test_resumed_run_keeps_its_settings(inputs: tuple[str, str], stopped: Path) -> None:
    model, _ = inputs
    with pytest.raises(SettingsError) as caught:
        finetune(model, "other.jsonl", stopped, FinetuneConfig(rank=4, learning_rate=1e-2), resume=True)
    assert caught.value.message == (
        f"a resumed run keeps its settings:\n  the data is other.jsonl; the run's is {inputs[1]}\n  rank is 4; the run's is 8"
    )
    assert caught.value.hint == "leave them out, or start again with --overwrite"


def test_kill_before_the_last_manifest_loses_nothing(
    inputs: tuple[str, str], undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    write = Run.write

    def dying(self: Run, folder: Path, *, complete: bool, **results: Any) -> None:
        if complete:
            raise KeyboardInterrupt
        write(self, folder, complete=complete, **results)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "write", dying)
        with pytest.raises(Interrupted):
            finetune(*inputs, run, FinetuneConfig(**SETTINGS))
    assert not (run / checkpoint.FOLDER).exists()
    result = finetune(*inputs, run, FinetuneConfig(), resume=True)
    assert result["steps"] == SETTINGS["max_steps"]
    check_same(run, undisturbed)


def test_damaged_checkpoint_is_named(inputs: tuple[str, str], stopped: Path) -> None:
    file = stopped / checkpoint.FOLDER / checkpoint.FILE
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(FolderError) as caught:
        finetune(*inputs, stopped, FinetuneConfig(), resume=True)
    assert caught.value.message.startswith(f"{file} is damaged: ")
    assert caught.value.hint == "start again with --overwrite"


@pytest.mark.parametrize(("bits", "count"), [(32, 3), (8, 5)])
def test_checkpoint_holds_optimizer_and_random_state(bits: int, count: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(4096))
    optimizer = AdamW([{"params": [parameter]}], 0.1, bits=bits)
    (parameter**2).sum().backward()
    optimizer.step()
    checkpoint.save(tmp_path, State(step=7, best={"step": 3}), {"p": parameter}, optimizer, torch.get_rng_state())
    wanted = torch.rand(3)
    other = torch.nn.Parameter(torch.zeros(4096))
    fresh = AdamW([{"params": [other]}], 0.1, bits=bits)
    state = checkpoint.restore(tmp_path, {"p": other}, fresh)
    assert (state.step, state.best) == (7, {"step": 3})
    assert torch.equal(other, parameter)
    assert torch.equal(torch.rand(3), wanted)
    assert len(fresh.state[other]) == count
    for name, value in optimizer.state[parameter].items():
        assert torch.equal(fresh.state[other][name], value)
    with pytest.raises(FolderError, match="of another model or other adapters: p, q"):
        checkpoint.restore(tmp_path, {"q": other}, fresh)
