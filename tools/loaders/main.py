"""What each loader says of the same bundle: greedy tokens of a decoder, answers of the other tasks.

    tools/check_loaders BUNDLE… [--input TEXT_OR_FILE …] [--json FILE]

Each loader runs in a process of its own, is given the bundle's folder and the inputs, and prints JSON: a list of token ids, or
of an answer in words, for each input. Exit code 1 where one of them does not say what `edgelora run` says.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SIDES = Path(__file__).parent
NEW_TOKENS = 24
INPUTS = {
    "text-generation": ("What is the capital of France?", "Name three colours.", "dim the kitchen lights to forty percent"),
    "text2text-generation": ("Where is the station?", "It is raining."),
    "question-answering": ("Who came?|Anna came to the party with a cake.",),
    "text-ranking": ("where is my card?|card arrival|exchange rate|lost or stolen card",),
    "sentence-similarity": ("where is my card?|card arrival|exchange rate|lost or stolen card",),
}
TEXTS = ("the doorbell will not join my wifi", "how do I get my money back?", "Anna met Peter in Paris")
NO_PIPELINE = (  # of transformers.js
    "text-ranking", "text-regression", "multi-label-classification", "sentence-similarity", "speech-recognition-ctc",
)  # fmt: skip
COMMANDS = {
    "edgelora run": [str(ROOT / ".venv/bin/python"), str(SIDES / "edgelora_side.py")],
    "onnxruntime-genai": [str(ROOT / ".venv/bin/python"), str(SIDES / "genai_side.py")],
    "optimum-onnx": [str(ROOT / ".venv-optimum/bin/python"), str(SIDES / "optimum_side.py")],
    "transformers.js": ["node", str(SIDES / "browser_side.mjs"), str(ROOT / ".venv-web")],
}


def ask(loader: str, bundle: Path, task: str, inputs: list[str]) -> tuple[list[Any] | None, str]:
    """Return what a loader said of each input, or None, and in words."""
    if loader == "onnxruntime-genai" and task != "text-generation":
        return None, "for decoders only"
    own = str(json.loads((bundle / "config.json").read_text(encoding="utf-8")).get("model_type")).startswith("edgelora")
    if own and loader in ("optimum-onnx", "transformers.js"):
        return None, "it knows the models of transformers alone"
    if loader == "transformers.js" and task in NO_PIPELINE:
        return None, "it has no pipeline for this task"
    request = json.dumps({"bundle": str(bundle), "task": task, "inputs": inputs, "new_tokens": NEW_TOKENS})
    environment = {**os.environ, "PYTHONPATH": str(ROOT)} if "edgelora_side" in COMMANDS[loader][1] else {**os.environ}
    try:
        done = subprocess.run(
            COMMANDS[loader], input=request, capture_output=True, text=True, timeout=1800, check=False, env=environment
        )
    except FileNotFoundError as error:
        return None, f"not here: {error.filename}"
    try:
        said: list[Any] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
        return None, f"failed: {lines[-1][:200]}"
    return said, ""


def check(bundle: Path, inputs: list[str]) -> list[dict[str, Any]]:
    """Return a row for each loader and input."""
    task = str(json.loads((bundle / "edgelora.json").read_text(encoding="utf-8"))["task"])
    inputs = inputs or list(INPUTS.get(task, TEXTS))
    wanted: list[Any] | None = None
    rows = []
    for loader in COMMANDS:
        said, note = ask(loader, bundle, task, inputs)
        wanted = said if loader == "edgelora run" else wanted
        for place, given in enumerate(inputs):
            row: dict[str, Any] = {"bundle": bundle.name, "loader": loader, "input": given[:40]}
            if said is None:
                rows.append({**row, "said": note, "same": None})
                break
            same = None if wanted is None else said[place] == wanted[place]
            rows.append({**row, "said": shown(said[place]), "same": same})
    return rows


def shown(said: Any) -> str:
    text = " ".join(map(str, said)) if isinstance(said, list) else str(said)
    return text if len(text) < 70 else f"{text[:67]}…"


def main() -> int:
    sys.path.insert(0, str(ROOT))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path, nargs="+", metavar="BUNDLE")
    parser.add_argument(
        "--input",
        action="append",
        default=[],
        help="text, or file (a sound of the model's rate); default: some texts of the task",
    )
    parser.add_argument("--json", type=Path, help="write the rows here too")
    options = parser.parse_args()
    from edgelora import console

    rows = [row for bundle in options.bundles for row in check(bundle.resolve(), options.input)]
    marks = {True: "yes", False: "NO", None: "–"}
    console.table("The same bundle in each loader", [{**row, "same": marks[row["same"]]} for row in rows])
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2, ensure_ascii=False), encoding="utf-8")
    failed = any(row["same"] is False or (row["same"] is None and "failed" in row["said"]) for row in rows)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
