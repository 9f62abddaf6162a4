"""The rows: E2E pairs as the peer's recipe has them, rows of a given length, and the token ids of a run's steps."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

JOINED_ROWS = 300  # rows made by joining: more than any part trains on
PROMPT_SHARE = 0.45  # of a joined row's tokens; E2E's own rows have about this

Pair = tuple[str, str]


def read_pairs(path: Path) -> list[Pair]:
    """Return (mr, ref) of each row of a CSV file. Raises SystemExit where these columns are missing."""
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = {"mr", "ref"} - set(reader.fieldnames or ())
        if missing:
            raise SystemExit(f"error: {path} has no column {', '.join(sorted(missing))}; a CSV file with mr and ref is wanted")
        return [(row["mr"], row["ref"]) for row in reader]


def write_rows(path: Path, pairs: list[Pair]) -> Path:
    """Write prompt/completion rows as JSONL; the prompt's wording is that of the peer's recipe."""
    lines = [json.dumps({"prompt": f"Describe: {mr}", "completion": ref}, ensure_ascii=False) for mr, ref in pairs]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def natural(pairs: list[Pair], work: Path) -> Path:
    """Return the file of the rows as they are."""
    return write_rows(work / "rows" / "e2e.jsonl", pairs)


def of_length(pairs: list[Pair], tokens: int, tokenizer_folder: Path, work: Path) -> Path:
    """Return a file of rows, each of at least `tokens` tokens and made by joining: cut to length, all are equally long."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))

    def count(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False).ids)

    order = list(pairs)
    random.Random(0).shuffle(order)
    source: Iterator[Pair] = cycle(order)
    joined = []
    for _ in range(JOINED_ROWS):
        prompts, answers = [next(source)[0]], [next(source)[1]]
        asked, answered = count(prompts[0]), count(answers[0])
        while asked < PROMPT_SHARE * tokens - 30:
            prompts.append(next(source)[0])
            asked += count(prompts[-1])
        while asked + answered < 1.05 * tokens:  # joining may merge tokens where pieces meet
            answers.append(next(source)[1])
            answered += count(answers[-1])
        joined.append(("; ".join(prompts), " ".join(answers)))
    return write_rows(work / "rows" / f"joined-{tokens}.jsonl", joined)


def step_rows(run: Path) -> list[list[int]]:
    """Return the row numbers of each step that a run's log names, in order."""
    return [line["rows"] for line in step_log(run)]


def step_log(run: Path) -> list[dict[str, Any]]:
    """Return the log's line of each step: loss, tokens, seconds, rows."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if "rows" in line]


def write_steps(path: Path, run: Path, steps: list[list[int]]) -> Path:
    """Write the token ids and targets of these rows of a run, one line for a step, as tools/peft_baseline.py reads them."""
    from edgelora.data.store import Store

    store = Store.open(run / "data" / "train")
    with path.open("w", encoding="utf-8") as file:
        for rows in steps:
            examples = [store[row].arrays for row in rows]
            names = {"ids": "ids", "supervised": "supervised"}
            file.write(json.dumps({ours: [e[array].tolist() for e in examples] for ours, array in names.items()}) + "\n")
    return path


def random_steps(run: Path, steps: int, batch_size: int, seed: int = 0) -> list[list[int]]:
    """Return row numbers in random order, whatever their lengths: as the peer's users draw them."""
    from edgelora.data.store import Store

    count = len(Store.open(run / "data" / "train"))
    order = random.Random(seed).sample(range(count), min(count, steps * batch_size))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def supervised_tokens(run: Path, steps: list[list[int]]) -> list[int]:
    """Return the targets of each step."""
    from edgelora.data.store import Store

    store = Store.open(run / "data" / "train")
    return [sum(int(store[row].arrays["supervised"].sum()) for row in rows) for rows in steps]
