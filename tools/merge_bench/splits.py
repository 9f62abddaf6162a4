"""The rows: train, valid and test of the E2E challenge and of Banking77, and the token ids of test rows.

E2E has several answers to one meaning: all of them go to one side, so that held-out rows ask what training never asked.
The split depends on the file alone, not on how many rows are scored.
"""

from __future__ import annotations

import csv
import json
import random
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

from training_bench.rows import read_pairs

VALID_SHARE, TEST_SHARE = 0.05, 0.1
BANKING_TEST_SHARE = 0.2  # 2,000 rows: half a point is ten of them

Row = dict[str, str]
Splits = dict[str, list[Row]]


def e2e(csv_file: Path, work: Path) -> Path:
    """Return the folder with train, valid and test.jsonl of E2E rows; the wording is that of tools/peft_baseline.py."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for mr, ref in read_pairs(csv_file):
        groups[mr].append({"prompt": f"Describe: {mr}", "completion": ref})
    return write(work / "rows" / "merge-e2e", split(list(groups.values()), TEST_SHARE))


def banking(csv_file: Path, work: Path) -> Path:
    """Return the folder with train, valid and test.jsonl of Banking77; each label gives its share of each."""
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    with csv_file.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            groups[row["category"], row["text"]].append({"text": row["text"], "label": row["category"]})
    by_label: dict[str, list[list[Row]]] = defaultdict(list)
    for (label, _), group in groups.items():
        by_label[label].append(group)
    parts = [split(found, BANKING_TEST_SHARE) for _, found in sorted(by_label.items())]
    return write(
        work / "rows" / "merge-banking",
        {name: shuffled([row for part in parts for row in part[name]]) for name in ("train", "valid", "test")},
    )


def split(groups: list[list[Row]], test_share: float) -> Splits:
    """Share out groups of rows that belong together: test, then valid, the rest train, each at least one group."""
    order = shuffled(groups)
    total = sum(map(len, order))
    found: Splits = {"train": [], "valid": [], "test": []}
    for group in order:
        wanting = (n for n, share in (("test", test_share), ("valid", VALID_SHARE)) if len(found[n]) < max(1, share * total))
        found[next(wanting, "train")] += group
    return {name: shuffled(rows) for name, rows in found.items()}


def shuffled(items: list[Any]) -> list[Any]:
    return random.Random(0).sample(items, len(items))


def write(folder: Path, splits: Splits) -> Path:
    """Write the rows of each split as JSONL, whole or not at all."""
    made = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)
    for name, rows in splits.items():
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        (made / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    made.rename(folder)
    return folder


def first_rows(path: Path, count: int, out: Path) -> Path:
    """Write the first `count` rows of a file (all, where it has fewer) to another."""
    lines = path.read_text(encoding="utf-8").splitlines()[:count]
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return out


def write_ids(rows: Path, model: Path, out: Path) -> Path:
    """Encode prompt/completion rows as training does, one line of ids and targets for each."""
    from edgelora.tasks import get_task
    from edgelora.tokenizer import Tokenizer

    task, tokenizer = get_task("text-generation"), Tokenizer.from_folder(model)
    with rows.open(encoding="utf-8") as file, out.open("w", encoding="utf-8") as written:
        for line in file:
            arrays = task.encode(task.normalize(json.loads(line)), tokenizer, []).arrays
            written.write(json.dumps({name: arrays[name].tolist() for name in ("ids", "supervised")}) + "\n")
    return out
