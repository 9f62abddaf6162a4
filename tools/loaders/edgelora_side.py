"""`edgelora run`'s side of tools/check_loaders: a request as JSON on stdin, what the bundle says as JSON on stdout."""

from __future__ import annotations

import json
import sys
from typing import Any

from edgelora.config import GenerateConfig
from edgelora.run.model import load


def best(found: Any) -> Any:
    return found[0]["label"]


def ranked(found: Any) -> Any:
    return [entry["item"] for entry in found]


def heard(found: Any) -> Any:
    return found["text"] if isinstance(found, dict) else found


# Of each task: the answer in words, from what `edgelora run --json` has.
WORDS: dict[str, Any] = {
    **dict.fromkeys(("text-classification", "image-classification", "audio-classification"), best),
    "zero-shot-image-classification": best,
    **dict.fromkeys(("text-ranking", "sentence-similarity"), ranked),
    "token-classification": lambda found: [[span["text"], span["label"]] for span in found["spans"]],
    **dict.fromkeys(("automatic-speech-recognition", "speech-recognition-ctc"), heard),
    "question-answering": lambda found: found["answer"],
    "text-regression": lambda found: round(found["score"], 2),
    "multi-label-classification": lambda found: sorted(entry["label"] for entry in found if entry["probability"] > 0.5),
    "image-segmentation": lambda found: [found["areas"][0]["label"], round(found["areas"][0]["share"], 2)],
    "object-detection": lambda found: sorted(entry["label"] for entry in found),
}


def row_of(task: str, answered: str, given: str) -> dict[str, Any]:
    """Return the row that an input is; the parts of one that has several are between bars."""
    first, *others = given.split("|")
    if task in ("text-ranking", "sentence-similarity"):
        return {"query": first, "items": others}
    if task == "question-answering":
        return {"question": first, "context": others[0]}
    if task == "zero-shot-image-classification":
        return {"image": first, "labels": others}
    return {answered: given}


def main() -> None:
    request = json.load(sys.stdin)
    model = load(request["bundle"])
    task = request["task"]
    said: list[Any] = []
    limit = GenerateConfig(max_new_tokens=request["new_tokens"])
    for given in request["inputs"]:
        if task == "text-generation":
            answer = model.answer([{"role": "user", "content": given}], max_new_tokens=request["new_tokens"])
            said.append(answer.tokens)
            continue
        (found,) = model.answers([row_of(task, model.answerer.task.answered, given)], config=limit if model.writes else None)
        said.append(WORDS.get(task, str)(found))
    print(json.dumps(said))


main()
