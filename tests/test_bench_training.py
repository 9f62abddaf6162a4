"""The benchmark of training: its peer against our own training, its models, its measuring of processes, its arithmetic."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from tolerances import PEER_LOSS

from edgelora.config import FinetuneConfig, load_toml, replace

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))  # where the benchmark lies; it is no part of the package
pytest.importorskip("resource")

import peft_baseline  # noqa: E402
from training_bench import __main__ as command  # noqa: E402
from training_bench import budgets, cgroups, curve, grid, limits, models, predictions, processes, rate, rows, runs, speed  # noqa: E402
from training_bench.results import Results  # noqa: E402

# transformers renames what PEFT and its users call.
PEFT_WARNS = pytest.mark.filterwarnings("ignore:.* is deprecated and will be removed in v6:FutureWarning")
MACHINE = {"commit": "abc"}
ALLOCATE = "import time; held = b'x' * ({} << 20); time.sleep(0.3); print('{{\"tokens_per_s\": 5.0}}')"


@pytest.fixture
def e2e(tmp_path: Path) -> Path:
    path = tmp_path / "e2e.csv"
    lines = [f'"name[Inn {i}], area[city]","The Inn {i} is in the city."' for i in range(60)]
    path.write_text("\n".join(["mr,ref", *lines]) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def bench(tmp_path: Path, e2e: Path) -> runs.Bench:
    return runs.Bench(tmp_path / "work", e2e, steps=3, repeats=1, threads=1, model="tiny")


def options(model: Path, **given: Any) -> argparse.Namespace:
    return peft_baseline.parse([str(model), "--rows", "steps.jsonl", *(f"--{k}={v}" for k, v in given.items())])


@PEFT_WARNS
def test_the_peer_learns_as_we_do(bench: runs.Bench, decoder_model: Path, e2e: Path) -> None:
    """Same rows, same A, same rate, no clipping: the peer's losses are ours, though it pads and we pack."""
    from edgelora.train.finetune import finetune

    bench.work.mkdir()
    data = rows.natural(rows.read_pairs(e2e), bench.work)
    ask = runs.Ours("curve", decoder_model, data, 4, compute="fp32", options={"base-bits": 32})
    ask.arguments(bench)  # writes the settings that every run of ours has
    settings = load_toml(bench.work / "settings-fp32.toml", FinetuneConfig(base_bits=32, precision="fp32", learning_rate=1e-2))
    for name, steps in (("first", 1), ("curve", 4)):
        config = replace(settings, {"max_steps": steps, "batch_size": 8, "valid_rows": 2, "threads": 1}, where="test")
        finetune(str(decoder_model), str(data), bench.run_folder(name), config)
    run = bench.run_folder("curve")
    file = rows.write_steps(bench.work / "steps.jsonl", run, rows.step_rows(run))
    arguments = options(decoder_model, **{"learning-rate": 1e-2, "weight-decay": 0})
    arguments.init = bench.run_folder("first") / "adapter_model.safetensors"
    found = peft_baseline.train(peft_baseline.load(arguments), peft_baseline.steps_of_file(file), arguments)
    log = rows.step_log(run)
    assert found["losses"] == pytest.approx([line["loss"] for line in log], rel=PEER_LOSS)
    assert found["tokens"] == [line["tokens"] for line in log]
    assert found["losses"][-1] < found["losses"][0]
    targets = [sum(map(sum, step["supervised"])) for step in peft_baseline.steps_of_file(file)]
    assert rows.supervised_tokens(run, rows.step_rows(run)) == targets


@PEFT_WARNS
def test_checkpointing_changes_no_loss_and_another_init_is_refused(decoder_model: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    step = {"ids": [[5, 6, 7, 8], [9, 10]], "supervised": [[0, 0, 1, 1], [0, 1]]}
    losses = []
    for flag in (True, False):
        torch.manual_seed(0)
        arguments = options(decoder_model)
        arguments.no_checkpointing = flag
        losses.append(peft_baseline.train(peft_baseline.load(arguments), iter([step, step]), arguments)["losses"])
    assert losses[0] == pytest.approx(losses[1], rel=PEER_LOSS)
    save_file({"base_model.model.lora_A.weight": torch.zeros(8, 4)}, tmp_path / "other.safetensors")
    arguments.init = tmp_path / "other.safetensors"
    with pytest.raises(SystemExit, match="is not an adapter of this model"):
        peft_baseline.load(arguments)


def test_the_peer_pads_and_ignores_prompts() -> None:
    batch = peft_baseline.collate({"ids": [[5, 6, 7], [8]], "supervised": [[0, 1, 1], [1]]}, 2)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 2, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]


def test_the_peer_reads_a_csv_file_in_random_order(decoder_model: Path, e2e: Path) -> None:
    steps = list(peft_baseline.steps_of_csv(e2e, decoder_model, 8, seed=1))
    assert [len(step["ids"]) for step in steps] == [8] * 7
    assert all(sum(mask) and not mask[0] for step in steps for mask in step["supervised"])
    assert steps[0] != next(peft_baseline.steps_of_csv(e2e, decoder_model, 8, seed=2))


def test_joined_rows_are_long_enough(tmp_path: Path, e2e: Path) -> None:
    tiny.save_tokenizer(tmp_path / "model")
    path = rows.of_length(rows.read_pairs(e2e), 200, tmp_path / "model", tmp_path)
    content = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    lengths = [len(row["prompt"]) + len(row["completion"]) for row in content]  # a byte is a token here
    assert len(content) == rows.JOINED_ROWS
    assert 200 <= min(lengths) < 300
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="has no column mr, ref"):
        rows.read_pairs(tmp_path / "bad.csv")


@pytest.mark.parametrize(("name", "count"), [("qwen-0.5b", 494032768), ("qwen-1.5b", 1543714304), ("qwen-7b", 7615616512)])
def test_the_shapes_are_the_public_ones(name: str, count: int) -> None:
    assert sum(torch.Size(shape).numel() for _, shape in models.SHAPES[name].tensors()) == count


def test_a_random_model_opens_here_and_in_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    from edgelora.models.source import open_model

    monkeypatch.setattr(models, "SHARD_BYTES", 40000)
    tiny.save_tokenizer(tmp_path / "tokenizer")
    folder = tmp_path / "qwen"
    folder.mkdir()
    shape = models.QwenShape(32, 2, 4, 2, 48, tiny.VOCAB, False)
    models.write_random(shape, folder, tmp_path / "tokenizer")
    assert len(list(folder.glob("*.safetensors"))) > 1
    source = open_model(str(folder))
    found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    assert {name: source.shape(name) for name in source.names()} == dict(shape.tensors())
    for name, tensor in found.items():
        assert torch.equal(source.read(name).float(), tensor), name
    assert found["lm_head.weight"].std() == pytest.approx(models.STD, rel=0.05)
    assert bool((found["model.norm.weight"] == 1).all())
    assert not torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])
    assert models.weights(folder) == sum(tensor.numel() for tensor in found.values())


def test_a_process_is_measured_with_its_children() -> None:
    nested = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {ALLOCATE.format(120)!r}], check=True)"
    alone = processes.run(processes.python("-c", ALLOCATE.format(120)))
    family = processes.run(processes.python("-c", nested))
    assert (alone.outcome, alone.result) == ("done", {"tokens_per_s": 5.0})
    assert 120 < alone.peak_rss_mb < 200
    assert family.peak_tree_mb > 120
    if sys.platform == "linux":
        assert alone.peak_anonymous_mb is not None
        assert 120 <= alone.peak_anonymous_mb <= alone.peak_rss_mb


def test_failures_have_names() -> None:
    code = "import sys; print('error: too little\\nhint: more', file=sys.stderr); sys.exit(3)"
    refused = processes.run(processes.python("-c", code))
    assert (refused.outcome, refused.message, refused.result) == ("refused", "error: too little\nhint: more", {})
    late = processes.run(processes.python("-c", "import time; time.sleep(60)"), timeout=0.2)
    assert (late.exit_code, late.outcome) == (124, "failed")
    killed = processes.run(processes.python("-c", "import os; os.kill(os.getpid(), 9)"))
    assert killed.outcome == "killed"


@pytest.mark.skipif(cgroups.parent() is None, reason="needs root and a memory cgroup")
def test_a_cgroup_kills_what_needs_more() -> None:
    outcomes = {}
    for limit in (60, 300):
        with cgroups.cgroup(limit) as group:
            outcomes[limit] = processes.run(group.wrap(processes.python("-c", ALLOCATE.format(120)))).outcome
            kills = group.kills()
        assert not group.folder.exists()
        assert bool(kills) == (limit == 60)
    assert outcomes == {60: "killed", 300: "done"}


def test_what_was_measured_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results.json"
    done = {"outcome": "done", "seconds": 1.0, "peak_rss_mb": 10.0}
    calls = []

    def measure(record: dict[str, Any]) -> Any:
        return lambda: calls.append(1) or record

    Results(path, MACHINE).run("a", measure(done))
    Results(path, MACHINE).run("b", measure({**done, "outcome": "failed"}))
    again = Results(path, {"commit": "def"})
    assert "has runs of commit abc" in capsys.readouterr().err
    assert again.run("a", measure({})) == done
    assert len(calls) == 2
    again.run("b", measure(done))
    assert len(calls) == 3
    assert json.loads(path.read_text(encoding="utf-8"))["runs"] == {"a": done, "b": done}


def test_sides_alternate_and_are_compared() -> None:
    theirs, ours = ([(name, dict) for name in names] for names in ("PQ", "ABC"))
    assert "".join(name for name, _ in speed.alternation(theirs, ours)) == "PAQBC"
    run = {"outcome": "done", "peak_tree_mb": 1.0, "peak_anonymous_mb": None, "ram_mb": None}
    found = {
        "PEFT": [{**run, "tokens_per_s": 50.0, "peak_rss_mb": 2290.0}, {**run, "tokens_per_s": 70.0, "peak_rss_mb": 2290.0}],
        "ours": [{**run, "tokens_per_s": 150.0, "peak_rss_mb": 458.0}],
    }
    assert speed.share_mb(found, 4) == 572
    assert speed.share_mb(found, None) is None
    row = speed.summary(found)[1]
    assert (row["× PEFT, our order"], row["× PEFT, random"], row["of its RSS"]) == (2.5, None, 0.2)


def test_curves_are_compared() -> None:
    theirs = [2.0, 1.0, 0.5]
    row = curve.compare([2.0, 1.005, 0.498], theirs)
    assert row["largest difference, %"] == pytest.approx(0.5)
    assert (row["at step"], row["within 1%"]) == (2, True)
    assert curve.compare([2.0, 1.02, 0.5], theirs)["within 1%"] is False
    assert curve.smoothed([float(i) for i in range(10)])[-1] == sum(range(2, 10)) / 8


def test_the_smallest_cgroup_is_searched() -> None:
    tried: list[int] = []
    assert limits.search(lambda limit: tried.append(limit) or limit >= 333, 50, 1000) in range(333, 344)
    assert len(tried) < 10
    assert limits.search(lambda limit: False, 50, 1000) is None
    free = {"outcome": "done", "seconds": 10.0, "step_seconds": [9.0, 1.0, 1.0]}
    assert limits.close({**free, "seconds": 12.9}, free)
    assert not limits.close({**free, "seconds": 13.1}, free)
    assert not limits.close({**free, "step_seconds": [1.0, 1.4, 1.4]}, free)
    assert not limits.close({**free, "outcome": "killed"}, free)


def test_only_necessary_operations_count() -> None:
    work = rate.Work(
        [(30, 10), (10, 30)] * 4, 4 * 300, 4, vocab=100, hidden=10, tokens=7, supervised=3, pieces=1, recomputed=0.5
    )
    assert work.operations() == 7 * 5 * 2400 + 3 * 4 * 1000
    assert work.operations(down=False) == work.operations() - 7 * 2 * 0.5 * 1200
    assert dataclasses.replace(work, recomputed=0.0).operations() == 7 * 4 * 2400 + 3 * 4 * 1000


def test_the_matrix_rate_takes_the_faster_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rate, "SECONDS", 0.01)
    threads = torch.get_num_threads()
    found = rate.rates_of(1, [{"T": 16, "N": 24, "K": 8, "count": 3}])
    torch.set_num_threads(threads)
    assert 0 < found["gflops"] <= found["best_gflops"]
    assert [shape["way"] for shape in found["shapes"]] == ["forward", "backward"]
    x, w = torch.randn(5, 8), torch.randn(6, 8)
    for name, call in rate.libraries(torch).items():
        torch.testing.assert_close(call(x, w), x @ w.t(), msg=name)


def test_what_the_grid_adds_is_a_share_of_its_own_step(tmp_path: Path) -> None:
    records = [{"outcome": "done", "step_seconds": [9.0, 2.0, s], "peak_rss_mb": peak} for s, peak in ((2.0, 7.0), (3.0, 5.0))]
    row = grid.row_of("x", records, 1.5)
    assert (row["s/step"], row["of a step"], row["peak MB"]) == (2.0, 0.25, 7.0)
    assert grid.row_of("x", [*records, {"outcome": "killed", "message": ""}], 1.5)["outcome"] == "killed"
    (tmp_path / "x").mkdir()
    bench = runs.Bench(tmp_path / "x", Path(), 8, 1, 1)
    ask = runs.Ours("grid", Path("m"), Path("d"), 2, compute="fp32", settings=grid.WAYS["…, and learned scales"])
    chosen = load_toml(Path(ask.arguments(bench)[3]), FinetuneConfig())
    assert (chosen.compute, chosen.grid_start, chosen.grid_scales) == ("fp32", "calibrated", "learned")


def test_a_run_beyond_its_budget_is_told() -> None:
    run = {"outcome": "done", "peak_tree_mb": 500.0}
    assert (budgets.held(run, 500), budgets.held(run, 499), budgets.held({"outcome": "refused"}, 1)) == (True, False, None)
    assert budgets.held({"outcome": "killed"}, 500) is False
    drawn = budgets.random_budgets()
    assert drawn == budgets.random_budgets() != budgets.random_budgets(seed=1)
    assert len({budget["ram_mb"] for budget in drawn}) == 20


def test_predictions_are_held_against_runs() -> None:
    record = {"outcome": "done", "peak_rss_mb": 95.0, "step_seconds": [1.0, 2.0], "others_busy": 0.0}
    row = predictions.row_of(
        "x", [{**record, "predicted": {"peak_mb": mb, "seconds": s}} for mb, s in ((95.0, 2.5), (100.0, 6.0), (96.0, 2.0))]
    )
    assert (row["ratio"], row["s ratio"]) == (0.95, 1.2)
    assert predictions.worst_of([row, {"ratio": 1.04}], "ratio") == pytest.approx(-5)
    assert sum(len(predictions.GRID[name]) for name in command.PLANNED) >= 12


def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    found = command.parse(["--data", "x.csv", "--what", "speed,plan", "--model", "qwen-7b"])
    assert (found.what, found.model, found.steps) == (("speed", "plan"), ["qwen-7b"], 8)
    with pytest.raises(SystemExit):
        command.parse(["--data", "x.csv", "--what", "sped"])
    assert "sped is no part; allowed: speed, curve" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        command.refuse_busy({"busy": 0.5}, anyway=False)
    assert end.value.code == 3
    known = SimpleNamespace(content={"runs": {"speed/smollm2/8/PEFT/0": {"peak_rss_mb": 2290.0}}})
    assert command.peer_budgets(runs.Bench(Path(), Path(), 8, 1, 1), known) == [None, 572, 1145]
