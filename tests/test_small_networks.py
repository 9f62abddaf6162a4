"""The small networks of tools/: each family can be made, is small, and learns a batch when it is trained."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import transformers
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import pretrain_pairs
import pretrain_pictures
import pretrain_texts
from small_networks import PICTURES, SOUNDS, TEXTS
from tasks_bench.rows import ENTRIES

from edgelora.tasks import get_task

ROWS = [
    {"source": f"a{n} b", "target": f"b a{n}", "text": f"a{n} b", "label": f"l{n % 3}", "prompt": f"a{n}", "completion": "b"}
    for n in range(12)
]


@pytest.mark.filterwarnings("ignore:Version v4.12.0:FutureWarning")  # of transformers' EncoderDecoderModel with labels
@pytest.mark.parametrize("family", TEXTS)
def test_a_network_on_texts_learns_its_rows(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    pretrain_texts.train(family, tmp_path / "rows.jsonl", tmp_path / "out", 0.01, 300, 12, 2e-3, 0.0)
    losses = [float(line.rsplit(" ", 1)[1]) for line in capsys.readouterr().out.splitlines()]
    assert all(map(math.isfinite, losses))
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == TEXTS[family][1]
    assert 1e5 < (tmp_path / "out" / "model.safetensors").stat().st_size < 1e7


@pytest.mark.parametrize("family", [*PICTURES, *SOUNDS])
def test_other_networks_can_be_made(family: str) -> None:
    task = (PICTURES | SOUNDS)[family][0]
    if family in PICTURES:
        config = pretrain_pictures.make_config(family, 64, ["a", "b"])
    else:
        config = pretrain_pairs.make_config(family, 20, 64, ["a", "b"] if "classification" in task else [])
    network = getattr(transformers, get_task(task).auto_class).from_config(config)
    assert sum(parameter.numel() for parameter in network.parameters()) < 3e6


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_networks_on_pairs_are_written_whole(family: str, tmp_path: Path) -> None:
    rows = []
    for number in range(12):
        Image.new("L", (64, 64), 20 * number).save(tmp_path / f"{number}.png")
        rows.append({"image": f"{number}.png", "text": ("dark", "grey", "light")[number // 4]})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    pretrain_pairs.train(family, str(tmp_path / "rows.jsonl"), tmp_path / "out", 64, 0.01, 4, 1e-3)
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == family
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {
        "model.safetensors",
        "tokenizer.json",
        "preprocessor_config.json",
    }


def test_rows_have_names_of_their_own() -> None:
    assert len({entry.name for entry in ENTRIES}) == len(ENTRIES)
