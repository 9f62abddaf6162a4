"""Answers of a bundle with and without drafts, greedy, on the same prompts in turn: tokens/s, and whether they differ.

    tools/bench_drafts BUNDLE [ROWS.jsonl] [--summarize FILE] [--prompts 20] [--new-tokens 96] [--json FILE]

ROWS are a task's (`prompt`; the bundle's own turns), FILE is a text whose passages are put after "Summarize this text: ".
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from pathlib import Path
from typing import Any

import edgelora
from edgelora import console
from edgelora.data.read import iterate_file
from edgelora.run.model import Model

PASSAGE = 1200  # characters


def prompts(arguments: argparse.Namespace) -> dict[str, list[str]]:
    found = {}
    if arguments.rows is not None:
        rows = iterate_file(arguments.rows, lambda *_: None)
        found[arguments.rows.name] = [str(row[arguments.column]) for _, row in itertools.islice(rows, arguments.prompts)]
    if arguments.summarize is not None:
        text = arguments.summarize.read_text(encoding="utf-8")
        passages = [text[start : start + PASSAGE] for start in range(0, len(text) - PASSAGE + 1, PASSAGE)]
        found["summarize"] = [f"Summarize this text: {passage}" for passage in passages[: arguments.prompts]]
    return found


def measure(model: Model, given: list[str], new_tokens: int) -> dict[str, Any]:
    """Return the figures of some prompts; a first answer warms up."""
    speeds: dict[bool, list[float]] = {False: [], True: []}
    same = tokens = accepted = 0
    model.answer(given[0], max_new_tokens=8)
    for prompt in given:
        answers = {drafts: model.answer(prompt, max_new_tokens=new_tokens, speculate=drafts) for drafts in (False, True)}
        same += answers[False].tokens == answers[True].tokens
        tokens += len(answers[False].tokens)
        accepted += answers[True].drafts.accepted if answers[True].drafts is not None else 0
        for drafts, answer in answers.items():
            speeds[drafts].append(len(answer.tokens) / max(answer.decode_s, 1e-9))
    plain, drafted = (statistics.median(speeds[drafts]) for drafts in (False, True))
    gains = [b / a for a, b in zip(speeds[False], speeds[True], strict=True)]
    return {
        "prompts": len(given), "tokens": tokens, "tokens/s without": round(plain, 1), "with": round(drafted, 1),
        "speed-up, median": round(statistics.median(gains), 2), "best": round(max(gains), 2), "worst": round(min(gains), 2),
        "drafted, %": round(100 * accepted / max(1, tokens), 1), "same answers": f"{same} of {len(given)}",
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser("bench_drafts", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("rows", type=Path, nargs="?")
    parser.add_argument("--column", default="prompt", help="of the rows; default: prompt")
    parser.add_argument("--summarize", type=Path, metavar="FILE")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    given = prompts(arguments)
    if not given:
        parser.error("rows, or --summarize FILE, are wanted")
    model = edgelora.load(arguments.bundle)
    rows = [{"prompts of": name, **measure(model, texts, arguments.new_tokens)} for name, texts in given.items()]
    console.table(f"{arguments.bundle.name}, run by {'EdgeLoRA' if model.runs_native else 'ONNX Runtime'}", rows)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
