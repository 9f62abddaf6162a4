"""--target-modules none: the head alone is trained, and goes the whole line as an adapter without layers."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors import safe_open

from edgelora.config import FinetuneConfig
from edgelora.errors import SettingsError
from edgelora.evaluate import evaluate
from edgelora.export.export import export
from edgelora.merging.merge import merge
from edgelora.train.finetune import finetune
from tests import tiny
from tests.test_token_classification import write

WORDS = {"heat": "hhhh", "light": "llll", "sound": "ssss"}


def test_a_head_is_trained_merged_and_exported(tmp_path: Path) -> None:
    model = tiny.save_encoder(tmp_path / "model", "bert", base_only=True)
    rows = [{"text": f"{word} {number}", "label": label} for number in range(40) for label, word in WORDS.items()]
    data = write(tmp_path / "rows.jsonl", rows)
    config = FinetuneConfig(target_modules="none", precision="int8", epochs=8.0, batch_size=16, learning_rate=1e-2)
    figures = finetune(str(model), str(data), tmp_path / "run", config)
    assert figures["valid"]["accuracy"] > 0.8
    with safe_open(tmp_path / "run" / "adapter_model.safetensors", "pt") as file:
        names = list(file.keys())
    assert names
    assert not [name for name in names if "lora_" in name]
    merge(tmp_path / "run", tmp_path / "merged", precision="int8", force=True)
    assert export(str(tmp_path / "run"), tmp_path / "bundle", precision="int8", force=True)["verify"]["passed"]
    scores = [evaluate(tmp_path / name, str(data))["metrics"]["accuracy"] for name in ("run", "merged", "bundle")]
    assert min(scores) > 0.8


def test_a_model_without_a_head_is_refused(tmp_path: Path) -> None:
    model = tiny.save_encoder(tmp_path / "model", "bert", base_only=True)
    data = write(tmp_path / "rows.jsonl", [{"query": f"{word} {n}", "item": word} for n in range(8) for word in WORDS])
    with pytest.raises(SettingsError, match="nothing is trained"):
        finetune(str(model), str(data), tmp_path / "run", FinetuneConfig(target_modules="none"))
    assert not (tmp_path / "run").exists()
