"""Pictures through the whole line: read, trained, merged, exported, run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny

from edgelora.config import FinetuneConfig
from edgelora.data.check import scan
from edgelora.errors import DataError
from edgelora.evaluate import evaluate
from edgelora.export.export import export
from edgelora.run.answer import run
from edgelora.train.finetune import finetune


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_pictures(tmp_path_factory.mktemp("pictures") / "rows", rows=60)


@pytest.mark.parametrize(("family", "precision", "layers"), [
    ("resnet", "int4", 0), ("vit", "int4", 12), ("swin", "int4", 25), ("efficientnet", "int4", 0), ("mobilevit", "int4", 54),
])  # fmt: skip
def test_the_whole_line(
    family: str, precision: str, layers: int, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgelora.export.int8.times", lambda *_: (1.0, 1.0))  # int8 is no faster: what is measured varies
    model = tiny.save_vision(tmp_path / "model", family, labels=7, settled=family in ("efficientnet", "mobilevit"))
    config = FinetuneConfig(precision=precision, epochs=8.0, batch_size=8, rank=4, learning_rate=1e-2)
    figures = finetune(str(model), str(pictures), tmp_path / "run", config)
    assert figures["valid"]["accuracy"] > 0.6
    exported = export(str(tmp_path / "run"), tmp_path / "bundle", precision=precision, force=True)
    assert exported["verify"]["passed"]
    assert exported["precision"] == ("fp32" if layers == 0 else precision)
    assert exported["nodes"] == layers
    assert (tmp_path / "bundle" / "preprocessor_config.json").is_file()
    adapter = evaluate(tmp_path / "run")["metrics"]
    bundle = evaluate(tmp_path / "bundle", str(pictures))["metrics"]
    assert adapter["accuracy"] == figures["valid"]["accuracy"]
    assert bundle["accuracy"] > 0.6
    dark = sorted((pictures / "dark").iterdir())[0]
    shown: list[str] = []
    answer = run(tmp_path / "bundle", [str(dark)], write=shown.append)["output"]
    assert sorted(entry["label"] for entry in answer) == ["dark", "light", "stripes"]
    assert sum(entry["probability"] for entry in answer) == pytest.approx(1.0)
    assert "".join(shown).splitlines()[0].startswith(answer[0]["label"])
    with pytest.raises(DataError, match="does not exist"):
        run(tmp_path / "bundle", [str(tmp_path / "none.png")])


def test_rows_of_folders_and_tables_are_the_same(pictures: Path, tmp_path: Path) -> None:
    found = scan(str(pictures), task=None, columns=None, valid=None)
    assert found.task.name == "image-classification"
    assert found.labels == ["dark", "light", "stripes"]
    table = pictures.parent / "rows.csv"
    lines = [f"rows/{path.parent.name}/{path.name},{path.parent.name}" for path in sorted(pictures.glob("*/*.png"))]
    table.write_text("\n".join(["image,label", *lines]))
    rows = [found.located(path, row) for path, _, row in found.rows("train")]
    listed = scan(str(table), task=None, columns=None, valid=None)
    assert [listed.located(path, row) for path, _, row in listed.rows("train")] == rows
    table.write_text("image,label\nrows/none.png,dark\n,dark\n")
    problems = scan(str(table), task=None, columns=None, valid=None).problems.lines()
    assert [line.partition(": ")[0] for line in problems] == ["rows.csv, line 2", "rows.csv, line 3"]


def test_a_store_keeps_arrays_of_any_rank(tmp_path: Path) -> None:
    import numpy as np

    from edgelora.data.store import Store, StoreWriter
    from edgelora.tasks.base import Example

    def example(rows: int) -> Example:
        pixels = np.arange(rows * 6, dtype=np.uint8).reshape(rows, 2, 3)
        arrays: dict[str, Any] = {"pixels": pixels, "boxes": np.zeros((rows - 1, 4), np.float32)}
        return Example(arrays | {"length": np.array(rows, np.int32)})

    writer = StoreWriter(tmp_path / "store")
    for rows in (1, 3, 2):
        writer.add(example(rows))
    writer.close()
    store = Store.open(tmp_path / "store")
    assert store.lengths.tolist() == [1, 3, 2] == [len(entry) for entry in store]
    for rows, entry in zip((1, 3, 2), store, strict=True):
        for name, array in example(rows).arrays.items():
            np.testing.assert_array_equal(entry.arrays[name], array)
            assert entry.arrays[name].shape == array.shape
    assert json.loads((tmp_path / "store" / "store.json").read_text())["arrays"]["boxes"] == {"dtype": "float32", "shape": [4]}
