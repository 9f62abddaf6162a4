"""The parts of the benchmark of merging with processes that are not started: their tables and requirements."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from faked_bench import banking_file, e2e_file, make_bench, measured, runner_of, work
from merge_bench import banking, bits, e2e, foreign, scales
from training_bench.processes import Measured

__all__ = ["banking_file", "e2e_file", "work"]  # fixtures

LOSSES = {
    "smollm2": 2.4, "peft-merged-ours": 1.5, "bundle-int4": 1.51,
    "peft-merged-ours-rtn": 1.7, "peft-merged-ours-genai-int4": 1.8, "peft-merged-ours-genai-mixed": 1.6,
    "peft-merged-ours-gptq": 1.505,
}  # fmt: skip


def test_the_table_tells_what_holds(work: Path, e2e_file: Path) -> None:
    calls: list[list[str]] = []
    bench = make_bench(work, runner_of(LOSSES, calls))
    table = {row["what"]: row for row in e2e.measure(bench, e2e_file, None)}
    assert set(table) == {"base, fp32", "fp32 adapter", e2e.OURS, *e2e.OTHERS}
    assert table[e2e.OURS]["above fp32, %"] == pytest.approx(100 * 0.01 / 1.5)
    assert table[e2e.RTN]["gain kept, %"] == pytest.approx(100 * 0.7 / 0.9)
    assert table["base, fp32"]["gain kept, %"] == 0
    required = {row["requirement"]: row["holds"] for row in bench.results.content["parts"]["e2e/5-steps"]["requirements"]}
    assert required == {
        f"{e2e.OURS} within 1% of the fp32 adapter": "yes",
        f"better than {e2e.RTN}": "yes",
        f"better than {e2e.GENAI}": "yes",
        f"better than {e2e.MIXED}": "yes",
        f"better than {e2e.GPTQ}": "no",
    }
    made = len(calls)
    e2e.measure(make_bench(work, runner_of(LOSSES, calls)), e2e_file, None)
    assert len(calls) == made  # nothing is measured twice


def test_a_peer_that_fails_leaves_the_others(work: Path, e2e_file: Path) -> None:
    bench = make_bench(work, runner_of(LOSSES, [], failing="gptq.py"))
    table = {row["what"]: row for row in e2e.measure(bench, e2e_file, None)}
    assert table[e2e.GPTQ]["note"].startswith("peft-merged-ours-gptq failed: error: it did not work")
    assert table[e2e.RTN]["loss"] == 1.7
    required = bench.results.content["parts"]["e2e/5-steps"]["requirements"]
    assert [row["holds"] for row in required] == ["yes", "yes", "yes", "yes", "not measured"]


def test_points_of_accuracy(tmp_path: Path, banking_file: Path) -> None:
    accuracies = {"banking-fp32": 0.92, "banking-bundle-int4": 0.914, "banking-bundle-int8": 0.915}

    def runner(words: list[str], **_: Any) -> Measured:
        if "evaluate" in words:
            name = Path(words[words.index("evaluate") + 1]).name
            return measured(metrics={"accuracy": accuracies[name], "macro_f1": 0.9, "loss": 0.3})
        Path(words[words.index("--output") + 1]).mkdir(parents=True)
        return measured()

    bench = make_bench(tmp_path, runner)
    table = banking.measure(bench, banking_file, 7)
    assert [row.get("points") for row in table[1:]] == pytest.approx([-0.6, -0.5])
    found = bench.results.content["parts"]["banking/7-steps"]["requirements"]
    assert [row["holds"] for row in found] == ["no", "yes"]


def test_an_adapter_of_pefts_keeps_its_gain(work: Path, e2e_file: Path) -> None:
    losses = {
        "smollm2": 2.4, "peft-merged-of-theirs": 1.5,
        "foreign-theirs-nearest-bundle": 1.6, "foreign-theirs-calibrated-bundle": 1.55,
    }  # fmt: skip
    calls: list[list[str]] = []
    bench = make_bench(work, runner_of(losses, calls))
    table = foreign.measure(bench, e2e_file, work / "theirs")
    assert [row["what"] for row in table[2:]] == [foreign.NEAREST, foreign.CALIBRATED]
    merges = [words for words in calls if "merge" in words]
    assert ["--calibrate" in words for words in merges] == [False, True]
    calibration = Path(merges[1][merges[1].index("--calibrate") + 1])
    assert json.loads(calibration.read_text(encoding="utf-8").splitlines()[0])["prompt"].startswith("Describe: ")
    found = bench.results.content["parts"]["peft/5-steps"]["requirements"]
    assert [(row["holds"], row["found"][:5]) for row in found] == [("yes", "94.4%")]


@pytest.mark.parametrize(("equal", "holds"), [(True, "yes"), (False, "no")])
def test_scales_on_a_base_give_the_bundles_logits(work: Path, e2e_file: Path, equal: bool, holds: str) -> None:
    plain = runner_of({**LOSSES, "bundle-scales": 1.7}, [])

    def runner(words: list[str], **given: Any) -> Measured:
        if scales.__name__ in words:
            return measured(loss=1.7, equal=equal, positions=100, **{"largest difference": 0.0 if equal else 0.5})
        return plain(words, **given)

    bench = make_bench(work, runner)
    table = {row["what"]: row for row in scales.measure(bench, e2e_file)}
    assert table[scales.SCALES]["gain kept, %"] == pytest.approx(100 * 0.7 / 0.9)
    assert table[scales.SCALES]["training MB"] == 10.0
    assert "same logits" not in table[scales.DELTA]
    assert [row["holds"] for row in bench.results.content["parts"]["scales/5-steps"]["requirements"]] == [holds]


def test_every_precision_is_tried(work: Path, e2e_file: Path) -> None:
    losses = {**LOSSES, **{f"bundle-{name}": 1.5 + number / 100 for number, name in enumerate(bits.precisions())}}
    table = bits.measure(make_bench(work, runner_of(losses, [])), e2e_file)
    assert {"int8", "int4"} <= {row["what"] for row in table}
    assert [row["loss"] for row in table[2:]] == sorted(row["loss"] for row in table[2:])
