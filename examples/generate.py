#!/usr/bin/env python3
"""Write the example rows from their templates: deterministic, standard library only.

    python examples/generate.py            # every folder here that has a templates.toml
    python examples/generate.py --check    # exit code 1 if the committed rows are not what the templates give

A template is a sentence with `{slots}` and `[one|of|these]`; `{minutes:long}` fills the argument `minutes` from the slot
`long`. Each belongs to one split, so that no sentence of test.jsonl or valid.jsonl has the form of a training sentence: what is
measured is understanding of new wording, not memory of old.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import tomllib
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SPLITS = ("train", "valid", "test")
UNITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen"]
UNITS += ["fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]


def number_words(number: int) -> str:
    """Return 0 to 100 as it is spoken: "thirty five"."""
    if number == 100:
        return "a hundred"
    if number < 20:
        return UNITS[number]
    tens, unit = divmod(number, 10)
    return " ".join([TENS[tens - 2], *([UNITS[unit]] if unit else [])])


def slot_choices(slot: Any) -> list[tuple[str, Any]]:
    """Return what can be said for a slot, each with its value: from a list, a {spoken: value} table or a range of numbers."""
    if isinstance(slot, list):
        return [(value, value) for value in slot]
    if "from" in slot:
        numbers = range(slot["from"], slot["to"] + 1, slot.get("step", 1))
        spoken = [(number_words(n), n) for n in numbers] * 3 + [(str(n), n) for n in numbers]
        return [(form.format(text), n) for text, n in spoken for form in slot.get("forms", ["{}"])]
    return list(slot.items())


def say(template: str, slots: dict[str, Any], chance: random.Random) -> tuple[str, dict[str, Any]]:
    """Fill one template; return the sentence and the values of its slots."""
    text = re.sub(r"\[([^\]]*)\]", lambda match: chance.choice(match[1].split("|")), template)
    values = {}
    for slot, name, source in re.findall(r"(\{(\w+)(?::(\w+))?\})", text):
        spoken, values[name] = chance.choice(slot_choices(slots[source or name]))
        text = text.replace(slot, spoken)
    return " ".join(text.split()), values


def make_row(command: dict[str, Any], recipe: dict[str, Any], split: str, chance: random.Random) -> dict[str, str]:
    """Return one row: a sentence with its label, or with the JSON call that it stands for."""
    text, values = say(chance.choice(command[split]), recipe.get("slots", {}), chance)
    around = recipe["around"] | command.get("around", {})
    text = " ".join(f"{chance.choice(around['before'])} {text} {chance.choice(around['after'])}".split())
    if "label" in command:
        return {"text": text, "label": command["label"]}
    values |= command.get("fixed", {})
    call = {"tool": command["tool"], **{name: values[name] for name in command["args"]}}
    return {"prompt": text, "completion": json.dumps(call)}


def make_split(recipe: dict[str, Any], split: str, seen: set[str]) -> list[dict[str, str]]:
    """Return the rows of a split: the commands in turn by their share, no sentence twice; `seen` grows."""
    chance = random.Random(f"{recipe['seed']} {split}")
    commands = [command for command in recipe["command"] for _ in range(command.get("share", 1))]
    rows: list[dict[str, str]] = []
    while len(rows) < recipe["rows"][split]:
        row = make_row(commands[len(rows) % len(commands)], recipe, split, chance)
        sentence = next(iter(row.values()))
        if sentence not in seen:
            seen.add(sentence)
            rows.append(row)
    chance.shuffle(rows)
    return rows


def make_files(folder: Path) -> dict[Path, str]:
    """Return the text of train.jsonl, valid.jsonl and test.jsonl as the folder's templates.toml gives them."""
    recipe = tomllib.loads((folder / "templates.toml").read_text(encoding="utf-8"))
    seen: set[str] = set()
    files = {}
    for split in SPLITS:
        lines = [json.dumps(row, ensure_ascii=False) for row in make_split(recipe, split, seen)]
        files[folder / f"{split}.jsonl"] = "\n".join(lines) + "\n"
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    check = parser.parse_args().check
    stale = []
    for recipe in sorted(HERE.glob("*/templates.toml")):
        for path, text in make_files(recipe.parent).items():
            if check and path.read_text(encoding="utf-8") != text:
                stale.append(str(path))
            elif not check:
                path.write_text(text, encoding="utf-8", newline="\n")
    if stale:
        raise SystemExit("not what the templates give: " + ", ".join(stale))


if __name__ == "__main__":
    main()
