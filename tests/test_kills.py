"""SIGKILL at random times, also while a checkpoint is written: the resumed run ends with the same adapter, bit for bit.

Six kills, or as many as EDGELORA_KILLS says (the design asks for 30); EDGELORA_SEED chooses others.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from killing import Killer
from safetensors.torch import load_file
from tiny import save_decoder

from edgelora.adapters.peft_format import WEIGHTS
from edgelora.folder import check_files, read_manifest
from edgelora.train import checkpoint

KILLS = int(os.environ.get("EDGELORA_KILLS", "6"))
SEED = int(os.environ.get("EDGELORA_SEED", "0"))
# Dropout, 8-bit moments, adapters in the last layers and a checkpoint after every step: all of the state matters.
SETTINGS: dict[str, Any] = {
    "threads": 1, "epochs": 1000.0, "max_steps": 12 * KILLS, "learning_rate": 1e-2, "batch_size": 4, "micro_batch": 2,
    "dropout": 0.1, "last_layers": 1, "optimizer_bits": 8, "rank": 128, "alpha": 16.0, "evaluations": 5, "valid_rows": 4,
    "checkpoint_minutes": 1e-9,
}  # fmt: skip


@pytest.mark.skipif("forkserver" not in multiprocessing.get_all_start_methods(), reason="Windows has no SIGKILL")
def test_killed_runs_end_with_the_same_bits(tmp_path: Path) -> None:
    rows = [json.dumps({"prompt": f"say {n}", "completion": str(n) * 3}) for n in range(120)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    inputs = str(save_decoder(tmp_path / "model")), str(tmp_path / "rows.jsonl")
    killer = Killer(inputs, SETTINGS, SEED)
    assert killer.train(tmp_path / "wanted", "step", 1) == -signal.SIGKILL
    shutil.copytree(tmp_path / "wanted", tmp_path / "run")  # a plan is measured: both go by the same
    assert killer.train(tmp_path / "wanted") == 0

    places: Counter[str] = Counter()
    for _ in range(KILLS):
        place, code = killer.kill_once(tmp_path / "run")
        assert code == -signal.SIGKILL, f"{place}: exit code {code}"
        places[place] += 1
        assert read_manifest(tmp_path / "run", "run")["complete"] is False
    assert len(places) > 1
    assert killer.train(tmp_path / "run") == 0

    ours, theirs = load_file(tmp_path / "run" / WEIGHTS), load_file(tmp_path / "wanted" / WEIGHTS)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert steps(tmp_path / "run") == steps(tmp_path / "wanted")
    assert len(steps(tmp_path / "run")) == SETTINGS["max_steps"]
    manifest = read_manifest(tmp_path / "run", "run")
    assert manifest["complete"] is True
    check_files(tmp_path / "run", manifest)
    assert not (tmp_path / "run" / checkpoint.FOLDER).exists()


def steps(run: Path) -> list[tuple[int, float, list[int]]]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [(line["step"], line["loss"], line["rows"]) for line in lines if "rows" in line]
