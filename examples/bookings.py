"""Write bookings/: messages to a restaurant for the tasks of encoders. Standard library only, always the same rows.

python examples/bookings.py
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "bookings"
ROWS = 240
NAMES = ("Anna Berg", "Tom", "Mrs Okafor", "Lena Maria Sand", "J. Duarte", "Yuki", "Sam Hill", "Dr Novak")
TIMES = ("7 pm", "half past six", "20:15", "noon", "a quarter to eight", "9 o'clock")
DAYS = ("Friday", "tomorrow", "the 3rd of May", "next Sunday", "tonight", "June 12")
SIZES = ("two", "5", "four people", "a party of nine", "2 adults and a child")
FORMS = (
    "Hello, this is {name}. A table for {size} on {day} at {time}, please.",
    "Can we come {day} at {time}? We are {size}. {name}",
    "{name} here, {size}, {day}, {time}!",
    "I would like to book for {size}, {day} around {time}. The name is {name}.",
    "Please move our table to {day}. Thanks, {name}",
    "Is {time} possible for {size}?",
)
EXTRAS = {
    "vegetarian": "We eat no meat.",
    "outside": "Outside if the weather is good.",
    "wheelchair": "One of us uses a wheelchair.",
    "birthday": "It is a birthday, so a cake would be nice.",
}
QUESTIONS = {"name": "Who is it?", "size": "How many people?", "day": "On which day?", "time": "At what time?"}


def message(draw: random.Random) -> tuple[str, list[dict[str, Any]]]:
    """Return a message and its spans."""
    values = {"name": NAMES, "size": SIZES, "day": DAYS, "time": TIMES}
    text = ""
    spans: list[dict[str, Any]] = []
    for part in draw.choice(FORMS).replace("{", "|{").replace("}", "}|").split("|"):
        slot = part.strip("{}")
        piece = draw.choice(values[slot]) if part.startswith("{") else part
        if part.startswith("{"):
            spans.append({"start": len(text), "end": len(text) + len(piece), "label": slot})
        text += piece
    return text, spans


def make_rows() -> dict[str, list[dict[str, Any]]]:
    """Return the rows of each file."""
    draw = random.Random(0)
    rows: dict[str, list[dict[str, Any]]] = {
        name: [] for name in ("spans", "questions", "labels", "scores", "pairs", "summaries")
    }
    for _ in range(ROWS):
        text, spans = message(draw)
        rows["spans"].append({"text": text, "spans": spans})
        slot = draw.choice(list(QUESTIONS))
        found = [{"text": text[s["start"] : s["end"]], "answer_start": s["start"]} for s in spans if s["label"] == slot]
        rows["questions"].append({"question": QUESTIONS[slot], "context": text, "answers": found})
        extras = draw.sample(list(EXTRAS), draw.randint(0, 2))
        rows["labels"].append({"text": " ".join([text, *(EXTRAS[extra] for extra in extras)]), "labels": extras})
        known = {span["label"]: text[span["start"] : span["end"]] for span in spans}
        said = [f"{slot} {known[slot]}" for slot in QUESTIONS if slot in known] + extras
        rows["summaries"].append({"text": rows["labels"][-1]["text"], "summary": ", ".join(said)})
        rows["scores"].append({"text": text, "score": round(len(spans) / 4, 2)})  # how complete it is
        extra = draw.choice(list(EXTRAS))
        rows["pairs"].append({"query": f"{text} {EXTRAS[extra]}", "item": f"wish: {extra}"})
    rows["candidates"] = make_candidates(rows["labels"])
    return rows


def make_candidates(labelled: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return all wishes as candidates of each message, those that it has relevant."""
    return [
        {"query": row["text"], "item": f"wish: {extra}", "relevance": int(extra in row["labels"])}
        for row in labelled[: ROWS // len(EXTRAS)]
        for extra in EXTRAS
    ]


def make_files() -> dict[Path, str]:
    lines = {name: [json.dumps(row, ensure_ascii=False) for row in rows] for name, rows in make_rows().items()}
    return {FOLDER / f"{name}.jsonl": "\n".join(found) + "\n" for name, found in lines.items()}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for path, text in make_files().items():
        path.write_text(text, encoding="utf-8", newline="\n")
