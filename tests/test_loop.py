"""The loop's own promises: it goes back from broken steps, checkpoints before it stops, and keeps the best adapter on disk."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import save_decoder

from edgelora.adapters.peft_format import WEIGHTS
from edgelora.cli.boundary import guarded
from edgelora.config import FinetuneConfig
from edgelora.errors import FolderError, Interrupted, SettingsError
from edgelora.models import gemm
from edgelora.train import checkpoint
from edgelora.train.checkpoint import State
from edgelora.train.finetune import Training, finetune
from edgelora.train.loop import Trainer, evaluation_steps
from edgelora.train.optimizer import AdamW
from edgelora.train.signals import stop_request

SETTINGS: dict[str, Any] = {
    "threads": 1, "max_steps": 8, "learning_rate": 1e-2, "batch_size": 4, "dropout": 0.1, "evaluations": 4, "valid_rows": 4,
    "schedule": "constant", "warmup_ratio": 0.0,
}  # fmt: skip


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


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def check_same(run: Path, wanted: Path) -> None:
    ours, theirs = load_file(run / WEIGHTS), load_file(wanted / WEIGHTS)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    kept = [[(line["step"], line.get("loss"), line.get("valid")) for line in lines(folder)] for folder in (run, wanted)]
    assert kept[0] == kept[1]


class Moment:
    """Raises a signal at the n-th scoring of the validation rows: 1 is the base's, the last one the closing table's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, at: int) -> None:
        self.left, self.number = at, number
        for name in ("score", "closing"):
            monkeypatch.setattr(Training, name, self.counted(getattr(Training, name)))

    def counted(self, score: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self.left -= 1
            if self.left == 0:
                signal.raise_signal(self.number)
            return score(*arguments, **options)

        return call


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(("at", "step"), [(1, None), (3, 4), (6, None)])  # the base, the second evaluation, the closing table
def test_a_signal_while_rows_are_scored_leaves_a_run_to_resume(
    number: signal.Signals, at: int, step: int | None, inputs: tuple[str, str], undisturbed: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """As the command line does it, which treats SIGTERM as Ctrl-C. The evaluation is left at once, and made again."""
    run = tmp_path / "run"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in a shell's background
    with monkeypatch.context() as patch:
        Moment(patch, number, at)
        try:
            assert guarded(lambda: finetune(*inputs, run, FinetuneConfig(**SETTINGS))) == 130
        finally:
            signal.signal(signal.SIGINT, before)
    said = capsys.readouterr().err
    stopped = "interrupted; the last checkpoint is kept" if step is None else f"interrupted after step {step} of 8"
    assert f"error: {stopped}" in said
    assert f"hint: edgelora finetune {inputs[0]} {inputs[1]} -o {run} --resume" in said
    if step is not None:
        assert lines(run)[-1]["step"] == step
        assert "rows" in lines(run)[-1]  # and no evaluation
    finetune(*inputs, run, FinetuneConfig(), resume=True)
    check_same(run, undisturbed)


def test_a_signal_does_not_break_a_checkpoint_off(
    inputs: tuple[str, str], undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C twice in the middle of writing a checkpoint: it is finished, and the run stops behind it."""
    raw, run = checkpoint.raw, tmp_path / "run"
    calls: list[int] = []

    def signalling(tensor: torch.Tensor) -> memoryview:
        calls.append(1)
        if len(calls) in (150, 160):
            signal.raise_signal(signal.SIGINT)
        return raw(tensor)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "raw", signalling)
        with pytest.raises(Interrupted, match="interrupted after step 1 of 8; what was learned is kept"):
            finetune(*inputs, run, FinetuneConfig(**SETTINGS, checkpoint_minutes=1e-9))
    finetune(*inputs, run, FinetuneConfig(), resume=True)
    check_same(run, undisturbed)


def test_the_second_signal_ends_at_once() -> None:
    with stop_request() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt), stop.ending_at_once():
            raise AssertionError("a signal came before")


def test_gradients_that_are_not_finite_roll_everything_back(
    inputs: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The loss is fine. Weights, moments and the random state return to the checkpoint, and the rows come again."""
    gradients, seen = Trainer.gradients, []
    before: list[dict[str, torch.Tensor]] = []

    def snapshot(self: Trainer) -> dict[str, torch.Tensor]:
        found = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        for name, parameter in self.parameters.items():
            found |= {f"{what}.{name}": tensor.clone() for what, tensor in self.optimizer.state[parameter].items()}
        return {**found, "random": torch.get_rng_state()}

    def poisoned(self: Trainer, *arguments: Any) -> tuple[float, int]:
        if self.state.step == 5:
            before.append(snapshot(self))
        found = gradients(self, *arguments)
        seen.append(self.state.step)
        if seen.count(5) == 1 and self.state.step == 5:
            next(p.grad for p in self.parameters.values() if p.grad is not None)[0, 0] = math.nan
            torch.rand(100)
        return found

    monkeypatch.setattr(Trainer, "gradients", poisoned)
    run = tmp_path / "run"
    finetune(*inputs, run, FinetuneConfig(**SETTINGS, checkpoint_minutes=1e-9))
    warning = "warning: step 6: the gradient's norm is nan; back to step 5 with half the learning rate"
    assert warning in capsys.readouterr().err
    assert seen == [0, 1, 2, 3, 4, 5, 5, 6, 7]
    assert len(before[0]) > 3 * 28
    assert before[0].keys() == before[1].keys()
    assert all(torch.equal(before[0][name], before[1][name]) for name in before[0])
    assert {"step": 5, "rolled_back": "the gradient's norm is nan"} in lines(run)
    assert [line["learning_rate"] for line in lines(run) if "rows" in line] == [1e-2] * 5 + [5e-3] * 3


def test_the_best_on_disk_is_the_best_on_record_after_going_back(
    inputs: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The evaluation after step 6 is the best; step 8 breaks and no checkpoint was due by the clock since the start."""
    gradients, broken = Trainer.gradients, [7]
    scores = iter([9.0, 5.0, 4.0, 3.0, 6.0, 6.0])  # the base first

    def nan_once(self: Trainer, *arguments: Any) -> tuple[float, int]:
        total, items = gradients(self, *arguments)
        if self.state.step in broken:
            broken.clear()
            return math.nan, items
        return total, items

    monkeypatch.setattr(Trainer, "gradients", nan_once)
    monkeypatch.setattr(Training, "score", lambda self, **options: {"loss": next(scores)})
    result = finetune(*inputs, tmp_path / "run", FinetuneConfig(**SETTINGS))
    assert result["best_step"] == 6
    back = [line for line in lines(tmp_path / "run") if "rolled_back" in line]
    assert back == [{"step": 7, "rolled_back": "the loss is nan"}]
    steps = [line["step"] for line in lines(tmp_path / "run") if "rows" in line]
    assert steps == [1, 2, 3, 4, 5, 6, 7, 7, 8]  # from the checkpoint of step 6, made with the best


def test_threads_and_budget_of_a_resumed_run_are_the_recorded_ones(
    inputs: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        Moment(patch, signal.SIGINT, 3)
        with pytest.raises(Interrupted):
            finetune(*inputs, tmp_path / "run", FinetuneConfig(**SETTINGS))
    with pytest.raises(SettingsError) as caught:
        finetune(*inputs, tmp_path / "run", FinetuneConfig(threads=7, ram=1 << 30), resume=True)
    assert caught.value.message == (
        "a resumed run keeps its settings:\n  ram is 1073741824; the run's is None\n  threads is 7; the run's is 1"
    )


def test_a_checkpoint_takes_no_memory_of_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written is the memory of the tensors themselves; the library's own reader finds them all."""
    raw, written = checkpoint.raw, set()

    def noting(tensor: torch.Tensor) -> memoryview:
        written.add(np.frombuffer(raw(tensor), dtype=np.uint8).ctypes.data)
        return raw(tensor)

    monkeypatch.setattr(checkpoint, "raw", noting)
    torch.manual_seed(0)
    parameters = {f"layer.{n}": torch.nn.Parameter(torch.randn(64, 64)) for n in range(8)}
    optimizer = AdamW([{"params": list(parameters.values())}], 0.1)
    for parameter in parameters.values():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    random = torch.get_rng_state()
    checkpoint.save(tmp_path, State(step=3), parameters, optimizer, random)
    held = [random, *parameters.values(), *(tensor for state in optimizer.state.values() for tensor in state.values())]
    assert written == {tensor.data_ptr() for tensor in held}
    with safe_open(tmp_path / checkpoint.FOLDER / checkpoint.FILE, "pt") as file:
        assert set(file.keys()) == {"random"} | {
            f"{kind}.{name}"
            for kind in ("parameter", "optimizer.step", "optimizer.exp_avg", "optimizer.exp_avg_sq")
            for name in parameters
        }
        assert torch.equal(file.get_tensor("parameter.layer.3"), parameters["layer.3"])
    narrow = {name: torch.nn.Parameter(torch.zeros(64)) for name in parameters}
    with pytest.raises(FolderError, match=r"of another model or other adapters: layer\.0, "):
        checkpoint.restore(tmp_path, narrow, AdamW([{"params": list(narrow.values())}], 0.1))
    file_path = tmp_path / checkpoint.FOLDER / checkpoint.FILE
    os.truncate(file_path, file_path.stat().st_size - 1)
    with pytest.raises(FolderError, match="is damaged"):
        checkpoint.restore(tmp_path, parameters, optimizer)


def test_evaluations_are_spread_and_end_with_the_last_step() -> None:
    assert evaluation_steps(10, 4) == {2, 5, 8, 10}
    assert evaluation_steps(2, 5) == {1, 2}
    assert evaluation_steps(7, 0) == {7}
