"""Parallel text: a small T5 is trained here on one part of it and adapted to the other."""

from __future__ import annotations

from pathlib import Path

from training_bench.processes import ROOT, python, run

from tasks_bench.entry import Missing, Places, Prepared, new_folder, split
from tasks_bench.texts import Row, prepared, read_e2e, write_jsonl

PRETRAIN = ROOT / "tools" / "pretrain_texts.py"


def pretrained(places: Places, name: str, rows: list[Row], minutes: float) -> Path:
    """Return a T5 trained here from scratch on these rows, for so many minutes; made once."""
    out = places.work / "models" / name
    if not (out / "model.safetensors").is_file():
        write_jsonl(new_folder(out) / "pretraining.jsonl", rows)
        made = run(python(str(PRETRAIN), str(out / "pretraining.jsonl"), str(out), "--minutes", str(minutes)))
        if not made.done:
            raise Missing(f"tools/pretrain_texts.py failed: {made.message}")
    return out


def meanings(places: Places) -> Prepared:
    """E2E's meanings → sentences: those without `near[…]` are for pretraining, those with it for the adapter."""
    minutes = 4.0
    rows = [{"source": row["mr"], "target": row["ref"]} for row in read_e2e(places)]
    near = [row for row in rows if "near[" in row["source"]]
    model = pretrained(places, "t5-meanings", [row for row in rows if "near[" not in row["source"]], minutes)
    groups: dict[str, list[Row]] = {}
    for row in near:
        groups.setdefault(row["source"], []).append(row)
    parts = split(list(groups.values()), test=60, valid=20, train=-1)
    found = {name: [row for group in part for row in group] for name, part in parts.items()}
    found["train"] = split(found["train"], train=1600)["train"]
    note = f"pretrained here for {minutes:g} min on meanings without `near`, adapted to those with it"
    return prepared(str(model), places.work / "rows" / "meanings", found, note=note)
